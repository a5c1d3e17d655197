#!/bin/bash
# The guest's clocks beside the host's: how far they drift apart; and over a pause at the monitor's prompt, which guest time hides: nothing goes back, no timer is
# lost, and no interrupts come in a storm behind it. Figures are printed; what is asked for leaves room for a busy host, and for how uncertain the figures are (clocks.c).
#
# With SOAK_LONG it looks for an hour (DRIFT_MINUTES), and asks for more.
. "$(dirname "$0")/../lib/tap.sh"
export DOPPEL_GUEST=${DOPPEL_GUEST:-${BUILD:-$top/build}/guest}
seconds=15 most_ppm=100
[ -z "${SOAK_LONG:-}" ] || seconds=$((${DRIFT_MINUTES:-60} * 60)) most_ppm=20
gcc -std=gnu17 -O1 -Wall -Wextra -static -pthread -o "$tmp/clocks" "$top/tests/time/clocks.c" || { not_ok "clocks.c compiles"; done_testing; }
cp "$tmp/clocks" "$tmp/disk" && truncate -s %512 "$tmp/disk"

measure()                                           # drift or pause, seconds, options: figures in $tmp/figures, as shell variables
{
    local what=$1 length=$2
    shift 2
    timeout -k 10 $((length + 250)) "$tmp/clocks" "$what" "$length" "$DOPPEL" run --quiet "$@" --disk "$tmp/disk,readonly" -- \
        sh -c 'cat /dev/vda >/tmp/c; chmod +x /tmp/c; cat /sys/devices/system/clocksource/clocksource0/current_clocksource >/tmp/before; /tmp/c guest
            cmp -s /tmp/before /sys/devices/system/clocksource/clocksource0/current_clocksource && ! dmesg | grep -iq "clocksource.*unstable"' >"$tmp/figures" 2>"$tmp/err"
    is "$what: both programs end well, with the same clocksource" "$? $(tail -n 3 "$tmp/err")" "0 "
    paste -sd ' ' "$tmp/figures" | fold -s -w 140 | sed 's/^/# /'
}
holds()                                             # name, condition of awk's with $NAME for figures
{
    if awk -F= -v OFS== '{ v[$1] = $2 } END { if (!('"$(sed 's/\$\([a-z_]*\)/v["\1"]/g' <<<"$2")"')) exit 1 }' "$tmp/figures"; then ok "$1"
    else not_ok "$1" "not so: $2" "$(cat "$tmp/figures")"; fi
}

engine=(--engine bt --cpus 2)
[ "$ENGINE" = auto ] || engine=(--engine "$ENGINE" --cpus 2)
measure drift "$seconds" "${engine[@]}"
holds "drift: the clock that nobody slews" '$raw_ppm ^ 2 < ('$most_ppm' + $uncertain_ppm) ^ 2'
holds "drift: the TSC" '$tsc_ppm ^ 2 < ('$most_ppm' + $uncertain_ppm) ^ 2'
holds "drift: monotonic time, but for the host's own slewing" '($monotonic_ppm + $host_slew_ppm) ^ 2 < ('$most_ppm' + $uncertain_ppm) ^ 2'
holds "drift: time of day, to half a second, as the kernel reads it from the RTC" '$realtime_off_ms ^ 2 < 1500 ^ 2'
holds "drift: nothing goes back" '$back == 0'
holds "drift: a periodic timer expires as often as time says" '$expired <= $periods + 2 && $expired >= $periods - 200'

measure pause 5 "${engine[@]}"
holds "pause: the guest stands still" '$answers_while_paused == 0'
holds "pause: guest time hides it" '$hidden_seconds > $pause_seconds - 0.5 && $hidden_seconds < $pause_seconds + 10'
holds "pause: so does the TSC" '$tsc_hidden_share > 0.98 && $tsc_hidden_share < 1.02'
holds "pause: nothing goes back" '$back == 0'
holds "pause: no leap" '$gap_ms < 700 * $pause_seconds'
holds "pause: a periodic timer expires as often as guest time says" '$expired <= $periods + 2 && $expired >= $periods - 200'
holds "pause: no storm of timer interrupts behind it" '$loc_over_pause < 2 * $loc_expected + 500 && $loc_per_second_after < 2 * $loc_per_second_before + 500'
holds "pause: the time of day is the host's" '$realtime_off_ms ^ 2 < 2000 ^ 2'
done_testing
