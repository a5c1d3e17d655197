# For test scripts, sourced after tap.sh: a machine with real KVM on any host. QEMU's TCG models a processor with AMD's SVM;
# a Debian kernel with kvm-amd runs there, and doppel as a program in it.
#
#   nested_build DIR                 kernel, modules, busybox, doppel, its libraries, the default guest as /guest
#   nested_add DIR FILE PATH         one more file for the machine, with the libraries that it needs
#   nested_run DIR SECONDS COMMAND   runs COMMAND by sh there, 2 processors; its output, standard output and error
#                                    together, is ours; status in $nested_status: empty if the machine did not end
#   nested_steps DIR SECONDS COMMAND the same for a COMMAND in steps, so many SECONDS for each machine
#
# QEMU's machine may hang: TCG 7.2 sometimes goes on with code that another processor has changed, the kernel's, too
# (kvm/hold.c prevents most of that), and no time limit inside ends it. One that gives no sign of life is ended. A long COMMAND prints
# "[step NAME]" before each of its steps, and begins with the one that $FROM names, if any: nested_steps makes a new
# machine for the step that the last one did not get past (without steps, for all of it). Twice the same is too often.
#
# Packages come from guest/build's cache.
nested_build()                                      # folder
{
    local dir=$1 cache=${XDG_CACHE_HOME:-$HOME/.cache}/doppel/packages module file
    mkdir -p "$dir/debs" "$dir/root"/{bin,dev,proc,sys,tmp,guest,lib/modules}
    "$top/guest/build" --quiet --kernel standard "${BUILD:-$top/build}/guest-standard" || return
    for module in standard busybox; do dpkg -x "$cache/$module.deb" "$dir/debs" || return; done
    cp "$dir"/debs/boot/vmlinuz-* "$dir/vmlinuz"
    cp "$dir/debs/bin/busybox" "$dir/root/bin/busybox"
    for module in irqbypass ccp kvm kvm-amd; do
        file=$(find "$dir/debs" -name "$module.ko*" | head -n 1)
        [ -z "$file" ] || cp "$file" "$dir/root/lib/modules/"
    done
    cp "${DOPPEL_GUEST:-${BUILD:-$top/build}/guest}"/{vmlinuz,initrd,cmdline,manifest} "$dir/root/guest/"
    nested_add "$dir" "$DOPPEL" /bin/doppel
    nested_add "$dir" "${BUILD:-$top/build}/kvm/hold" /bin/hold
    cat >"$dir/root/init" <<'INIT'
#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin DOPPEL_GUEST=/guest HOME=/tmp TERM=dumb
mount -t proc proc /proc; mount -t sysfs sysfs /sys; mount -t devtmpfs dev /dev; mount -t tmpfs tmp /tmp
for m in irqbypass ccp kvm kvm-amd; do
    f=$(ls /lib/modules/$m.ko* 2>/dev/null) && insmod $f
done
cd /tmp
hold >/tmp/held 2>&1 &
until [ -s /tmp/held ]; do usleep 10000; done
while sleep 5; do echo "[alive]"; done &
echo "[begin]"
setsid sh /command </dev/null 2>&1
echo "[end $?]"
poweroff -f
INIT
    chmod 755 "$dir/root/init"
}

nested_add()                                        # folder, file, path
{
    local lib
    mkdir -p "$1/root$(dirname "$3")"
    cp "$2" "$1/root$3"
    ldd "$2" 2>/dev/null | grep -o '/[^ ]*' | while read -r lib; do
        mkdir -p "$1/root$(dirname "$lib")"
        [ -e "$1/root$lib" ] || cp -L "$lib" "$1/root$lib"
    done
}

nested_run()                                        # folder, seconds, command
{
    local qemu
    printf '%s\n' "$3" >"$1/root/command"
    (cd "$1/root" && find . | "$1/debs/bin/busybox" cpio -o -H newc -R 0:0 2>/dev/null) >"$1/initrd"
    : >"$1/log"                                     # of now: the last machine's may be old, or there may be none
    timeout -k 10 "$2" qemu-system-x86_64 -accel tcg,thread=multi -machine q35 -cpu "${NESTED_CPU:-EPYC-v1,+svm}" -smp 2 \
        -m 3072 -nodefaults -display none -no-reboot -serial stdio -kernel "$1/vmlinuz" -initrd "$1/initrd" \
        -append "console=ttyS0 quiet loglevel=1 panic=-1 cryptomgr.notests=1" ${NESTED_ARGS:-} </dev/null >"$1/log" 2>&1 &
    qemu=$!
    while kill -0 "$qemu" 2>/dev/null; do
        [ $(($(date +%s) - $(stat -c %Y "$1/log"))) -le 100 ] || kill "$qemu" 2>/dev/null
        sleep 0.5
    done
    wait "$qemu"
    nested_said "$1/log" | sed -n '/^\[begin\]$/,/^\[end [0-9]*\]$/p' | sed '1d;/^\[end [0-9]*\]$/d'
    nested_status=$(nested_said "$1/log" | sed -n 's/^\[end \([0-9]*\)\]$/\1/p')
}
nested_said() { tr -d '\r\0' <"$1" | sed -z 's/\[alive\]\n//g'; }

nested_steps()                                      # folder, seconds, command
{
    local from='' tried=- step
    for (( ; ; )); do
        nested_run "$1" "$2" "export FROM='$from'; $3" >"$1/steps"
        [ -z "$nested_status" ] || break
        step=$(sed -n 's/^\[step \(.*\)\]$/\1/p' "$1/steps" | tail -n 1)
        sed -n "/^\[step $step\]\$/q;p" "$1/steps" | sed '/^\[step /d'
        echo "# QEMU's machine did not get past the step \"$step\"; its last line: $(tail -n 1 "$1/steps")"
        [ "$step" != "$tried" ] || return
        from=$step tried=$step
    done
    sed '/^\[step /d' "$1/steps"
}
