#!/bin/bash
# A Debian system at work in the guest: compilers, interpreters, databases, compilers at run time, debuggers, 32-bit
# programs, stressors, and a kernel that changes its own code. What a program says is compared with what the same
# program says on the host.
#
#   tests/soak/soak.sh ENGINE [CPUS [CASE...]]      CPUS: default "1 2"; CASE: default all (cases.sh has them)
#
# SOAK_DISTURB=1: meanwhile the guest is paused, the monitor stopped, its prompt asked, and the guest's time of day set to any year, several times a second.
# No program that measures its time by that can take part (stress-ng's).
#
# ENGINE tcg is QEMU's emulator, which is to pass, too: a case that fails there is at fault itself. (gdb differs there, by
# flags that are undefined after a multiplication; our engines take them from the processor.)
# SOAK_LONG=1 makes each case longer (an hour and more for all of them, on 1 and 2 vCPUs). SOAK_MINUTES=N ends it: cases that would begin later are skipped. Every case is a test by name; one that cannot run is skipped with the reason.
. "$(dirname "$0")/../lib/tap.sh"
here=$top/tests/soak
build=${BUILD:-$top/build}
engine=$1
cpus=${2:-1 2}
shift $(($# > 2 ? 2 : $#))
limit=${SOAK_LONG:+900}
limit=${limit:-180}                               # of a case: on a busy machine the longest has taken 50
export SOAK_LONG=${SOAK_LONG:-}
disturb=${SOAK_DISTURB:-}
read -ra counts <<<"$cpus"
share=$((${SOAK_MINUTES:-0} * 60 / ${#counts[@]}))                 # seconds for each number of vCPUs; 0: no end
PATH=$PATH:/usr/sbin:/sbin

if ! "$here/root" "$build/soak" 2>"$tmp/err"; then
    skip "soak, $engine" "no Debian root: $(tail -n 1 "$tmp/err")"
    done_testing
fi

# ---- what goes to /soak ----

tools=$tmp/tools
mkdir -p "$tools/module" "$tools/source"
cp "$here/cases.sh" "$here/inside.sh" "$tools"
cp "$here"/module/* "$tools/module"
cp -r "$top/src" "$tools/source"
freestanding=(-O1 -g "-ffile-prefix-map=$here/=" -ffreestanding -nostdlib -static -no-pie -fno-pic -fno-stack-protector -fcf-protection=none
    -fno-asynchronous-unwind-tables -Wl,--build-id=none)
for f in bpf jit pages registers places vanish; do
    gcc -std=gnu17 -O1 -Wall -Wextra -static -pthread -o "$tools/$f" "$here/$f.c" || { not_ok "$f.c compiles"; done_testing; }
done
gcc -m32 "${freestanding[@]}" -o "$tools/i386" "$here/i386.c" && gcc "${freestanding[@]}" -o "$tools/step" "$here/step.c" ||
    { not_ok "i386.c and step.c compile"; done_testing; }

on_host() { "$here/root" --run "$build/soak" "$tools" /bin/sh -c "$1" </dev/null; }
on_host true 2>"$tmp/err"
case $? in
    0) host=1 ;;
    *) host= ;;
esac
kernel=$(sed -n 's/^kernel=//p' "${DOPPEL_GUEST:-$build/guest}/manifest")
if [ ! -d "$build/soak/root/usr/src/linux-headers-$kernel" ]; then
    echo "there are no headers of Linux $kernel any more" >"$tools/module/why"
elif [ -z "$host" ]; then
    echo "the module cannot be built without root's rights or name spaces" >"$tools/module/why"
else
    # Once for the same source: it takes longer than the rest of the preparation.
    key="$kernel $(cat "$here"/module/* | sha256sum | cut -c1-64)"
    if ! grep -qsxF "$key" "$build/soak/module.key"; then
        if on_host "make -C /usr/src/linux-headers-$kernel M=/soak/module modules" >"$tmp/module.log" 2>&1; then
            cp "$tools/module/soak.ko" "$build/soak/soak.ko" && echo "$key" >"$build/soak/module.key"
        else
            not_ok "the kernel module builds" "$(tail -n 20 "$tmp/module.log")"
        fi
    fi
    cp "$build/soak/soak.ko" "$tools/module"
fi
truncate -s 64M "$tmp/tools.img"
mke2fs -q -F -t ext4 -O ^has_journal -m 0 -d "$tools" "$tmp/tools.img" || { not_ok "mke2fs"; done_testing; }
truncate -s 256M "$tmp/swap.img"

# ---- the host's answers ----

declare -A kind
names=()
while read -r c k; do names+=("$c"); kind[$c]=$k; done < <(SOAK_LONG=$SOAK_LONG bash "$here/cases.sh" list)
[ $# = 0 ] || names=("$@")
for c in "${names[@]}"; do
    [ "${kind[$c]-}" = same ] && [ -n "$host" ] || continue
    begin=${EPOCHREALTIME/./}
    on_host "exec sh /soak/cases.sh run $c" >"$tmp/host.$c" 2>&1 || not_ok "$c on the host" "$(tail -n 20 "$tmp/host.$c")"
    eval "ms_${c//-/_}=$(((${EPOCHREALTIME/./} - begin) / 1000))"
done

# ---- guests ----

running=                                            # it has a process group of its own, and would outlive us
trap '[ -z "$running" ] || kill $running; rm -rf "$tmp"' EXIT

# Until the guest named "soak" is gone. How often what was done goes to $tmp/disturbed.
disturber()                                         # process number of the guest's `timeout`
{
    local pid control=$tmp/rt/doppel/soak/control
    ask() { printf '%s\n' "$@" | timeout 60 "$build/boot/stream" unix "$control" >/dev/null 2>&1; }
    while kill -0 "$1" 2>/dev/null; do
        sleep 0.$((RANDOM % 90 + 10))
        pid=$("$DOPPEL" ps 2>/dev/null | awk '$1 == "soak" { print $2 }')
        [ -n "$pid" ] || continue
        case $((RANDOM % 6)) in
            0) ask pause && sleep 0.0$((RANDOM % 90 + 10)); ask resume && echo paused ;;
            1) ask pause resume pause resume pause resume && echo "paused thrice" ;;
            2) kill -STOP "$pid" && sleep 0.$((RANDOM % 30 + 10)); kill -CONT "$pid" && echo stopped ;;
            3) timeout 60 "$DOPPEL" exec soak -- date -s "@$((1700000000 + RANDOM * 10000))" </dev/null >/dev/null 2>&1 && echo "time set" ;;
            4) ask info && echo info ;;
            5) ask stats && echo stats ;;
        esac
    done 2>/dev/null >>"$tmp/disturbed"
}

guest()                                             # vCPUs, seconds, arguments of inside.sh
{
    local script="modprobe ext4; mkdir /mnt/tools; mount -t ext4 -o ro /dev/vdb /mnt/tools && SOAK_LONG=$SOAK_LONG sh /mnt/tools/inside.sh $3"
    local dir=${DOPPEL_GUEST:-$build/guest}
    if [ "$engine" = tcg ]; then
        mkdir -p "$tmp/rd"
        printf '#!/bin/sh\nmount -t devtmpfs dev /dev; mount -t proc proc /proc; mount -t sysfs sys /sys\nexec </dev/null >/dev/ttyS0 2>&1
            for m in $(cat /etc/modules); do insmod $m; done\n%s\npoweroff -f\n' "$script" >"$tmp/rd/init"
        chmod 755 "$tmp/rd/init"
        (cat "$dir/initrd"; cd "$tmp/rd" && echo init | cpio -o -H newc 2>/dev/null || busybox cpio -o -H newc 2>/dev/null) >"$tmp/initrd"
        timeout -k 10 "$2" qemu-system-x86_64 -accel tcg,thread=multi -cpu max -smp "$1" -m 1G -nodefaults -display none -no-reboot -serial stdio \
            -kernel "$dir/vmlinuz" -initrd "$tmp/initrd" -append "$(cat "$dir/cmdline")" \
            -drive "file=$build/soak/root.img,format=raw,if=virtio,readonly=on" -drive "file=$tmp/tools.img,format=raw,if=virtio,readonly=on" \
            -drive "file=$tmp/swap.img,format=raw,if=virtio" \
            </dev/null 2>"$tmp/err" | tr -d '\r' >"$tmp/out"
        return "${PIPESTATUS[0]}"
    fi
    local named=()
    if [ -n "$disturb" ]; then
        mkdir -p -m 700 "$tmp/rt"
        export XDG_RUNTIME_DIR=$tmp/rt
        named=(--name soak)
    fi
    timeout -k 10 "$2" "$DOPPEL" run --engine "$engine" ${MMU:+--mmu "$MMU"} "${named[@]}" --quiet --cpus "$1" --memory 1G \
        --disk "$build/soak/root.img,readonly" --disk "$tmp/tools.img,readonly" --disk "$tmp/swap.img" --status-file "$tmp/status" -- sh -c "$script" \
        </dev/null >"$tmp/out" 2>"$tmp/err" &
    running=$!
    [ -z "$disturb" ] || disturber $running &
    wait $running
    local r=$?
    running=
    wait
    return $r
}

# All cases in one guest. One that takes the guest down is to blame alone; the others go on in a new one.
for n in $cpus; do
    left=("${names[@]}") status=0 until=$((SECONDS + share))
    : >"$tmp/all"
    while [ ${#left[@]} -gt 0 ]; do
        guest "$n" "$([ -n "$SOAK_LONG" ] && echo $((120 + limit * ${#left[@]})) || echo 600)" "$limit $((share ? until > SECONDS ? until - SECONDS : 1 : 0)) ${left[*]}"
        status=$?
        cat "$tmp/out" >>"$tmp/all"
        rest=()
        for c in "${left[@]}"; do grep -qF "[end $c " "$tmp/out" || rest+=("$c"); done
        left=()
        if [ ${#rest[@]} -gt 0 ]; then
            {
                echo "[begin ${rest[0]}]"
                echo "the guest ended with status $status in it, or before"
                tail -n 10 "$tmp/out"
                tail -n 30 "$tmp/err"
                cat "$tmp/status" 2>/dev/null
                echo "[end ${rest[0]} 999 0]"
            } >>"$tmp/all"
            # Without any result it is the guest itself: once is enough.
            if grep -q '^\[end ' "$tmp/out" || [ ${#rest[@]} = 1 ]; then left=("${rest[@]:1}"); fi
        fi
    done
    for c in "${names[@]}"; do
        name="$engine${MMU:+ $MMU}, $n vCPU: $c"
        awk -v c="$c" '$0 == "[begin " c "]" { on = 1; n = 0; next } on && index($0, "[end " c " ") == 1 { on = 0 } on { line[++n] = $0 }
            END { for (i = 1; i <= n; i++) if (i < n || line[i] != "") print line[i] }' "$tmp/all" >"$tmp/got"
        read -r _ _ result ms < <(grep -F "[end $c " "$tmp/all" | tail -n 1 | tr -d ']') || result= ms=
        if [ -z "$result" ]; then
            not_ok "$name" "the guest ended before it"
        elif [ "$result" = 77 ]; then
            skip "$name" "$(tail -n 1 "$tmp/got")"
        elif [ "$result" != 0 ]; then
            not_ok "$name" "status $result after $ms ms" "$(tail -n 40 "$tmp/got")"
        elif [ "${kind[$c]}" = same ] && [ -z "$host" ]; then
            skip "$name" "it ran, but this host offers neither root's rights nor name spaces to compare"
        elif [ "${kind[$c]}" = same ] && ! cmp -s "$tmp/got" "$tmp/host.$c"; then
            not_ok "$name" "output differs from the host's (-):" "$(diff -u "$tmp/host.$c" "$tmp/got" | head -n 20)"
        else
            ok "$name"
        fi
        was=ms_${c//-/_}
        echo "# $c: ${ms:-?} ms${!was:+, ${!was} ms on the host}"
        [ "${kind[$c]}" = same ] || [ "$result" != 0 ] || sed 's/^/# /' "$tmp/got" | head -n 4
    done
    is "$engine, $n vCPU: the kernel complains of nothing" "$(grep '^\[kernel\]' "$tmp/all")" ""
    is "$engine, $n vCPU: the guest ends well" "$status" 0
    if [ -n "$disturb" ] && [ -n "$SOAK_LONG" ]; then
        echo "# disturbed: $(sort "$tmp/disturbed" | uniq -c | awk '{ n = $1; $1 = ""; printf "%s%s %d", s, $0, n; s = "," }')"
        is "$engine, $n vCPU: it was disturbed, in each way" "$(sort -u "$tmp/disturbed" | wc -l)" 6
    fi
done
done_testing
