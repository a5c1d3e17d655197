#!/bin/bash
# Guests of other kinds, from Debian's packages: memtest86+ to its banner and through tests, the i386 kernels (by bzImage) to a
# shell of an i386 busybox, Debian's installer to its first menu, SeaBIOS with GRUB's rescue
# image. Packages are kept beside the guest's (guest/build says where) and fetched once, by apt as an ordinary user.
. "$(dirname "$0")/../lib/tap.sh"
cache=${XDG_CACHE_HOME:-$HOME/.cache}/doppel/packages
mkdir -p "$cache"
run=(run --engine "$ENGINE" --quiet)
exec 9>"$cache/foreign.lock"
flock 9

# apt with lists of its own for the architecture i386, so that the system's are not changed.
i386=(-qq -o APT::Sandbox::User= -o Debug::NoLocking=true -o "Dir::State=$tmp/apt" -o "Dir::State::status=$tmp/apt/status"
      -o "Dir::State::lists=$tmp/apt/lists" -o "Dir::Cache=$tmp/apt/cache" -o APT::Architecture=i386 -o APT::Architectures=i386)
i386_lists()
{
    [ -e "$tmp/apt/done" ] && return
    mkdir -p "$tmp/apt/lists/partial" "$tmp/apt/cache/archives/partial"
    : >"$tmp/apt/status"
    apt-get "${i386[@]}" update >&2                 # of several sources one may be out of order
    : >"$tmp/apt/done"
}
fetch()                                             # file, package, apt options...
{
    local file=$1 package=$2
    shift 2
    [ -e "$cache/$file" ] && return
    rm -rf "$tmp/fetch"; mkdir "$tmp/fetch"
    (cd "$tmp/fetch" && apt-get -qq -o APT::Sandbox::User= -o Debug::NoLocking=true "$@" download "$package" >&2) &&
        mv "$tmp"/fetch/*.deb "$cache/$file"
}
fetch_i386()                                        # file, package or meta package
{
    local real
    [ -e "$cache/$1" ] && return
    i386_lists || return
    real=$(apt-cache "${i386[@]}" show --no-all-versions "$2" | sed -n 's/^Depends:.*\(linux-image-[0-9][^ ,]*\).*/\1/p' | head -n 1)
    fetch "$1" "${real:-$2}" "${i386[@]}"
}
unpack() { rm -rf "$tmp/$2"; mkdir "$tmp/$2"; dpkg -x "$cache/$1" "$tmp/$2"; }

# Runs until the output holds the pattern, or for so many seconds; leaves $out.
until_output()                                      # seconds, pattern, arguments...
{
    local seconds=$1 pattern=$2 job
    shift 2
    : >"$tmp/out"
    "$DOPPEL" "$@" <"$tmp/in" >"$tmp/out" 2>&1 &
    job=$!
    for ((i = 0; i < seconds * 2; i++)); do
        sed 's/\x1b\[[0-9;?]*[A-Za-z]//g' "$tmp/out" | tr -d '\0' | grep -qaE "$pattern" && break
        kill -0 $job 2>/dev/null || break
        sleep 0.5
    done
    { kill -KILL $job; wait $job; } 2>/dev/null
    out=$(sed 's/\x1b\[[0-9;?]*[A-Za-z]//g' "$tmp/out" | tr -d '\0\r')
}
: >"$tmp/in"

# --- memtest86+ ---
if fetch memtest.deb memtest86+ && unpack memtest.deb memtest; then
    for kind in x64 ia32; do
        until_output 120 'Moving inversions' "${run[@]}" --memory 64M --kernel "$tmp/memtest/boot/memtest86+$kind.bin" --append console=ttyS0,115200
        like "memtest86+ $kind: banner" "$out" 'Memtest86\+|6\.10\.unknown'
        like "memtest86+ $kind: through its address tests" "$out" 'Moving inversions'
        like "memtest86+ $kind: no errors" "$out" 'Errors: +0'
    done
else
    not_ok "memtest86+: package"
fi

# --- i386 kernels ---
fetch_i386 busybox-i386.deb busybox-static && unpack busybox-i386.deb bb || not_ok "busybox for i386: package"
mkdir -p "$tmp/rd"/{bin,dev,proc}
cp "$tmp/bb/bin/busybox" "$tmp/rd/bin/"
cat >"$tmp/rd/init" <<'I'
#!/bin/busybox sh
/bin/busybox mount -t devtmpfs none /dev
exec </dev/console >/dev/console 2>&1
/bin/busybox mount -t proc none /proc
echo "shell: $(/bin/busybox uname -m) $(/bin/busybox grep -c ^processor /proc/cpuinfo) $((6 * 7))"
/bin/busybox poweroff -f
I
chmod 755 "$tmp/rd/init"
(cd "$tmp/rd" && find . | "$tmp/bb/bin/busybox" cpio -o -H newc 2>/dev/null) >"$tmp/rd.cpio"
for kind in 686 686-pae; do
    if fetch_i386 linux-$kind.deb linux-image-$kind && unpack linux-$kind.deb "linux-$kind"; then
        for n in 1 2; do
            [ $kind = 686 ] && [ $n = 2 ] && continue            # that kernel is for one processor
            doppel "${run[@]}" --cpus $n --kernel "$tmp/linux-$kind"/boot/vmlinuz-* --initrd "$tmp/rd.cpio" \
                --append "console=ttyS0 quiet panic=-1" --no-reboot </dev/null
            like "linux $kind, $n vCPU: a shell" "${out//$'\r'/}" "shell: i686 $n 42"
            is "linux $kind, $n vCPU: powers off" "$status" 0
        done
    else
        not_ok "linux $kind: package"
    fi
done

# --- Debian's installer ---
if fetch installer.deb debian-installer-12-netboot-amd64 && unpack installer.deb installer; then
    dir=$tmp/installer/usr/lib/debian-installer/images/12/amd64/text/debian-installer/amd64
    until_output 400 'Select a language|Choose the language|Language:' "${run[@]}" --memory 1G --kernel "$dir/linux" --initrd "$dir/initrd.gz" \
        --append "console=ttyS0 TERM=vt102 DEBIAN_FRONTEND=text priority=high"
    like "Debian's installer: its first menu" "$out" 'Select a language|Choose the language|Language:'
    rm -rf "$tmp/installer"
else
    not_ok "Debian's installer: package"
fi

# --- firmware: SeaBIOS finds the disk by virtio and starts GRUB's rescue image from it, both on the serial line ---
if fetch seabios.deb seabios && unpack seabios.deb seabios && fetch grub-rescue.deb grub-rescue-pc && unpack grub-rescue.deb grub; then
    for rom in bios.bin bios-256k.bin; do
        until_output 90 'GNU GRUB' "${run[@]}" --memory 128M --firmware "$tmp/seabios/usr/share/seabios/$rom" \
            --disk "$tmp/grub/usr/lib/grub-rescue/grub-rescue-cdrom.iso,readonly"
        like "SeaBIOS ($rom): banner" "$out" 'SeaBIOS \(version'
        like "SeaBIOS ($rom): boots from the disk" "$out" 'Booting from Hard Disk'
        like "GRUB: menu" "$out" 'GNU GRUB'
    done
else
    not_ok "SeaBIOS, GRUB: packages"
fi

done_testing
