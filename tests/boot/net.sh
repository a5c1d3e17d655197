#!/bin/bash
# Networks as an ordinary user meets them: DHCP, DNS, TCP and UDP both ways by IPv4 and IPv6, published ports, restrict, captures, and options that cannot be.
# With user namespaces it runs in one of its own, where ports are free and the resolver is the test's. SOAK_LONG: 256 MiB instead of 16.
if [ -z "${NET_INSIDE-}" ]; then
    NET_INSIDE=none; export NET_INSIDE
    unshare -rmn true 2>/dev/null && NET_INSIDE=namespace exec unshare -rmn "$0" "$@"
fi
. "$(dirname "$0")/../lib/tap.sh"
guest=${DOPPEL_GUEST:-${BUILD:-$top/build}/guest}
peer=${BUILD:-$top/build}/boot/netpeer
bytes=$((16 << 20)); [ -z "${SOAK_LONG-}" ] || bytes=$((256 << 20))
engines=${ENGINES:-auto${SOAK_LONG:+ interp}}
run=(run --quiet --initrd "$tmp/initrd" --append "$(cat "$guest/cmdline")" --kernel "$guest/vmlinuz")
pids=()
trap 'kill "${pids[@]}" 2>/dev/null; rm -rf "$tmp"' EXIT

mkdir "$tmp/rd"; cp "$peer" "$tmp/rd/netpeer"
(cd "$tmp/rd" && echo netpeer | cpio --quiet -o -H newc) >"$tmp/more.cpio"
cat "$guest/initrd" "$tmp/more.cpio" >"$tmp/initrd"

# Runs the peer in the background with its output in a file, and waits until it listens.
host()                                              # file, arguments...
{
    local file=$tmp/$1
    shift
    "$peer" "$@" >"$file" 2>&1 &
    pids+=($!)
    until_line "$file" listening
}
until_line()                                        # file, word: does the last process started say it, in time?
{
    local i
    for ((i = 0; i < BOOT_SECONDS * 10; i++)); do
        grep -q "$2" "$1" 2>/dev/null && return
        kill -0 "${pids[-1]}" 2>/dev/null || return
        sleep 0.1
    done
    return 1
}
ended() { wait "${pids[-1]}"; echo "$(tail -n 1 "$tmp/$1" | sed 's/, .*//') $?"; }
# Ports of the host: the namespace's own, or some that nobody is likely to have.
base=20000; [ $NET_INSIDE = namespace ] || base=$((20000 + $$ % 20000))
port() { echo $((base + $1)); }

if [ $NET_INSIDE = namespace ]; then
    ip link set lo up
    echo "nameserver 127.0.0.1" >"$tmp/resolv.conf"
    mount --bind "$tmp/resolv.conf" /etc/resolv.conf
    host dns dns 127.0.0.1 host.test 192.0.2.7 2001:db8::7
fi

