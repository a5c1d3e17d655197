# Runs in the guest, by the default guest's shell: cases, each in the Debian root of /dev/vda with /soak from /dev/vdb; /dev/vdc is for swapping (vanish).
#
#   inside.sh SECONDS UNTIL CASE...     no case may take longer than SECONDS, or begin when UNTIL seconds have passed (0: whenever)
#
# Prints "[begin CASE]", what the case says, "[end CASE STATUS MILLISECONDS]".
limit=$1 until=$2
shift 2
ms() { read -r up _ </proc/uptime; up=${up%.*}${up#*.}0; echo "${up#0}"; }
modprobe ext4; modprobe overlay
mkdir -p /mnt/lower /mnt/over /mnt/root
mount -t ext4 -o ro /dev/vda /mnt/lower && mount -t tmpfs over /mnt/over && mkdir /mnt/over/up /mnt/over/work &&
    mount -t overlay -o lowerdir=/mnt/lower,upperdir=/mnt/over/up,workdir=/mnt/over/work soak /mnt/root &&
    mount -t ext4 -o ro /dev/vdb /mnt/root/soak || exit 3
for d in dev proc sys; do mount -o bind /$d /mnt/root/$d; done
mount -t tracefs tracefs /mnt/root/sys/kernel/tracing
mount -t tmpfs shm /mnt/root/dev/shm 2>/dev/null
echo 0 >/proc/sys/kernel/printk
# A busy host takes a processor away for seconds, which is nothing that the guest did: it is to complain of what lasts.
echo 60 >/proc/sys/kernel/watchdog_thresh
echo 120 >/sys/module/rcupdate/parameters/rcu_cpu_stall_timeout
start=$(ms)
for c; do
    if [ "$until" != 0 ] && [ $(($(ms) - start)) -gt $((until * 1000)) ]; then
        printf '[begin %s]\nno time was left (SOAK_MINUTES)\n[end %s 77 0]\n' "$c" "$c"
        continue
    fi
    mount -t tmpfs tmp /mnt/root/tmp
    begin=$(ms)
    echo "[begin $c]"
    SOAK_LONG=$SOAK_LONG SOAK_GUEST=1 chroot /mnt/root /usr/bin/timeout -k 5 "$limit" /bin/sh /soak/cases.sh run "$c" </dev/null 2>&1
    status=$?
    echo
    echo "[end $c $status $(($(ms) - begin))]"
    umount -l /mnt/root/tmp
done
dmesg | grep -E 'BUG:|WARNING:|Oops|rcu:.*stall|soft lockup|general protection|unable to handle|hung_task|Call Trace' | head -n 20 | sed 's/^/[kernel] /'
