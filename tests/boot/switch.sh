#!/bin/bash
# A guest whose whole state is saved and loaded again every few milliseconds of its boot (tests/kvm/switch with one engine twice).
. "$(dirname "$0")/../lib/tap.sh"
guest=${DOPPEL_GUEST:-${BUILD:-$top/build}/guest}
for cpus in 1 2; do
    out=$(timeout -k 10 "$BOOT_SECONDS" "${BUILD:-$top/build}/kvm/switch" "$guest/vmlinuz" "$guest/initrd" "$(cat "$guest/cmdline")" interp interp $cpus 50 2>&1)
    like "interp, $cpus vCPU: every 50 ms" "${out##*$'\n'}" '^[0-9]{2,} moves: ok$'
done
done_testing
