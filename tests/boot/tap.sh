#!/bin/bash
# Networks that the host makes: tap devices in a network namespace of the test's (by name with an MTU of 9000, several queues, by descriptor without the kernel's offloads),
# and passt. SOAK_LONG: 256 MiB instead of 16.
if [ -z "${NET_INSIDE-}" ]; then
    NET_INSIDE=none; export NET_INSIDE
    unshare -rmn true 2>/dev/null && NET_INSIDE=namespace exec unshare -rmn "$0" "$@"
fi
. "$(dirname "$0")/../lib/tap.sh"
guest=${DOPPEL_GUEST:-${BUILD:-$top/build}/guest}
peer=${BUILD:-$top/build}/boot/netpeer
bytes=$((16 << 20)); [ -z "${SOAK_LONG-}" ] || bytes=$((256 << 20))
run=(run --engine "$ENGINE" --quiet --initrd "$tmp/initrd" --kernel "$guest/vmlinuz" --append "$(cat "$guest/cmdline")")
pids=()
trap 'kill "${pids[@]}" 2>/dev/null; rm -rf "$tmp"' EXIT
if [ $NET_INSIDE != namespace ]; then
    skip "networks of the host's" "user namespaces cannot be made here"
    done_testing
fi

mkdir "$tmp/rd"; cp "$peer" "$tmp/rd/netpeer"
(cd "$tmp/rd" && echo netpeer | cpio --quiet -o -H newc) >"$tmp/more.cpio"
cat "$guest/initrd" "$tmp/more.cpio" >"$tmp/initrd"
ip link set lo up

host()                                              # file, arguments of the peer: in the background, until it listens
{
    local i file=$tmp/$1
    shift
    "$peer" "$@" >"$file" 2>&1 &
    pids+=($!)
    for ((i = 0; i < 600; i++)); do
        grep -q listening "$file" 2>/dev/null && return
        kill -0 "${pids[-1]}" 2>/dev/null || return
        sleep 0.1
    done
}

# In the guest: an address of the test's, then both directions at full MTU, IPv6, and what was agreed on.
inside='
    n=0; until ip link set eth0 up 2>/dev/null || [ $n = 300 ]; do sleep 0.1; n=$((n + 1)); done; ip addr add 10.9.0.2/24 dev eth0
    echo "mtu $(cat /sys/class/net/eth0/mtu)"
    echo "features $(cut -c1-2,8-9,12-13,16,23 /sys/class/net/eth0/device/features)"
    echo "ping $(ping -c 3 -s $1 10.9.0.1 | grep -c "bytes from")"
    echo "recv $(/netpeer connect 10.9.0.1 7000 recv $0 | sed "s/, .*//")"
    echo "send $(/netpeer connect 10.9.0.1 7001 send $0 | sed "s/, .*//")"
    echo "udp $(/netpeer udp-ask 10.9.0.1 7002 10 $1)"
    echo "queues $(ls -d /sys/class/net/eth0/queues/rx-* | wc -l)"'
# name, MTU, queues, wanted features, payload of pings, command before doppel, arguments
tap()
{
    local name=$1 mtu=$2 queues=$3 features=$4 size=$5
    shift 5
    ip link del tap0 2>/dev/null
    # shellcheck disable=SC2046
    if ! ip tuntap add dev tap0 mode tap $([ "$queues" = 1 ] || echo multi_queue) 2>"$tmp/err"; then
        skip "$name" "$(head -n 1 "$tmp/err")"
        return
    fi
    ip link set tap0 mtu "$mtu" up; ip addr add 10.9.0.1/24 dev tap0
    host h1 listen 10.9.0.1 7000 send $bytes; host h2 listen 10.9.0.1 7001 recv $bytes; host h3 udp-echo 10.9.0.1 7002
    timeout -k 10 "$BOOT_SECONDS" "$@" -- sh -c "$inside" $bytes "$size" >"$tmp/out" 2>"$tmp/err" </dev/null
    is "$name" "$(cat "$tmp/out")" "mtu $mtu
features $features
ping 3
recv $bytes bytes
send $bytes bytes
udp 10 of 10
queues $queues"
    is "$name: the host received" "$(sed -n '$s/, .*//p' "$tmp/h2")" "$bytes bytes"
    kill "${pids[@]}" 2>/dev/null; pids=()
}
run[-1]+=" doppel.net=off"
# CSUM GUEST_CSUM, GUEST_TSO4 TSO6, HOST_TSO4 TSO6, MRG_RXBUF, MQ
tap "tap by name, MTU 9000" 9000 1 11111110 8900 "$DOPPEL" "${run[@]}" --net tap=tap0
tap "tap, two queues" 1500 2 11111111 1400 "$DOPPEL" "${run[@]}" --cpus 2 --net tap=tap0,queues=2
tap "tap by descriptor" 1500 1 11111110 1400 "$peer" tap tap0 vnet 1 -- "$DOPPEL" "${run[@]}" --net fd=10
tap "tap by descriptor, without the kernel's offloads" 1500 1 11111110 1400 "$peer" tap tap0 plain 1 -- "$DOPPEL" "${run[@]}" --net fd=10
tap "tap by two descriptors" 1500 2 11111111 1400 "$peer" tap tap0 vnet 2 -- "$DOPPEL" "${run[@]}" --cpus 2 --net fd=10:11

