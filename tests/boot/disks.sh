#!/bin/bash
# Disks at work: every back end and both kinds of device under a verifying load; what the guest flushed is there after kill -9; servers of network disks
# that are slow, fail, hang or die; a full host; a root disk without an initramfs.
. "$(dirname "$0")/../lib/tap.sh"
guest=${DOPPEL_GUEST:-${BUILD:-$top/build}/guest}
build=${BUILD:-$top/build}
work=$build/boot/disk_work
verify_seconds=3 kills=3
[ -z "${SOAK_LONG:-}" ] || { verify_seconds=300; kills=50; }
PATH=$PATH:/usr/sbin:/sbin
run=(run --engine "$ENGINE" --quiet)
trap 'kill -9 $(jobs -pr) $(jobs -ps) 2>/dev/null; rm -rf "$tmp"' EXIT

mkdir "$tmp/rd"
cp "$work" "$tmp/rd/disk_work"
(cd "$tmp/rd" && echo disk_work | cpio --quiet -o -H newc) >"$tmp/more.cpio"
cat "$guest/initrd" "$tmp/more.cpio" >"$tmp/initrd"
run+=(--initrd "$tmp/initrd")
image() { truncate -s 0 "$1"; truncate -s "${2:-16M}" "$1"; }

# Until a line of the file matches, or seconds are over.
wait_for()                                          # file, extended regular expression, seconds
{
    local end=$((SECONDS + $3))
    while ! tr -d '\0\r' <"$1" 2>/dev/null | grep -qE "$2"; do
        [ $SECONDS -lt $end ] || return 1
        sleep 0.1
    done
}
# A server on a socket in $tmp, by name; its process is $server.
serve()                                             # name, nbdkit's arguments
{
    local name=$1
    shift
    nbdkit --foreground --unix "$tmp/$name.sock" --pidfile "$tmp/$name.pid" "$@" 2>"$tmp/$name.log" &
    server=$!
    local end=$((SECONDS + 60))
    until [ -s "$tmp/$name.pid" ] || [ $SECONDS -ge $end ]; do sleep 0.1; done
}
uri() { echo "nbd+unix:///?socket=$tmp/$1.sock"; }
have_nbd=$(command -v nbdkit)

# ---- all back ends, at the same time ----
for i in a b c d f; do image "$tmp/$i.img"; done
disks=(--disk "$tmp/a.img,io=uring" --disk "$tmp/b.img,io=threads" --disk "$tmp/c.img,overlay=$tmp/c.over" --disk "$tmp/d.img,overlay" --disk "$tmp/f.img,bus=nvme")
names="vda vdb vdc vdd nvme0n1"
"$DOPPEL" run --disk "$tmp/a.img,io=uring" --kernel /nowhere 2>&1 | grep -q 'does not permit io_uring' && disks[1]=$tmp/a.img,io=threads
if [ -n "$have_nbd" ]; then
    serve slow --filter=delay memory 16M delay-read=1ms delay-write=2ms
    disks+=(--disk "$(uri slow)") names+=" vde"
fi
sum=$(sha256sum <"$tmp/c.img")
in_guest="modprobe nvme; for d in $names; do /disk_work verify /dev/\$d $verify_seconds >/tmp/\$d & done; wait; for d in $names; do echo \"\$d: \$(cat /tmp/\$d)\"; done"
BOOT_SECONDS=$((BOOT_SECONDS + 4 * verify_seconds)) doppel "${run[@]}" --cpus 2 "${disks[@]}" -- sh -c "$in_guest" </dev/null
for d in $names; do is "verified: $d" "$(grep "^$d:" <<<"$out")" "$d: verified"; done
is "verified: the base of an overlay is untouched" "$(sha256sum <"$tmp/c.img")" "$sum"
image "$tmp/a.img"
doppel "${run[@]}" --virtio modern,split --disk "$tmp/a.img" -- /disk_work verify /dev/vda 1 </dev/null
is "verified: split rings" "$out" "verified"
[ -n "$have_nbd" ] && kill "$server"

