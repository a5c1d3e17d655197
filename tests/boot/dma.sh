#!/bin/bash
# Code that comes from a disk by DMA into memory that was executed before.
. "$(dirname "$0")/../lib/tap.sh"
program=${BUILD:-$top/build}/boot/dma_code
"$program" --image >"$tmp/disk.img"
for run in "interp 2" "bt 1" "bt 2"; do
    read -r engine cpus <<<"$run"
    doppel run --engine $engine --quiet --cpus $cpus --disk "$tmp/disk.img,readonly" -- \
        sh -c 'cat >/p; chmod 755 /p; /p /dev/vda 300' <"$program"
    is "$engine, $cpus vCPU: functions read from the disk are those that run" "$out" ok
done

done_testing
