/*
 * struct x86 in and out of KVM (Linux' Documentation/virt/kvm/api.rst: KVM_GET_REGS and its neighbours).
 *
 * The TPR, which is CR8, belongs to the local APIC (chips.c), and so does IA32_APIC_BASE: set() leaves both. The
 * paravirtual clock's MSRs are written only when they change, since a write of the wall clock's stores into guest
 * memory.
 *
 * On the vCPU's thread, or while it stands still.
 */
#include "cpu/kvm/kvm.h"

#include <asm/kvm_para.h>
#include <errno.h>
#include <string.h>
#include <sys/ioctl.h>

#include "base/err.h"

#define MSR_TSC 0x10
#define MSR_TSC_ADJUST 0x3b
#define MSR_MISC_ENABLE 0x1a0

struct msr_row {
    u32 msr;
    u32 offset;                                                    /* of the u64 in struct x86 */
};
#define ROW(msr, field) { msr, offsetof(struct x86, field) }
static const struct msr_row rows[] = {
    ROW(0x174, sysenter_cs), ROW(0x175, sysenter_esp), ROW(0x176, sysenter_eip), ROW(0xc0000081, star),
    ROW(0xc0000082, lstar), ROW(0xc0000083, cstar), ROW(0xc0000084, sfmask), ROW(0xc0000102, kernel_gs_base),
    ROW(0xc0000103, tsc_aux), ROW(0x277, pat), ROW(MSR_MISC_ENABLE, misc_enable), ROW(0x48, spec_ctrl),
    ROW(0xda0, xss), ROW(0x1d9, debugctl), ROW(0x8b, bios_sign_id), ROW(0x17a, mcg_status), ROW(0x2ff, mtrr_def_type),
    ROW(0x250, mtrr_fixed[0]), ROW(0x258, mtrr_fixed[1]), ROW(0x259, mtrr_fixed[2]), ROW(0x268, mtrr_fixed[3]),
    ROW(0x269, mtrr_fixed[4]), ROW(0x26a, mtrr_fixed[5]), ROW(0x26b, mtrr_fixed[6]), ROW(0x26c, mtrr_fixed[7]),
    ROW(0x26d, mtrr_fixed[8]), ROW(0x26e, mtrr_fixed[9]), ROW(0x26f, mtrr_fixed[10]), ROW(0x200, mtrr_base[0]),
    ROW(0x201, mtrr_mask[0]), ROW(0x202, mtrr_base[1]), ROW(0x203, mtrr_mask[1]), ROW(0x204, mtrr_base[2]),
    ROW(0x205, mtrr_mask[2]), ROW(0x206, mtrr_base[3]), ROW(0x207, mtrr_mask[3]), ROW(0x208, mtrr_base[4]),
    ROW(0x209, mtrr_mask[4]), ROW(0x20a, mtrr_base[5]), ROW(0x20b, mtrr_mask[5]), ROW(0x20c, mtrr_base[6]),
    ROW(0x20d, mtrr_mask[6]), ROW(0x20e, mtrr_base[7]), ROW(0x20f, mtrr_mask[7]), ROW(0x4b564d00, kvm_wall_clock),
    ROW(0x4b564d01, kvm_system_time), ROW(0x4b564d03, kvm_steal_time), ROW(0x4b564d04, kvm_pv_eoi),
};
_Static_assert(ARRAY_SIZE(rows) <= KVM_MSRS_MAX, "rows fit the mask");

struct msr_list {                                        /* struct kvm_msrs, with room for its entries */
    u32 nmsrs, pad;
    struct kvm_msr_entry entry[KVM_MSRS_MAX];
};

static u64 *row_field(const struct x86 *x, const struct msr_row *row)
{
    return (u64 *)((u8 *)x + row->offset);
}

/* ---- MSRs ---- */

int kvm_msr_get_one(struct vcpu *v, u32 msr, u64 *val)
{
    struct msr_list l = { .nmsrs = 1, .entry[0].index = msr };

    if (ioctl(kvcpu_of(v)->fd, KVM_GET_MSRS, &l) != 1)
        return -1;
    *val = l.entry[0].data;
    return 0;
}