# ---- what was flushed is there after kill -9 ----
crash()                                             # name, device, whole seconds at most, disk options
{
    local name=$1 dev=$2 flushed last=0 i bad=
    shift 2
    for ((i = 0; i < kills; i++)); do
        : >"$tmp/out"
        "$DOPPEL" "${run[@]}" "$@" -- sh -c "modprobe nvme; /disk_work journal $dev" </dev/null >"$tmp/out" 2>"$tmp/err" &
        local job=$!
        wait_for "$tmp/out" '^flushed' "$BOOT_SECONDS" || bad+=" nothing was flushed in round $i: $(tail -n 1 "$tmp/err");"
        sleep "0.$((RANDOM % 9))$((RANDOM % 9))"
        kill -9 $job
        wait $job 2>/dev/null
        flushed=$(sed -n 's/^flushed \([0-9]*\)$/\1/p' "$tmp/out" | tail -n 1)
        doppel "${run[@]}" "$@" -- sh -c "modprobe nvme; /disk_work check $dev ${flushed:-0}" </dev/null
        [ "$out" = "all there" ] || bad+=" round $i, flushed ${flushed:-?}: $out $err;"
        last=${flushed:-0}
    done
    is "kill -9, $kills times: $name (the last time behind record $last)" "$bad" ""
}
image "$tmp/a.img"; crash "raw" /dev/vda --disk "$tmp/a.img"
image "$tmp/a.img"; crash "NVMe, an overlay" /dev/nvme0n1 --disk "$tmp/a.img,overlay=$tmp/crash.over,bus=nvme"

# The same with a file system, which is checked as after any crash; what was synced is in it.
journalled()                                        # rounds
{
    local i bad=
    image "$tmp/fs.img" 64M
    mke2fs -q -t ext4 "$tmp/fs.img"
    for ((i = 0; i < $1; i++)); do
        "$DOPPEL" "${run[@]}" --disk "$tmp/fs.img" -- sh -c 'mount -t ext4 /dev/vda /mnt && rm -f /mnt/*
            n=0; while :; do n=$((n + 1)); echo $n >/mnt/$((n % 200)); dd if=/dev/urandom of=/mnt/data$((n % 7)) bs=64k count=$((n % 5)) 2>/dev/null
            [ $((n % 5)) != 0 ] || { sync; echo "synced $n"; }; done' </dev/null >"$tmp/out" 2>"$tmp/err" &
        local job=$! n found
        wait_for "$tmp/out" '^synced' "$BOOT_SECONDS" || bad+=" nothing was synced in round $i: $(tail -n 1 "$tmp/err");"
        sleep "0.$((RANDOM % 9))$((RANDOM % 9))"
        kill -9 $job
        wait $job 2>/dev/null
        n=$(sed -n 's/^synced \([0-9]*\)$/\1/p' "$tmp/out" | tail -n 1)
        e2fsck -fp "$tmp/fs.img" >"$tmp/fsck" 2>&1
        [ $? -le 1 ] || bad+=" round $i: $(tail -n 3 "$tmp/fsck");"
        found=$(debugfs -R "cat /$((${n:-0} % 200))" "$tmp/fs.img" 2>/dev/null)
        [ "${found:-0}" -ge "${n:-0}" ] || bad+=" round $i: ${n:-?} was synced, ${found:-nothing} is there;"
    done
    is "kill -9, $1 times: ext4 is sound, and what was synced is there" "$bad" ""
}
if command -v mke2fs >/dev/null && command -v debugfs >/dev/null; then
    journalled $((kills > 3 ? kills : 1))
else
    skip "kill -9: ext4" "mke2fs and debugfs are not installed (package e2fsprogs)"
fi

