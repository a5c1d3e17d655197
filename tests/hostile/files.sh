#!/bin/bash
# Kernels, initrds, disks, sizes and consoles that are missing, broken or absurd: a clear error of at most 4 lines on standard error, within a few seconds, with
# the right status, naming the file or the option. Run against the build with ASan and UBSan.
. "$(dirname "$0")/../lib/tap.sh"
DOPPEL=${DOPPEL_ASAN:-$top/build/asan/doppel}
guest=${BUILD:-$top/build}/guest
export DOPPEL_GUEST=$guest ASAN_OPTIONS=abort_on_error=1 UBSAN_OPTIONS=halt_on_error=1
cd "$tmp" || exit 1
base=(run --engine interp --quiet --console none)

# name, status, word that the message holds, arguments: ends before the guest starts, and within 6 s, once in two tries: a shared machine may stand still in one.
refused()
{
    local name=$1 want=$2 word=$3 lines took status try
    shift 3
    for try in 1 2; do
        took=$SECONDS
        timeout -k 5 15 "$DOPPEL" "$@" </dev/null >out 2>err
        status=$?
        took=$((SECONDS - took))
        [ $took -gt 6 ] || break
    done
    lines=$(wc -l <err)
    if [ $status != "$want" ]; then not_ok "$name" "exit status $status, wanted $want" "$(head -n 8 err)"
    elif [ "$lines" -gt 4 ] || [ "$lines" -lt 1 ]; then not_ok "$name" "$lines lines on standard error" "$(head -n 20 err)"
    elif ! grep -qF -- "$word" err; then not_ok "$name" "the message does not name $word" "$(cat err)"
    elif grep -qE 'Sanitizer|runtime error|bug:' err; then not_ok "$name" "$(cat err)"
    elif [ "$took" -gt 6 ]; then not_ok "$name" "took $took s, in each of two tries"
    else ok "$name"; fi
}
# name, arguments: whatever the guest does with it, the monitor keeps to its statuses
survives()
{
    local name=$1
    shift
    timeout -k 5 20 "$DOPPEL" "$@" </dev/null >out 2>err &
    local pid=$!
    sleep 4
    pkill -KILL -P $pid 2>/dev/null                 # still running is fine: the guest is lost, doppel is not
    wait $pid 2>/dev/null
    local status=$?
    if grep -qE 'Sanitizer|runtime error|bug:' err; then not_ok "$name" "$(head -n 40 err)"
    else case $status in 0 | 1 | 70 | 71 | 137) ok "$name" ;; *) not_ok "$name" "exit status $status" "$(head -n 20 err)" ;; esac; fi
}

: >empty
head -c 100 "$guest/vmlinuz" >truncated-head
head -c 4000000 "$guest/vmlinuz" >truncated-half
head -c 2000000 /dev/urandom >random
mkdir folder
mkfifo fifo
# An arm64 Image and an ELF file of another machine.
{ head -c 56 /dev/zero; printf 'ARMd'; head -c 100000 /dev/zero; } >arm64-image
{ printf '\177ELF\002\001\001\000\000\000\000\000\000\000\000\000\002\000\267\000\001\000\000\000'; head -c 4096 /dev/zero; } >aarch64-elf
{ head -c 18 /bin/busybox 2>/dev/null || head -c 18 /bin/ls; } >short-elf
printf 'a shell script\n' >text
install -m 000 /dev/null unreadable

for k in missing empty truncated-head truncated-half random folder fifo arm64-image aarch64-elf short-elf text; do
    refused "kernel: $k" 1 "$k" "${base[@]}" --kernel $k
done
for k in missing folder fifo; do
    refused "initrd: $k" 1 "$k" "${base[@]}" --kernel "$guest/vmlinuz" --initrd $k
done
survives "initrd: random bytes" "${base[@]}" --kernel "$guest/vmlinuz" --initrd random --append "console=ttyS0 panic=-1" --no-reboot
survives "initrd: empty" "${base[@]}" --kernel "$guest/vmlinuz" --initrd empty --no-reboot
for d in missing folder fifo empty; do
    refused "disk: $d" 1 "$d" "${base[@]}" --disk $d