# ---- user network: one guest that does all of it ----
inside='
    say() { echo "$1: $(shift; "$@" 2>&1 | grep -v listening | tail -n 1 | sed "s/, .*//")"; }
    n=0; until ip -o -4 addr show dev eth0 | grep -q inet || [ $n = 600 ]; do sleep 0.1; n=$((n + 1)); done
    say address sh -c "ip -o -4 addr show dev eth0 | sed \"s/.*inet //;s/ .*//\""
    say resolver sed "s/nameserver //" /etc/resolv.conf
    n=0; until ip -6 addr show dev eth0 scope site | grep -v tentative | grep -q inet6 || [ $n = 100 ]; do sleep 0.1; n=$((n + 1)); done
    say name4 sh -c "nslookup -type=a host.test | sed -n \"s/^Address: //p\" | tail -n 1"
    say name6 sh -c "nslookup -type=aaaa host.test | sed -n \"s/^Address: //p\" | tail -n 1"
    say recv4 /netpeer connect 10.0.2.2 $1 recv $0
    say send4 /netpeer connect 10.0.2.2 $2 send $0
    say recv6 /netpeer connect fec0::2 $3 recv 1048576
    say udp4 /netpeer udp-ask 10.0.2.2 $4 20 1400
    say udp-large /netpeer udp-ask 10.0.2.2 $5 5 9000
    /netpeer listen 0.0.0.0 7000 recv $0 >/tmp/p4 & /netpeer listen :: 7001 recv 1048576 >/tmp/p6 & /netpeer udp-echo 0.0.0.0 7002 >/dev/null &
    p=$!; /netpeer udp-echo :: 7003 >/dev/null & q=$!
    n=0; until [ -s /tmp/p4 ] && [ -s /tmp/p6 ] || [ $n = 300 ]; do sleep 0.1; n=$((n + 1)); done
    echo ready
    wait $p $q; wait
    say published4 cat /tmp/p4; say published6 cat /tmp/p6
    exit 5'
user_network()                                      # engine, arguments...
{
    local engine=$1 name="$*"; shift
    host h1 listen 127.0.0.1 "$(port 1)" send $bytes; host h2 listen 127.0.0.1 "$(port 2)" recv $bytes
    host h3 listen ::1 "$(port 3)" send 1048576
    host h4 udp-echo 127.0.0.1 "$(port 4)"; host h5 udp-echo 127.0.0.1 "$(port 5)"
    : >"$tmp/out"
    timeout -k 10 "$BOOT_SECONDS" "$DOPPEL" "${run[@]}" --engine "$engine" "$@" --capture "$tmp/$engine.pcapng" --stats=json,file="$tmp/stats" \
        --publish "$(port 6):7000" --publish "[::1]:$(port 7):7001" --publish "$(port 8):7002/udp" --publish "[::1]:$(port 9):7003/udp" \
        -- sh -c "$inside" $bytes "$(port 1)" "$(port 2)" "$(port 3)" "$(port 4)" "$(port 5)" >"$tmp/out" 2>"$tmp/err" </dev/null &
    local doppel=$!
    pids+=($doppel)
    if until_line "$tmp/out" ready; then
        is "$name: published TCP, IPv4" "$("$peer" connect 127.0.0.1 "$(port 6)" send $bytes | sed 's/, .*//')" "$bytes bytes"
        is "$name: published TCP, IPv6" "$("$peer" connect ::1 "$(port 7)" send 1048576 | sed 's/, .*//')" "1048576 bytes"
        is "$name: published UDP, IPv4" "$("$peer" udp-ask 127.0.0.1 "$(port 8)" 20 1400)" "20 of 20"
        is "$name: published UDP, IPv6" "$("$peer" udp-ask ::1 "$(port 9)" 20 1400)" "20 of 20"
    else
        not_ok "$name: the guest is ready" "$(cat "$tmp/out" "$tmp/err")"
    fi
    wait $doppel; is "$name: exit status" $? 5
    local value
    while read -r what value; do
        [[ $NET_INSIDE = namespace || $what != name* ]] || { skip "$name: $what" "no user namespaces, so no resolver of the test's"; continue; }
        is "$name: $what" "$(sed -n "s/^$what: //p" "$tmp/out")" "$value"
    done <<W
address 10.0.2.15/24
resolver 10.0.2.3
name4 192.0.2.7
name6 2001:db8::7
recv4 $bytes bytes
send4 $bytes bytes
recv6 1048576 bytes
udp4 20 of 20
udp-large 5 of 5
published4 $bytes bytes
published6 1048576 bytes
W
    is "$name: the host received" "$(sed -n '$s/, .*//p' "$tmp/h2")" "$bytes bytes"
    # Every frame costs less than an exit: notifications are suppressed while the card's thread is at work.
    is "$name: fewer notifications than frames" "$(sed -n 's/.*"net0":{"sent":\([0-9]*\),.*"notifications":\([0-9]*\),.*/\1 \2/p' "$tmp/stats" |
        awk '{ print ($1 > 100 && $2 <= $1) }')" 1
}
for engine in $engines; do user_network "$engine"; done
user_network "${engines##* }" --net user,offload=off
user_network "${engines##* }" --cpus 2

