/*
 * The catcher of long mode: 256 entries, 16 bytes apart. Whether an error code was pushed is seen from the stack
 * itself: the processor aligns RSP to 16 before it pushes five or six quadwords (SDM vol. 3A 6.14.2), so INT n to
 * any vector needs no entry of its own.
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
/* exec_call(ip, data, user): the assembly half of exec() */
        .globl  exec_call
exec_call:
        .irp    r, rbx, rbp, r12, r13, r14, r15
        pushq   %\r
        .endr
        movq    %rdi, %r8
        movq    %rsi, %rdi
        movq    %rsi, %rbx
        movl    $-1, trap
        movl    $0, trap + 4
        movq    %rsp, trap_sp
        movq    $2f, trap_fix
        testl   %edx, %edx
        jz      1f
        pushq   $0x23
        pushq   $user_stack_end + 0x10000000
        pushq   user_flags
        pushq   $0x2b
        pushq   $3f + 0x10000000
        xorl    %eax, %eax
        xorl    %ecx, %ecx
        xorl    %edx, %edx
        xorl    %ebp, %ebp
        iretq
1:      xorl    %eax, %eax
        xorl    %ecx, %ecx
        xorl    %edx, %edx
        xorl    %ebp, %ebp
        call    *%r8
2:      movq    $0, trap_fix
        .irp    r, r15, r14, r13, r12, rbp, rbx
        popq    %\r
        .endr
        cld
        ret
3:      call    *%r8                    /* at CPL 3 */
        int     $0x80

        .bss
trap_had_error:
        .skip   4
        .section .note.GNU-stack, "", @progbits
