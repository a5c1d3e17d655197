#!/bin/bash
# iperf3 between guest and host, both ways and both at once, streams and datagrams, over the user network and (several queues, MTU 9000) a tap device: all that is asked for is sent and arrives, with
# error and, of datagrams, next to no loss. Debian's iperf3 runs at both ends. SOAK_LONG: 1 GiB instead of 16 MiB each, and by IPv6, too.
if [ -z "${NET_INSIDE-}" ]; then
    NET_INSIDE=none; export NET_INSIDE
    unshare -rmn true 2>/dev/null && NET_INSIDE=namespace exec unshare -rmn "$0" "$@"
fi
. "$(dirname "$0")/../lib/tap.sh"
. "$top/tests/lib/nested.sh"
guest=${DOPPEL_GUEST:-${BUILD:-$top/build}/guest}
MiB=${SOAK_LONG:+1024}; MiB=${MiB:-16}
run=(run --engine "$ENGINE" --quiet --cpus 2 --memory 512M --initrd "$tmp/initrd" --kernel "$guest/vmlinuz")
trap '[ -z "${server-}" ] || kill $server 2>/dev/null; rm -rf "$tmp"' EXIT
command -v iperf3 >/dev/null || { skip iperf3 "it is not installed"; done_testing; }

mkdir -p "$tmp/guest/root/tmp"
nested_add "$tmp/guest" "$(command -v iperf3)" /bin/iperf3
(cd "$tmp/guest/root" && find . -mindepth 1 | cpio --quiet -o -H newc -R 0:0) >"$tmp/more.cpio"
cat "$guest/initrd" "$tmp/more.cpio" >"$tmp/initrd"
[ $NET_INSIDE != namespace ] || ip link set lo up
port=$((20000 + $$ % 20000))

# In the guest: one run of iperf3 per argument string; its JSON between marks. The server takes one client after the other; a moment passes until it listens anew.
inside='
    n=0; until ip link show eth0 >/dev/null 2>&1 || [ $n = 300 ]; do sleep 0.1; n=$((n + 1)); done
    if [ -n "$NET_ADDRESS" ]; then ip link set eth0 up; ip addr add $NET_ADDRESS dev eth0; else
        n=0; until ip -o -4 addr show dev eth0 | grep -q inet || [ $n = 600 ]; do sleep 0.1; n=$((n + 1)); done; fi
    for words; do
        n=0
        until iperf3 -J -p $NET_PORT $words >/tmp/out 2>&1 || [ $n = 20 ] || ! grep -qE "busy|refused|unable to connect" /tmp/out; do sleep 0.5; n=$((n + 1)); done
        echo "== $words"; cat /tmp/out
    done'
# One field of the report of a run: of "sum_received" and so on, in the order of iperf3.
field()                                             # words, object, field
{
    awk -v mark="== $1" -v object="\"$2\":" -v field="\"$3\":" '
        /^== / { on = $0 == mark; inside = 0 }
        on && $1 == object { inside = 1 }
        on && inside && $1 == field { gsub(/,/, "", $2); print $2; exit }' "$tmp/out"
}
both_ends()                                         # name, host's address, guest's ("": by DHCP), doppel's arguments...
{
    local name=$1 host=$2 address=$3 words runs
    shift 3
    runs=("-c $host -n ${MiB}M" "-c $host -n ${MiB}M -R" "-c $host -n ${MiB}M -P 4" "-c $host -n ${MiB}M -P 4 -R" "-c $host -t $seconds --bidir" "-c $host -u -b 20M -l 1400 -n ${udp}M"
        "-c $host -u -b 20M -l 1400 -n ${udp}M -R")
    iperf3 -s -p "$port" >"$tmp/server" 2>&1 & server=$!
    timeout -k 10 "$((BOOT_SECONDS + MiB))" "$DOPPEL" "${run[@]}" --append "$(cat "$guest/cmdline")${address:+ doppel.net=off}" "$@" \
        -- env NET_PORT="$port" NET_ADDRESS="$address" sh -c "$inside" iperf "${runs[@]}" >"$tmp/out" 2>"$tmp/err" </dev/null
    is "$name: status" $? 0
    is "$name: no error" "$(grep -m 3 '"error"' "$tmp/out")" ""
    for words in "${runs[@]}"; do
        case $words in
            *' -u '*) is "$name: $words: datagrams arrive" "$(field "$words" sum lost_percent | awk '{ print ($1 != "" && $1 < 90) }')" 1 ;;
            *--bidir) is "$name: $words: both directions flow" \
                "$(echo "$(field "$words" sum_sent bytes) $(field "$words" sum_received_bidir_reverse bytes)" | awk '{ print ($1 > 0 && $2 > 0) }')" 1 ;;
            *-R) is "$name: $words: all is received" "$(field "$words" sum_received bytes | awk '{ print ($1 >= '$((MiB << 20))') }')" 1 ;;
            *) is "$name: $words: all is sent" "$(field "$words" sum_sent bytes | awk '{ print ($1 >= '$((MiB << 20))') }')" 1 ;;
        esac
    done
    kill $server; wait $server 2>/dev/null; server=
}
seconds=2 udp=2
[ -z "${SOAK_LONG-}" ] || seconds=60 udp=100

both_ends "user network" 10.0.2.2 ""
[ -z "${SOAK_LONG-}" ] || both_ends "user network, IPv6" fec0::2 ""
if [ $NET_INSIDE = namespace ] && ip tuntap add dev tap0 mode tap multi_queue 2>"$tmp/err"; then
    ip link set tap0 mtu 9000 up; ip addr add 10.9.0.1/24 dev tap0
    both_ends "tap, two queues, MTU 9000" 10.9.0.1 10.9.0.2/24 --net tap=tap0,queues=2
else
    skip "tap" "no tap device can be made here"
fi
done_testing
