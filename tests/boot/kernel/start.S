/*
 * A multiboot kernel for the tests: entered in 32-bit mode, it goes to long mode and calls kernel_main(magic, info); a
 * second processor comes by the trampoline at 0x8000 and calls second_main(). -DMULTIBOOT=1 or 2 chooses the header,
 * -DADDRESSES puts load addresses into it, -DRELOCATABLE (2 only) is accepted but asks for the place where it is linked.
 */
#define MB1_FLAGS 0x3

    .section .header, "a"
    .code32
    .balign 8
header:
#if MULTIBOOT == 1
#ifdef ADDRESSES
#define FLAGS (MB1_FLAGS | 0x10000)
#else
#define FLAGS MB1_FLAGS
#endif
    .long 0x1badb002, FLAGS, -(0x1badb002 + FLAGS)
#ifdef ADDRESSES
    .long header, load_start, load_end, bss_end, _start
#endif
#else
    .long 0xe85250d6, 0, header_end - header, -(0xe85250d6 + (header_end - header))
    .balign 8
    .short 1, 0                                 /* information request: command line, memory map, ELF, RSDP */
    .long 24, 1, 6, 9, 15
#ifdef ADDRESSES
    .balign 8
    .short 2, 0
    .long 24, header, load_start, load_end, bss_end
    .balign 8
    .short 3, 0
    .long 12, _start
#endif
#ifdef RELOCATABLE
    .balign 8
    .short 10, 0
    .long 24, 0x100000, 0x40000000, 4096, 0
#endif
    .balign 8
    .short 6, 1                                 /* module alignment, optional */
    .long 8
    .balign 8
    .short 99, 1                                /* nobody knows it, and nobody has to */
    .long 8
    .balign 8
    .short 0, 0
    .long 8
header_end:
#endif

    .text
    .code32
    .globl _start
_start:
    cli
    mov $stack_end, %esp
    pushl $0
    push %ebx
    pushl $0
    push %eax
    call long_mode
    lgdt gdt_pointer
    ljmp $8, $1f
    .code64
1:  mov $16, %eax
    mov %eax, %ds
    mov %eax, %es
    mov %eax, %ss
    pop %rdi
    pop %rsi
    call kernel_main
2:  hlt
    jmp 2b

    .code32
long_mode:                                      /* page tables (identity, 2 MiB pages), PAE, LME, paging */
    mov $pml4, %edi
    movl $pdpt + 3, (%edi)
    mov $pdpt, %edi
    movl $pd + 3, (%edi)
    movl $pd + 4096 + 3, 8(%edi)
    movl $pd + 8192 + 3, 16(%edi)
    movl $pd + 12288 + 3, 24(%edi)
    mov $pd, %edi
    mov $0x83, %eax
    mov $2048, %ecx
3:  mov %eax, (%edi)
    add $0x200000, %eax
    add $8, %edi
    loop 3b
    mov %cr4, %eax
    or $0x20, %eax
    mov %eax, %cr4
    mov $pml4, %eax
    mov %eax, %cr3
    mov $0xc0000080, %ecx
    rdmsr
    or $0x100, %eax
    wrmsr
    mov %cr0, %eax
    or $0x80000000, %eax
    mov %eax, %cr0
    ret

/* Copied to 0x8000: real mode, CS = 0x800. */
    .globl trampoline, trampoline_end
    .code16
trampoline:
    cli
    xor %ax, %ax
    mov %ax, %ds
    lgdtl 0x8000 + (gdt32_pointer - trampoline)
    mov %cr0, %eax
    or $1, %al
    mov %eax, %cr0
    ljmpl $24, $second32
    .balign 8
gdt32_pointer:
    .short gdt_end - gdt - 1
    .long gdt
trampoline_end:
    .code32
second32:
    mov $16, %eax
    mov %eax, %ds
    mov %eax, %es
    mov %eax, %ss
    mov $second_stack_end, %esp
    call long_mode
    ljmp $8, $4f
    .code64
4:  call second_main
5:  hlt
    jmp 5b

    .data
    .balign 8
gdt:
    .quad 0, 0x00af9a000000ffff, 0x00cf92000000ffff, 0x00cf9a000000ffff
gdt_end:
gdt_pointer:
    .short gdt_end - gdt - 1
    .long gdt

    .bss
    .balign 4096
pml4:
    .skip 4096
pdpt:
    .skip 4096
pd:
    .skip 4 * 4096
    .skip 8192
stack_end:
    .skip 8192
second_stack_end:
    .section .note.GNU-stack, "", @progbits
