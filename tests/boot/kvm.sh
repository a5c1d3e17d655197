#!/bin/bash
# The KVM engine: boots, disks, moves between engines, sys programs, what engines owe to debuggers and migration
# (tests/kvm/inside.sh), and gdb. Where this host's /dev/kvm is real all of it runs there; else in a machine of QEMU's
# that models SVM, and what can run on a /dev/kvm that is an emulator runs on that, too. What such processors do
# otherwise than the manuals is in sys/tcg-differs.txt, kvm/nested-differs.txt and kvm/host-differs.txt.
. "$(dirname "$0")/../lib/tap.sh"
. "$(dirname "$0")/../lib/nested.sh"
. "$(dirname "$0")/../lib/symbols.sh"
build=${BUILD:-$top/build}
export DOPPEL_GUEST=${DOPPEL_GUEST:-$build/guest}
here=$(cd "$(dirname "$0")" && pwd)

# TAP lines without numbers on standard input; "sys: " and "engine: " checks that fail are compared with lists of names.
report()                                            # list of known differences...
{
    local line name entry differs
    while IFS= read -r line; do
        case $line in
            'ok '*) ok "${line#ok }" ;;
            'not ok sys: '* | 'not ok engine: '*)
                name=${line#not ok } name=${name#sys: } differs=
                while IFS= read -r entry; do
                    case $entry in '#'* | '') ;; *) [ "${name#"$entry"}" = "$name" ] || differs=1 ;; esac
                done < <(cat "$@" /dev/null)
                if [ -n "$differs" ]; then echo "# known to differ: $name"; else not_ok "$name"; fi ;;
            'not ok '*) not_ok "${line#not ok }" ;;
            '#'*) echo "$line" ;;
        esac
    done
}
sys_on_host()                                       # seconds for each
{
    local image
    for image in "$build"/sys/*.bin; do
        timeout -k 5 "$(($1 * 3))" "$build/sys/sys_runner" --engine kvm --timeout "$1" "$image" 2>&1 |
            sed -n 's/^\(not ok\|ok\) [0-9]* - /\1 sys: /p'
    done
    timeout -k 5 200 "$build/kvm/engine_test" --engine kvm 2>&1 | sed -n 's/^\(not ok\|ok\) [0-9]* - /\1 engine: /p'
}
debug()                                             # file with symbols; commands on standard input; $said
{
    { printf 'set pagination off\nset confirm off\nset width 0\nset remotetimeout 30\nset style enabled off\n'; cat; } >"$tmp/commands"
    said=$(timeout -k 5 "${GDB_SECONDS:-120}" gdb -q -nx -batch -x "$tmp/commands" "$1" 2>&1)
}
says() { if [[ $said =~ $2 ]]; then ok "$1"; else not_ok "$1" "gdb said:" "$said" "wanted: $2"; fi; }

# The first of three parts of a bzImage that boot protocols know: the kernel itself, an ELF file with a PVH entry.
unpack_kernel()                                     # bzImage, out
{
    local sectors offset length
    sectors=$(od -An -tu1 -j $((0x1f1)) -N1 "$1") offset=$(od -An -tu4 -j $((0x248)) -N4 "$1")
    length=$(od -An -tu4 -j $((0x24c)) -N4 "$1")
    tail -c +$(((sectors + 1) * 512 + offset + 1)) "$1" | head -c $((length)) | lz4 -dc >"$2" 2>/dev/null
    [ "$(head -c 4 "$2" | tail -c 3)" = ELF ]
}

# A Debian kernel on a /dev/kvm of any kind: even one that emulates gets to start_kernel in seconds, without a decompressor.
gdb_start_kernel()
{
    local sock=$tmp/gdb pid
    rm -f "$sock"
    timeout -k 5 150 "$DOPPEL" run --engine kvm --kernel "$tmp/vmlinux" --cpus 2 --console none --append nokaslr \
        --gdb "unix:$sock,wait" >"$tmp/gdb-out" 2>&1 </dev/null &
    pid=$!
    for _ in $(seq 100); do [ -S "$sock" ] && break; sleep 0.1; done
    debug "$tmp/symbols" <<END
target remote $sock
break start_kernel
continue
bt 2
x/i \$pc
p \$efer
stepi
echo step:\n
x/i \$pc
info threads
END
    kill -QUIT "$pid" 2>/dev/null
    wait "$pid"
    says "gdb: the kernel stops at start_kernel" 'hit Breakpoint 1, 0x[0-9a-f]+ in start_kernel'
    says "gdb: a backtrace with symbols" '#0 .* start_kernel \(\).#1 .* secondary_startup_64_no_verify'
    says "gdb: instructions, in 64-bit mode" '<start_kernel>:.call +0x[0-9a-f]+ <__fentry__>'
    says "gdb: EFER" '\[ SCE LME LMA NXE \]'
    says "gdb: a step" 'step:.=> 0x[0-9a-f]+ <__fentry__>'
    says "gdb: two processors are two threads" '1 +Thread 1 \(vCPU 0.* 2 +Thread 2 \(vCPU 1, '
}

# The same gdb and a guest inside QEMU, by a serial line: QEMU 7.2 has no breakpoints for a guest's guest (nested-differs.txt), all else is there.
gdb_nested_once()
{
    local line=$tmp/serial pid
    rm -f "$line"
    cat >"$tmp/nested/root/gdb.sh" <<'END'
ip link set lo up
stty -F /dev/ttyS1 raw -echo
doppel run --engine kvm --gdb 1234 --cpus 2 --quiet --append nokaslr -- sh -c 'echo up; sleep 10; echo over' >out 2>&1 &
doppel=$!
for n in $(seq 60); do grep -q up out && break; sleep 1; done
echo "[gdb ready]"
nc 127.0.0.1 1234 </dev/ttyS1 >/dev/ttyS1 &
wait $doppel; echo "status $?"; cat out
END
    NESTED_ARGS="-serial unix:$line,server=on,wait=off" nested_run "$tmp/nested" 240 "timeout 200 sh /gdb.sh" >"$tmp/gdb-out" &
    pid=$!
    for _ in $(seq 150); do grep -q 'gdb ready' "$tmp/nested/log" 2>/dev/null && break; sleep 1; done
    debug "$tmp/symbols" <<END
target remote $line
info threads
p \$efer
x/s (char*)&linux_banner
p *(int*)&nr_cpu_ids
set \$r15 = 0x1234567890abcdef
p/x \$r15
stepi
echo stepped:\n
info symbol \$pc
stepi
stepi
thread 2
info symbol \$pc
detach
END
    wait "$pid"
}
gdb_nested()
{
    gdb_nested_once
    grep -q '^status ' "$tmp/gdb-out" || gdb_nested_once    # it has hung (lib/nested.sh)
    says "gdb inside: two processors are two threads, in the kernel" '1 +Thread 1 \(vCPU 0.*ring 0.* 2 +Thread 2 \(vCPU 1, .*ring 0'
    says "gdb inside: EFER" '\[ SCE LME LMA NXE SVME? ?\]|\[ SCE LME LMA NXE'
    says "gdb inside: memory by virtual address" 'Linux version 6'
    says "gdb inside: a variable of the kernel's" '\$[0-9]+ = 2'
    says "gdb inside: steps, in the kernel's code" 'stepped:.[a-zA-Z_0-9]+( \+ [0-9]+)? in section'
    said=$(cat "$tmp/gdb-out")
    says "gdb inside: the guest goes on afterwards, and ends as it should" 'status 0.*over'
}

if "$DOPPEL" doctor 2>/dev/null | grep -q 'kvm  *real'; then
    export REFUSE=$build/hostile/kvm_refuse.so ONCE=$build/hostile/once.elf PEER=$build/boot/netpeer
    export DOPPEL SWITCH=$build/kvm/switch ENGINE_TEST=$build/kvm/engine_test SYS_RUNNER=$build/sys/sys_runner SYS_IMAGES=$build/sys
    (cd "$tmp" && timeout -k 10 600 bash "$top/tests/kvm/inside.sh") >"$tmp/result" 2>&1
    is "all of it ran" $? 0
    report <"$tmp/result"
    GDB_ENGINE=kvm bash "$here/gdb.sh" 2>&1 | sed 's/^\(not ok\|ok\) [0-9]* - /\1 gdb: /' >"$tmp/result"
    report <"$tmp/result"
    done_testing
fi

# Symbols come from the same kernel on the interpreter.
doppel run --engine interp --append nokaslr -- cat /proc/kallsyms
symbols_make "$tmp/out" "$tmp/symbols"

if [ ! -e /dev/kvm ]; then
    skip "sys programs on the host's /dev/kvm" "there is none"
elif [ ! -w /dev/kvm ]; then
    skip "sys programs on the host's /dev/kvm" "no permission to use it"
else
    echo "# on the host's /dev/kvm, which emulates"
    sys_on_host 20 >"$tmp/result"
    report "$top/tests/kvm/host-differs.txt" <"$tmp/result"
    if unpack_kernel "$DOPPEL_GUEST/vmlinuz" "$tmp/vmlinux"; then
        gdb_start_kernel
    else
        not_ok "the default guest's kernel can be unpacked"
    fi
fi

if nested_build "$tmp/nested" 2>"$tmp/err"; then
    echo "# inside QEMU"
    for program in kvm/switch kvm/engine_test sys/sys_runner; do nested_add "$tmp/nested" "$build/$program" "/bin/${program#*/}"; done
    mkdir "$tmp/nested/root/sysbin"
    cp "$build"/sys/*.bin "$tmp/nested/root/sysbin/"
    rm -f "$tmp/nested/root/sysbin/debug32.bin"             # QEMU 7.2 itself dies of its breakpoints: nested-differs.txt
    rm -f "$tmp/nested/root/sysbin/xmc64.bin"               # TCG 7.2 goes on with code that another processor has changed (as smp64, for longer)
    cp "$top/tests/kvm/inside.sh" "$build/hostile/once.elf" "$build/hostile/kvm_refuse.so" "$build/boot/netpeer" "$tmp/nested/root/"
    # QEMU's processors are slow: the interpreter inside needs a tenth of a second for what takes this host two milliseconds.
    nested_steps "$tmp/nested" 1800 "export REFUSE=/kvm_refuse.so ONCE=/once.elf PEER=/netpeer DOPPEL=/bin/doppel SWITCH=/bin/switch ENGINE_TEST=/bin/engine_test \
        SYS_RUNNER=/bin/sys_runner SYS_IMAGES=/sysbin STEP_SHORT=500 STEP_LONG=3000 SYS_SECONDS=20; sh /inside.sh" >"$tmp/result"
    report "$top/tests/sys/tcg-differs.txt" "$top/tests/kvm/nested-differs.txt" <"$tmp/result"
    is "inside QEMU: all of it ran" "$nested_status" 0
    gdb_nested
else
    not_ok "a machine of QEMU's can be made" "$(tail -n 1 "$tmp/err")"
fi
done_testing
