/*
 * The catcher of real mode: 256 entries in the interrupt vector table, 8 bytes apart. There are no error codes
 * (SDM vol. 3A 20.1.4).
 */
        .code16
        .text
        .globl  trap_entry
        .balign 8
trap_entry:
        .set    n, 0
        .rept   256
        .balign 8
        pushw   $n
        jmp     trap_common
        .set    n, n + 1
        .endr

trap_common:                            /* vector, IP, CS, FLAGS */
        pushw   %ds
        pushw   %es
        pushw   %fs
        pushw   %gs
        pushal
        cld
        xorw    %ax, %ax
        movw    %ax, %ds
        movw    %ax, %es
        movw    %ss, %bx
        movw    %ax, %ss                /* the C part runs on a stack of its own */
        movl    %esp, %esi
        movl    $catch_stack_end, %esp
        movzwl  %bx, %ebx
        pushl   %ebx
        movzwl  %si, %eax
        shll    $4, %ebx
        addl    %ebx, %eax
        pushl   %eax
        calll   trap_catch              /* (linear address of the frame, SS): 1: go on at trap_fix */
        popl    %ecx
        popl    %ebx
        testl   %eax, %eax
        jnz     1f
        movw    %bx, %ss
        movl    %esi, %esp
        popal
        popw    %gs
        popw    %fs
        popw    %es
        popw    %ds
        addw    $2, %sp
        iretw

1:      xorw    %ax, %ax
        movw    %ax, %fs
        movw    %ax, %gs
        pushl   $2
        popfl
        movl    fix_regs + 0, %edi
        movl    fix_regs + 4, %esi
        movl    fix_regs + 8, %ebp
        movl    fix_regs + 16, %ebx
        movl    fix_regs + 20, %edx
        movl    fix_regs + 24, %ecx
        movl    fix_regs + 28, %eax
        movl    trap_sp, %esp
        jmpw    *trap_fix

        .bss
        .balign 4
        .globl  fix_regs
fix_regs:
        .skip   32
        .skip   512
catch_stack_end:
        .section .note.GNU-stack, "", @progbits
