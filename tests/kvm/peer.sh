#!/bin/bash
# Evidence for nested-differs.txt: peer.sh PROGRAM... runs sys programs (control64 ...) inside QEMU on QEMU's own user of
# KVM, and the same programs on TCG without a machine in the machine; prints the checks that fail, and how it ended. A
# check that fails there as well is not doppel's. BUILD=DIR (default build). No test: a tool.
set -u
export LC_ALL=C
top=$(cd "$(dirname "$0")/../.." && pwd)
export BUILD=${BUILD:-$top/build}
export DOPPEL=${DOPPEL:-$BUILD/doppel} DOPPEL_GUEST=${DOPPEL_GUEST:-$BUILD/guest}
. "$top/tests/lib/nested.sh"
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
cat >"$tmp/run" <<'END'
# accelerator, processor, folder, program
run()
{
    : >/tmp/peer-out
    timeout 60 qemu-system-x86_64 -accel $1 -M pc -cpu $2 -smp 2 -m 64 -display none -nodefaults -no-reboot \
        -debugcon file:/tmp/peer-out -device isa-debug-exit,iobase=0xf4 -bios $3/reset.rom \
        -device loader,file=$3/$4.bin,addr=0x8000,force-raw=on -device loader,addr=0x500,data=0,data-len=4 >/dev/null 2>/tmp/peer-err
    echo "== $1, $4: status $?, last line: $(tail -n 1 /tmp/peer-out)"
    grep '^not ok' /tmp/peer-out
    grep -i 'entry failed\|internal error' /tmp/peer-err
}
END
. "$tmp/run"
for p; do run tcg,thread=multi EPYC-v1,+svm "$BUILD/sys" "$p"; done
nested_build "$tmp/n" || exit
nested_add "$tmp/n" /usr/bin/qemu-system-x86_64 /bin/qemu-system-x86_64
mkdir -p "$tmp/n/root/sysbin" "$tmp/n/root/usr/share/qemu"
cp "$BUILD"/sys/*.bin "$BUILD/sys/reset.rom" "$tmp/n/root/sysbin/"
cp -L /usr/share/qemu/kvmvapic.bin "$tmp/n/root/usr/share/qemu/"
{ cat "$tmp/run"; echo "for p in $*; do run kvm host /sysbin \$p; done"; } >"$tmp/n/root/peer.sh"
nested_run "$tmp/n" "${PEER_SECONDS:-$((60 + $# * 60))}" "sh /peer.sh"