# ---- the capture of the last one, by a reader that is not ours ----
capture=$tmp/${engines##* }.pcapng
if command -v tshark >/dev/null; then
    fields() { tshark -n -r "$capture" "$@" 2>>"$tmp/tshark"; }
    is "capture: the card" "$(fields -c 1 -T fields -e frame.interface_name)" net0
    is "capture: DHCP, and in which direction" "$(fields -Y dhcp -T fields -e dhcp.option.dhcp -e frame.packet_flags_direction | sort -u | paste -sd ' ')" \
        $'1\t0x00000002 2\t0x00000001 3\t0x00000002 5\t0x00000001'
    is "capture: all of a stream" "$(fields -Y "tcp.srcport == $(port 1)" -T fields -e tcp.len | awk '{ n += $1 } END { print (n >= '$bytes') }')" 1
    # Segments that were cut later: each is as long as its headers say, some are longer than a frame on a wire, and together they are all of the stream, without a gap.
    is "capture: large segments from the guest, none missing" "$(fields -Y "tcp.dstport == $(port 2) && tcp.len > 0" -T fields -e tcp.seq -e tcp.len -e ip.len -e frame.len |
        awk 'BEGIN { next_seq = 1; ok = 1 } { if ($3 + 14 != $4 || $1 > next_seq) ok = 0; if ($2 > 1460) large++; if ($1 + $2 > next_seq) next_seq = $1 + $2 }
            END { print ok, (large > 0), next_seq - 1 }')" "1 1 $bytes"
    is "capture: large segments to the guest, none missing" "$(fields -Y "tcp.srcport == $(port 3) && tcp.len > 0" -T fields -e tcp.seq -e tcp.len -e ipv6.plen -e frame.len |
        awk 'BEGIN { next_seq = 1; ok = 1 } { if ($3 + 54 != $4 || $1 > next_seq) ok = 0; if ($2 > 1440) large++; if ($1 + $2 > next_seq) next_seq = $1 + $2 }
            END { print ok, (large > 0), next_seq - 1 }')" "1 1 1048576"
    stream=$(fields -Y "tcp.srcport == $(port 3)" -T fields -e tcp.stream | head -n 1)
    is "capture: the stream put together again is what was sent" "$(tshark -n -q -r "$capture" -z "follow,tcp,raw,${stream:-0}" 2>>"$tmp/tshark" |
        perl -ne 'print pack "H*", $1 if /^\t?([0-9a-f]+)$/' | sha256sum)" "$("$peer" data 1048576 | sha256sum)"
    is "capture: IPv6 and UDP are in it" "$(fields -Y 'ipv6 && tcp' | head -n 1 | wc -l; fields -Y "udp.port == $(port 4)" | head -n 1 | wc -l)" $'1\n1'
    is "capture: time in nanoseconds goes forward" "$(fields -T fields -e frame.time_epoch | awk 'BEGIN { ok = 1 } $1 + 0.001 < last { ok = 0 } { last = $1; if (length($1) < 20) ok = 0 } END { print ok }')" 1
    is "capture: nothing malformed" "$(grep -ciE 'malformed|cut short|corrupt' "$tmp/tshark")" 0
else
    skip capture "tshark is not installed"
fi
small()                                             # a file system of 1 MiB for the capture's file
{
    mkdir -p "$tmp/small"; mount -t tmpfs -o size=1m none "$tmp/small"
}
if [ $NET_INSIDE = namespace ] && small 2>/dev/null; then
    host h1 listen 127.0.0.1 "$(port 1)" send $bytes
    timeout -k 10 "$BOOT_SECONDS" "$DOPPEL" "${run[@]}" --capture "$tmp/small/full.pcapng" --net user -- /netpeer connect 10.0.2.2 "$(port 1)" recv $bytes \
        >"$tmp/out" 2>"$tmp/err" </dev/null
    is "full disk: the network goes on" "$(tail -n 1 "$tmp/out" | sed 's/, .*//')" "$bytes bytes"
    like "full disk: the user is told" "$(cat "$tmp/err")" 'full\.pcapng: No space left on device; it ends here'
    is "full disk: whole packets only" "$(! command -v tshark >/dev/null || tshark -r "$tmp/small/full.pcapng" 2>&1 >/dev/null | grep -ci 'cut short')" \
        "$(command -v tshark >/dev/null && echo 0)"
    umount "$tmp/small"
else
    skip "full disk" "a file system cannot be mounted here"
fi

