#!/bin/bash
# Guests of other kinds, from Debian's packages: memtest86+ to its banner and through tests, the i386 kernels (by bzImage) to a
# shell of an i386 busybox, Debian's installer to its first menu, SeaBIOS with GRUB's rescue
# image, and from a disk by GRUB to a shell of Debian's kernel. Packages are kept beside the guest's (guest/build says where) and fetched once, by apt as an ordinary user.
. "$(dirname "$0")/../lib/tap.sh"
BOOT_SECONDS=400                                    # on a quiet machine it is 20
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
unpack()                                            # file, folder, what of it (all)
{
    rm -rf "${tmp:?}/$2"; mkdir "$tmp/$2"
    dpkg-deb --fsys-tarfile "$cache/$1" | tar -x -C "$tmp/$2" --no-same-owner ${3:+--wildcards "$3"}
}

unfetched="its package cannot be fetched here" unfetched_i386=

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
    skip "memtest86+" "$unfetched"
fi

# --- i386 kernels ---
fetch_i386 busybox-i386.deb busybox-static && unpack busybox-i386.deb bb || unfetched_i386=1
mkdir -p "$tmp/rd"/{bin,dev,proc}
[ -n "$unfetched_i386" ] || cp "$tmp/bb/bin/busybox" "$tmp/rd/bin/"
cat >"$tmp/rd/init" <<'I'
#!/bin/busybox sh
/bin/busybox mount -t devtmpfs none /dev
exec </dev/console >/dev/console 2>&1
/bin/busybox mount -t proc none /proc
echo "shell: $(/bin/busybox uname -m) $(/bin/busybox grep -c ^processor /proc/cpuinfo) $((6 * 7))"
/bin/busybox poweroff -f
I
chmod 755 "$tmp/rd/init"
(cd "$tmp/rd" && find . | cpio --quiet -o -H newc) >"$tmp/rd.cpio"
for kind in 686 686-pae; do
    if [ -z "$unfetched_i386" ] && fetch_i386 linux-$kind.deb linux-image-$kind && unpack linux-$kind.deb "linux-$kind" './boot/vmlinuz*'; then
        for n in 1 2; do
            [ $kind = 686 ] && [ $n = 2 ] && continue            # that kernel is for one processor
            doppel "${run[@]}" --cpus $n --kernel "$tmp/linux-$kind"/boot/vmlinuz-* --initrd "$tmp/rd.cpio" \
                --append "console=ttyS0 quiet panic=-1 cryptomgr.notests=1" --no-reboot </dev/null
            like "linux $kind, $n vCPU: a shell" "${out//$'\r'/}" "shell: i686 $n 42"
            is "linux $kind, $n vCPU: powers off" "$status" 0
        done
    else
        skip "linux $kind" "$unfetched"
    fi
done

# --- Debian's installer ---
if fetch installer.deb debian-installer-12-netboot-amd64 && unpack installer.deb installer '*/text/*'; then
    dir=$tmp/installer/usr/lib/debian-installer/images/12/amd64/text/debian-installer/amd64
    until_output 400 'Select a language|Choose the language|Language:' "${run[@]}" --memory 1G --kernel "$dir/linux" --initrd "$dir/initrd.gz" \
        --append "console=ttyS0 TERM=vt102 DEBIAN_FRONTEND=text priority=high cryptomgr.notests=1"
    like "Debian's installer: its first menu" "$out" 'Select a language|Choose the language|Language:'
    rm -rf "$tmp/installer"
else
    skip "Debian's installer" "$unfetched"
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
    skip "SeaBIOS, GRUB's rescue image" "$unfetched"
fi