# ---- servers that misbehave ----
if [ -n "$have_nbd" ]; then
    serve bad --filter=error memory 16M error-pread=EIO error-pread-rate=100% error-pread-file="$tmp/fail"
    touch "$tmp/fail"
    doppel "${run[@]}" --disk "$(uri bad)" -- sh -c 'dd if=/dev/vda of=/dev/null bs=4k count=1 2>&1 | tail -n 1; dd if=/dev/zero of=/dev/vda bs=4k count=1 conv=fsync 2>/dev/null && echo written' </dev/null
    like "nbd: an error of the server is an I/O error for the guest" "$out" 'Input/output error.*written'
    like "nbd: and is told" "$err" 'reading failed: Input/output error; the guest sees an I/O error'
    kill "$server"

    # The server dies: errors, and the guest goes on. It hangs: the monitor prompt works, and the run can be ended.
    serve dies memory 16M
    mkfifo "$tmp/in"
    "$DOPPEL" "${run[@]}" --disk "$(uri dies)" <"$tmp/in" >"$tmp/out" 2>"$tmp/err" &
    job=$!
    exec 9>"$tmp/in"
    wait_for "$tmp/out" '~# ' "$BOOT_SECONDS"
    kill -9 "$server"; wait "$server" 2>/dev/null
    echo 'dd if=/dev/vda of=/dev/null bs=4k count=1; echo still "here"' >&9
    wait_for "$tmp/out" 'still here' 60
    like "nbd: the server dies, the guest goes on" "$(tr -d '\r' <"$tmp/out")" $'I/O error.*still here'
    echo 'poweroff' >&9
    wait $job
    is "nbd: and ends" $? 0
    exec 9>&-

    serve hangs memory 16M
    "$DOPPEL" "${run[@]}" --disk "$(uri hangs)" <"$tmp/in" >"$tmp/out" 2>"$tmp/err" &
    job=$!
    exec 9>"$tmp/in"
    wait_for "$tmp/out" '~# ' "$BOOT_SECONDS"
    kill -STOP "$server"
    printf 'dd if=/dev/vda of=/dev/null bs=4k count=1 & echo "asked" now\n' >&9
    wait_for "$tmp/out" 'asked now' 60
    printf '\1cinfo\n' >&9
    like "nbd: the server hangs, the monitor prompt does not" "$(wait_for "$tmp/out" 'disk 0: nbd.*16777216 bytes' 60 && echo yes)" yes
    printf 'reset\n' >&9
    like "nbd: nor does a reset" "$(wait_for "$tmp/out" 'reset; running' 60 && echo yes)" yes
    printf 'quit\n' >&9
    wait $job
    is "nbd: nor does quit" $? 0
    exec 9>&-
    kill -9 "$server" 2>/dev/null

    # The host is full: the guest is paused; with room again it goes on, and nothing is lost.
    serve full --filter=error memory 16M error-pwrite=ENOSPC error-pwrite-rate=100% error-pwrite-file="$tmp/full"
    touch "$tmp/full"
    "$DOPPEL" "${run[@]}" --disk "$(uri full)" <"$tmp/in" >"$tmp/out" 2>"$tmp/err" &
    job=$!
    exec 9>"$tmp/in"
    wait_for "$tmp/out" '~# ' "$BOOT_SECONDS"
    echo '/disk_work fill /dev/vda' >&9
    like "full host: the guest is paused, and it is told" "$(wait_for "$tmp/err" 'no room for what the guest writes.*resume' 60 && echo yes)" yes
    printf '\1cresume\n' >&9
    end=$((SECONDS + 60))
    until [ "$(grep -c 'no room' "$tmp/err")" -ge 2 ] || [ $SECONDS -ge $end ]; do sleep 0.1; done
    printf 'info\n' >&9
    like "full host: still no room, still paused" "$(wait_for "$tmp/out" 'state: paused' 60 && wait_for "$tmp/out" 'requests wait for room' 60 && echo yes)" yes
    rm "$tmp/full"
    printf 'resume\n\n' >&9
    like "full host: with room it goes on where it was" "$(wait_for "$tmp/out" '^filled' 60 && echo yes)" yes
    echo poweroff >&9
    wait $job
    is "full host: exit status" $? 0
    exec 9>&-
    touch "$tmp/full"
    doppel "${run[@]}" --disk "$(uri full),on-full=error" -- sh -c '/disk_work fill /dev/vda' </dev/null
    like "full host: on-full=error" "$out" 'writing: (No space left|Input/output error)'
    kill "$server" 2>/dev/null
    doppel "${run[@]}" --disk "nbd+unix:///?socket=$tmp/nobody" -- true </dev/null
    like "nbd: no server" "$err" 'cannot connect'
