#!/bin/bash
# A multiboot kernel of our own (tests/boot/kernel), linked in every form that a header allows: loaded, told what it is told,
# two processors started, ended by the debug exit port. Boot sectors, statuses, and the serial line beside the debug console.
. "$(dirname "$0")/../lib/tap.sh"
BOOT_SECONDS=60
run=(run --engine "$ENGINE" --quiet --debug-exit --memory 64M)
source=$top/tests/boot/kernel

build()                                             # output, macros...
{
    local out=$1; shift
    "${CC:-gcc}" -m64 -O1 -ffreestanding -fno-pic -no-pie -mno-red-zone -mgeneral-regs-only -fno-stack-protector -fcf-protection=none \
        -fno-asynchronous-unwind-tables -nostdlib -static -Wl,--build-id=none -Wl,-z,noexecstack -Wl,-z,max-page-size=4096 \
        -Wl,--no-warn-rwx-segments -T "$source/kernel.ld" "$@" "$source/start.S" "$source/kernel.c" -o "$out"
}
cd "$tmp" || exit 1
{ build one-64 -DMULTIBOOT=1 && objcopy -O elf32-i386 one-64 one-32 &&
  build one-a -DMULTIBOOT=1 -DADDRESSES && objcopy -O binary one-a one-raw &&
  build two-64 -DMULTIBOOT=2 && objcopy -O elf32-i386 two-64 two-32 &&
  build two-a -DMULTIBOOT=2 -DADDRESSES && objcopy -O binary two-a two-raw &&
  build two-relocatable -DMULTIBOOT=2 -DRELOCATABLE; } 2>build.err || { not_ok "the kernels are built" "$(cat build.err)"; done_testing; }
printf 'the module' >module

common=$'command line quiet x=1\nloader doppel [0-9.]+\nmodule module\nmodule size 0xa\nmodule first word 0x20656874'
tail=$'second processor, APIC 0x1\nserial line'
for k in one-64 one-32 one-raw two-64 two-32 two-raw two-relocatable; do
    doppel "${run[@]}" --cpus 2 --kernel $k --initrd module --append "quiet x=1" </dev/null
    out=${out//$'\r'/}
    is "$k: status" "$status" 43
    sections=$'section headers 0x[0-9a-f]+\n'
    case $k in *raw) sections= ;; esac
    case $k in
        one*) want=$'^magic 0x2badb002\nflags 0x[0-9a-f]+\nlower 0x27c\n'"$common"$'\nusable MiB 0x3f\n'"$sections$tail"'$' ;;
        two-relocatable) want=$'^magic 0x36d76289\n'"$common"$'\nlower 0x27c\nusable MiB 0x3f\n'"$sections"$'ACPI revision 0x2\nload base 0x200000\n'"$tail"'$' ;;
        two*) want=$'^magic 0x36d76289\n'"$common"$'\nlower 0x27c\nusable MiB 0x3f\n'"$sections"$'ACPI revision 0x2\n'"$tail"'$' ;;
    esac
    like "$k: what it was given" "$out" "$want"
    is "$k: nothing else is said" "$err" ""
done

# QEMU's loader tells the same kernel the same, where it can (multiboot 1, 32-bit files): all but its own name, how much memory is below its
# extended BIOS data area, that it gives a boot device and no section headers, and that its command line begins with the file's name.
same() { sed -E -e '/^(flags|lower|loader|section headers) /d' -e "s/^command line $1 /command line /" | tr -d '\r'; }
if command -v qemu-system-x86_64 >/dev/null; then
    for k in one-32 one-raw; do
        timeout -s KILL "$BOOT_SECONDS" qemu-system-x86_64 -accel tcg -m 64 -smp 2 -display none -monitor none -no-reboot -kernel $k -initrd module \
            -append "quiet x=1" -device isa-debug-exit,iobase=0xf4,iosize=4 -debugcon file:qemu.debug -serial file:qemu.serial </dev/null 2>qemu.err
        is "$k: QEMU's status" $? 43
        doppel "${run[@]}" --cpus 2 --kernel $k --initrd module --append "quiet x=1" </dev/null
        is "$k: what QEMU says, too" "$(same $k <"$tmp/out")" "$(cat qemu.debug qemu.serial | same $k)"
    done
else
    skip "what QEMU says, too" "qemu-system-x86_64 is not installed (package qemu-system-x86)"
fi

doppel "${run[@]}" --kernel one-64 --append x </dev/null
like "one processor: the second does not come, and there is no module" "$out" $'loader [^\n]*\nusable.*second processor: none'

# A boot sector that says which drive it was loaded from, and ends with a 4-byte value of which 7 bits count.
cat >sector.S <<'S'
    .code16
    mov %dl, %al
    out %al, $0xe9
    mov $0x12345650, %eax
    mov $0xf4, %dx
    out %eax, %dx
1:  hlt
    jmp 1b
    .org 510
    .short 0xaa55
S
"${CC:-gcc}" -m32 -c sector.S -o sector.o && objcopy -O binary -j .text sector.o sector
doppel "${run[@]}" --status-file "$tmp/status" --kernel sector </dev/null
is "boot sector: status" "$status" $(((0x50 << 1 | 1) & 0xff))
is "boot sector: drive" "$(od -An -tx1 <"$tmp/out")" " 80"
like "boot sector: status file" "$(cat "$tmp/status")" $'end=debug-exit\nfailed=none'

# A guest that resets itself at once is started three times, not for ever; and once with --no-reboot.
cat >reset.S <<'S'
    .code16
    mov $'x', %al
    out %al, $0xe9
    mov $6, %al
    mov $0xcf9, %dx
    out %al, %dx
1:  hlt
    jmp 1b
    .org 510
    .short 0xaa55
S
"${CC:-gcc}" -m32 -c reset.S -o reset.o && objcopy -O binary -j .text reset.o reset
doppel "${run[@]}" --status-file "$tmp/status" --kernel reset </dev/null
is "resets at once: status" "$status" 1
is "resets at once: three starts" "$out" xxx
like "resets at once: says so" "$err" 'reset itself three times'
like "resets at once: status file" "$(cat "$tmp/status")" $'status=1\nend=reset\nfailed=guest'
doppel "${run[@]}" --no-reboot --kernel reset </dev/null
is "resets at once: with --no-reboot" "$status $out" "0 x"

# The reset vector of a firmware image of 64 KiB of our own, seen below 4 GiB and below 1 MiB.
cat >firmware.S <<'S'
    .code16
    .org 0x8000
start:
    mov $0xf000, %ax
    mov %ax, %ds
    mov 0x9000, %al
    out %al, $0xf4
    .org 0x9000
    .byte 0x15
    .org 0xfff0
    ljmp $0xf000, $0x8000
    .org 0x10000
S
"${CC:-gcc}" -m32 -c firmware.S -o firmware.o && objcopy -O binary -j .text firmware.o firmware
doppel "${run[@]}" --firmware firmware </dev/null
is "firmware: runs from the reset vector" "$status" 43


{ timeout -s KILL 4 "$DOPPEL" run --engine "$ENGINE" --quiet --memory 64M --kernel sector </dev/null >out 2>&1; } 2>/dev/null
is "without --debug-exit the port does nothing" $? 137

done_testing
