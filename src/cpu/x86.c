/*
 * The architectural state: power-on, INIT, SIPI (SDM vol. 3A 10.1, table 10-1), save and load, print.
 *
 * Plain data; the caller owns it. A loaded state is untrusted: what an engine would take for granted is checked here.
 */
#include "cpu/x86.h"

#include <string.h>

#include "cpu/cpuid.h"

/* Offsets in the legacy region and header of an XSAVE area, SDM vol. 1 13.4 */
#define XSAVE_FCW 0
#define XSAVE_FTW 4
#define XSAVE_MXCSR 24
#define XSAVE_MXCSR_MASK 28
#define XSAVE_BV 512
#define XSAVE_XCOMP_BV 520

#define MXCSR_INIT 0x1f80u
#define MXCSR_MASK_RESET 0xffffu
#define MXCSR_VALID 0x2ffffu              /* with AMD's MM; the engine masks what this host does not have */
#define FCW_RESET 0x40u
#define CR0_RESET (CR0_CD | CR0_NW | CR0_ET)
#define DR6_RESET 0xffff0ff0u
#define DR7_RESET 0x400u
#define PAT_RESET 0x0007040600070406ull
#define MISC_ENABLE_RESET 0x1801u          /* fast strings; no branch trace, no PEBS */

static void put32(u8 *p, u32 v)
{
    memcpy(p, &v, sizeof(v));
}

/* What RESET and INIT have in common. */
static void reset_core(struct x86 *x)
{
    memset(x->gpr, 0, sizeof(x->gpr));
    x->gpr[RDX] = cpuid_host(1, 0)->eax;
    x->rip = 0xfff0;
    x->rflags = FLAG_1;
    for (unsigned i = 0; i < SEGS; i++)
        x->seg[i] = (struct x86_seg){.limit = 0xffff, .attr = 0x93};
    x->seg[SEG_CS] = (struct x86_seg){.base = 0xffff0000, .limit = 0xffff, .sel = 0xf000, .attr = 0x9b};
    x->ldtr = (struct x86_seg){.limit = 0xffff, .attr = 0x82};
    x->tr = (struct x86_seg){.limit = 0xffff, .attr = 0x8b};
    x->gdtr = x->idtr = (struct x86_table){.limit = 0xffff};
    x->cr2 = x->cr3 = x->cr4 = 0;
    memset(x->pdpte, 0, sizeof(x->pdpte));
    memset(x->dr, 0, sizeof(x->dr));
    x->dr6 = DR6_RESET;
    x->dr7 = DR7_RESET;
    x->efer = 0;
    x->debugctl = 0;
    x->shadow = x->nmi_blocked = x->nmi_pending = x->kvm_unhalted = false;
    x->kvm_pv_eoi = x->kvm_steal_time = 0; /* they point into memory that may have another use afterwards */
}

void x86_reset(struct x86 *x, bool bsp)
{
    memset(x, 0, sizeof(*x));
    reset_core(x);
    x->cr0 = CR0_RESET;
    x->xcr0 = XSTATE_X87;
    x->pat = PAT_RESET;
    x->misc_enable = MISC_ENABLE_RESET;
    put32(x->xsave + XSAVE_FCW, FCW_RESET);
    x->xsave[XSAVE_FTW] = 0xff;            /* tag word 0x5555: every register holds zero */
    put32(x->xsave + XSAVE_MXCSR, MXCSR_INIT);
    put32(x->xsave + XSAVE_MXCSR_MASK, MXCSR_MASK_RESET);
    x->xsave[XSAVE_BV] = XSTATE_X87;
    x->activity = bsp ? X86_RUNNING : X86_WAIT_SIPI;
}

/* The bootstrap processor starts again at the reset vector after INIT: its caller sets activity to X86_RUNNING. */
void x86_init(struct x86 *x)
{
    u64 kept = x->cr0 & (CR0_CD | CR0_NW);
    reset_core(x);
    x->cr0 = kept | CR0_ET;
    x->activity = X86_WAIT_SIPI;
}

void x86_sipi(struct x86 *x, u8 vector)
{
    x->seg[SEG_CS] =
        (struct x86_seg){.base = (u64)vector << 12, .limit = 0xffff, .sel = (u16)(vector << 8), .attr = 0x9b};
    x->rip = 0;
    x->activity = X86_RUNNING;
}

static void seg_state(struct x86_seg *g, struct stream *s)
{
    stream_u64(s, &g->base);
    stream_u32(s, &g->limit);
    stream_u16(s, &g->sel);
    stream_u16(s, &g->attr);
}

static void table_state(struct x86_table *t, struct stream *s)
{
    stream_u64(s, &t->base);
    stream_u16(s, &t->limit);
}

