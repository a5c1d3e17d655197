#!/bin/bash
# The bench: its program tells sane times and finds wrong results, natively and under interp, and bench/run makes one
# table of them. A few rows only: what figures are worth is not tested here.
. "$(dirname "$0")/../lib/tap.sh"
rows=${BUILD:-$top/build}/bench/rows
[ -x "$rows" ] || { not_ok "$rows is there" "make $rows"; done_testing; }

# Natively: every row of the first three groups gives a time between a thousandth of a nanosecond and a second, or is
# skipped with a reason.
"$rows" --list >"$tmp/list"
like "rows: names are unique" "$(cut -f1 "$tmp/list" | sort | uniq -d)" '^$'
mapfile -t names < <(awk -F'\t' '$2 != "programs" { print $1 }' "$tmp/list")
"$rows" --ms 1 --limit 20 "${names[@]}" >"$tmp/rows" 2>&1
is "rows: each is there once, in order" "$(sed -n 's/^row \([^ ]*\) .*/\1/p' "$tmp/rows")" \
    "$(printf '%s\n' "${names[@]}")"
is "rows: sane values" "$(awk '$1 == "row" && !($3 == "ok" && $4 > 0.001 && $4 < 1e9) && !($3 == "skip" && NF > 3)' \
    "$tmp/rows")" ""
is "rows: an unknown row is refused" "$("$rows" no-such-row >/dev/null 2>&1; echo $?)" 64
is "rows: a program row without data is skipped" "$("$rows" zstd | grep -c '^row zstd skip no --data')" 1
is "rows: the limit ends a row" "$("$rows" --ms 60000 --limit 1 mix | sed -n 's/^row //p')" "mix limit 1"

# A program that gives a wrong answer is no result.
mkdir "$tmp/data"
"$rows" --make-data "$tmp/data"
printf '#!/bin/sh\nexit 0\n' >"$tmp/data/busybox"; chmod +x "$tmp/data/busybox"
like "rows: a wrong result is told" "$("$rows" --data "$tmp/data" find)" \
    'row find failed out/find has 0 lines instead of 50'

# The whole way: native and interp, one table.
timeout 150 "$top/bench/run" --quick --systems native,interp --rows boot-init,calls,avx2,getppid,fork,pipe-1 \
    --out "$tmp/out" "$DOPPEL" >"$tmp/table" 2>"$tmp/err"
is "bench/run: status" $? 0
is "bench/run: prints the table that it wrote" "$(cat "$tmp/table")" "$(cat "$tmp/out/bench.md")"
# Columns: row, per, native, interp, its ratio to native.
for row in calls getppid fork pipe-1; do
    cells=$(grep "($row)" "$tmp/table" | cut -d'|' -f4-6)
    like "table: $row has both times and a ratio" "$cells" '^ [0-9.]+ (ns|us|ms) \| [0-9.]+ (ns|us|ms|s) \| [0-9.]+ $'
done
like "table: boot to init" "$(grep '(boot-init)' "$tmp/table")" '\|  \| [0-9.]+ m?s \|'
like "table: interpreted calls are slower than native ones" "$(grep '(calls)' "$tmp/table" | cut -d'|' -f6)" \
    '^ ([2-9]|[1-9][0-9]+)(\.[0-9]+)? $'
like "JSON: a median and its samples" "$(grep -A1 '"name": "calls"' "$tmp/out/bench.json" | tail -n 1)" \
    '"native": \{"median": [0-9.]+, "to_native": 1.000, "samples": \[[0-9.]+\]\}'
is "JSON: brackets match" "$(tr -cd '{[' <"$tmp/out/bench.json" | wc -c)" \
    "$(tr -cd '}]' <"$tmp/out/bench.json" | wc -c)"
like "SVG: bars" "$(grep -c '<title>doppel interp: ' "$tmp/out/bench.svg")" '^[4-9]$'
done_testing
