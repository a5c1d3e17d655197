#!/bin/bash
# Guests that write random values to every port, every register and into virtqueues, against doppel built with ASan and UBSan: whatever becomes of the guest, the
# monitor ends in one of its documented ways and no sanitizer speaks. CHAOS_SECONDS for each kind (default 20).
. "$(dirname "$0")/../lib/tap.sh"
DOPPEL=${DOPPEL_ASAN:-$top/build/asan/doppel}
chaos=${BUILD:-$top/build}/hostile/chaos
seconds=${CHAOS_SECONDS:-20}
export ASAN_OPTIONS=abort_on_error=1 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1
truncate -s 1M "$tmp/disk"

for kind in ports mmio virtq all; do
    for cpus in 1 2; do
        end=$((SECONDS + seconds / 2)) bad= started=
        while [ $SECONDS -lt $end ] && [ -z "$bad" ]; do
            # A machine that is still running after a while is told to stop: the second SIGTERM ends at once.
            timeout -k 20 "$((seconds / 2 + 5))" "$DOPPEL" run --engine interp --quiet --cpus $cpus --memory 512M --kernel "$chaos" --append "$kind" --disk "$tmp/disk" \
                --console "$tmp/serial" </dev/null >"$tmp/out" 2>"$tmp/err" &
            pid=$!
            while kill -0 $pid 2>/dev/null && [ $SECONDS -lt $end ]; do sleep 0.1; done
            child=$(pgrep -P $pid) && { kill -TERM $child; sleep 0.3; kill -TERM $child; } 2>/dev/null
            wait $pid; status=$?
            grep -q "chaos: $kind" "$tmp/serial" && started=1
            case $status in
                0 | 1 | 70 | 71 | 143) ;;
                *) bad="exit status $status" ;;
            esac
            grep -qE 'Sanitizer|runtime error|doppel: bug' "$tmp/err" && bad="a sanitizer or an assertion speaks"
            [ $status = 1 ] && ! grep -q 'doppel' "$tmp/err" && bad="status 1 without a message"
        done
        if [ -n "$bad" ]; then
            not_ok "chaos: $kind, $cpus vCPU" "$bad" "$(tail -n 40 "$tmp/err")"
        elif [ -z "$started" ]; then
            not_ok "chaos: $kind, $cpus vCPU" "the guest did not start" "$(cat "$tmp/err")"
        else
            ok "chaos: $kind, $cpus vCPU"
        fi
    done
done
done_testing