static void array_state(u64 *v, size_t n, struct stream *s)
{
    for (size_t i = 0; i < n; i++)
        stream_u64(s, &v[i]);
}

static bool canonical(u64 a)
{
    return (u64)((s64)(a << 16) >> 16) == a;
}

static bool pat_valid(u64 pat)
{
    for (unsigned i = 0; i < 8; i++) {
        u8 type = (u8)(pat >> i * 8);
        if (type > 7 || type == 2 || type == 3)
            return false;
    }
    return true;
}

static bool control_valid(const struct x86 *x)
{
    const u64 efer_known = EFER_SCE | EFER_LME | EFER_LMA | EFER_NXE | EFER_AUTOIBRS;
    bool pg = x->cr0 & CR0_PG, lma = x->efer & EFER_LMA, lme = x->efer & EFER_LME;
    if (x->cr0 >> 32 || x->cr4 >> 32 || (pg && !(x->cr0 & CR0_PE)) || ((x->cr0 & CR0_NW) && !(x->cr0 & CR0_CD)))
        return false;
    if (x->efer & ~efer_known || lma != (lme && pg) || (lma && !(x->cr4 & CR4_PAE)))
        return false;
    if (x->cr4 & CR4_PCIDE && !lma)
        return false;
    return !(x->dr6 >> 32) && !(x->dr7 >> 32) && pat_valid(x->pat);
}

static bool segments_valid(const struct x86 *x)
{
    const u16 known = 0xfff;
    bool lma = x->efer & EFER_LMA, vm = x->rflags & FLAG_VM;
    for (unsigned i = 0; i < SEGS; i++)
        if (x->seg[i].attr & ~known || !canonical(x->seg[i].base))
            return false;
    if (x->ldtr.attr & ~known || x->tr.attr & ~known || !canonical(x->ldtr.base) || !canonical(x->tr.base))
        return false;
    if (!canonical(x->gdtr.base) || !canonical(x->idtr.base))
        return false;
    if (vm && (lma || !(x->cr0 & CR0_PE) || x86_cpl(x) != 3))
        return false;
    if (lma && x->seg[SEG_CS].attr & SEG_L && !canonical(x->rip))
        return false;
    return true;
}

static bool extended_valid(const struct x86 *x)
{
    const u64 known = XSTATE_X87 | XSTATE_SSE | XSTATE_AVX | XSTATE_AVX512 | XSTATE_PKRU;
    u64 bv, xcomp;
    u32 mxcsr;
    memcpy(&bv, x->xsave + XSAVE_BV, sizeof(bv));
    memcpy(&xcomp, x->xsave + XSAVE_XCOMP_BV, sizeof(xcomp));
    memcpy(&mxcsr, x->xsave + XSAVE_MXCSR, sizeof(mxcsr));
    if (bv & ~known || xcomp || mxcsr & ~MXCSR_VALID || x->xcr0 & ~known || !(x->xcr0 & XSTATE_X87))
        return false;
    if (x->xcr0 & XSTATE_AVX && !(x->xcr0 & XSTATE_SSE))
        return false;
    if (x->xcr0 & XSTATE_AVX512 && ((x->xcr0 & XSTATE_AVX512) != XSTATE_AVX512 || !(x->xcr0 & XSTATE_AVX)))
        return false;
    return !x->xss;
}

static void activity_state(struct x86 *x, struct stream *s)
{
    u32 activity = x->activity;
    stream_u32(s, &activity);
    if (s->load && activity > X86_SHUTDOWN)
        stream_bad(s, "processor activity");
    else
        x->activity = activity;
    stream_bool(s, &x->shadow);
    stream_bool(s, &x->nmi_blocked);
    stream_bool(s, &x->nmi_pending);
    stream_bool(s, &x->kvm_unhalted);
}

