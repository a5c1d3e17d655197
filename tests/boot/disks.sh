#!/bin/bash
# Disks at work: every back end and both kinds of device under verifying loads (our own and fio's); what the guest flushed is there after kill -9, and file systems
# are sound; servers of network disks that are slow, fail, answer wrong, hang or die; a full host; a root disk without an initramfs.
. "$(dirname "$0")/../lib/tap.sh"
guest=${DOPPEL_GUEST:-${BUILD:-$top/build}/guest}
build=${BUILD:-$top/build}
work=$build/boot/disk_work
verify_seconds=3 kills=3 fio_mib=4 fio_loops=1
[ -z "${SOAK_LONG:-}" ] || { verify_seconds=300; kills=50; fio_mib=16; fio_loops=20; }
kills=${DISK_KILLS:-$kills}
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

# A disk of tools, $tmp/tools.img, which the guest mounts at /mnt/t: programs of this host, each with its libraries (some fill 100 MB: too much for an
# initramfs). /mnt/t/PROGRAM starts one.
have_fio='' have_xfs=''
tool()                                              # program
{
    local path lib
    path=$(command -v "$1") && mkdir -p "$tmp/tools/lib" && cp -L "$path" "$tmp/tools/lib/$1.bin" || return 1
    for lib in $(ldd "$path" | grep -o '/[^ ]*'); do [ -e "$tmp/tools/lib/${lib##*/}" ] || cp -L "$lib" "$tmp/tools/lib/" || return 1; done
    printf '#!/bin/sh\nexec /mnt/t/lib/ld-linux-x86-64.so.2 --library-path /mnt/t/lib /mnt/t/lib/%s.bin "$@"\n' "$1" >"$tmp/tools/$1"
    chmod 755 "$tmp/tools/$1"
}
if command -v mke2fs >/dev/null; then
    tool fio && have_fio=1
    command -v mkfs.xfs >/dev/null && tool xfs_repair && have_xfs=1
    [ -z "$have_fio$have_xfs" ] || { mke2fs -q -t ext4 -O ^has_journal -m 0 -d "$tmp/tools" "$tmp/tools.img" 300M >/dev/null || have_fio='' have_xfs=''; }
    rm -rf "$tmp/tools"
fi
tools="mkdir -p /mnt/t; mount -t ext4 -o ro /dev/vda /mnt/t"

# ---- all back ends, at the same time ----
for i in a b c d f n t; do image "$tmp/$i.img"; done
[ -f "$tmp/tools.img" ] || image "$tmp/tools.img"
disks=(--disk "$tmp/tools.img,readonly" --disk "$tmp/a.img,io=uring" --disk "$tmp/b.img,io=threads" --disk "$tmp/c.img,overlay=$tmp/c.over" --disk "$tmp/d.img,overlay"
    --disk "$tmp/f.img,bus=nvme" --disk "$tmp/t.img,cache=writethrough,bus=nvme")
names="vdb vdc vdd vde nvme0n1 nvme1n1"
"$DOPPEL" run --disk "$tmp/a.img,io=uring" --kernel /nowhere 2>&1 | grep -q 'does not permit io_uring' && disks[3]=$tmp/a.img,io=threads
next=f
if "$DOPPEL" run --disk "$tmp/n.img,cache=none" --kernel /nowhere 2>&1 | grep -q 'cache=none'; then
    skip "verified: cache=none" "no direct access in $tmp"
else
    disks+=(--disk "$tmp/n.img,cache=none") names+=" vd$next" next=g
fi
if [ -n "$have_nbd" ]; then
    serve slow --filter=delay memory 16M delay-read=1ms delay-write=2ms
    disks+=(--disk "$(uri slow)") names+=" vd$next"
    next=$([ $next = f ] && echo g || echo h)
fi
qemu_nbd=''
if command -v qemu-nbd >/dev/null; then
    image "$tmp/q.img"
    qemu-nbd --socket="$tmp/qemu.sock" --format=raw --persistent "$tmp/q.img" 2>"$tmp/qemu.log" &
    qemu_nbd=$!
    end=$((SECONDS + 60))
    until [ -S "$tmp/qemu.sock" ] || [ $SECONDS -ge $end ]; do sleep 0.1; done
    disks+=(--disk "$(uri qemu)") names+=" vd$next"
