/*
 * The native side: signal frames do all of it. An int3 in this file raises SIGTRAP; the handler saves the interrupted context, writes the
 * case's registers, flags and extended state into the frame, and returns to the case's instruction. The next signal is the case's end: its frame
 * holds the whole outcome, and the saved context is put back.
 *
 * The handler runs with the case's FS base and flags until it has put the host's back, so it calls nothing of libc before.
 */
#define _GNU_SOURCE
#include <signal.h>
#include <string.h>
#include <sys/auxv.h>
#include <sys/mman.h>
#include <sys/ucontext.h>
#include <unistd.h>

#define HOST_REG_RIP 16
#define GREG_CSGSFS 18
#define GREG_ERR 19
#define GREG_TRAPNO 20
#define GREG_CR2 22
#undef REG_RIP
#include "insn.h"

/* struct _fpx_sw_bytes of asm/sigcontext.h, at byte 464 of the frame's image */
struct sw_bytes {
    u32 magic1, extended_size;
    u64 xfeatures;
    u32 xstate_size, pad[7];
};

static struct {
    struct xlayout layout;
    u8 *code;                                                      /* the code pages, writable */
    const struct icase *i;
    struct outcome *out;
    bool armed, writable_code;
    u64 fs_base;
    greg_t saved_gregs[23];
    sigset_t saved_mask;
    u8 saved_fp[16384] __attribute__((aligned(64)));
    u32 saved_fp_size;
} n;

static const int caught[] = {SIGTRAP, SIGSEGV, SIGBUS, SIGFPE, SIGILL};
static struct sigaction before[ARRAY_SIZE(caught)];

/* gregs: R8..R15 RDI RSI RBP RBX RDX RAX RCX RSP RIP EFL */
static const u8 greg_of[16] = {13, 14, 12, 11, 15, 10, 9, 8, 0, 1, 2, 3, 4, 5, 6, 7};

static void enter_case(ucontext_t *uc)
{
    greg_t *g = uc->uc_mcontext.gregs;
    u8 *fp = (u8 *)uc->uc_mcontext.fpregs;
    struct sw_bytes sw;
    const struct state *in = &n.i->in;

    memcpy(n.saved_gregs, g, sizeof n.saved_gregs);
    memcpy(&sw, fp + 464, sizeof sw);
    n.saved_fp_size = sw.extended_size ? sw.extended_size : 512;
    memcpy(n.saved_fp, fp, MIN(n.saved_fp_size, (u32)sizeof n.saved_fp));
    vectors_put(&in->v, &n.layout, fp);
    memcpy(fp + 464, &sw, sizeof sw);
    for (unsigned r = 0; r < 16; r++)
        g[greg_of[r]] = (greg_t)in->gpr[r];
    g[HOST_REG_RIP] = (greg_t)in->rip;
    g[17] = (greg_t)in->rflags;
    g[GREG_CSGSFS] = (g[GREG_CSGSFS] & ~0xffffll) | (n.i->compat ? 0x23 : 0x33);
    __asm__ volatile("wrgsbase %0" ::"r"(in->gs_base));
    n.armed = true;
    __asm__ volatile("wrfsbase %0" ::"r"(in->fs_base));
}

static void leave_case(ucontext_t *uc, u64 fs_base, u64 gs_base)
{
    greg_t *g = uc->uc_mcontext.gregs;
    u8 *fp = (u8 *)uc->uc_mcontext.fpregs;
    struct state *s = &n.out->s;

    n.armed = false;
    for (unsigned r = 0; r < 16; r++)
        s->gpr[r] = (u64)g[greg_of[r]];
    s->rip = (u64)g[HOST_REG_RIP];
    s->rflags = (u64)g[17];
    s->fs_base = fs_base;
    s->gs_base = gs_base;
    n.out->vector = (unsigned)g[GREG_TRAPNO];
    n.out->error = (u64)g[GREG_ERR];
    n.out->cr2 = (u64)g[GREG_CR2];
    vectors_get(&s->v, &n.layout, fp);
    memcpy(g, n.saved_gregs, sizeof n.saved_gregs);
    memcpy(fp, n.saved_fp, MIN(n.saved_fp_size, (u32)sizeof n.saved_fp));
}

