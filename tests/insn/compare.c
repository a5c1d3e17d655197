/* What differs between two outcomes (insn.h), as lines of a report. */
#include <stdarg.h>
#include <string.h>

#include "insn.h"

static char report[4000];
static size_t report_len;

void differ(const char *fmt, ...)
{
    va_list ap;

    va_start(ap, fmt);
    if (report_len < sizeof report - 200)
        report_len += (size_t)vsnprintf(report + report_len, 200, fmt, ap);
    va_end(ap);
}

void differ_begin(void)
{
    report_len = 0;
    report[0] = 0;
}

const char *differ_report(void)
{
    return report;
}

static unsigned long long word(const u8 *p)
{
    unsigned long long v;

    memcpy(&v, p, 8);
    return v;
}

void compare_vectors(const struct vectors *a, const struct vectors *b)
{
    for (unsigned r = 0; r < 32; r++) {
        if (!memcmp(a->zmm[r], b->zmm[r], 64))
            continue;
        differ("#   zmm%-2u native", r);
        for (unsigned w = 8; w-- > 0;)
            differ(" %016llx", word(a->zmm[r] + 8 * w));
        differ("\n#         engine");
        for (unsigned w = 8; w-- > 0;)
            differ(" %016llx", word(b->zmm[r] + 8 * w));
        differ("\n");
    }
    for (unsigned r = 0; r < 8; r++) {
        if (a->k[r] != b->k[r])
            differ("#   k%u native %llx engine %llx\n", r, (unsigned long long)a->k[r], (unsigned long long)b->k[r]);
        if (memcmp(a->st[r], b->st[r], 10))
            differ("#   st%u native %04x:%016llx engine %04x:%016llx\n", r, a->st[r][8] | a->st[r][9] << 8, word(a->st[r]),
                   b->st[r][8] | b->st[r][9] << 8, word(b->st[r]));
    }
    if (a->mxcsr != b->mxcsr)
        differ("#   mxcsr native %x engine %x\n", a->mxcsr, b->mxcsr);
    if (a->fcw != b->fcw || a->fsw != b->fsw || a->ftw != b->ftw)
        differ("#   fcw fsw ftw native %x %x %x engine %x %x %x\n", a->fcw, a->fsw, a->ftw, b->fcw, b->fsw, b->ftw);
    if ((a->fsw & 0x80) && (a->fop != b->fop || a->fip != b->fip || a->fdp != b->fdp))
        differ("#   fop fip fdp native %x %llx %llx engine %x %llx %llx\n", a->fop, (unsigned long long)a->fip, (unsigned long long)a->fdp, b->fop,
               (unsigned long long)b->fip, (unsigned long long)b->fdp);
}

void compare_memory(const struct outcome *a, const struct outcome *b)
{
    for (unsigned p = 0; p < PAGES; p++) {
        if (page_kind(p) != KIND_RW || !memcmp(a->mem[p], b->mem[p], PAGE_SIZE))
            continue;
        for (unsigned n = 0, shown = 0; n < PAGE_SIZE && shown < 4; n++) {
            if (a->mem[p][n] == b->mem[p][n])
                continue;
            differ("#   [%llx] native %02x engine %02x\n", PAGE_VA(p) + n, a->mem[p][n], b->mem[p][n]);
            shown++;
        }
    }
}

void compare_registers(const struct state *a, const struct state *b, u64 undefined)
{
    static const char *const name[] = {"rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15"};

    for (unsigned r = 0; r < 16; r++) {
        if (a->gpr[r] != b->gpr[r])
            differ("#   %s native %llx engine %llx\n", name[r], (unsigned long long)a->gpr[r], (unsigned long long)b->gpr[r]);
    }
    if (a->rip != b->rip)
        differ("#   rip native %llx engine %llx\n", (unsigned long long)a->rip, (unsigned long long)b->rip);
    if ((a->rflags ^ b->rflags) & ~undefined)
        differ("#   rflags native %llx engine %llx\n", (unsigned long long)a->rflags, (unsigned long long)b->rflags);
    if (a->fs_base != b->fs_base || a->gs_base != b->gs_base)
        differ("#   fs, gs base native %llx %llx engine %llx %llx\n", (unsigned long long)a->fs_base, (unsigned long long)a->gs_base,
               (unsigned long long)b->fs_base, (unsigned long long)b->gs_base);
}
