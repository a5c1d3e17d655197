#!/bin/bash
# What is told of a running guest: --profile with the names of its kernel's functions, --stats and the monitor's stats, --trace, on both software
# engines. A guest that reads random numbers shows whether shares and names are right: its kernel does little but compute ChaCha20 then.
. "$(dirname "$0")/../lib/tap.sh"
lines_of() { awk -v part="$1" '/^[A-Z]/ { on = index($0, part) == 1; next } on && NF' "$2"; }   # part of a profile, file

for engine in interp bt; do
    doppel run --quiet --engine $engine --profile "$tmp/profile" --stats=json,file="$tmp/stats" --trace faults,interrupts,exits,file="$tmp/trace" \
        -- sh -c 'cat /proc/kallsyms; cat /dev/urandom >/dev/null & sleep 2; kill $!' </dev/null
    is "$engine: the run ends well" "$status:$err" "0:"
    like "$engine: profile: what was run, and its kernel's symbols" "$(head -n 1 "$tmp/profile")" \
        "^doppel profile: engine $engine, 1 vCPU, [0-9.]+ s of guest time, 997 samples a second; [1-9][0-9]{4,} symbols"
    # Functions that were met are the guest's own: as /proc/kallsyms has them, which the guest has printed.
    awk '{ print $3 }' "$tmp/out" | sort -u >"$tmp/names"
    lines_of "The guest" "$tmp/profile" | grep -v ' page 0x' | awk '{ print $NF }' | sort -u >"$tmp/met"
    is "$engine: profile: there are many functions" "$([ "$(wc -l <"$tmp/met")" -ge 20 ] && echo yes)" yes
    is "$engine: profile: all of them are in /proc/kallsyms" "$(comm -23 "$tmp/met" "$tmp/names")" ""
    like "$engine: profile: what most time is for" "$(lines_of "The guest" "$tmp/profile" | head -n 2)" ' chacha_'
    where=interpreter
    [ $engine = interp ] || where=translated
    like "$engine: profile: and $where is where it goes" "$(lines_of "Where" "$tmp/profile" | sort -rn | head -n 2)" " %  $where"
    is "$engine: profile: shares make a whole" "$(lines_of "Where" "$tmp/profile" | awk '{ n += $1 } END { print (n > 99 && n < 101) }')" 1
    like "$engine: profile: the monitor's functions have names" "$(lines_of "The monitor" "$tmp/profile" | awk '{ print $NF }' | tr '\n' ' ')" \
        '(icpu|bt|code|tlb)_[a-z]+ '
    like "$engine: stats: JSON with counters and time" "$(cat "$tmp/stats")" \
        '"vcpus":\[\{"id":0,"instructions":[1-9][0-9]{6,},.*"interrupts":[1-9].*"page-faults":[1-9].*"tlb-misses-read":[1-9].*"blocks-decoded":[1-9].*"samples":[1-9]'
    is "$engine: stats: JSON is whole" "$(tr -cd '{[' <"$tmp/stats" | wc -c)" "$(tr -cd '}]' <"$tmp/stats" | wc -c)"
    if [ $engine = bt ]; then
        like "$engine: stats: translations, exits by cause with time, what the cache holds" "$(cat "$tmp/stats")" \
            '"blocks-translated":[1-9].*"direct-jump":[1-9].*"exit-time":\{"direct-jump-percent":[0-9.]+.*"cache":\{"translations":[1-9].*"translating":\{"us":[1-9][0-9]*,"ns-per-block":[1-9]'
    fi
    # What was counted is in the trace, each time.
    counted() { grep -oE "\"$1\":[0-9]+" "$tmp/stats" | head -n 1 | cut -d: -f2; }
    is "$engine: trace: page faults" "$(grep -c ' faults  *#PF' "$tmp/trace")" "$(counted page-faults)"
    is "$engine: trace: interrupts" "$(grep -c ' interrupts *interrupt ' "$tmp/trace")" "$(counted interrupts)"
    [ $engine = interp ] || is "$engine: trace: exits" "$(grep -c ' exits  *look-up, rip 0x' "$tmp/trace")" "$(counted look-up)"
done

# The monitor's memory beyond the guest's, when it has booted: below 64 MiB, translations and all. The code that the boot ran once has been swept out by then.
mkfifo "$tmp/in"
exec 7<>"$tmp/in"
timeout -k 10 "$BOOT_SECONDS" "$DOPPEL" run --quiet --engine bt --memory 512M --stats=json,file="$tmp/stats" -- sh -c 'echo up; read line; echo "$line"' <"$tmp/in" >"$tmp/up" 2>&1 &
boot=$!
until grep -q up "$tmp/up" || ! kill -0 "$boot" 2>/dev/null; do sleep 0.1; done
kb=$(awk '/^[0-9a-f]+-[0-9a-f]+ / { ram = /memfd:doppel-ram/ } /^Rss:/ && !ram { kb += $2 } END { print kb + 0 }' "/proc/$(pgrep -P "$boot" | head -n 1)/smaps")
echo done >&7
wait "$boot"
is "memory: the guest ran" "$(tr -d '\r' <"$tmp/up" | tail -n 1)" "done"
is "memory: $kb KiB beyond a guest of 512 MiB" "$((kb > 0 && kb < 65536))" 1
like "memory: code that ran once is swept out" "$(cat "$tmp/stats")" '"cache-sweeps":[1-9]'
done_testing