static void handler(int sig, siginfo_t *si, void *ucontext)
{
    ucontext_t *uc = ucontext;
    u64 fs = 0, gs = 0;

    __asm__ volatile("pushfq; andl $~0x244000, (%%rsp); popfq" ::: "memory", "cc"); /* the case's AC, NT, ID must not be ours */
    if (n.armed) {
        __asm__ volatile("rdfsbase %0; rdgsbase %1" : "=r"(fs), "=r"(gs));
        __asm__ volatile("wrfsbase %0" ::"r"(n.fs_base));
        leave_case(uc, fs, gs);
        return;
    }
    if (sig == SIGTRAP && n.i) {
        enter_case(uc);
        return;
    }
    for (unsigned k = 0; k < ARRAY_SIZE(caught); k++) {            /* of the interpreter's stubs, or of the test program itself */
        if (caught[k] == sig && (before[k].sa_flags & SA_SIGINFO)) {
            before[k].sa_sigaction(sig, si, ucontext);
            return;
        }
    }
    signal(sig, SIG_DFL);
}

static int map_pages(bool writable_code)
{
    int fd = memfd_create("insn-code", 0);

    if (fd < 0 || ftruncate(fd, 2 * (off_t)PAGE_SIZE))
        return -1;
    n.code = mmap(NULL, 2 * PAGE_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (n.code == MAP_FAILED)
        return -1;
    for (unsigned p = 0; p < PAGES; p++) {
        int prot = page_kind(p) != KIND_CODE ? PROT_READ | PROT_WRITE : PROT_READ | PROT_EXEC | (writable_code ? PROT_WRITE : 0);
        int flags = MAP_FIXED_NOREPLACE;
        void *want = (void *)PAGE_VA(p), *got;

        if (page_kind(p) == KIND_NONE)
            continue;
        got = page_kind(p) == KIND_CODE ? mmap(want, PAGE_SIZE, prot, MAP_SHARED | flags, fd, (off_t)(p * PAGE_SIZE))
                                        : mmap(want, PAGE_SIZE, prot, MAP_PRIVATE | MAP_ANONYMOUS | flags, -1, 0);
        if (got != want)
            return -1;
    }
    close(fd);
    return 0;
}

int native_open(const struct xlayout *l, bool writable_code, const char **why)
{
    static u8 stack[65536] __attribute__((aligned(64)));
    struct sigaction sa = {.sa_sigaction = handler, .sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER};
    stack_t ss = {.ss_sp = stack, .ss_size = sizeof stack};

    n.layout = *l;
    if (!(getauxval(26) & 2)) {                                    /* AT_HWCAP2, HWCAP2_FSGSBASE */
        *why = "the host's kernel does not enable FSGSBASE";
        return -1;
    }
    n.writable_code = writable_code;
    if (map_pages(writable_code)) {
        *why = "cannot map pages at fixed low addresses";
        return -1;
    }
    sigfillset(&sa.sa_mask);                                       /* whose handler is called from ours may count on that */
    sigaltstack(&ss, NULL);
    for (unsigned k = 0; k < ARRAY_SIZE(caught); k++)
        sigaction(caught[k], &sa, &before[k]);
    __asm__ volatile("mov %0, %%ds; mov %0, %%es" ::"r"(0x2b));    /* for 32-bit code */
    __asm__ volatile("rdfsbase %0" : "=r"(n.fs_base));
    return 0;
}

static void apply_patches(const struct icase *i)
{
    for (unsigned p = 0; p < ARRAY_SIZE(i->patch_va); p++) {
        if (i->patch_va[p])
            memcpy((void *)i->patch_va[p], &i->patch[p], 8);
    }
    if (i->image)
        memcpy((void *)i->patch_va[0], i->image, 1024);
}

void native_run(const struct icase *i, const u8 *pattern, struct outcome *out)
{
    static bool ro;

    if (!ro) {
        memcpy((void *)PAGE_VA(PAGE_RO), pattern + PAGE_RO * PAGE_SIZE, PAGE_SIZE);
        mprotect((void *)PAGE_VA(PAGE_RO), PAGE_SIZE, PROT_READ);
        ro = true;
    }
    for (unsigned p = 0; p < PAGES; p++) {
        if (page_kind(p) == KIND_RW)
            memcpy((void *)PAGE_VA(p), pattern + p * PAGE_SIZE, PAGE_SIZE);
    }
    apply_patches(i);
    memset(n.code, 0xcc, 2 * PAGE_SIZE);
    if (i->text)
        memcpy(n.code, i->text, i->text_len);
    else
        memcpy(n.code + (i->in.rip - CODE_VA), i->code, MIN((u64)i->len, CODE_VA + 2 * PAGE_SIZE - i->in.rip));
    n.i = i;
    n.out = out;
    __asm__ volatile("int3" ::: "memory");
    n.i = NULL;
    for (unsigned p = 0; p < PAGES; p++) {
        if (page_kind(p) == KIND_RW || (n.writable_code && page_kind(p) == KIND_CODE))
            memcpy(out->mem[p], (void *)PAGE_VA(p), PAGE_SIZE);
    }
}
