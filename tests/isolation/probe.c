/*
 * A program in the guest that tries addresses: it reads them from standard input, one hexadecimal number a line, and says
 * after "go" how many attempts were answered as a process's page tables demand: SIGSEGV by #PF with the address and the
 * error code, or by #GP or #SS where the address is not canonical. Addresses that this process has mapped itself are left
 * out. "end" ends it.
 */
#define _GNU_SOURCE
#include <setjmp.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#define ADDRESSES 20000
#define TASK_SIZE 0x7ffffffff000ull                 /* of Linux; from here on it says of a fault that the page is there */

/* Each takes the address in RDI; what is stored is a mark. RBX, RBP and RSP are kept where nothing faults. */
#define OP(name, text) void op_##name(uint64_t a); __asm__(".text\nop_" #name ": " text "\n")
OP(load, "mov (%rdi), %rax; ret");
OP(load_byte, "movzbl (%rdi), %eax; ret");
OP(load_index, "mov $0x1000, %ecx; lea -0x8000(%rdi), %rdi; mov (%rdi,%rcx,8), %rax; ret");
OP(load_wrap, "mov $0x2000000000000000, %rcx; mov 0x7ffffff8(%rdi,%rcx,8), %rax; ret"); /* the caller takes 7ffffff8h off */
OP(load_r14, "push %r14; mov %rdi, %r14; mov (%r14), %rax; pop %r14; ret");
OP(load_fs, "mov %fs:0, %rax; sub %rax, %rdi; mov %fs:(%rdi), %rax; ret");
OP(store, "movq $0x5a5a5a5a, (%rdi); ret");
OP(store_byte, "movb $0x5a, (%rdi); ret");
OP(add, "addq $1, (%rdi); ret");
OP(lock_add, "lock addq $1, (%rdi); ret");
OP(xchg, "xchg %rax, (%rdi); ret");
OP(cmpxchg, "mov (%rsp), %rax; lock cmpxchg %rcx, (%rdi); ret");
OP(rep_movs_from, "mov %rdi, %rsi; lea -256(%rsp), %rdi; mov $16, %ecx; rep movsb; ret");
OP(rep_movs_to, "lea -256(%rsp), %rsi; mov $16, %ecx; rep movsb; ret");
OP(rep_stos, "mov $16, %ecx; rep stosb; ret");
OP(scas, "mov $16, %ecx; repne scasb; ret");
OP(sse_load, "movdqu (%rdi), %xmm0; ret");
OP(sse_store, "movdqu %xmm0, (%rdi); ret");
OP(x87_load, "fldl (%rdi); fstp %st(0); ret");
OP(fxsave, "and $-16, %rdi; fxsave (%rdi); ret");
OP(push, "mov %rsp, %rdx; lea 8(%rdi), %rsp; push %rax; mov %rdx, %rsp; ret");
OP(pop, "mov %rsp, %rdx; mov %rdi, %rsp; pop %rax; mov %rdx, %rsp; ret");
OP(call, "mov %rsp, %rdx; lea 8(%rdi), %rsp; call 1f; 1: mov %rdx, %rsp; ret");
OP(ret, "mov %rdi, %rsp; ret");
OP(leave, "push %rbp; mov %rsp, %rdx; mov %rdi, %rbp; leave; mov %rdx, %rsp; pop %rbp; ret");
OP(rbp_load, "push %rbp; mov %rdi, %rbp; mov (%rbp), %rax; pop %rbp; ret");
OP(jump, "jmp *%rdi");
OP(jump_memory, "jmp *(%rdi)");

enum { READ = 0, WRITE = 2, JUMP = 16 };
static const struct op {
    const char *name;
    void (*run)(uint64_t a);
    int kind;
    bool stack;                                     /* #SS, not #GP */
    uint64_t less;
} ops[] = {
    { "load", op_load, READ, false, 0 },
    { "load of a byte", op_load_byte, READ, false, 0 },
    { "load, index", op_load_index, READ, false, 0 },
    { "load, sum that wraps", op_load_wrap, READ, false, 0x7ffffff8 },
    { "load, R14", op_load_r14, READ, false, 0 },
    { "load, FS", op_load_fs, READ, false, 0 },
    { "store", op_store, WRITE, false, 0 },
    { "store of a byte", op_store_byte, WRITE, false, 0 },
    { "add", op_add, WRITE, false, 0 },
    { "lock add", op_lock_add, WRITE, false, 0 },
    { "xchg", op_xchg, WRITE, false, 0 },
    { "cmpxchg", op_cmpxchg, WRITE, false, 0 },
    { "rep movs from", op_rep_movs_from, READ, false, 0 },
    { "rep movs to", op_rep_movs_to, WRITE, false, 0 },
    { "rep stos", op_rep_stos, WRITE, false, 0 },
    { "repne scas", op_scas, READ, false, 0 },
    { "movdqu load", op_sse_load, READ, false, 0 },
    { "movdqu store", op_sse_store, WRITE, false, 0 },
    { "fld", op_x87_load, READ, false, 0 },
    { "fxsave", op_fxsave, WRITE, false, 0 },
    { "push", op_push, WRITE, true, 0 },
    { "pop", op_pop, READ, true, 0 },
    { "call", op_call, WRITE, true, 0 },
    { "ret", op_ret, READ, true, 0 },
    { "leave", op_leave, READ, true, 0 },
    { "load, RBP", op_rbp_load, READ, true, 0 },
    { "jump", op_jump, JUMP, false, 0 },
    { "jump through memory", op_jump_memory, READ, false, 0 },
};

