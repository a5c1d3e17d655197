# For test scripts, sourced: TAP lines, a scratch folder, and doppel under a timeout.
#
#   DOPPEL    the program (default build/doppel)        ENGINE   --engine for every run (default: auto)
#   BOOT_SECONDS   how long a boot may take under interp on a busy machine
set -u
export LC_ALL=C
top=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
DOPPEL=${DOPPEL:-$top/build/doppel}
ENGINE=${ENGINE:-auto}
BOOT_SECONDS=${BOOT_SECONDS:-180}
tap_n=0 tap_failed=0
tmp=$(mktemp -d "${TMPDIR:-/tmp}/doppel-test.XXXXXX")
trap 'rm -rf "$tmp"' EXIT

ok() { tap_n=$((tap_n + 1)); echo "ok $tap_n - $1"; }
not_ok()                                            # name, explanation...
{
    tap_n=$((tap_n + 1)); tap_failed=$((tap_failed + 1))
    echo "not ok $tap_n - $1"
    shift
    printf '%s\n' "$@" | sed 's/^/# /'
}
skip() { tap_n=$((tap_n + 1)); echo "ok $tap_n - $1 # SKIP $2"; }
is()                                                # name, got, wanted
{
    if [ "$2" = "$3" ]; then ok "$1"; else not_ok "$1" "got:    $2" "wanted: $3"; fi
}
like()                                              # name, got, extended regular expression
{
    if [[ $2 =~ $3 ]]; then ok "$1"; else not_ok "$1" "got:    $2" "wanted: $3"; fi
}
# Runs doppel with these arguments; leaves $status, $out and $err (files $tmp/out and $tmp/err).
doppel()
{
    timeout -k 10 "$BOOT_SECONDS" "$DOPPEL" "$@" >"$tmp/out" 2>"$tmp/err"
    status=$?
    out=$(tr -d '\0' <"$tmp/out"); err=$(tr -d '\0' <"$tmp/err")
}
done_testing() { echo "1..$tap_n"; [ "$tap_failed" = 0 ]; exit; }
