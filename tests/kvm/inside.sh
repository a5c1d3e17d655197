# What boot/kvm.sh runs where /dev/kvm is real: on the host, or inside QEMU (then by busybox's sh). Prints TAP lines without numbers.
#
#   $REFUSE $ONCE   hostile/kvm_refuse.so and a kernel that ends by itself (hostile/kvm.sh); may be missing
#   $PEER           boot/netpeer; may be missing
#   $FROM           the step to begin with (lib/nested.sh); empty: the first
#   $DOPPEL $SWITCH $ENGINE_TEST $SYS_RUNNER   programs        $SYS_IMAGES   folder of sys programs        $DOPPEL_GUEST   the default guest
cmdline=$(cat "$DOPPEL_GUEST/cmdline")

is()                                                # name, got, wanted
{
    if [ "$2" = "$3" ]; then
        echo "ok $1"
    else
        echo "not ok $1"
        echo "# got: $(echo "$2" | tail -n 5 | tr '\n' '|'); wanted: $3"
    fi
}

step()                                              # name. True: it is to be made
{
    [ -z "${FROM:-}" ] || [ "$FROM" = "$1" ] || return 1
    FROM=
    echo "[step $1]"
}

# Leaves $out and $status. QEMU's TCG may go on with old code in the guest's kernel, too (kvm/hold.c), which then never ends: one more chance.
tries()                                             # seconds, command
{
    limit=$1
    shift
    for try in 1 2; do
        out=$(timeout -k 5 "$limit" "$@" 2>&1)
        status=$?
        case $status in 124 | 137 | 143) echo "# did not end within $limit s: $*" | head -n 1 ;; *) return ;; esac
    done
}

if step auto; then
    # An emulated machine on a busy host may take several measurements.
    for n in 1 2 3 4 5 6; do
        out=$(timeout -k 5 100 "$DOPPEL" run -- true 2>&1 | head -n 1)
        echo "# $out"
        [ "${out%%(*}" != "engine: kvm " ] || break
    done
    is "auto takes kvm where it is real" "${out%%(*}" "engine: kvm "
fi

if step vcpus; then
    for n in 1 2; do
        tries 100 "$DOPPEL" run --engine kvm --quiet --cpus $n -- sh -c 'uname -sm; nproc; exit 3'
        is "$n vCPU: output" "$(echo $out)" "Linux x86_64 $n"
        is "$n vCPU: exit status" $status 3
    done
fi

if step disk; then
    dd if=/dev/urandom of=a.img bs=1M count=8 2>/dev/null
    dd if=/dev/zero of=b.img bs=1M count=8 2>/dev/null
    sum=$(sha256sum <a.img)
    tries 100 "$DOPPEL" run --engine kvm --quiet --cpus 2 --disk a.img,readonly --disk b.img -- sh -c \
        'sha256sum </dev/vda; dd if=/dev/vda of=/dev/vdb bs=64k 2>/dev/null; cat /sys/block/vda/ro'
    is "disk: read by the guest, read-only flag" "$(echo $out)" "$(echo $sum 1)"
    is "disk: written by the guest" "$(sha256sum <b.img)" "$sum"
    rm -f a.img b.img
fi

# A network card: an address, and streams both ways of which every byte is compared.
peer()                                              # file, arguments: in the background, until it listens
{
    file=$1
    shift
    timeout 300 "$PEER" "$@" >"$file" 2>&1 &
    for n in $(seq 100); do grep -q listening "$file" && break; sleep 0.1; done
}
if [ -n "${PEER:-}" ] && step network; then
    ip link set lo up 2>/dev/null
    mkdir -p rd; cp "$PEER" rd/netpeer
    (cd rd && echo netpeer | cpio -o -H newc 2>/dev/null) | cat "$DOPPEL_GUEST/initrd" - >with-peer
    port=$((20000 + $$ % 20000))
    peer sends listen 127.0.0.1 $port send 4194304; peer receives listen 127.0.0.1 $((port + 1)) recv 4194304
    out=$(timeout -k 5 200 "$DOPPEL" run --engine kvm --quiet --cpus 2 --net user --kernel "$DOPPEL_GUEST/vmlinuz" --initrd with-peer --append "$cmdline" -- sh -c '
        n=0; until ip -o -4 addr show dev eth0 | grep -q inet || [ $n = 600 ]; do sleep 0.1; n=$((n + 1)); done; ip -o -4 addr show dev eth0 | sed "s/.*inet //;s/ .*//"
        /netpeer connect 10.0.2.2 $0 recv 4194304 | sed "s/, .*//"; /netpeer connect 10.0.2.2 $1 send 4194304 | sed "s/, .*//"' $port $((port + 1)) 2>&1 </dev/null)
    is "network: address, and streams both ways" "$(echo $out)" "10.0.2.15/24 4194304 bytes 4194304 bytes"
    wait
    is "network: the host received" "$(sed -n '$s/, .*//p' receives)" "4194304 bytes"
    rm -rf rd with-peer sends receives
fi

# The guest goes from engine to engine while it boots, and answers at last. Between unlike engines a few moves suffice: inside QEMU an interpreter is
# an emulator in an emulator.
move()                                              # first engine, second, vCPUs, milliseconds, moves
{
    step "move $*" || return
    tries 500 "$SWITCH" "$DOPPEL_GUEST/vmlinuz" "$DOPPEL_GUEST/initrd" "$cmdline" "$@"
    is "moves from $1 to $2, $3 vCPU, every $4 ms: its command answers" "$(echo "$out" | tail -n 1 | sed 's/^[0-9]* //')" "moves: ok"
}
move kvm kvm 2 "${STEP_SHORT:-100}" 1000000
move kvm interp 1 "${STEP_LONG:-700}" 4
move interp kvm 2 "${STEP_LONG:-700}" 5

# The probe likes it, and then a machine has no interrupt chips (KVM_CREATE_IRQCHIP): auto takes another engine.
if [ -n "${REFUSE:-}" ] && step refuse; then
    out=$(LD_PRELOAD=$REFUSE KVM_REFUSE_NR=96 timeout -k 5 100 "$DOPPEL" run --kernel "$ONCE" --debug-exit --console none 2>&1)
    is "auto without interrupt chips: ends as it should" $? 11
    is "auto without interrupt chips: takes another engine" "$(echo "$out" | sed -n 's/^engine: \([a-z]*\) (kvm: .*/\1/p')" bt
fi

if step engine; then
    timeout -k 5 400 "$ENGINE_TEST" --engine kvm 2>&1 | sed -n 's/^\(not ok\|ok\) [0-9]* - /\1 engine: /p;/^#/p'
fi

for image in "$SYS_IMAGES"/*.bin; do
    step "sys ${image##*/}" || continue
    timeout -k 5 100 "$SYS_RUNNER" --engine kvm --timeout "${SYS_SECONDS:-60}" "$image" 2>&1 | sed -n 's/^\(not ok\|ok\) [0-9]* - /\1 sys: /p;/^#/p'
done
