/* The catcher of protected mode: 256 entries, 16 bytes apart. */
        .text
        .globl  trap_entry
        .balign 16
trap_entry:
        .set    n, 0
        .rept   256
        .balign 16
        .if     n != 8 && (n < 10 || n > 14) && n != 17
        pushl   $-1
        .endif
        pushl   $n
        jmp     trap_common
        .set    n, n + 1
        .endr

        .balign 16
trap_common:                            /* vector, error or -1, EIP, CS, EFLAGS, [ESP, SS, [ES, DS, FS, GS]] */
        cld
        pushl   %ds
        pushl   %es
        pushl   %fs
        pushl   %gs
        pushal
        movl    $0x23, %eax
        movl    %eax, %ds
        movl    %eax, %es
        movl    %esp, %eax
        pushl   %eax
        call    trap_catch              /* 1: go on at trap_fix; else where it came from */
        addl    $4, %esp
        testl   %eax, %eax
        jnz     1f
        popal
        popl    %gs
        popl    %fs
        popl    %es
        popl    %ds
        addl    $8, %esp
        iretl

1:      movl    %esp, %esi              /* the frame's registers, kept where no stack is needed */
        movl    $fix_regs, %edi
        movl    $8, %ecx
        ss rep  movsl
        xorl    %eax, %eax
        movl    %eax, %fs
        movl    %eax, %gs
        movl    $0x10, %eax
        movl    %eax, %ss
        movl    trap_sp, %esp
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
        jmp     *trap_fix

/* exec_call(ip, data, user): the assembly half of exec() */
        .globl  exec_call
exec_call:
        pushl   %ebx
        pushl   %ebp
        pushl   %esi
        pushl   %edi
        movl    20(%esp), %eax
        movl    %eax, exec_target
        movl    24(%esp), %edi
        movl    28(%esp), %edx
        movl    %edi, %esi
        movl    %edi, %ebx
        movl    $-1, trap
        movl    $0, trap + 4
        movl    %esp, trap_sp
        movl    $2f, trap_fix
        testl   %edx, %edx
        jz      1f
        pushl   $0x23
        pushl   $user_stack_end
        pushl   user_flags
        pushl   $0x1b
        pushl   $3f
        xorl    %eax, %eax
        xorl    %ecx, %ecx
        xorl    %edx, %edx
        xorl    %ebp, %ebp
        iretl
1:      xorl    %eax, %eax
        xorl    %ecx, %ecx
        xorl    %edx, %edx
        xorl    %ebp, %ebp
        call    *exec_target
2:      movl    $0, %ss:trap_fix
        popl    %edi
        popl    %esi
        popl    %ebp
        popl    %ebx
        cld
        ret
3:      call    *exec_target            /* at CPL 3 */
        int     $0x80

        .bss
        .balign 4
fix_regs:
        .skip   32
exec_target:
        .skip   4
        .section .note.GNU-stack, "", @progbits
