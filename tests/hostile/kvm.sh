#!/bin/bash
# /dev/kvm that may not be used: a clear message from --engine kvm, another engine from auto, and doctor says why.
. "$(dirname "$0")/../lib/tap.sh"
chmod 755 "$tmp"
cp "$DOPPEL" "$tmp/doppel"
as_nobody() { timeout -k 10 "$BOOT_SECONDS" setpriv --reuid=65534 --regid=65534 --clear-groups "$tmp/doppel" "$@" 2>&1; }
kernel=${DOPPEL_GUEST:-${BUILD:-$top/build}/guest}/vmlinuz
cp "$kernel" "$tmp/vmlinuz"; chmod 644 "$tmp/vmlinuz"

if [ "$(id -u)" != 0 ]; then
    skip "without permission" "only root can become somebody without it"
elif [ -e /dev/kvm ] && setpriv --reuid=65534 --regid=65534 --clear-groups test -w /dev/kvm; then
    skip "without permission" "everybody may use /dev/kvm here"
else
    out=$(as_nobody run --engine kvm --kernel "$tmp/vmlinuz"); status=$?
    wanted='no permission to use /dev/kvm'
    [ -e /dev/kvm ] || wanted='there is no /dev/kvm'
    like "--engine kvm: the message says why, and what to do" "$out" "^doppel: kvm: $wanted.*--engine interp"
    is "--engine kvm: fails" "$([ $status != 0 ] && [ $status != 124 ] && echo yes)" yes
    like "doctor says why" "$(as_nobody doctor)" 'kvm  *(no /dev/kvm|/dev/kvm is there but cannot be used: permission)'
fi
done_testing
