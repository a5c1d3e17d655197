#!/bin/bash
# Boots the default guest and the standard kernel, with 1 and 2 vCPUs, to a command's output; disks; 100 MiB through the console.
. "$(dirname "$0")/../lib/tap.sh"
run=(run --engine "$ENGINE" --quiet)
standard=$top/build/guest-standard

command_output()                                    # name, guest folder ("": default), vCPUs
{
    [ -n "$2" ] && export DOPPEL_GUEST=$2 || unset DOPPEL_GUEST
    doppel "${run[@]}" --cpus "$3" -- sh -c 'uname -sm; nproc; cut -d" " -f2,6- /proc/mtrr
        dmesg -r | grep "^<[0-4]>"; exit 3' </dev/null
    like "$1: output" "$(grep -v '^<' <<<"$out")" $'^Linux x86_64\n'"$3"$'\nbase=0x0c0000000 .*1024MB.* uncachable$'
    # But those of a host that is busy with something else.
    is "$1: the kernel has nothing to complain about" "$(grep '^<' <<<"$out" | grep -v -i -E 'clocksource|hrtimer|rcu')" ""
    is "$1: exit status" "$status" 3
    is "$1: standard error" "$err" ""
    unset DOPPEL_GUEST
}
command_output "cloud kernel, 1 vCPU" "" 1
command_output "cloud kernel, 2 vCPUs" "" 2
"$top/guest/build" --quiet --kernel standard "$standard" || not_ok "the standard kernel's guest is built"
command_output "standard kernel, 1 vCPU" "$standard" 1
command_output "standard kernel, 2 vCPUs" "$standard" 2

# KVM's paravirtual interface, as the guest's drivers see it; and without it, when it is taken away.
pv_lines='dmesg | sed -n -E "s/.*(kvm-guest: .*)/\1/p" | sed "s/ [0-9a-f]{5,}//" | sort'
doppel "${run[@]}" --cpus 2 -- sh -c "$pv_lines"
like "paravirtual: TLB flush" "$out" 'setup PV remote TLB flush|KVM setup pv remote TLB flush'
like "paravirtual: IPIs" "$out" 'setup PV IPIs'
like "paravirtual: locks" "$out" 'PV spinlocks enabled'
doppel "${run[@]}" --cpus 2 --cpuid -pv-eoi,-pv-ipi,-pv-tlb-flush,-pv-unhalt,-steal-time -- sh -c "$pv_lines; nproc"
is "paravirtual: taken away" "$(grep -E 'TLB|IPIs|enabled' <<<"$out")" ""
is "paravirtual: the guest runs without" "$(tail -n 1 <<<"$out")" 2
doppel run --engine "$ENGINE" --cpus 2 --verbose -- sh -c 'i=0; while [ $i -lt 100 ]; do /bin/true; i=$((i+1)); done'
if [ "$ENGINE" != kvm ] && ! grep -q 'engine: kvm' <<<"$err"; then
    read -r eois irqs < <(sed -n -E 's/.*handled for the guest:.* apic-eoi ([0-9]+),.* interrupts ([0-9]+).*/\1 \2/p' <<<"$err")
    is "paravirtual: most interrupts end without the local APIC ($eois of ${irqs:-?})" "$((${eois:-1} * 3 < ${irqs:-0}))" 1
fi

# A disk, written by the guest and read by the host, and the other way round; a second one read-only.
head -c 16777216 /dev/urandom >"$tmp/a.img"
truncate -s 16M "$tmp/b.img"
sum=$(sha256sum <"$tmp/a.img")
doppel "${run[@]}" --disk "$tmp/a.img,readonly" --disk "$tmp/b.img" -- sh -c '
    sha256sum </dev/vda; dd if=/dev/vda of=/dev/vdb bs=64k 2>/dev/null; cat /sys/block/vda/ro /sys/block/vdb/ro
    echo x 2>/dev/null | dd of=/dev/vda 2>/dev/null && echo "wrote to a read-only disk"'
is "disk: read by the guest, read-only flags" "$out" "$sum"$'\n1\n0'
is "disk: written by the guest" "$(sha256sum <"$tmp/b.img")" "$sum"
is "disk: the read-only one is unchanged" "$(sha256sum <"$tmp/a.img")" "$sum"

# A file system made and filled by the guest is sound for the host.
truncate -s 32M "$tmp/c.img"
if command -v mke2fs >/dev/null && command -v e2fsck >/dev/null; then
    mke2fs -q -t ext4 "$tmp/c.img"
    doppel "${run[@]}" --disk "$tmp/c.img" -- sh -c 'mount -t ext4 /dev/vda /mnt && cp /bin/busybox /mnt/copy && sha256sum /mnt/copy | cut -c1-64 && umount /mnt'
    like "ext4: the guest made a file" "$out" '^[0-9a-f]{64}$'
    is "ext4: e2fsck finds nothing" "$(e2fsck -fn "$tmp/c.img" >/dev/null 2>&1; echo $?)" 0
    is "ext4: the file is there" "$(debugfs -R 'cat copy' "$tmp/c.img" 2>/dev/null | sha256sum | cut -c1-64)" "$out"
else
    skip "ext4: e2fsck finds nothing" "mke2fs or e2fsck is not installed (package e2fsprogs)"
fi

# 100 MiB of random bytes from standard input to standard output.
head -c 104857600 /dev/urandom >"$tmp/random"
timeout -k 10 600 "$DOPPEL" "${run[@]}" -- cat <"$tmp/random" >"$tmp/echoed" 2>"$tmp/err"
is "100 MiB through cat: exit status" $? 0
is "100 MiB through cat: same bytes" "$(sha256sum <"$tmp/echoed")" "$(sha256sum <"$tmp/random")"

done_testing