done
if [ "$(id -u)" = 0 ]; then
    chmod 755 "$tmp"
    user=(setpriv --reuid 65534 --regid 65534 --clear-groups)
    if "${user[@]}" test -x "$DOPPEL"; then
        save=$DOPPEL DOPPEL=setpriv
        for o in kernel disk; do
            refused "$o: unreadable" 1 unreadable "${user[@]:1}" "$save" "${base[@]}" --$o unreadable
        done
        DOPPEL=$save
    else
        skip "kernel, disk: unreadable" "an ordinary user cannot reach $DOPPEL"
    fi
fi
truncate -s 1M ro.img; chmod 444 ro.img
truncate -s 1M busy.img
exec 7<>busy.img; flock 7
timeout 10 "$DOPPEL" "${base[@]}" --disk busy.img </dev/null >out 2>err & first=$!
refused "disk: twice in one machine" 1 twice.img "${base[@]}" --disk "$(truncate -s 1M twice.img; echo twice.img)" --disk twice.img
kill $first 2>/dev/null; wait $first 2>/dev/null; exec 7>&-

# Multiboot headers that make no sense, modules beyond memory, boot sectors, firmware of odd sizes.
word() { printf "\\x$(printf %02x $(($1 & 255)))\\x$(printf %02x $(($1 >> 8 & 255)))\\x$(printf %02x $(($1 >> 16 & 255)))\\x$(printf %02x $(($1 >> 24 & 255)))"; }
multiboot()                                         # flags, words that follow the checksum
{
    local flags=$1 w
    shift
    word 0x1badb002; word "$flags"; word $((-(0x1badb002 + flags)))
    for w in "$@"; do word "$w"; done
    head -c 2000 /dev/zero
}
multiboot 0x10 >mb-flags
multiboot 3 >mb-no-elf
multiboot 0x10003 0x100000 0x200000 0 0 0x100000 >mb-load-above-header
multiboot 0x10003 0x100000 0x100000 0xffffffff 0 0x100000 >mb-beyond-file
multiboot 0x10003 0x100000 0x100000 0 0xffff0000 0x100000 >mb-bss
multiboot 0x10003 0xfffff000 0xfffff000 0 0 0xfffff000 >mb-top
multiboot 0x10003 0 0 0 0 0 >mb-zero
multiboot 0x10003 0x100000 0x100000 0 0 0x100000 >mb-good
{ word 0xe85250d6; word 0; word 16; word $((-(0xe85250d6 + 16))); head -c 2000 /dev/zero | tr '\0' '\377'; } >mb2-no-end
{ word 0xe85250d6; word 0; word 24; word $((-(0xe85250d6 + 24))); word 77; word 8; head -c 2000 /dev/zero; } >mb2-unknown-tag
truncate -s 600M huge
truncate -s 16M disk-with-sector; printf '\125\252' | dd of=disk-with-sector bs=1 seek=510 conv=notrunc 2>/dev/null
for k in mb-flags mb-no-elf mb-load-above-header mb-beyond-file mb-bss mb-top mb-zero mb2-no-end mb2-unknown-tag disk-with-sector; do
    refused "kernel: $k" 1 "$k" "${base[@]}" --kernel $k
done
refused "module beyond memory: multiboot" 1 huge "${base[@]}" --kernel mb-good --initrd huge
refused "module beyond memory: bzImage" 1 huge "${base[@]}" --kernel "$guest/vmlinuz" --initrd huge
# PVH: an ELF file with Xen's note, and what may be wrong with it.
cat >pvh.S <<'S'
    .code32
    .globl _start
_start: hlt
    jmp _start
    .section .note.pvh, "a", @note
    .long 4, 8, 18
    .asciz "Xen"
    .quad _start