# ---- restrict: nothing goes out, what is published comes in ----
host h1 listen 127.0.0.1 "$(port 1)" send 1000
timeout -k 10 "$BOOT_SECONDS" "$DOPPEL" "${run[@]}" --net user,restrict --publish "$(port 6):7000" -- sh -c '
    n=0; until ip -o -4 addr show dev eth0 | grep -q inet || [ $n = 600 ]; do sleep 0.1; n=$((n + 1)); done
    ip -o -4 addr show dev eth0 | sed "s/.*inet //;s/ .*//"
    timeout 3 /netpeer connect 10.0.2.2 $0 recv 1000 | tail -n 1
    timeout 3 nslookup host.test >/dev/null 2>&1 && echo resolved
    exec /netpeer listen 0.0.0.0 7000 recv 5000' "$(port 1)" >"$tmp/out" 2>"$tmp/err" </dev/null &
pids+=($!)
until_line "$tmp/out" listening
"$peer" connect 127.0.0.1 "$(port 6)" send 5000 >/dev/null
wait "${pids[-1]}"
is "restrict" "$(sed 's/, .*//' "$tmp/out")" $'10.0.2.15/24\nconnect: Connection refused\nlistening\n5000 bytes'

# ---- two cards, an address of the user's, none at all ----
doppel "${run[@]}" --net user,mac=02:aa:bb:cc:dd:ee,mtu=1400 --net user -- sh -c 'for i in eth0 eth1; do
    n=0; until ip -o -4 addr show dev $i | grep -q inet || [ $n = 600 ]; do sleep 0.1; n=$((n + 1)); done
    cat /sys/class/net/$i/address /sys/class/net/$i/mtu; ip -o -4 addr show dev $i | sed "s/.*inet //;s/ .*//"; done' </dev/null
is "two cards" "$(paste -sd ' ' <<<"$out")" "02:aa:bb:cc:dd:ee 1400 10.0.2.15/24 52:54:00:12:34:57 1500 10.0.3.15/24"
doppel "${run[@]}" --net none -- ls /sys/class/net </dev/null
is "no card" "$out" lo

# ---- what cannot be ----
refused()                                           # name, status, pattern, arguments...
{
    local name=$1 want=$2 pattern=$3
    shift 3
    doppel "${run[@]}" "$@" -- true </dev/null
    is "$name: status" "$status" "$want"
    like "$name: message" "$err" "$pattern"
}
host busy bind 127.0.0.1 "$(port 6)" tcp
host busy2 bind 127.0.0.1 "$(port 8)" udp
refused "port in use" 1 "port $(port 6) of the host is in use" --publish "$(port 6):80"
refused "port in use, UDP" 1 "port $(port 8) of the host is in use" --publish "$(port 8):80/udp"
refused "an address that is not the host's" 1 "does not have this address" --publish "192.0.2.1:$(port 9):80"
refused "no capture can be made" 1 "cannot open it" --capture "$tmp/none/x"
refused "no such tap" 1 "tap none-such" --net tap=none-such-0123456
refused "no descriptor" 1 "fd=77" --net fd=77
refused "no tap's descriptor" 1 "no tap device" --net fd=9 9>"$tmp/file"
refused "no passt" 1 "start it before" --net passt="$tmp/none"
# As an ordinary user is: without the right to take ports below 1024 (which are those that need one: the namespace's own setting).
plain=()
[ "$(id -u)" != 0 ] || plain=(setpriv --bounding-set -net_bind_service --inh-caps -net_bind_service)
if "${plain[@]}" true 2>/dev/null && [ "$(cat /proc/sys/net/ipv4/ip_unprivileged_port_start)" -gt 80 ]; then
    for words in 80:80 80:80/udp "[::1]:80:80"; do
        timeout -k 10 "$BOOT_SECONDS" "${plain[@]}" "$DOPPEL" "${run[@]}" --publish "$words" -- true >"$tmp/out" 2>"$tmp/err" </dev/null
        is "--publish $words, a port that is not for users: status" $? 1
        like "--publish $words, a port that is not for users: message" "$(cat "$tmp/err")" 'port 80 of the host is not for ordinary users'
    done
else
    skip "ports that are not for users" "this user may take them all"
fi
done_testing
