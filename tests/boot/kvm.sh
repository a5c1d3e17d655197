#!/bin/bash
# The KVM engine: boots, disks, moves between engines, sys programs (tests/kvm/inside.sh). Where this host's /dev/kvm is real they run on it; else in a
# machine of QEMU's that models SVM. What QEMU's processor does otherwise than the manuals is in sys/tcg-differs.txt and kvm/nested-differs.txt.
. "$(dirname "$0")/../lib/tap.sh"
. "$(dirname "$0")/../lib/nested.sh"
build=${BUILD:-$top/build}
known=("$top/tests/sys/tcg-differs.txt" "$top/tests/kvm/nested-differs.txt")

if "$DOPPEL" doctor 2>/dev/null | grep -q 'kvm  *real'; then
    known=(/dev/null)
    DOPPEL_GUEST=${DOPPEL_GUEST:-$build/guest} SWITCH=$build/kvm/switch SYS_RUNNER=$build/sys/sys_runner SYS_IMAGES=$build/sys
    export DOPPEL DOPPEL_GUEST SWITCH SYS_RUNNER SYS_IMAGES
    (cd "$tmp" && timeout -k 10 600 bash "$top/tests/kvm/inside.sh") >"$tmp/result" 2>&1
    nested_status=$?
elif nested_build "$tmp/nested" 2>"$tmp/err"; then
    nested_add "$tmp/nested" "$build/kvm/switch" /bin/switch
    nested_add "$tmp/nested" "$build/sys/sys_runner" /bin/sys_runner
    mkdir "$tmp/nested/root/sysbin"
    cp "$build"/sys/*.bin "$tmp/nested/root/sysbin/"
    rm -f "$tmp/nested/root/sysbin/debug32.bin"             # QEMU 7.2 itself dies of its breakpoints: a fault in its code
    cp "$top/tests/kvm/inside.sh" "$tmp/nested/root/"
    # QEMU's processors are slow: the interpreter inside needs a tenth of a second for what takes this host two milliseconds.
    nested_run "$tmp/nested" 800 "export DOPPEL=/bin/doppel SWITCH=/bin/switch SYS_RUNNER=/bin/sys_runner SYS_IMAGES=/sysbin \
        STEP_SHORT=500 STEP_LONG=3000 SYS_SECONDS=40; sh /inside.sh" >"$tmp/result"
else
    echo "# $(tail -n 1 "$tmp/err")"
    nested_status=none
fi

while IFS= read -r line; do
    case $line in
        'ok '*) ok "${line#ok }" ;;
        'not ok sys: '*)
            name=${line#not ok sys: }
            differs=
            while IFS= read -r entry; do
                case $entry in '#'* | '') ;; *) [ "${name#"$entry"}" = "$name" ] || differs=1 ;; esac
            done < <(cat "${known[@]}")
            if [ -n "$differs" ]; then echo "# known to differ: $name"; else not_ok "sys: $name"; fi ;;
        'not ok '*) not_ok "${line#not ok }" ;;
        '#'*) echo "$line" ;;
    esac
done <"$tmp/result"
[ "$nested_status" = 0 ] && ok "all of it ran" || not_ok "all of it ran" "status $nested_status" "$(tail -n 5 "$tmp/nested/log" 2>/dev/null)"
done_testing