int kvm_msr_set_one(struct vcpu *v, u32 msr, u64 val)
{
    struct msr_list l = { .nmsrs = 1, .entry[0] = { .index = msr, .data = val } };

    return ioctl(kvcpu_of(v)->fd, KVM_SET_MSRS, &l) == 1 ? 0 : -1;
}

void kvm_find_msrs(struct vcpu *v)
{
    u64 val;

    for (unsigned i = 0; i < ARRAY_SIZE(rows); i++)
        if (kvm_msr_get_one(v, rows[i].msr, &val) == 0)
            kvcpu_of(v)->msr_there |= BIT(i);
}

static int get_msrs(struct vcpu *v, struct x86 *x)
{
    struct msr_list l = { 0 };
    unsigned n = 0;
    u64 adjust;

    for (unsigned i = 0; i < ARRAY_SIZE(rows); i++)
        if (kvcpu_of(v)->msr_there & BIT(i))
            l.entry[n++].index = rows[i].msr;
    l.nmsrs = n;
    if (ioctl(kvcpu_of(v)->fd, KVM_GET_MSRS, &l) != (int)n)
        return err(-EIO, "kvm: vCPU %u: cannot read the MSRs", v->id);
    n = 0;
    for (unsigned i = 0; i < ARRAY_SIZE(rows); i++)
        if (kvcpu_of(v)->msr_there & BIT(i))
            *row_field(x, &rows[i]) = l.entry[n++].data;
    if (kvm_msr_get_one(v, MSR_TSC_ADJUST, &adjust) == 0)
        x->tsc_adjust = (s64)adjust;
    return 0;
}

static int set_msrs(struct vcpu *v, const struct x86 *x)
{
    struct x86 *now = aligned_alloc(64, ALIGN_UP(sizeof *now, 64));
    int r = now ? 0 : err(-ENOMEM, "kvm: out of memory");

    if (r == 0)
        r = get_msrs(v, now);
    for (unsigned i = 0; r == 0 && i < ARRAY_SIZE(rows); i++) {
        u64 val = *row_field(x, &rows[i]);
        bool there = kvcpu_of(v)->msr_there & BIT(i), unseen = rows[i].msr == MSR_MISC_ENABLE &&
                              cpuid_is_amd(v->m->cpuid);

        if ((there && val == *row_field(now, &rows[i])) || (!there && !val) || unseen)
            continue;
        if (!there || kvm_msr_set_one(v, rows[i].msr, val) < 0)
            r = err(-EIO, "kvm: vCPU %u: this host's KVM does not take 0x%llx for MSR 0x%x", v->id,
                    (unsigned long long)val, rows[i].msr);
    }
    free(now);
    return r < 0 ? r : kvm_tsc_set(v, x->tsc_adjust);
}

int kvm_tsc_set(struct vcpu *v, s64 adjust)
{
    u64 offset = clock_tsc_bias(v->m->clock) + (u64)adjust;
    struct kvm_device_attr attr = { .group = KVM_VCPU_TSC_CTRL, .attr = KVM_VCPU_TSC_OFFSET, .addr = (u64)&offset };

    kvm_msr_set_one(v, MSR_TSC_ADJUST, (u64)adjust);               /* KVM: a host's write moves the register only */
    if (kvm_of(v->m)->tsc_offset) {
        if (ioctl(kvcpu_of(v)->fd, KVM_SET_DEVICE_ATTR, &attr) < 0)
            return err(-errno, "kvm: vCPU %u: cannot set the TSC: %s", v->id, strerror(errno));
    } else if (kvm_msr_set_one(v, MSR_TSC, clock_tsc(v->m->clock) + (u64)adjust) < 0) {
        return err(-EIO, "kvm: vCPU %u: cannot set the TSC", v->id);
    }
    return 0;
}

/* ---- segments and control registers ---- */

