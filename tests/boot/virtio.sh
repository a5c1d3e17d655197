#!/bin/bash
# Transitional virtio devices: a stock kernel's modern driver takes them, and so does its legacy driver (virtio_pci's parameter force_legacy), with
# everything that the default guest does over them; and what --virtio modern leaves of them.
. "$(dirname "$0")/../lib/tap.sh"
guest=${DOPPEL_GUEST:-${BUILD:-$top/build}/guest}
run=(run --engine "$ENGINE" --quiet --net user)
head -c 4194304 /dev/urandom >"$tmp/a.img"
truncate -s 4M "$tmp/b.img"
sum=$(sha256sum <"$tmp/a.img")

# As the first process, this loads the modules up to virtio_pci with the parameter, and becomes init.
mkdir "$tmp/rd"
cat >"$tmp/rd/legacy" <<'I'
#!/bin/busybox sh
while read -r m; do
    case $m in
        */virtio_pci.ko) /bin/busybox insmod "$m" force_legacy=1; break ;;
        *) /bin/busybox insmod "$m" ;;
    esac
done </etc/modules
exec /init
I
chmod 755 "$tmp/rd/legacy"
(cd "$tmp/rd" && echo legacy | cpio --quiet -o -H newc) >"$tmp/more.cpio"
cat "$guest/initrd" "$tmp/more.cpio" >"$tmp/initrd"

look='for d in /sys/bus/virtio/devices/virtio*; do
          p=$(readlink -f $d/..)
          [ $(cat $p/device) = 0x1053 ] && continue  # vsock: its driver comes when it comes, and there is no legacy one
          echo "$(cat $p/device) $(cat $p/revision) $(cut -c33 $d/features) $(cat $d/status)"
      done
      dd if=/dev/vda of=/dev/vdb bs=64k conv=fsync 2>/dev/null
      dd if=/dev/hwrng bs=512 count=4 2>/dev/null | wc -c
      grep -c "virtio.*-" /proc/interrupts
      n=0; until ip -o -4 addr show dev eth0 | grep -q inet || [ $n = 600 ]; do sleep 0.1; n=$((n + 1)); done
      ip -o -4 addr show dev eth0 | sed "s/.*inet //;s/ .*//"
      exit 7'
# name, wanted lines of devices (ID, revision, VERSION_1 accepted, status), interrupts by MSI-X at least, arguments
drivers()
{
    local name=$1 want=$2 msix=$3
    shift 3
    truncate -s 0 "$tmp/b.img"; truncate -s 4M "$tmp/b.img"
    doppel "${run[@]}" --disk "$tmp/a.img,readonly" --disk "$tmp/b.img" "$@" -- sh -c "$look" </dev/null
    is "$name: devices" "$(head -n 5 <<<"$out")" "$want"
    is "$name: entropy" "$(sed -n 6p <<<"$out")" 2048
    is "$name: interrupts" "$(($(sed -n 7p <<<"$out") > msix))" $((msix > 0))
    is "$name: address by DHCP" "$(sed -n 8p <<<"$out")" 10.0.2.15/24
    is "$name: exit status" "$status" 7
    is "$name: disks" "$(sha256sum <"$tmp/b.img")" "$sum"
}
legacy=$'0x1003 0x00 0 0x00000007\n0x1005 0x00 0 0x00000007\n0x1001 0x00 0 0x00000007\n0x1001 0x00 0 0x00000007\n0x1000 0x00 0 0x00000007'
drivers "modern driver" "${legacy//0 0x00000007/1 0x0000000f}" 5
drivers "legacy driver" "$legacy" 5 --initrd "$tmp/initrd" --append rdinit=/legacy
drivers "legacy driver without MSI" "$legacy" 0 --initrd "$tmp/initrd" --append "rdinit=/legacy pci=nomsi"
drivers "--virtio modern" $'0x1043 0x01 1 0x0000000f\n0x1044 0x01 1 0x0000000f\n0x1042 0x01 1 0x0000000f\n0x1042 0x01 1 0x0000000f\n0x1041 0x01 1 0x0000000f' 5 \
    --virtio modern

# What the guest can tell its disks by; without a word of the user's they are counted.
truncate -s 4M "$tmp/c.img"
doppel "${run[@]}" --disk "$tmp/a.img,readonly,serial=Work_1.2-b" --disk "$tmp/b.img" --disk "$tmp/c.img,bus=nvme,serial=12345678901234567890" -- \
    sh -c 'cat /sys/block/vda/serial; echo; cat /sys/block/vdb/serial; echo; cat /sys/class/nvme/nvme0/serial' </dev/null
is "serial numbers" "$(grep . <<<"$out" | paste -sd ' ')" "Work_1.2-b disk1 12345678901234567890"

done_testing
