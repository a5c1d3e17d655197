/*
 * The catcher of long mode: 256 entries, 16 bytes apart. Whether an error code was pushed is seen from the stack itself: the processor aligns RSP to 16
 * before it pushes five or six quadwords (SDM vol. 3A 6.14.2), so INT n to any vector needs no entry of its own.
 */
        .text
        .globl  trap_entry
        .balign 16
trap_entry:
        .set    n, 0
        .rept   256
        .balign 16
        pushq   $n
        jmp     trap_common
        .set    n, n + 1
        .endr

        .balign 16
trap_common:                            /* vector, [error,] RIP, CS, RFLAGS, RSP, SS */
        cld
        .irp    r, r15, r14, r13, r12, r11, r10, r9, r8, rdi, rsi, rbp, rsp, rbx, rdx, rcx, rax
        pushq   %\r
        .endr
        movq    %rsp, %rdi
        movq    %rsp, %rbx
        andq    $-16, %rsp
        call    trap_catch              /* 1: there is an error code */
        movq    %rbx, %rsp
        movl    %eax, trap_had_error
        .irp    r, rax, rcx, rdx, rbx
        popq    %\r
        .endr
        addq    $8, %rsp
        .irp    r, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15
        popq    %\r
        .endr
        leaq    8(%rsp), %rsp
        cmpl    $0, trap_had_error
        je      1f
        leaq    8(%rsp), %rsp
1:      iretq
        .bss
trap_had_error:
        .skip   4
        .section .note.GNU-stack, "", @progbits