S
change() { cp pvh-good "$1"; printf "$3" | dd of="$1" bs=1 seek="$2" conv=notrunc 2>/dev/null; }    # name, offset, bytes
if "${CC:-gcc}" -m64 -nostdlib -static -no-pie -Wl,--build-id=none -Wl,-Ttext-segment=0x200000 pvh.S -o pvh-good 2>err; then
    note=$(grep -obUaP 'Xen\x00' pvh-good | head -n 1 | cut -d: -f1)
    head -c 100 pvh-good >pvh-head
    change pvh-no-headers 56 '\000\000'
    change pvh-many-headers 56 '\377\377'
    change pvh-headers-behind-end 32 '\000\377\377\377\377\377\377\177'
    change pvh-not-for-this-processor 18 '\267'
    change pvh-no-such-note "$note" 'Xer'
    change pvh-huge-note $((note - 8)) '\377\377\377\377'
    change pvh-entry-above-4-gib $((note + 8)) '\377\377\377\377\377'
    change pvh-load-at-the-end-of-addresses 88 '\000\360\377\377\377\377\377\377'
    for k in pvh-{head,no-headers,many-headers,headers-behind-end,not-for-this-processor,no-such-note,huge-note,entry-above-4-gib,load-at-the-end-of-addresses}; do
        refused "kernel: $k" 1 "$k" "${base[@]}" --kernel $k
    done
    refused "module beyond memory: PVH" 1 huge "${base[@]}" --kernel pvh-good --initrd huge
    survives "PVH: a kernel that does nothing" "${base[@]}" --kernel pvh-good
else
    not_ok "the PVH kernel is built" "$(cat err)"
fi
for n in 1 511 65535 65537 100000; do
    truncate -s $n "firmware-$n"
    refused "firmware: $n bytes" 1 "firmware-$n" "${base[@]}" --firmware "firmware-$n"
done
for f in missing empty folder fifo huge; do
    refused "firmware: $f" 1 "$f" "${base[@]}" --firmware $f
done
head -c 131072 /dev/urandom >firmware-random
survives "firmware: random bytes" "${base[@]}" --firmware firmware-random --no-reboot
refused "firmware and a command" 64 firmware "${base[@]}" --firmware firmware-random -- true

for m in 0 1 1K -5 3M 99999999999999999999G 1000000G abc 512X "" 0x100; do
    refused "--memory '$m'" 64 --memory "${base[@]}" --memory "$m"
done
refused "memory too small for the kernel" 1 memory "${base[@]}" --memory 16M
for c in 0 -1 65 1000000 two ""; do
    refused "--cpus '$c'" 64 --cpus "${base[@]}" --cpus "$c"
done
refused "unknown option" 64 --nonsense "${base[@]}" --nonsense
refused "unknown engine" 64 --engine run --quiet --engine warp
refused "unknown command" 64 fly fly
refused "--trace of nothing known" 64 --trace "${base[@]}" --trace bogus
refused "--disk with an unknown attribute" 64 --disk "${base[@]}" --disk "ro.img,shiny"
refused "command line too long" 1 append "${base[@]}" --append "$(head -c 70000 /dev/zero | tr '\0' x)"
refused "console: a folder" 1 folder run --engine interp --quiet --console folder
refused "console: a socket in a missing folder" 1 nowhere run --engine interp --quiet --console unix:nowhere/sock
refused "status file: a missing folder" 1 nowhere run --engine interp --quiet --status-file nowhere/status -- true

# Outputs that cannot be written: the guest is not harmed and still gives its status (1 for a command that believes all went well).
export BOOT_SECONDS=280
timeout 280 "$DOPPEL" run --engine interp --quiet -- sh -c 'echo lost; exit 5' </dev/null >/dev/full 2>err
status=$?
grep -qE 'Sanitizer|runtime error|bug:' err && status="sanitizer: $(head -n 5 err)"
like "standard output is full: the end is told" "$status" '^(5|1|141)$'

# The host's disk is full below a sparse image: the guest sees an I/O error, the user is told, and the guest goes on to its end.
mkdir small
if unshare -rm true 2>/dev/null; then
    timeout 280 unshare -rm bash -c 'mount -t tmpfs -o size=2m none small && truncate -s 16M small/full.img &&
        exec "$0" run --engine interp --quiet --disk small/full.img,on-full=error -- \
            sh -c "dd if=/dev/zero of=/dev/vda bs=64k count=128 conv=fsync 2>/dev/null; echo \$?"' "$DOPPEL" </dev/null >out 2>err
    is "full host disk: doppel's status" $? 0
    is "full host disk: the guest's write fails" "$(cat out)" 1
    like "full host disk: the user is told" "$(cat err)" 'full\.img.*No space left'
    is "full host disk: no sanitizer speaks" "$(grep -cE 'Sanitizer|runtime error|bug:' err)" 0
else
    skip "full host disk" "user namespaces cannot be made here"
fi
done_testing