static sigjmp_buf back;
static int got_signal, got_trap, got_error;
static uint64_t got_address;

static void on_fault(int sig, siginfo_t *info, void *context)
{
    ucontext_t *u = context;

    got_signal = sig;
    got_trap = (int)u->uc_mcontext.gregs[REG_TRAPNO];
    got_error = (int)u->uc_mcontext.gregs[REG_ERR];
    got_address = (uint64_t)info->si_addr;
    siglongjmp(back, 1);
}

static uint64_t address[ADDRESSES], range[512][2];
static unsigned addresses, ranges;

static void own_ranges(void)
{
    char line[400];
    FILE *f = fopen("/proc/self/maps", "r");

    while (f && fgets(line, sizeof line, f) && ranges < 512)
        if (sscanf(line, "%lx-%lx", &range[ranges][0], &range[ranges][1]) == 2)
            ranges++;
    if (f)
        fclose(f);
}

/* With some room: fxsave, strings and stack growth. */
static bool ours(uint64_t a)
{
    for (unsigned i = 0; i < ranges; i++)
        if (a + (1 << 20) >= range[i][0] && a < range[i][1] + 4096)
            return true;
    return false;
}

static unsigned bad;

static void attempt(const struct op *o, uint64_t a)
{
    if (o->run == op_load_fs && a >> 63)
        return;                                     /* processors differ: the sum is canonical, the offset may not be */
    if (o->run == op_fxsave && (a ^ (a + 511)) >> 47)
        return;                                     /* half of it is canonical */
    got_signal = 0;
    if (!sigsetjmp(back, 1))
        o->run(a - o->less);
    bool canonical = (uint64_t)((int64_t)(a << 16) >> 16) == a, kernel = a >= TASK_SIZE;
    int trap = canonical ? 14 : o->stack ? 12 : 13, error = 4 | o->kind | (kernel ? 1 : 0);
    bool there = got_address == a || (o->run == op_fxsave && got_address - a < 512);
    if (got_signal == (trap == 12 ? SIGBUS : SIGSEGV) && got_trap == trap && (!canonical || (got_error == error && there)))
        return;
    if (bad++ < 10)
        printf("%s at %lx: signal %d, trap %d (expected %d), error %x (%x), address %lx\n", o->name, (unsigned long)a, got_signal, got_trap,
               trap, got_error, error, (unsigned long)got_address);
}

int main(void)
{
    static uint8_t stack[65536];
    stack_t alternate = { .ss_sp = stack, .ss_size = sizeof stack };
    struct sigaction act = { .sa_sigaction = on_fault, .sa_flags = SA_SIGINFO | SA_ONSTACK };
    char line[100];

    sigaltstack(&alternate, NULL);
    for (const int *s = (const int[]){ SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGTRAP, 0 }; *s; s++)
        sigaction(*s, &act, NULL);
    own_ranges();
    puts("ready");
    fflush(stdout);
    while (fgets(line, sizeof line, stdin)) {
        if (!strncmp(line, "end", 3))
            break;
        if (strncmp(line, "go", 2)) {
            uint64_t a = strtoull(line, NULL, 16);
            if (addresses < ADDRESSES && !ours(a))
                address[addresses++] = a;
            continue;
        }
        for (unsigned i = 0; i < addresses; i++)
            for (unsigned k = 0; k < sizeof ops / sizeof *ops; k++)
                attempt(&ops[k], address[i]);
        printf("%u addresses, %u bad\n", addresses, bad);
        fflush(stdout);
        addresses = bad = 0;
    }
    return 0;
}