# --- the same from a disk as Debian's installer leaves it: a boot sector, GRUB behind it, a partition with kernel and initrd. GRUB reads by the BIOS, the
# kernel finds ACPI where the firmware has put it, both processors, and the disk again. ---
guest=${DOPPEL_GUEST:-${BUILD:-$top/build}/guest}
make_disk()
{
    local core=$tmp/grub-pc/usr/lib/grub/i386-pc
    (
        cd "$tmp" && mkdir -p disk/grub more &&
        printf '%s\n' 'serial --unit=0 --speed=115200' 'terminal_input serial' 'terminal_output serial' \
            'configfile (hd0,msdos1)/grub/grub.cfg' >early.cfg &&
        printf '%s\n' 'linux /vmlinuz console=ttyS0 quiet panic=-1 cryptomgr.notests=1 rdinit=/look' 'initrd /initrd' boot >disk/grub/grub.cfg &&
        cat >more/look <<'I' &&
#!/bin/busybox sh
export PATH=/bin:/sbin
busybox mount -t devtmpfs none /dev
exec </dev/console >/dev/console 2>&1
mount -t proc none /proc
mount -t sysfs none /sys
while read -r m; do insmod $m; done </etc/modules
mount -r -t ext4 /dev/vda1 /mnt
echo "shell: $(uname -m) $(nproc) $(ls /mnt | tr '\n' ' ')"
echo "tables: $(ls /sys/firmware/acpi/tables | tr '\n' ' ')"
echo "complaints: $(dmesg | grep -v "report a bug" | grep -c -i -E "acpi.*(error|warn|bug)|can.t claim|no compatible bridge|address conflict")"
poweroff -f
I
        chmod 755 more/look && (cd more && echo look | cpio --quiet -o -H newc) >more.cpio &&
        cat "$guest/initrd" more.cpio >disk/initrd && cp "$guest/vmlinuz" disk/vmlinuz &&
        LD_LIBRARY_PATH=$tmp/devmapper/lib/x86_64-linux-gnu "$tmp/grub-common/usr/bin/grub-mkimage" -d "$core" -O i386-pc -p '(hd0,msdos1)/grub' \
            -c early.cfg -o core.img biosdisk part_msdos ext2 linux normal serial terminal configfile &&
        truncate -s 48M part.img && mke2fs -q -t ext2 -d disk part.img >&2 &&
        truncate -s 49M disk.img && dd if="$core/boot.img" of=disk.img conv=notrunc bs=440 count=1 status=none &&
        printf '\200\376\377\377\203\376\377\377\000\010\000\000\000\200\001\000' | dd of=disk.img conv=notrunc bs=1 seek=446 status=none &&
        printf '\125\252' | dd of=disk.img conv=notrunc bs=1 seek=510 status=none &&
        dd if=core.img of=disk.img conv=notrunc bs=512 seek=1 status=none &&
        dd if=part.img of=disk.img conv=notrunc bs=1M seek=1 status=none && rm part.img
    )
}
if fetch grub-pc.deb grub-pc-bin && unpack grub-pc.deb grub-pc && fetch grub-common.deb grub-common && unpack grub-common.deb grub-common &&
        fetch devmapper.deb libdevmapper1.02.1 && unpack devmapper.deb devmapper && [ -d "$tmp/seabios" ]; then
    make_disk || not_ok "the disk with GRUB and a kernel is made"
    for n in 1 2; do
        doppel "${run[@]}" --cpus $n --memory 256M --firmware "$tmp/seabios/usr/share/seabios/bios-256k.bin" --disk "$tmp/disk.img,readonly" </dev/null
        out=$(sed 's/\x1b\[[0-9;?]*[A-Za-z]//g' <<<"${out//$'\r'/}")
        like "firmware, GRUB, Linux, $n vCPU: a shell" "$out" "shell: x86_64 $n grub initrd lost.found vmlinuz"
        like "firmware, GRUB, Linux, $n vCPU: ACPI tables" "$out" 'tables: APIC DSDT FACP FACS HPET MCFG '
        like "firmware, GRUB, Linux, $n vCPU: the kernel has nothing to complain about" "$out" 'complaints: 0($|[^0-9])'
        is "firmware, GRUB, Linux, $n vCPU: powers off" "$status" 0
    done
else
    skip "firmware, GRUB, Linux" "$unfetched"
fi

done_testing
