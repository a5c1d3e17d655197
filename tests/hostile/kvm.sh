#!/bin/bash
# /dev/kvm that may not be used, or refuses: a clear message from --engine kvm, another engine from auto, and doctor says
# why. Refusals (tests/kvm/refuse.sh) need a /dev/kvm of any kind: without one they run inside QEMU.
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
    like "--engine kvm: the message says why, and what to do" "$out" "^doppel: kvm: $wanted.*--engine bt"
    is "--engine kvm: fails" "$([ $status != 0 ] && [ $status != 124 ] && echo yes)" yes
    like "doctor says why" "$(as_nobody doctor)" 'kvm  *(no /dev/kvm|/dev/kvm is there but cannot be used: permission)'
fi

# --- refusals ---
build=${BUILD:-$top/build}
if [ -w /dev/kvm ]; then
    (cd "$tmp" && REFUSE=$build/hostile/kvm_refuse.so KERNEL=$build/hostile/once.elf DOPPEL=$DOPPEL sh "$top/tests/kvm/refuse.sh") >"$tmp/result" 2>&1
elif . "$top/tests/lib/nested.sh" && nested_build "$tmp/nested" 2>"$tmp/err"; then
    nested_add "$tmp/nested" "$build/hostile/kvm_refuse.so" /bin/kvm_refuse.so
    cp "$build/hostile/once.elf" "$top/tests/kvm/refuse.sh" "$tmp/nested/root/"
    nested_steps "$tmp/nested" 400 'REFUSE=/bin/kvm_refuse.so KERNEL=/once.elf DOPPEL=/bin/doppel sh /refuse.sh' >"$tmp/result"
else
    echo "not ok a machine of QEMU's can be made: $(tail -n 1 "$tmp/err")" >"$tmp/result"
fi
while IFS= read -r line; do
    case $line in 'ok '*) ok "${line#ok }" ;; 'not ok '*) not_ok "${line#not ok }" ;; esac
done <"$tmp/result"
like "the list of ioctls is not empty" "$(grep -c 'ioctl [0-9]* refused' "$tmp/result")" '^[1-9][0-9]$'
done_testing