fi
sum=$(sha256sum <"$tmp/c.img")
fio="/mnt/t/fio --name=verify --thread --direct=1 --ioengine=io_uring --iodepth=16 --rw=randwrite --bsrange=1k-128k --size=${fio_mib}M --verify=crc32c --verify_fatal=1
    --verify_state_save=0 --do_verify=1 --end_fsync=1 --loops=$fio_loops"
in_guest="modprobe nvme; until [ -b /dev/nvme0n1 ] && [ -b /dev/nvme1n1 ]; do sleep 0.1; done; for d in $names; do /disk_work verify /dev/\$d $verify_seconds >/tmp/\$d & done; wait; for d in $names; do echo \"\$d: \$(cat /tmp/\$d)\"; done"
[ -z "$have_fio" ] || in_guest+="; $tools; for d in $names; do { ${fio//$'\n'/ } --filename=/dev/\$d >/tmp/\$d 2>&1 && echo verified >>/tmp/\$d; } & done; wait
    for d in $names; do echo \"fio \$d: \$(tail -n 1 /tmp/\$d)\"; done"
BOOT_SECONDS=$((BOOT_SECONDS + 4 * verify_seconds + (fio_loops - 1) * 300)) doppel "${run[@]}" --cpus 2 "${disks[@]}" -- sh -c "$in_guest" </dev/null
for d in $names; do is "verified: $d" "$(grep "^$d:" <<<"$out")" "$d: verified"; done
if [ -n "$have_fio" ]; then
    for d in $names; do is "verified by fio: $d" "$(grep "^fio $d:" <<<"$out")" "fio $d: verified"; done
else
    skip "verified by fio" "fio or mke2fs is not installed"
fi
is "verified: the base of an overlay is untouched" "$(sha256sum <"$tmp/c.img")" "$sum"
image "$tmp/a.img"
doppel "${run[@]}" --virtio modern,split --disk "$tmp/a.img" -- /disk_work verify /dev/vda 1 </dev/null
is "verified: split rings" "$out" "verified"
[ -n "$have_nbd" ] && kill "$server"
[ -z "$qemu_nbd" ] || { kill "$qemu_nbd"; wait "$qemu_nbd" 2>/dev/null; }

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