static struct x86_seg seg_in(const struct kvm_segment *s)
{
    u16 attr = (u16)(s->type | s->s << 4 | s->dpl << 5 | s->avl << 8 | s->l << 9 | s->db << 10 | s->g << 11);

    if (s->present && !s->unusable)
        attr |= SEG_P;
    return (struct x86_seg){ .base = s->base, .limit = s->limit, .sel = s->selector, .attr = attr };
}

static struct kvm_segment seg_out(const struct x86_seg *s)
{
    u16 a = s->attr;

    return (struct kvm_segment){
        .base = s->base, .limit = s->limit, .selector = s->sel, .type = SEG_TYPE(a), .s = a >> 4 & 1,
        .dpl = SEG_DPL(a), .present = a >> 7 & 1,
        .avl = a >> 8 & 1, .l = a >> 9 & 1, .db = a >> 10 & 1, .g = a >> 11 & 1, .unusable = !(a & SEG_P),
    };
}

/* struct kvm_sregs2 has the fields that struct kvm_sregs begins with, under the same names. */
#define SREGS_IN(x, s) \
    do { \
        (x)->seg[SEG_ES] = seg_in(&(s)->es); \
        (x)->seg[SEG_CS] = seg_in(&(s)->cs); \
        (x)->seg[SEG_SS] = seg_in(&(s)->ss); \
        (x)->seg[SEG_DS] = seg_in(&(s)->ds); \
        (x)->seg[SEG_FS] = seg_in(&(s)->fs); \
        (x)->seg[SEG_GS] = seg_in(&(s)->gs); \
        (x)->ldtr = seg_in(&(s)->ldt); \
        (x)->tr = seg_in(&(s)->tr); \
        (x)->gdtr = (struct x86_table){ (s)->gdt.base, (s)->gdt.limit }; \
        (x)->idtr = (struct x86_table){ (s)->idt.base, (s)->idt.limit }; \
        (x)->cr0 = (s)->cr0; \
        (x)->cr2 = (s)->cr2; \
        (x)->cr3 = (s)->cr3; \
        (x)->cr4 = (s)->cr4; \
        (x)->efer = (s)->efer; \
    } while (0)

#define SREGS_OUT(s, x) \
    do { \
        (s)->es = seg_out(&(x)->seg[SEG_ES]); \
        (s)->cs = seg_out(&(x)->seg[SEG_CS]); \
        (s)->ss = seg_out(&(x)->seg[SEG_SS]); \
        (s)->ds = seg_out(&(x)->seg[SEG_DS]); \
        (s)->fs = seg_out(&(x)->seg[SEG_FS]); \
        (s)->gs = seg_out(&(x)->seg[SEG_GS]); \
        (s)->ldt = seg_out(&(x)->ldtr); \
        (s)->tr = seg_out(&(x)->tr); \
        (s)->gdt = (struct kvm_dtable){ .base = (x)->gdtr.base, .limit = (x)->gdtr.limit }; \
        (s)->idt = (struct kvm_dtable){ .base = (x)->idtr.base, .limit = (x)->idtr.limit }; \
        (s)->cr0 = (x)->cr0; \
        (s)->cr2 = (x)->cr2; \
        (s)->cr3 = (x)->cr3; \
        (s)->cr4 = (x)->cr4; \
        (s)->efer = (x)->efer; \
    } while (0)

static int get_sregs(struct vcpu *v, struct x86 *x)
{
    int fd = kvcpu_of(v)->fd;
    struct kvm_sregs2 s2;
    struct kvm_sregs s;

    memset(x->pdpte, 0, sizeof x->pdpte);
    if (!kvm_of(v->m)->sregs2) {
        if (ioctl(fd, KVM_GET_SREGS, &s) < 0)
            return err(-errno, "kvm: vCPU %u: KVM_GET_SREGS: %s", v->id, strerror(errno));
        SREGS_IN(x, &s);
        return 0;
    }
    if (ioctl(fd, KVM_GET_SREGS2, &s2) < 0)
        return err(-errno, "kvm: vCPU %u: KVM_GET_SREGS2: %s", v->id, strerror(errno));
    SREGS_IN(x, &s2);
    if (s2.flags & KVM_SREGS2_FLAGS_PDPTRS_VALID)
        memcpy(x->pdpte, s2.pdptrs, sizeof x->pdpte);
    return 0;
}