void x86_state(struct x86 *x, struct stream *s)
{
    stream_section(s, "x86", 1);
    array_state(x->gpr, ARRAY_SIZE(x->gpr), s);
    stream_u64(s, &x->rip);
    stream_u64(s, &x->rflags);
    for (unsigned i = 0; i < SEGS; i++)
        seg_state(&x->seg[i], s);
    seg_state(&x->ldtr, s);
    seg_state(&x->tr, s);
    table_state(&x->gdtr, s);
    table_state(&x->idtr, s);
    u64 *const scalars[] = {
        &x->cr0,
        &x->cr2,
        &x->cr3,
        &x->cr4,
        &x->xcr0,
        &x->dr6,
        &x->dr7,
        &x->efer,
        &x->star,
        &x->lstar,
        &x->cstar,
        &x->sfmask,
        &x->kernel_gs_base,
        &x->tsc_aux,
        &x->sysenter_cs,
        &x->sysenter_esp,
        &x->sysenter_eip,
        &x->pat,
        &x->misc_enable,
        &x->spec_ctrl,
        &x->xss,
        &x->debugctl,
        &x->bios_sign_id,
        &x->mcg_status,
        &x->mtrr_def_type,
        &x->kvm_wall_clock,
        &x->kvm_system_time,
        &x->kvm_pv_eoi,
        &x->kvm_steal_time,
    };
    for (unsigned i = 0; i < ARRAY_SIZE(scalars); i++)
        stream_u64(s, scalars[i]);
    array_state(x->pdpte, ARRAY_SIZE(x->pdpte), s);
    array_state(x->dr, ARRAY_SIZE(x->dr), s);
    array_state(x->mtrr_fixed, ARRAY_SIZE(x->mtrr_fixed), s);
    array_state(x->mtrr_base, ARRAY_SIZE(x->mtrr_base), s);
    array_state(x->mtrr_mask, ARRAY_SIZE(x->mtrr_mask), s);
    u64 adjust = (u64)x->tsc_adjust;
    stream_u64(s, &adjust);
    x->tsc_adjust = (s64)adjust;
    activity_state(x, s);
    stream_bytes(s, x->xsave, sizeof(x->xsave));
    if (s->load && !s->error && !(control_valid(x) && segments_valid(x) && extended_valid(x)))
        stream_bad(s, "processor state");
}

static void print_seg(const char *name, const struct x86_seg *s, FILE *f)
{
    fprintf(f, "%-4s %04x  base %016llx  limit %08x  attr %03x%s\n", name, s->sel, (unsigned long long)s->base,
            s->limit, s->attr, s->attr & SEG_P ? "" : "  unusable");
}

void x86_print(const struct x86 *x, FILE *f)
{
    static const char *const reg[] = {
        "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15",
    };
    static const char *const seg[] = {"es", "cs", "ss", "ds", "fs", "gs"};
    static const char *const activity[] = {"running", "halted", "waiting for SIPI", "shut down"};
    static const struct {
        u32 bit;
        char name[5];
    } flag[] = {
        {FLAG_ID, "ID"}, {FLAG_VIP, "VIP"}, {FLAG_VIF, "VIF"}, {FLAG_AC, "AC"}, {FLAG_VM, "VM"}, {FLAG_RF, "RF"},
        {FLAG_NT, "NT"}, {FLAG_OF, "OF"},   {FLAG_DF, "DF"},   {FLAG_IF, "IF"}, {FLAG_TF, "TF"}, {FLAG_SF, "SF"},
        {FLAG_ZF, "ZF"}, {FLAG_AF, "AF"},   {FLAG_PF, "PF"},   {FLAG_CF, "CF"},
    };
    for (unsigned i = 0; i < 16; i++)
        fprintf(f, "%-3s %016llx%s", reg[i], (unsigned long long)x->gpr[i], i % 4 == 3 ? "\n" : "  ");
    fprintf(f, "rip %016llx  rflags %08llx [iopl %llu", (unsigned long long)x->rip, (unsigned long long)x->rflags,
            (unsigned long long)(x->rflags >> 12 & 3));
    for (unsigned i = 0; i < ARRAY_SIZE(flag); i++)
        if (x->rflags & flag[i].bit)
            fprintf(f, " %s", flag[i].name);
    fprintf(f, "]  cpl %u  %s%s%s\n", x86_cpl(x), activity[x->activity], x->shadow ? ", interrupt shadow" : "",
            x->nmi_blocked ? ", NMI blocked" : "");
    for (unsigned i = 0; i < SEGS; i++)
        print_seg(seg[i], &x->seg[i], f);
    print_seg("ldtr", &x->ldtr, f);
    print_seg("tr", &x->tr, f);
    fprintf(f, "gdtr base %016llx  limit %04x    idtr base %016llx  limit %04x\n", (unsigned long long)x->gdtr.base,
            x->gdtr.limit, (unsigned long long)x->idtr.base, x->idtr.limit);
    fprintf(f, "cr0 %08llx  cr2 %016llx  cr3 %016llx  cr4 %08llx  efer %04llx  xcr0 %llx\n", (unsigned long long)x->cr0,
            (unsigned long long)x->cr2, (unsigned long long)x->cr3, (unsigned long long)x->cr4,
            (unsigned long long)x->efer, (unsigned long long)x->xcr0);
    fprintf(f, "dr0 %016llx  dr1 %016llx  dr2 %016llx  dr3 %016llx  dr6 %08llx  dr7 %08llx\n",
            (unsigned long long)x->dr[0], (unsigned long long)x->dr[1], (unsigned long long)x->dr[2],
            (unsigned long long)x->dr[3], (unsigned long long)x->dr6, (unsigned long long)x->dr7);
}
