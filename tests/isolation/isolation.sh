#!/bin/bash
# A program in the guest tries every kind of access at the addresses where the monitor itself is, as /proc/PID/maps tells
# them while it runs, and at others: it must get from its kernel what any process gets. tests/sys/isolation64.c does the
# same without a kernel, at CPL 0 and 3.
. "$(dirname "$0")/../lib/tap.sh"
build=${BUILD:-$top/build}
gcc -std=gnu17 -O1 -Wall -Wextra -Werror -static -o "$tmp/probe" "$top/tests/isolation/probe.c" || { not_ok "probe.c compiles"; done_testing; }
size=$(stat -c %s "$tmp/probe")
truncate -s %512 "$tmp/probe"

# The edges and the middle of every mapping, the gaps behind, and addresses of all classes.
addresses()                                         # process
{
    awk '{ split($1, r, "-"); print r[1]; print r[2] }' "/proc/$1/maps" | while read -r a; do
        printf '%x\n%x\n%x\n' $((0x$a)) $((0x$a - 64)) $((0x$a + 4096))
    done | head -n 4000
    printf '%s\n' 0 1000 deadbeef000 7ffffffff000 7fffffffffc0 800000000000 8000deadbeef 1000000000000 ffff7fffffffffc0 ffff800000000000 \
        ffff888000001000 ffffffff81000000 ffffffffff600000 ffffffffffffffc0 8000000000000000 7fffffffffffffc0
    for ((slot = 0; slot < 256; slot += 5)); do printf '%x\n' $((slot << 39 | 0x12345640)) $((~0x7fffffffffff | slot << 39 | 0x7654000)); done
}

for how in interp bt "bt --mmu shadow" "bt --mmu softtlb"; do
    # shellcheck disable=SC2086
    mkfifo "$tmp/in" && exec 7<>"$tmp/in"
    # shellcheck disable=SC2086
    "$DOPPEL" run --engine $how --quiet --disk "$tmp/probe,readonly" -- sh -c "head -c $size /dev/vda >/tmp/probe; chmod 755 /tmp/probe; exec /tmp/probe" \
        <"$tmp/in" >"$tmp/out" 2>"$tmp/err" &
    pid=$!
    for ((i = 0; i < BOOT_SECONDS * 10; i++)); do grep -q ready "$tmp/out" && break; kill -0 $pid 2>/dev/null || break; sleep 0.1; done
    tried=0
    for round in 1 2 3; do                          # what it has translated meanwhile is elsewhere, and more
        addresses $pid >"$tmp/list"
        tried=$((tried + $(wc -l <"$tmp/list")))
        { cat "$tmp/list"; echo go; } >&7
        for ((i = 0; i < 1200; i++)); do
            [ "$(grep -c ' addresses, ' "$tmp/out")" -ge $round ] && break
            kill -0 $pid 2>/dev/null || break
            sleep 0.1
        done
    done
    echo end >&7
    for ((i = 0; i < 300; i++)); do kill -0 $pid 2>/dev/null || break; sleep 0.1; done
    kill -KILL $pid 2>/dev/null
    wait $pid
    status=$?
    exec 7>&-
    rm "$tmp/in"
    name="${how//--mmu /}"
    is "$name: attempts at $tried addresses give what the architecture says" "$(grep -c ' addresses, 0 bad$' "$tmp/out")" 3
    grep -v '^ready$' "$tmp/out" | head -n 12 | sed 's/^/# /'
    is "$name: ends well" "$status" 0
done
done_testing