static bool pae_paging(const struct x86 *x)
{
    return (x->cr0 & CR0_PG) && (x->cr4 & CR4_PAE) && !(x->efer & EFER_LMA);
}

static int set_sregs(struct vcpu *v, const struct x86 *x)
{
    int fd = kvcpu_of(v)->fd;
    struct kvm_sregs2 s2;
    struct kvm_sregs s;

    if (!kvm_of(v->m)->sregs2) {
        if (ioctl(fd, KVM_GET_SREGS, &s) < 0)
            return err(-errno, "kvm: vCPU %u: KVM_GET_SREGS: %s", v->id, strerror(errno));
        SREGS_OUT(&s, x);
        memset(s.interrupt_bitmap, 0, sizeof s.interrupt_bitmap);
        if (ioctl(fd, KVM_SET_SREGS, &s) < 0)
            return err(-errno, "kvm: vCPU %u: KVM_SET_SREGS: %s", v->id, strerror(errno));
        return 0;
    }
    if (ioctl(fd, KVM_GET_SREGS2, &s2) < 0)
        return err(-errno, "kvm: vCPU %u: KVM_GET_SREGS2: %s", v->id, strerror(errno));
    SREGS_OUT(&s2, x);
    s2.flags = 0;
    if (pae_paging(x)) {
        s2.flags = KVM_SREGS2_FLAGS_PDPTRS_VALID;
        memcpy(s2.pdptrs, x->pdpte, sizeof s2.pdptrs);
    }
    if (ioctl(fd, KVM_SET_SREGS2, &s2) < 0)
        return err(-errno, "kvm: vCPU %u: KVM_SET_SREGS2: %s", v->id, strerror(errno));
    return 0;
}

/* ---- general registers ---- */

#define GPRS(DO) \
    DO(RAX, rax) DO(RCX, rcx) DO(RDX, rdx) DO(RBX, rbx) DO(RSP, rsp) DO(RBP, rbp) DO(RSI, rsi) DO(RDI, rdi) \
    DO(R8, r8) DO(R9, r9) DO(R10, r10) DO(R11, r11) DO(R12, r12) DO(R13, r13) DO(R14, r14) DO(R15, r15)

static int get_regs(struct vcpu *v, struct x86 *x)
{
    struct kvm_regs r;

    if (ioctl(kvcpu_of(v)->fd, KVM_GET_REGS, &r) < 0)
        return err(-errno, "kvm: vCPU %u: KVM_GET_REGS: %s", v->id, strerror(errno));
#define DO(n, f) x->gpr[n] = r.f;
    GPRS(DO)
#undef DO
    x->rip = r.rip;
    x->rflags = r.rflags;
    return 0;
}

static int set_regs(struct vcpu *v, const struct x86 *x)
{
    struct kvm_regs r = { .rip = x->rip, .rflags = x->rflags };

#define DO(n, f) r.f = x->gpr[n];
    GPRS(DO)
#undef DO
    if (ioctl(kvcpu_of(v)->fd, KVM_SET_REGS, &r) < 0)
        return err(-errno, "kvm: vCPU %u: KVM_SET_REGS: %s", v->id, strerror(errno));
    return 0;
}

/* ---- extended state ---- */

_Static_assert(sizeof(struct kvm_xsave) == X86_XSAVE_MAX, "both are the standard format");