# The same with file systems, ext4 on virtio and XFS on NVMe, which are checked as after any crash: ext4 on the host, XFS, whose log only its driver replays, in
# the next guest. What was synced is in them.
at_work='modprobe nvme; mkdir -p /mnt/0; mount -t ext4 /dev/vdb /mnt/0 && rm -f /mnt/0/* && where=/mnt/0
    if [ -n "$xfs" ]; then
        '$tools' && mkdir -p /mnt/1
        until [ -b /dev/nvme0n1 ]; do sleep 0.1; done
        mount -t xfs /dev/nvme0n1 /mnt/1 && echo "xfs has $(cat /mnt/1/$((last % 200)) 2>/dev/null)" && umount /mnt/1 && /mnt/t/xfs_repair -n /dev/nvme0n1 >/tmp/repair 2>&1 && echo "xfs sound"
        [ -z "$once" ] || exit 0
        mount -t xfs /dev/nvme0n1 /mnt/1 && rm -f /mnt/1/* && where="/mnt/0 /mnt/1"
    fi
    n=0; while :; do n=$((n + 1)); for d in $where; do echo $n >$d/$((n % 200)); dd if=/dev/urandom of=$d/data$((n % 7)) bs=64k count=$((n % 5)) 2>/dev/null; done
    [ $((n % 5)) != 0 ] || { sync; echo "synced $n"; }; done'
journalled()                                        # rounds
{
    local i bad='' xbad='' n=0 found more=()
    image "$tmp/fs.img" 64M
    mke2fs -q -t ext4 "$tmp/fs.img"
    if [ -n "$have_xfs" ]; then
        image "$tmp/xfs.img" 320M
        mkfs.xfs -q -f "$tmp/xfs.img"
        more=(--disk "$tmp/xfs.img,bus=nvme")
    fi
    xfs_was()
    {
        grep -q '^xfs sound' "$tmp/out" || xbad+=" round $i: $(head -n 3 "$tmp/out") $(tail -n 1 "$tmp/err");"
        found=$(tr -d '\r' <"$tmp/out" | sed -n 's/^xfs has //p')
        [ "${found:-0}" -ge "$n" ] || xbad+=" round $i: $n was synced, ${found:-nothing} is there;"
    }
    for ((i = 0; i < $1; i++)); do
        : >"$tmp/out"
        "$DOPPEL" "${run[@]}" --disk "$tmp/tools.img,readonly" --disk "$tmp/fs.img" "${more[@]}" -- sh -c "xfs=$have_xfs; last=$n; once=; $at_work" </dev/null >"$tmp/out" 2>"$tmp/err" &
        local job=$!
        wait_for "$tmp/out" '^synced' "$BOOT_SECONDS" || bad+=" nothing was synced in round $i: $(tail -n 1 "$tmp/err");"
        sleep "0.$((RANDOM % 9))$((RANDOM % 9))"
        kill -9 $job
        wait $job 2>/dev/null
        [ -z "$have_xfs" ] || xfs_was
        n=$(sed -n 's/^synced \([0-9]*\)$/\1/p' "$tmp/out" | tail -n 1)
        n=${n:-0}
        e2fsck -fp "$tmp/fs.img" >"$tmp/fsck" 2>&1
        [ $? -le 1 ] || bad+=" round $i: $(tail -n 3 "$tmp/fsck");"
        found=$(debugfs -R "cat /$((n % 200))" "$tmp/fs.img" 2>/dev/null)
        [ "${found:-0}" -ge "$n" ] || bad+=" round $i: $n was synced, ${found:-nothing} is there;"
    done
    is "kill -9, $1 times: ext4 is sound, and what was synced is there (the last time $n)" "$bad" ""
    if [ -n "$have_xfs" ]; then
        doppel "${run[@]}" --disk "$tmp/tools.img,readonly" --disk "$tmp/fs.img" "${more[@]}" -- sh -c "xfs=1; last=$n; once=1; $at_work" </dev/null
        xfs_was
        is "kill -9, $1 times: XFS is sound, and what was synced is there" "$xbad" ""
    else
        skip "kill -9: XFS" "xfsprogs is not installed"
    fi
}
if command -v mke2fs >/dev/null && command -v debugfs >/dev/null; then
    journalled "$kills"
else
    skip "kill -9: ext4 and XFS" "mke2fs and debugfs are not installed (package e2fsprogs)"
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
    "$DOPPEL" "${run[@]}" --name "full$$" --disk "$(uri full)" <"$tmp/in" >"$tmp/out" 2>"$tmp/err" &
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
    like "full host: doppel ps tells" "$("$DOPPEL" ps)" "full$$ .* no-room "
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

    # TLS: the server is the one that was meant, or there is no disk. A key that both have; certificates: libnbd itself takes any where it finds no CA's.
    echo "doppel:$(head -c 16 /dev/urandom | od -An -tx1 | tr -d ' \n')" >"$tmp/psk"
    echo "doppel:$(head -c 16 /dev/urandom | od -An -tx1 | tr -d ' \n')" >"$tmp/other-psk"
    serve psk --tls=require --tls-psk="$tmp/psk" memory 16M
    doppel "${run[@]}" --disk "nbds+unix://doppel@/?socket=$tmp/psk.sock&tls-psk-file=$tmp/psk" -- cat /sys/block/vda/size </dev/null
    is "nbds: a key" "$status $out" "0 32768"
    doppel "${run[@]}" --disk "nbds+unix://doppel@/?socket=$tmp/psk.sock&tls-psk-file=$tmp/other-psk" -- true </dev/null
    is "nbds: another key: status" "$status" 1; like "nbds: another key: told" "$err" 'cannot connect: .*gnutls'
    doppel "${run[@]}" --disk "nbds+unix:///?socket=$tmp/psk.sock" -- true </dev/null
    is "nbds: nothing is checked over a Unix socket: status" "$status" 1; like "nbds: nothing is checked over a Unix socket: told" "$err" 'no certificate is checked'
    kill "$server" 2>/dev/null
    ca()                                                # folder, name of the server: a CA and a certificate by it
    {
        mkdir -p "$1" && cd "$1" &&
            openssl req -x509 -newkey rsa:2048 -nodes -keyout ca-key.pem -out ca-cert.pem -subj "/CN=CA $2" -days 2 &&
            openssl req -newkey rsa:2048 -nodes -keyout server-key.pem -out server.csr -subj "/CN=$2" &&
            openssl x509 -req -in server.csr -CA ca-cert.pem -CAkey ca-key.pem -CAcreateserial -out server-cert.pem -days 2 -extfile <(echo "subjectAltName=DNS:$2")
    }
    (ca "$tmp/good" localhost && ca "$tmp/named" elsewhere) >"$tmp/ca.log" 2>&1 || not_ok "nbds: certificates are made" "$(tail -n 5 "$tmp/ca.log")"
    # A port of its own: nbdkit says that one is taken by ending.
    port=$((22000 + $$ % 8000))
    serve_tls()                                         # folder
    {
        local try
        for try in 1 2 3 4 5; do
            rm -f "$tmp/tls.pid"
            port=$((port + 1))
            nbdkit --foreground -i 127.0.0.1 -p $port --pidfile "$tmp/tls.pid" --tls=require --tls-certificates="$1" memory 16M 2>"$tmp/tls.log" &
            server=$!
            until [ -s "$tmp/tls.pid" ] || ! kill -0 $server 2>/dev/null; do sleep 0.1; done
            [ -s "$tmp/tls.pid" ] && return
        done
    }
    nbds() { HOME=$tmp/nowhere doppel "${run[@]}" --disk "nbds://localhost:$port/$1" -- cat /sys/block/vda/size </dev/null; }
    serve_tls "$tmp/good"
    nbds "?tls-certificates=$tmp/good"; is "nbds: the server's CA" "$status $out" "0 32768"
    nbds "?tls-certificates=$tmp/named"; is "nbds: another CA: status" "$status" 1; like "nbds: another CA: told" "$err" 'certificate verification'
    nbds "?tls-certificates=$tmp/none"; is "nbds: a folder without a CA: status" "$status" 1; like "nbds: a folder without a CA: told" "$err" 'none/ca-cert.pem cannot be read'
    if [ -e /etc/pki/libnbd/ca-cert.pem ]; then
        skip "nbds: no CA" "this host has one for libnbd"
    else
        nbds ""; is "nbds: no CA: status" "$status" 1; like "nbds: no CA: told" "$err" 'nothing to know the server by'
    fi
    kill "$server" 2>/dev/null; wait "$server" 2>/dev/null
    serve_tls "$tmp/named"
    nbds "?tls-certificates=$tmp/named"; is "nbds: a certificate for another name: status" "$status" 1; like "nbds: a certificate for another name: told" "$err" 'certificate verification'
    kill "$server" 2>/dev/null; wait "$server" 2>/dev/null
else
    skip "network disks" "nbdkit is not installed"
fi

# ---- servers that answer wrong ----
# A server of 16 MiB of 0x42 for one client, which follows the protocol until a request lies behind the first MiB; then: "short": half of the data, and the
# connection ends; "magic": a reply that is none; "handle": an answer to nobody; "errno": an error that does not exist; "silent": an end without a word.
cat >"$tmp/liar.pl" <<'PERL'
use strict; use IO::Socket::UNIX; use Socket;
my ($path, $mode) = @ARGV;
$SIG{PIPE} = 'IGNORE';
my $s = IO::Socket::UNIX->new(Type => SOCK_STREAM, Local => $path, Listen => 4) or die "$path: $!";
my $c;
sub get { my ($n) = @_; my $b = ''; while (length $b < $n) { my $r = sysread $c, $b, $n - length $b, length $b; return undef unless $r } $b }
sub say_ { my ($b) = @_; my $at = 0; while ($at < length $b) { my $r = syswrite $c, $b, length($b) - $at, $at; return unless $r; $at += $r } }
while ($c = $s->accept) {
    say_('NBDMAGIC' . 'IHAVEOPT' . pack('n', 3));
    my $flags = get(4) // next;
    my $on = 0;
    while (!$on) {
        my $o = get(16) // last;
        my ($opt, $len) = (unpack 'x8NN', $o);
        my $data = $len ? get($len) : '';
        if ($opt == 1) { say_(pack('Q>n', 16 << 20, 1) . ((unpack('N', $flags) & 2) ? '' : "\0" x 124)); $on = 1 }
        elsif ($opt == 2) { say_(pack('Q>NNN', 0x3e889045565a9, 2, 1, 0)); last }
        else { say_(pack('Q>NNN', 0x3e889045565a9, $opt, 0x80000001, 0)) }
    }
    while ($on and defined(my $q = get(28))) {
        my ($type, $handle, $at, $len) = (unpack('x6n', $q), substr($q, 8, 8), unpack('x16Q>N', $q));
        get($len) if $type == 1;
        last if $type == 2;
        my $ok = pack('NN', 0x67446698, 0) . $handle;
        my $data = $type == 0 ? "\x42" x $len : '';
        if ($at < 1 << 20) { say_($ok . $data) }
        elsif ($mode eq 'short') { say_($ok . substr($data, 0, $len / 2)); last }
        elsif ($mode eq 'magic') { say_(pack('NN', 0x12345678, 0) . $handle . $data) }
        elsif ($mode eq 'handle') { say_(pack('NN', 0x67446698, 0) . 'nobody!!' . $data) }
        elsif ($mode eq 'errno') { say_(pack('NN', 0x67446698, 987654321) . $handle) }
        else { last }
    }
    close $c;
}
PERL
liars="short magic handle errno silent" liar_disks=() liar_pids=() names=(vda vdb vdc vdd vde)
for m in $liars; do
    perl "$tmp/liar.pl" "$tmp/$m.sock" $m 2>"$tmp/$m.log" &
    liar_pids+=($!)
    end=$((SECONDS + 60))
    until [ -S "$tmp/$m.sock" ] || [ $SECONDS -ge $end ]; do sleep 0.1; done
    liar_disks+=(--disk "$(uri "$m")")
done
doppel "${run[@]}" "${liar_disks[@]}" -- sh -c 'for d in vda vdb vdc vdd vde; do
    well=$(dd if=/dev/$d bs=4k count=4 2>/dev/null | tr -d B | wc -c); dd if=/dev/$d of=/dev/null bs=64k skip=32 count=1 2>/tmp/e; echo "$d: $well $? $(grep -o "Input/output error" /tmp/e)"; done' </dev/null
i=0
for m in $liars; do
    is "nbd: a server that answers wrong ($m)" "$(grep "^${names[i]}:" <<<"$out")" "${names[i]}: 0 1 Input/output error"
    i=$((i + 1))
done
is "nbd: servers that answer wrong: doppel's status" "$status" 0
kill "${liar_pids[@]}"; wait "${liar_pids[@]}" 2>/dev/null

# ---- images that change while they are used ----
# Cut short: what is not there any more is an I/O error, what is left is as it was, and a write makes the file longer again. Another file under the name: nobody notices. A second user: refused.
for i in a b c d e; do image "$tmp/$i.img"; tr '\0' x <"$tmp/$i.img" | dd of="$tmp/$i.img" conv=notrunc bs=1M 2>/dev/null; done
rm -f "$tmp/d.over"
[ -p "$tmp/in" ] || mkfifo "$tmp/in"
"$DOPPEL" "${run[@]}" --disk "$tmp/a.img" --disk "$tmp/b.img,io=threads" --disk "$tmp/c.img,bus=nvme" --disk "$tmp/d.img,overlay=$tmp/d.over" --disk "$tmp/e.img" <"$tmp/in" >"$tmp/out" 2>"$tmp/err" &
job=$!
exec 9>"$tmp/in"
wait_for "$tmp/out" '~# ' "$BOOT_SECONDS"
for d in a d; do
    "$DOPPEL" run --engine "$ENGINE" --disk "$tmp/$d.img" -- true </dev/null >"$tmp/second.out" 2>"$tmp/second.err"
    is "in use: a second machine with $d.img is refused" "$? $(grep -c 'in use by another' "$tmp/second.err")" "1 1"
done
"$DOPPEL" run --engine "$ENGINE" --disk "$tmp/a.img,overlay=$tmp/d.over" -- true </dev/null >/dev/null 2>"$tmp/second.err"
is "in use: and with its overlay" "$? $(grep -c 'in use by another' "$tmp/second.err")" "1 1"
"$DOPPEL" run --engine "$ENGINE" --disk "$tmp/d.img,overlay=$tmp/d.over" -- true </dev/null >/dev/null 2>"$tmp/second.err"
is "in use: the overlay alone" "$? $(grep -c 'overlay .* in use by another .* take another overlay' "$tmp/second.err")" "1 1"
echo 'modprobe nvme; until [ -b /dev/nvme0n1 ]; do sleep 0.1; done; dd if=/dev/zero of=/dev/vdc bs=64k seek=16 count=1 conv=fsync 2>/dev/null; echo over "written"' >&9
wait_for "$tmp/out" 'over written' 60
for i in a b c d; do truncate -s 1M "$tmp/$i.img"; done
truncate -s 64K "$tmp/d.over"
mv "$tmp/e.img" "$tmp/e.old"; image "$tmp/e.img"
cat >&9 <<'IN'
look() { dd if=/dev/$1 of=/dev/null iflag=direct bs=64k skip=$2 count=1 2>/dev/null && echo yes || echo no; }
for d in vda vdb nvme0n1 vdc; do echo "cut $d: $(look $d 4) $(look $d 128)"; done
for d in vda vdb nvme0n1; do dd if=/dev/zero of=/dev/$d oflag=direct bs=64k seek=128 count=1 2>/dev/null; echo "longer $d: $(look $d 128) $(look $d 200)"; done
echo "over vdc: $(look vdc 16)"
echo "swapped: $(dd if=/dev/vdd bs=64k skip=100 count=1 2>/dev/null | tr -d x | wc -c)"; dd if=/dev/zero of=/dev/vdd bs=64k count=1 conv=fsync 2>/dev/null; echo all "done"; poweroff
IN
wait_for "$tmp/out" 'all done' 120
wait $job
is "images that change: doppel's status" $? 0
exec 9>&-
tr -d '\r' <"$tmp/out" >"$tmp/told"
for d in vda vdb nvme0n1 vdc; do is "cut short: $d" "$(grep "^cut $d" "$tmp/told")" "cut $d: yes no"; done
for d in vda vdb nvme0n1; do is "cut short, and written behind the end: $d" "$(grep "^longer $d" "$tmp/told")" "longer $d: yes no"; done
is "cut short: the overlay's file" "$(grep '^over vdc' "$tmp/told")" "over vdc: no"
is "another file under its name" "$(grep '^swapped' "$tmp/told") $(head -c 65536 "$tmp/e.old" | tr -d '\0' | wc -c) $(tr -d '\0' <"$tmp/e.img" | wc -c)" "swapped: 0 0 0"
like "cut short: told" "$(cat "$tmp/err")" 'reading failed: Input/output error'

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

# ---- a disk with a boot sector, imported ----
# It reads the next sector by the firmware, writes that into the one behind, says it, and resets.
cat >"$tmp/boot.S" <<'S'
    .code16
    .globl _start
_start:
    cli
    xorw %ax, %ax
    movw %ax, %ds
    movw %ax, %es
    movw %ax, %ss
    movw $0x7c00, %sp
    sti
    movb %dl, drive
    movw $0x0201, %ax
    movw $0x0002, %cx
    movb $0, %dh
    movw $0x8000, %bx
    int $0x13
    jc fail
    movw $0x0301, %ax
    movw $0x0003, %cx
    movb $0, %dh
    movb drive, %dl
    movw $0x8000, %bx
    int $0x13
    jc fail
    movw $0x8000, %si
    jmp say
fail:
    movw $failed, %si
say:
    movw $0x3f8, %dx
1:  lodsb
    testb %al, %al
    jz 2f
    outb %al, %dx
    jmp 1b
2:  movb $0xfe, %al
    outb %al, $0x64
3:  hlt
    jmp 3b
drive: .byte 0
failed: .asciz "the disk cannot be read or written\n"
    .org 510
    .word 0xaa55
S
if [ ! -f /usr/share/seabios/bios-256k.bin ]; then
    skip "import of a disk with a boot sector" "the package seabios is not installed"
elif gcc -c -m32 -o "$tmp/boot.o" "$tmp/boot.S" && ld -m elf_i386 -Ttext=0x7c00 --oformat=binary -o "$tmp/boot.bin" "$tmp/boot.o"; then
    image "$tmp/boot.img" 8M
    dd if="$tmp/boot.bin" of="$tmp/boot.img" conv=notrunc status=none
    printf 'read by the firmware\n\0' | dd of="$tmp/boot.img" bs=512 seek=1 conv=notrunc status=none
    export DOPPEL_IMAGES=$tmp/store
    mkdir "$tmp/store"
    doppel image import "$tmp/boot.img" sector
    is "import of a disk with a boot sector" "$status" 0
    doppel image info sector
    like "import of a disk with a boot sector: it boots by firmware" "$out" 'boots by +firmware'
    doppel run sector --engine "$ENGINE" --quiet --net none --no-reboot </dev/null
    like "import of a disk with a boot sector: it boots" "$status $out" '^0 .*read by the firmware'
    doppel image info sector --check
    is "import of a disk with a boot sector: the image is as it was" "$status $out" "0 sector: the disk is as it was"
    doppel image rm sector
    is "import of a disk with a boot sector: removed" "$status $(ls -A "$tmp/store")" "0 "
    unset DOPPEL_IMAGES
else
    not_ok "the boot sector is built"
fi

# ---- no room for an overlay ----
# What was flushed before is there, and with room it goes on.
if unshare -rm true 2>/dev/null; then
    mkdir -p "$tmp/small"
    image "$tmp/base.img"
    # shellcheck disable=SC2016
    timeout -s KILL $((2 * BOOT_SECONDS)) unshare -rm bash -c 'mount -t tmpfs -o size=4m none "$1/small"
        run() { "$0" run "${@:3}" --disk "$1/base.img,overlay=$1/small/o.over,on-full=error" -- sh -c "$2" </dev/null; }
        dir=$1; shift
        run "$dir" "echo kept | dd of=/dev/vda bs=1M seek=15 conv=fsync 2>/dev/null; /disk_work fill /dev/vda" "$@"
        mount -o remount,size=64m "$dir/small"
        run "$dir" "dd if=/dev/vda bs=1M skip=15 count=1 2>/dev/null | head -n 1; /disk_work fill /dev/vda" "$@"' "$DOPPEL" "$tmp" "${run[@]:1}" >"$tmp/out" 2>"$tmp/err"
    is "no room for an overlay: doppel's status" $? 0
    like "no room for an overlay: an error, nothing that was flushed is lost, and with room it goes on" "$(tr -d '\r\0' <"$tmp/out" | paste -sd' ')" '^(writing|flushing): .*error kept filled$'
    like "no room for an overlay: told" "$(cat "$tmp/err")" 'No space left'
else
    skip "no room for an overlay" "user namespaces cannot be made here"
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
cp "$tmp/base.over" "$tmp/cut.over"; truncate -s 6000 "$tmp/cut.over"
refused "overlay: it has been cut off" 'it is cut short' "$tmp/base.img,overlay=$tmp/cut.over"
truncate -s 2M "$tmp/base.img"
refused "overlay: its base has another size" 'has another size now' "$tmp/base.img,overlay=$tmp/base.over"
truncate -s 1M "$tmp/base.img"; touch "$tmp/base.img"
refused "overlay: its base has been touched" 'time' "$tmp/base.img,overlay=$tmp/base.over"
refused "a folder" 'a directory' "$tmp"
refused "cache=none with an overlay" 'cache=' "$tmp/base.img,overlay,cache=none"
refused "cache=none, and a size that is no multiple" 'no multiple|no direct access' "$(truncate -s 100100 "$tmp/odd.img"; echo "$tmp/odd.img"),cache=none"
echo nonsense >"$tmp/base.over"
refused "overlay: it is none" 'is no overlay of doppel' "$tmp/base.img,overlay=$tmp/base.over"
refused "overlay: the base itself" 'in use' "$tmp/base.img,overlay=$tmp/base.img"

done_testing
