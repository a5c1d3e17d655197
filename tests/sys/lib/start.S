/*
 * From real mode at 0:8000h to main() in the program's mode (SDM vol. 3A 10.9.1 protected mode, 10.8.5 long mode).
 *
 * Memory: 500h the case number; 8000h the program, its stacks in .bss; 1 MiB page tables of long mode; 2 MiB the
 * pool of pages.
 */
        .set    PML4, 0x100000
        .set    PDPT, 0x101000
        .set    PD, 0x102000

        .section .start, "ax"
        .code16
        .globl  start
start:  cli
        cld
        xorw    %ax, %ax
        movw    %ax, %ds
        movw    %ax, %es
        movw    %ax, %ss
#ifdef REAL_MODE
        movw    %ax, %fs
        movw    %ax, %gs
        movl    $0x7c00, %esp
        ljmpl   $0, $1f
1:      calll   lib_init
        calll   main
2:      hlt
        jmp     2b
#else
        movw    $0x7c00, %sp
        lgdtl   start_gdt_reg
        movl    %cr0, %eax
        orl     $0x21, %eax             /* PE, NE */
        andl    $0x9fffffff, %eax       /* caches on */
        movl    %eax, %cr0
        ljmpl   $0x38, $1f

        .code32
1:      movw    $0x10, %ax
        movw    %ax, %ds
        movw    %ax, %es
        movw    %ax, %fs
        movw    %ax, %gs
        movw    %ax, %ss
        movl    $stack_end, %esp
#ifdef __x86_64__
        movl    $PML4, %edi             /* the three tables are zero: PML4[0] -> PDPT[0] -> PD: 512 pages of 2 MiB */
        movl    $PDPT + 7, (%edi)
        movl    $PDPT, %edi
        movl    $PD + 7, (%edi)
        movl    $PD, %edi
        movl    $0x83, %eax
1:      movl    %eax, (%edi)
        addl    $8, %edi
        addl    $0x200000, %eax
        cmpl    $PD + 4096, %edi
        jb      1b
        movl    $0x87, PD + 128 * 8     /* USER_OFF: the first 2 MiB, for CPL 3 too */
        movl    $PML4, %eax
        movl    %eax, %cr3
        movl    $0x20, %eax             /* PAE */
        movl    %eax, %cr4
        movl    $0xc0000080, %ecx
        rdmsr
        orl     $0x900, %eax            /* NXE, LME */
        wrmsr
        movl    %cr0, %eax
        orl     $0x80000000, %eax
        movl    %eax, %cr0
        ljmpl   $0x08, $1f
        .code64
1:      xorl    %ebp, %ebp
        movl    $stack_end, %esp
        call    lib_init
        call    main
#else
        ljmpl   $0x08, $1f
1:      xorl    %ebp, %ebp
        call    lib_init
        call    main
#endif
2:      hlt
        jmp     2b

        .balign 8
start_gdt_reg:
        .word   0x7ff
        .long   gdt
#endif
#ifndef REAL_MODE
        .bss
        .balign 16
        .skip   16384
stack_end:
        .globl  user_stack, user_stack_end, ring0_stack, ring0_stack_end
        .balign 4096
user_stack:
        .skip   8192
user_stack_end:
ring0_stack:
        .skip   8192
ring0_stack_end:
#endif
        .section .note.GNU-stack, "", @progbits
