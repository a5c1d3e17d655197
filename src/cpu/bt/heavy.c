/*
 * The gates through which light code calls heavy functions: heavy_NAME looks whether a guest's extended state is in this thread's registers (bt_fp_here), moves it
 * out if so, and goes on in NAME. All arguments stay where they are, in registers and on the stack (System V ABI; RAX counts vector arguments of
 * variadic functions).
 */
#include "cpu/bt/fpstate.h"

#define LIGHT(name)
#define HEAVY(name)                                                                                   \
    asm(".pushsection .text\n"                                                                        \
        ".globl heavy_" #name "\n"                                                                    \
        ".type heavy_" #name ", @function\n"                                                          \
        "heavy_" #name ":\n"                                                                          \
        "    movq bt_fp_here@gottpoff(%rip), %r11\n"                                                  \
        "    cmpq $0, %fs:(%r11)\n"                                                                   \
        "    je 1f\n"                                                                                 \
        "    call heavy_claim\n"                                                                      \
        "1:  jmp " #name "@PLT\n"                                                                     \
        ".size heavy_" #name ", . - heavy_" #name "\n"                                                \
        ".popsection");
#include "cpu/bt/heavy.def"

/* Entered with the stack aligned to 16: behind the return addresses of the light caller and of the gate. */
asm(".pushsection .text\n"
    ".type heavy_claim, @function\n"
    "heavy_claim:\n"
    "    push %rax\n"
    "    push %rdi\n"
    "    push %rsi\n"
    "    push %rdx\n"
    "    push %rcx\n"
    "    push %r8\n"
    "    push %r9\n"
    "    push %r10\n"
    "    call bt_fp_claim_here@PLT\n"
    "    pop %r10\n"
    "    pop %r9\n"
    "    pop %r8\n"
    "    pop %rcx\n"
    "    pop %rdx\n"
    "    pop %rsi\n"
    "    pop %rdi\n"
    "    pop %rax\n"
    "    ret\n"
    ".size heavy_claim, . - heavy_claim\n"
    ".popsection");
