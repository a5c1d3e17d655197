# What hostile/kvm.sh runs where /dev/kvm can be used: on the host, or inside QEMU (then by busybox's sh). Each ioctl that the engine makes, and each
# capability that it asks for, is refused in turn: a clear message or no matter, and never a crash or a hang. Prints TAP lines without numbers.
#
#   $DOPPEL   program        $REFUSE   kvm_refuse.so        $KERNEL   a multiboot kernel that resets its machine once and then writes 5 to port 0xf4
again()                                             # variable=value...
{
    out=$(env LD_PRELOAD="$REFUSE" "$@" timeout -k 5 "${REFUSE_SECONDS:-60}" "$DOPPEL" run --engine "$engine" --kernel "$KERNEL" --debug-exit \
        --console none 2>&1 </dev/null)
    status=$?
}
verdict()                                           # name
{
    if [ $status = 11 ] || { [ $status = 1 ] && echo "$out" | grep -qi 'doppel: .*kvm'; }; then
        echo "ok $1: $([ $status = 11 ] && echo "not needed" || echo "a message")"
    else
        echo "not ok $1: status $status: $(echo "$out" | tail -n 2 | tr '\n' '|')"
    fi
}
engine=kvm
rm -f refuse.log
again KVM_REFUSE_LOG="$PWD/refuse.log"
if [ $status = 11 ]; then echo "ok nothing refused: runs"; else echo "not ok nothing refused: runs: status $status: $out"; fi
for nr in $(sed -n 's/^nr //p' refuse.log | sort -n | uniq); do
    again KVM_REFUSE_NR="$nr"
    verdict "ioctl $nr refused"
done
for cap in $(sed -n 's/^cap //p' refuse.log | sort -n | uniq); do
    again KVM_REFUSE_CAP="$cap"
    verdict "capability $cap refused"
done
for n in 1 2 3; do
    again KVM_REFUSE_OPEN=$n
    verdict "/dev/kvm is gone at open $n"
done
# auto goes on without it, wherever it fails before the guest begins; the guest needs nothing of KVM.
engine=auto
for what in KVM_REFUSE_OPEN=1 KVM_REFUSE_OPEN=2 KVM_REFUSE_OPEN=3 KVM_REFUSE_NR=1 KVM_REFUSE_NR=96 KVM_REFUSE_NR=65 KVM_REFUSE_NR=144; do
    again $what
    if [ $status = 11 ] && echo "$out" | grep -q '^engine: '; then echo "ok auto, $what: $(echo "$out" | grep '^engine: ' | tail -n 1 | cut -c1-14)"
    else echo "not ok auto, $what: status $status: $out"; fi
done