static int get_extended(struct vcpu *v, struct x86 *x)
{
    struct kvm_xcrs xcrs;

    if (ioctl(kvcpu_of(v)->fd, KVM_GET_XSAVE, x->xsave) < 0)
        return err(-errno, "kvm: vCPU %u: KVM_GET_XSAVE: %s", v->id, strerror(errno));
    x->xcr0 = XSTATE_X87;
    if (!cpuid_has(v->m->cpuid, CPU_XSAVE))
        return 0;
    if (ioctl(kvcpu_of(v)->fd, KVM_GET_XCRS, &xcrs) < 0)
        return err(-errno, "kvm: vCPU %u: KVM_GET_XCRS: %s", v->id, strerror(errno));
    for (u32 i = 0; i < xcrs.nr_xcrs && i < ARRAY_SIZE(xcrs.xcrs); i++)
        if (xcrs.xcrs[i].xcr == 0)
            x->xcr0 = xcrs.xcrs[i].value;
    return 0;
}

static int set_extended(struct vcpu *v, const struct x86 *x)
{
    struct kvm_xcrs xcrs = { .nr_xcrs = 1, .xcrs[0] = { .xcr = 0, .value = x->xcr0 } };

    if (cpuid_has(v->m->cpuid, CPU_XSAVE) && ioctl(kvcpu_of(v)->fd, KVM_SET_XCRS, &xcrs) < 0)
        return err(-errno, "kvm: vCPU %u: KVM_SET_XCRS: %s", v->id, strerror(errno));
    if (ioctl(kvcpu_of(v)->fd, KVM_SET_XSAVE, x->xsave) < 0)
        return err(-errno, "kvm: vCPU %u: KVM_SET_XSAVE: %s", v->id, strerror(errno));
    return 0;
}

/* ---- debug registers, events, activity ---- */

/*
 * A kick (KVM_HC_KICK_CPU) that came before the HLT it is to end is kept by the kernel, which shows it only as the end of
 * that HLT. So whoever may have one has one: a guest that knows kicks looks again when it wakes for nothing; without its
 * kick it would sleep for ever.
 */
static bool may_be_kicked(const struct vcpu *v, const struct x86 *x)
{
    return v->m->vcpus > 1 && cpuid_pv(v->m->cpuid, KVM_FEATURE_PV_UNHALT) && x->kvm_system_time & 1;
}

static int get_rest(struct vcpu *v, struct x86 *x)
{
    int fd = kvcpu_of(v)->fd;
    struct kvm_debugregs d;
    struct kvm_vcpu_events e;
    struct kvm_mp_state mp;

    if (ioctl(fd, KVM_GET_DEBUGREGS, &d) < 0 || ioctl(fd, KVM_GET_VCPU_EVENTS, &e) < 0 || ioctl(fd, KVM_GET_MP_STATE,
        &mp) < 0)
        return err(-errno, "kvm: vCPU %u: cannot read debug registers and events: %s", v->id, strerror(errno));
    memcpy(x->dr, d.db, sizeof x->dr);
    x->dr6 = d.dr6;
    x->dr7 = d.dr7;
    x->shadow = e.interrupt.shadow;
    x->nmi_blocked = e.nmi.masked && !e.nmi.injected;
    x->nmi_pending = e.nmi.pending || e.nmi.injected;
    switch (mp.mp_state) {
    case KVM_MP_STATE_HALTED: x->activity = X86_HALTED; break;
    case KVM_MP_STATE_UNINITIALIZED:
    case KVM_MP_STATE_INIT_RECEIVED: x->activity = X86_WAIT_SIPI; break;
    default: x->activity = X86_RUNNING;
    }
    if (kvcpu_of(v)->shut_down)
        x->activity = X86_SHUTDOWN;
    x->kvm_unhalted = x->activity == X86_RUNNING && may_be_kicked(v, x);
    return 0;
}

