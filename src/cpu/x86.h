/*
 * The whole architectural state of one processor. Engines only advance it; it is what is saved, compared and moved between engines.
 *
 * Segment attributes are the descriptor's bits 40..47 and 52..55 as in the SVM VMCB: type 3..0, S 4, DPL 6..5, P 7, AVL 8, L 9, D/B 10, G 11
 * (AMD APM vol. 2 15.5.1). Limits are in bytes, already scaled by G. P = 0 means that the register holds no usable segment.
 */
#pragma once

#include "base/stream.h"
#include "base/types.h"

enum { RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8, R9, R10, R11, R12, R13, R14, R15 };
enum { SEG_ES, SEG_CS, SEG_SS, SEG_DS, SEG_FS, SEG_GS, SEGS };

struct x86_seg {
    u64 base;
    u32 limit;
    u16 sel, attr;
};
#define SEG_TYPE(a) ((a) & 15)
#define SEG_S   0x010
#define SEG_DPL(a) (((a) >> 5) & 3)
#define SEG_P   0x080
#define SEG_L   0x200
#define SEG_DB  0x400
#define SEG_G   0x800

struct x86_table {
    u64 base;
    u16 limit;
};

/* RFLAGS, SDM vol. 1 3.4.3 */
#define FLAG_CF  0x1u
#define FLAG_1   0x2u
#define FLAG_PF  0x4u
#define FLAG_AF  0x10u
#define FLAG_ZF  0x40u
#define FLAG_SF  0x80u
#define FLAG_TF  0x100u
#define FLAG_IF  0x200u
#define FLAG_DF  0x400u
#define FLAG_OF  0x800u
#define FLAG_IOPL 0x3000u
#define FLAG_NT  0x4000u
#define FLAG_RF  0x10000u
#define FLAG_VM  0x20000u
#define FLAG_AC  0x40000u
#define FLAG_VIF 0x80000u
#define FLAG_VIP 0x100000u
#define FLAG_ID  0x200000u
#define FLAGS_ARITH (FLAG_CF | FLAG_PF | FLAG_AF | FLAG_ZF | FLAG_SF | FLAG_OF)

#define CR0_PE 0x1u
#define CR0_MP 0x2u
#define CR0_EM 0x4u
#define CR0_TS 0x8u
#define CR0_ET 0x10u
#define CR0_NE 0x20u
#define CR0_WP 0x10000u
#define CR0_AM 0x40000u
#define CR0_NW 0x20000000u
#define CR0_CD 0x40000000u
#define CR0_PG 0x80000000u

#define CR4_VME 0x1u
#define CR4_PVI 0x2u
#define CR4_TSD 0x4u
#define CR4_DE  0x8u
#define CR4_PSE 0x10u
#define CR4_PAE 0x20u
#define CR4_MCE 0x40u
#define CR4_PGE 0x80u
#define CR4_PCE 0x100u
#define CR4_OSFXSR 0x200u
#define CR4_OSXMMEXCPT 0x400u
#define CR4_UMIP 0x800u
#define CR4_FSGSBASE 0x10000u
#define CR4_PCIDE 0x20000u
#define CR4_OSXSAVE 0x40000u
#define CR4_SMEP 0x100000u
#define CR4_SMAP 0x200000u
#define CR4_PKE 0x400000u

#define EFER_SCE 0x1u
#define EFER_LME 0x100u
#define EFER_LMA 0x400u
#define EFER_NXE 0x800u
#define EFER_AUTOIBRS 0x200000u

/* XCR0 components */
#define XSTATE_X87 0x1u
#define XSTATE_SSE 0x2u
#define XSTATE_AVX 0x4u
#define XSTATE_AVX512 0xe0u
#define XSTATE_PKRU 0x200u
#define X86_XSAVE_MAX 4096          /* standard format: 2696 with AVX-512 and PKRU */

enum x86_activity { X86_RUNNING, X86_HALTED, X86_WAIT_SIPI, X86_SHUTDOWN };

struct x86 {
    u64 gpr[16];
    u64 rip, rflags;
    struct x86_seg seg[SEGS], ldtr, tr;
    struct x86_table gdtr, idtr;
    u64 cr0, cr2, cr3, cr4, xcr0;                                  /* CR8 is the local APIC's TPR */
    u64 pdpte[4];
    u64 dr[4], dr6, dr7;
    u64 efer, star, lstar, cstar, sfmask, kernel_gs_base, tsc_aux;
    u64 sysenter_cs, sysenter_esp, sysenter_eip;
    u64 pat, misc_enable, spec_ctrl, xss, debugctl, bios_sign_id, mcg_status;
    u64 mtrr_def_type, mtrr_fixed[11], mtrr_base[8], mtrr_mask[8];
    s64 tsc_adjust;                                                /* IA32_TSC_ADJUST; guest TSC = clock_tsc() + tsc_adjust */
    u64 kvm_wall_clock, kvm_system_time;                           /* KVM's paravirtual clock MSRs, as written */
    u64 kvm_pv_eoi, kvm_steal_time;                                /* MSRs of KVM's PV EOI and steal time, as written */
    enum x86_activity activity;
    bool kvm_unhalted;                                             /* a kick has ended the HLT that it is in, or the next */
    bool shadow;                                                   /* interrupt shadow of STI or MOV SS is in force for the next instruction */
    bool nmi_blocked;                                              /* from an NMI's delivery to the next IRET */
    bool nmi_pending;
    /* Extended state as XSAVE's standard format stores it (SDM vol. 1 13.4), XSTATE_BV valid. */
    u8 xsave[X86_XSAVE_MAX] __attribute__((aligned(64)));
};

/* Power-on, SDM vol. 3A 10.1.1; bsp: is the bootstrap processor (others wait for a SIPI). */
void x86_reset(struct x86 *x, bool bsp);
/* INIT: as x86_reset, but extended state, CR0.CD/NW, TSC and MSRs stay (SDM vol. 3A table 10-1). */
void x86_init(struct x86 *x);
/* Start-up IPI: CS = vector << 8, base vector << 12, IP 0, running. */
void x86_sipi(struct x86 *x, u8 vector);
void x86_state(struct x86 *x, struct stream *s);                    /* save, load, digest */
void x86_print(const struct x86 *x, FILE *f);                      /* for people: registers, segments, control registers */
static inline unsigned x86_cpl(const struct x86 *x)
{
    return SEG_DPL(x->seg[SEG_SS].attr);                           /* SS.DPL is the CPL; reset gives 0, real mode 0, virtual-8086 3 */
}