else
    skip "network disks" "nbdkit is not installed"
fi

# ---- growing, and a root disk without an initramfs ----
image "$tmp/a.img"; image "$tmp/b.img"
[ -p "$tmp/in" ] || mkfifo "$tmp/in"
"$DOPPEL" "${run[@]}" --disk "$tmp/a.img" --disk "$tmp/b.img,bus=nvme" <"$tmp/in" >"$tmp/out" 2>"$tmp/err" &
job=$!
exec 9>"$tmp/in"
wait_for "$tmp/out" '~# ' "$BOOT_SECONDS"
echo 'modprobe nvme; until [ -b /dev/nvme0n1 ]; do sleep 0.1; done; echo there is "nvme"' >&9
wait_for "$tmp/out" 'there is nvme' 60
printf '\1cresize 0 32M\nresize 1 64M\nresize 1 1M\n\n' >&9
wait_for "$tmp/out" 'only grows' 60
echo 'until [ "$(cat /sys/block/vda/size /sys/block/nvme0n1/size | paste -sd+)" = 65536+131072 ]; do sleep 0.1; done; echo has "grown"; poweroff' >&9
like "resize: the guest sees it at once" "$(wait_for "$tmp/out" 'has grown' 60 && echo yes)" yes
wait $job
exec 9>&-
is "resize: the files are as large" "$(stat -c %s "$tmp/a.img" "$tmp/b.img" | paste -sd' ')" "33554432 67108864"

if command -v mke2fs >/dev/null; then
    mkdir -p "$tmp/root/bin" "$tmp/root/dev" "$tmp/root/proc"
    (cd "$tmp/root" && cpio --quiet -id bin/busybox <"$guest/initrd" && ln -s busybox bin/sh)
    printf '#!/bin/sh\n/bin/busybox mount -t proc proc /proc; /bin/busybox mount -o remount,rw /; /bin/busybox cp /proc/mounts /mounts\n' >"$tmp/root/init"
    echo '/bin/busybox sync; /bin/busybox mount -o remount,ro /; echo "root on $(/bin/busybox sed -n "s, / .*,,p" /mounts)"; /bin/busybox poweroff -f' >>"$tmp/root/init"
    chmod 755 "$tmp/root/init"
    image "$tmp/root.img" 32M
    mke2fs -q -t ext4 -d "$tmp/root" "$tmp/root.img"
    doppel run --engine "$ENGINE" --quiet --kernel "$guest/vmlinuz" --append "console=ttyS0 quiet root=/dev/nvme0n1 init=/init" --disk "$tmp/root.img,bus=nvme" </dev/null
    like "root on NVMe, without an initramfs" "$(tr -d '\r' <<<"$out")" 'root on /dev/(root|nvme0n1)'
    is "root on NVMe: the file system is sound" "$(e2fsck -fn "$tmp/root.img" >/dev/null 2>&1; echo $?)" 0
else
    skip "root on NVMe, without an initramfs" "mke2fs is not installed (package e2fsprogs)"
fi

# ---- what cannot be ----
refused()                                           # name, regular expression, disk option
{
    doppel run --engine "$ENGINE" --disk "$3" -- true </dev/null
    is "$1: exit status" "$status" 1
    like "$1" "$err" "$2"
}
image "$tmp/base.img" 1M
doppel "${run[@]}" --disk "$tmp/base.img,overlay=$tmp/base.over" -- sh -c 'echo x >/dev/vda' </dev/null
is "overlay: a run with a new one" "$status" 0
truncate -s 2M "$tmp/base.img"
refused "overlay: its base has another size" 'has another size now' "$tmp/base.img,overlay=$tmp/base.over"
echo nonsense >"$tmp/base.over"
refused "overlay: it is none" 'is no overlay of doppel' "$tmp/base.img,overlay=$tmp/base.over"
refused "overlay: the base itself" 'in use' "$tmp/base.img,overlay=$tmp/base.img"

done_testing