static int set_rest(struct vcpu *v, const struct x86 *x)
{
    static const u32 state[] = {
        [X86_RUNNING] = KVM_MP_STATE_RUNNABLE, [X86_HALTED] = KVM_MP_STATE_HALTED,
        [X86_WAIT_SIPI] = KVM_MP_STATE_INIT_RECEIVED,
        [X86_SHUTDOWN] = KVM_MP_STATE_RUNNABLE,
    };
    int fd = kvcpu_of(v)->fd;
    struct kvm_debugregs d = { .dr6 = x->dr6, .dr7 = x->dr7 };
    /* Intel's processors refuse STI's shadow with IF clear: then it is MOV SS's. */
    struct kvm_vcpu_events e = {
        .interrupt.shadow = !x->shadow ? 0 : x->rflags & FLAG_IF ? KVM_X86_SHADOW_INT_STI : KVM_X86_SHADOW_INT_MOV_SS,
        .nmi = { .pending = x->nmi_pending, .masked = x->nmi_blocked },
        .flags = KVM_VCPUEVENT_VALID_NMI_PENDING | KVM_VCPUEVENT_VALID_SHADOW,
    };
    bool kicked = x->activity == X86_HALTED && x->kvm_unhalted;
    struct kvm_mp_state mp = { .mp_state = kicked ? KVM_MP_STATE_RUNNABLE : state[x->activity] };

    memcpy(d.db, x->dr, sizeof d.db);
    if (ioctl(fd, KVM_SET_DEBUGREGS, &d) < 0 || ioctl(fd, KVM_SET_VCPU_EVENTS, &e) < 0 || ioctl(fd, KVM_SET_MP_STATE,
        &mp) < 0)
        return err(-errno, "kvm: vCPU %u: cannot set debug registers and events: %s", v->id, strerror(errno));
    kvcpu_of(v)->shut_down = x->activity == X86_SHUTDOWN;
    if (x->kvm_unhalted && x->activity == X86_RUNNING)
        kvm_kick_ahead(v);
    return 0;
}

int kvm_look(struct vcpu *v, struct x86 *x)
{
    int r;

    memset(x, 0, sizeof *x);
    r = get_regs(v, x);
    return r < 0 ? r : get_sregs(v, x);
}

int kvm_get(struct vcpu *v, struct x86 *x)
{
    int r;

    memset(x, 0, sizeof *x);
    r = get_regs(v, x);
    if (r == 0)
        r = get_sregs(v, x);
    if (r == 0)
        r = get_extended(v, x);
    if (r == 0)
        r = get_msrs(v, x);
    return r < 0 ? r : get_rest(v, x);
}

int kvm_set(struct vcpu *v, const struct x86 *x)
{
    int r = set_sregs(v, x);

    if (r == 0)
        r = set_extended(v, x);
    if (r == 0)
        r = set_regs(v, x);
    if (r == 0)
        r = set_msrs(v, x);
    return r < 0 ? r : set_rest(v, x);
}

/*
 * When a vCPU leaves the guest while the processor is delivering an event (the frame hits a page that is not mapped
 * yet), KVM keeps the event and delivers it at the next entry. struct x86 knows no such state, so the event goes back:
 * an interrupt to where it was acknowledged; an NMI is pending again; a fault or INT n occurs again, as its instruction
 * has not been completed. A pending debug trap stays with KVM.
 */
int kvm_settle(struct vcpu *v)
{
    struct kvm_vcpu_events e;
    int fd = kvcpu_of(v)->fd, r = 0;
    bool debug_trap;

    if (ioctl(fd, KVM_GET_VCPU_EVENTS, &e) < 0)
        return err(-errno, "KVM_GET_VCPU_EVENTS: %s", strerror(errno));
    debug_trap = (e.exception.injected || e.exception.pending) && e.exception.nr == 1;
    if (!e.interrupt.injected && !e.nmi.injected && (debug_trap || !(e.exception.injected || e.exception.pending)))
        return 0;
    if (e.interrupt.injected && !e.interrupt.soft)
        r = kvm_unack(v, e.interrupt.nr);
    e.interrupt.injected = 0;
    if (e.nmi.injected) {
        e.nmi.injected = 0;
        e.nmi.pending = 1;
        e.nmi.masked = 0;
        e.flags |= KVM_VCPUEVENT_VALID_NMI_PENDING;
    }
    if (!debug_trap)
        e.exception.injected = e.exception.pending = 0;
    if (r == 0 && ioctl(fd, KVM_SET_VCPU_EVENTS, &e) < 0)
        r = err(-errno, "KVM_SET_VCPU_EVENTS: %s", strerror(errno));
    return r;
}
