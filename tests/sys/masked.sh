#!/bin/bash
# Hosts that have less: with DOPPEL_HOST_MASK doppel takes this host for one without these features. The guest's processor follows, sys programs and generated
# instructions pass on bt's other ways, and the default guest boots and computes what it computes otherwise.
. "$(dirname "$0")/../lib/tap.sh"
build=${BUILD:-$top/build}
features="pdpe1gb bmi2 avx512f fsgsbase xgetbv1 pku avx xsave"
[ "$(uname -m)" = x86_64 ] || { skip "masked" "not x86-64"; done_testing; }

# One who asks for nonsense is told so.
DOPPEL_HOST_MASK=avx1024 doppel doctor
is "an unknown feature is refused" "$status" 64
like "and named" "$err" 'avx1024'

flags() { sed -n 's/^flags[^:]*: *//p' "$1" | head -n 1 | tr ' ' '\n' | grep -xF "$(tr ' ' '\n' <<<"$features")" | sort | paste -sd ' '; }
work='cat /proc/cpuinfo; i=0; while [ $i -lt 20 ]; do i=$((i + 1)); /bin/true; done
    gzip -c /bin/busybox | tee /tmp/z | sha512sum | sed "s/^/sum /"; gunzip -c /tmp/z | md5sum | sed "s/^/sum /"'
boot() { DOPPEL_HOST_MASK=$1 doppel run --engine bt --quiet --cpus 2 -- sh -c "$work"; }

boot ""
is "a guest with all that the host has" "$status" 0
have=$(flags "$tmp/out") sums=$(grep '^sum' "$tmp/out")
for mask in bmi2 avx512f fsgsbase,pku xgetbv1 xsave,pdpe1gb bmi2,avx,fsgsbase,xgetbv1,pku; do
    failed=
    for program in syscall64 xsave64 vectors64 string64 paging64 sensitive64; do
        DOPPEL_HOST_MASK=$mask timeout -k 5 150 "$build/sys/sys_runner" --timeout 120 --engine bt --at-once "$build/sys/$program.bin" >"$tmp/sys" 2>&1 ||
            failed+="$program: status $?: $(grep -A3 '^not ok' "$tmp/sys" | head -n 8)"$'\n'
    done
    is "without $mask: sys programs" "$failed" ""
    boot "$mask"
    gone=$mask
    case $mask in
        *avx,* | avx) gone+=,avx512f ;;
        xsave*) gone+=,avx,avx512f,xgetbv1,pku ;;
    esac
    is "without $mask: the guest's processor" "$(flags "$tmp/out")" "$(tr ' ' '\n' <<<"$have" | grep -vxF "$(tr ',' '\n' <<<"$gone")" | paste -sd ' ')"
    is "without $mask: the guest's work" "$status $(grep '^sum' "$tmp/out")" "0 $sums"
done
# Masks of registers are not for this comparison with the processor itself (insn_test.c says why).
mask=bmi2,fsgsbase,pku,xgetbv1
DOPPEL_HOST_MASK=$mask timeout -k 5 200 "$build/tests/insn/insn_test" --engine bt --every "$([ -n "${SOAK_LONG:-}" ] && echo 1 || echo 20)" >"$tmp/insn" 2>&1
is "without $mask: generated instructions" "$? $(grep '^not ok' "$tmp/insn" | head -n 5)" "0 "
done_testing