# The interface goes while the guest runs: its card has no link then, and all else goes on.
if ip link show tap0 >/dev/null 2>&1; then
    ip link del tap0; ip tuntap add dev tap0 mode tap; ip link set tap0 up
    timeout -k 10 "$BOOT_SECONDS" "$DOPPEL" "${run[@]}" --net tap=tap0 -- sh -c 'n=0; until [ "$(cat /sys/class/net/eth0/carrier 2>/dev/null)" = 1 ] || [ $n = 300 ]; do ip link set eth0 up 2>/dev/null; sleep 0.1; n=$((n + 1)); done; echo ready; n=0
        until [ "$(cat /sys/class/net/eth0/carrier 2>/dev/null)" = 0 ] || [ $n = 600 ]; do sleep 0.1; n=$((n + 1)); done; cat /sys/class/net/eth0/carrier' \
        >"$tmp/out" 2>"$tmp/err" </dev/null &
    doppel=$!
    for ((i = 0; i < BOOT_SECONDS * 10; i++)); do
        grep -q ready "$tmp/out" && break
        kill -0 $doppel 2>/dev/null || break
        sleep 0.1
    done
    ip link del tap0
    wait $doppel
    is "tap is deleted: the guest sees it" "$(cat "$tmp/out")" $'ready\n0'
    like "tap is deleted: the user is told" "$(cat "$tmp/err")" 'tap tap0: it has gone'
    doppel "${run[@]}" --net tap=lo -- true </dev/null
    like "no tap device" "$err" 'tap lo: it is no tap device'
fi

# ---- passt ----
run[-1]=${run[-1]% doppel.net=off}
for mode in quit liar; do
    host p passt "$tmp/passt" $mode
    doppel "${run[@]}" --net passt="$tmp/passt" -- sh -c 'n=0; until [ "$(cat /sys/class/net/eth0/carrier 2>/dev/null)" = 0 ] || [ $n = 300 ]; do sleep 0.1; n=$((n + 1)); done
        cat /sys/class/net/eth0/carrier' </dev/null
    is "passt that says nonsense or ends ($mode): the guest sees it" "$out" 0
    like "passt that says nonsense or ends ($mode): the user is told" "$err" 'passt.*it has gone'
done
host p passt "$tmp/passt" mute
doppel "${run[@]}" --net passt="$tmp/passt" -- sh -c 'ping -c 1 -W 1 10.0.0.1 >/dev/null; echo alive' </dev/null
is "passt that answers nothing" "$out" alive
if command -v passt >/dev/null; then
    # What passt takes for the way out: any interface with a default route.
    ip tuntap add dev up0 mode tap && ip addr add 192.168.77.2/24 dev up0 && ip link set up0 up && ip route add default via 192.168.77.1
    passt()
    {
        timeout 300 passt -f -q --socket "$tmp/real" >"$tmp/passt.log" 2>&1 &
        passt=$!; pids+=($passt)
        for ((i = 0; i < 100; i++)); do [ ! -S "$tmp/real" ] && kill -0 $passt 2>/dev/null || break; sleep 0.1; done
    }
    passt
    if [ -S "$tmp/real" ]; then
        host h1 listen 127.0.0.1 7000 send $bytes; host h2 listen 127.0.0.1 7001 recv $bytes
        doppel "${run[@]}" --net passt="$tmp/real" -- sh -c 'n=0; until ip -o -4 addr show dev eth0 | grep -q inet || [ $n = 600 ]; do sleep 0.1; n=$((n + 1)); done; ip -o -4 addr show dev eth0 | sed "s/.*inet //;s/ .*//"
            /netpeer connect 192.168.77.1 7000 recv $0 | sed "s/, .*//"; /netpeer connect 192.168.77.1 7001 send $0 | sed "s/, .*//"' $bytes </dev/null
        is "passt" "$out" "192.168.77.2/24"$'\n'"$bytes bytes"$'\n'"$bytes bytes"
        # It dies and comes back while the guest runs: no link, then one again, over which streams go as before.
        kill $passt; wait $passt 2>/dev/null; rm -f "$tmp/real"; passt
        host h1 listen 127.0.0.1 7000 send $bytes; host h2 listen 127.0.0.1 7001 recv $bytes
        : >"$tmp/out"
        timeout -k 10 "$BOOT_SECONDS" "$DOPPEL" "${run[@]}" --net passt="$tmp/real" -- sh -c 'n=0; until ip -o -4 addr show dev eth0 | grep -q inet || [ $n = 600 ]; do sleep 0.1; n=$((n + 1)); done
            carrier() { n=0; until [ "$(cat /sys/class/net/eth0/carrier)" = $1 ] || [ $n = 600 ]; do sleep 0.1; n=$((n + 1)); done; cat /sys/class/net/eth0/carrier; }
            /netpeer connect 192.168.77.1 7000 recv $0 | sed "s/, .*//"; echo ready; carrier 0; carrier 1; /netpeer connect 192.168.77.1 7001 send $0 | sed "s/, .*//"' $bytes \
            >"$tmp/out" 2>"$tmp/err" </dev/null &
        doppel=$!
        until_says() { local i; for ((i = 0; i < BOOT_SECONDS * 10; i++)); do grep -qx "$1" "$tmp/out" && return; kill -0 $doppel 2>/dev/null || return; sleep 0.1; done; }
        until_says ready; kill $passt; wait $passt 2>/dev/null; rm -f "$tmp/real"
        until_says 0; passt
        wait $doppel
        is "passt that dies and comes back" "$(cat "$tmp/out")" "$bytes bytes"$'\n'ready$'\n'0$'\n'1$'\n'"$bytes bytes"
        like "passt that dies and comes back: the user is told" "$(cat "$tmp/err")" 'passt .*it has gone.*no link until it is back'
    else
        skip passt "it does not run here: $(grep . "$tmp/passt.log" | head -n 1)"
    fi
else
    skip passt "it is not installed"
fi
done_testing
