/*
 * interp, the system side: what far transfers, event delivery, task switches and the system instructions share.
 *
 * All of them follow one rule: read and check everything first (descriptors, the TSS, the new stack), then change the
 * guest's registers. A new stack is therefore written or read through `struct stack`, a copy of SS:RSP that becomes the
 * current one only in stack_commit().
 *
 * Runs on the vCPU's thread; no locks.
 */
#pragma once

#include "cpu/interp/interp.h"

/* ---- binding ---- */
/* CALL, JMP, RET, MOV, PUSH, POP have general forms (insn_int.def) and system forms: their binders ask this first. */
bool sys_form(const struct decoded *d);    /* a far transfer, or an operand is a segment, control or debug register */
int bind_sys_form(struct icpu *c, const struct decoded *d, struct op *op, unsigned arg);
int bind_far(struct icpu *c, const struct decoded *d, struct op *op, unsigned arg);
int bind_mov_cr(struct icpu *c, const struct decoded *d, struct op *op, unsigned arg);

/* Rows of insn_sys.def. Some take an argument that selects the instruction. */
enum { IRET_16 = 2, IRET_32 = 4, IRET_64 = 8 };
int bind_iret(struct icpu *c, const struct decoded *d, struct op *op, unsigned size);
enum { INT_N, INT_3, INT_O, INT_1 };
int bind_int(struct icpu *c, const struct decoded *d, struct op *op, unsigned kind);
int bind_pushf(struct icpu *c, const struct decoded *d, struct op *op, unsigned size);
int bind_popf(struct icpu *c, const struct decoded *d, struct op *op, unsigned size);
int bind_cli(struct icpu *c, const struct decoded *d, struct op *op, unsigned arg);
int bind_sti(struct icpu *c, const struct decoded *d, struct op *op, unsigned arg);
int bind_clac(struct icpu *c, const struct decoded *d, struct op *op, unsigned set);
int bind_lxs(struct icpu *c, const struct decoded *d, struct op *op, unsigned seg);
enum { TABLE_GDT, TABLE_IDT };
int bind_lgdt(struct icpu *c, const struct decoded *d, struct op *op, unsigned table);
int bind_sgdt(struct icpu *c, const struct decoded *d, struct op *op, unsigned table);
enum { SEL_LDT, SEL_TR };
int bind_lldt(struct icpu *c, const struct decoded *d, struct op *op, unsigned which);
int bind_sldt(struct icpu *c, const struct decoded *d, struct op *op, unsigned which);
int bind_verr(struct icpu *c, const struct decoded *d, struct op *op, unsigned write);
int bind_lar(struct icpu *c, const struct decoded *d, struct op *op, unsigned arg);
int bind_lsl(struct icpu *c, const struct decoded *d, struct op *op, unsigned arg);
int bind_arpl(struct icpu *c, const struct decoded *d, struct op *op, unsigned arg);
int bind_smsw(struct icpu *c, const struct decoded *d, struct op *op, unsigned arg);
int bind_lmsw(struct icpu *c, const struct decoded *d, struct op *op, unsigned arg);
int bind_invpcid(struct icpu *c, const struct decoded *d, struct op *op, unsigned arg);
int bind_rdpid(struct icpu *c, const struct decoded *d, struct op *op, unsigned arg);
enum { BASE_READ = 0, BASE_WRITE = 1, BASE_FS = 0, BASE_GS = 2 };
int bind_fsgsbase(struct icpu *c, const struct decoded *d, struct op *op, unsigned what);
int bind_sysret(struct icpu *c, const struct decoded *d, struct op *op, unsigned arg);
int bind_in(struct icpu *c, const struct decoded *d, struct op *op, unsigned arg);
int bind_out(struct icpu *c, const struct decoded *d, struct op *op, unsigned arg);
int bind_ins(struct icpu *c, const struct decoded *d, struct op *op, unsigned size);
int bind_outs(struct icpu *c, const struct decoded *d, struct op *op, unsigned size);
/* Instructions without operands that matter: the argument is a number into a table of handlers (system.c). */
enum sys_plain {
    SYS_CLTS,
    SYS_HLT,
    SYS_INVD,
    SYS_WBINVD,
    SYS_INVLPG,
    SYS_RDMSR,
    SYS_WRMSR,
    SYS_RDTSC,
    SYS_RDTSCP,
    SYS_RDPMC,
    SYS_CPUID,
    SYS_SYSCALL,
    SYS_SYSENTER,
    SYS_SYSEXIT,
    SYS_SWAPGS,
    SYS_VMCALL,
    SYS_PLAINS
};
/* fastcall.c: what SYSCALL and SYSRET load, and which flags SYSRET takes from R11: all but RF, VM and reserved ones. */
#define SEG_FLAT_CODE64 0xa9bu             /* P S type 11 L G; DPL 0 */
#define SEG_FLAT_DATA 0xc93u
#define SEG_FLAT_DPL3 0x60u
#define SYSRET_FLAGS 0x3c7fd7u
int op_syscall(struct icpu *c, const struct op *op);
int op_sysenter(struct icpu *c, const struct op *op);
int op_sysexit(struct icpu *c, const struct op *op);
int op_swapgs(struct icpu *c, const struct op *op);
int bind_plain(struct icpu *c, const struct decoded *d, struct op *op, unsigned which);

/* ---- descriptors (SDM vol. 3A 3.4.5, 5.8, 7.2): seg.c ---- */
struct desc {
    u64 lo, hi;            /* hi: second half of 16-byte system descriptors in long mode, else 0 */
    u64 la;                /* where it stands */
    u16 sel;
};
/* System descriptor types, SDM vol. 3A table 3-2 */
enum {
    DESC_TSS16 = 1, DESC_LDT = 2, DESC_TSS16_BUSY = 3, DESC_CALL16 = 4, DESC_TASK = 5, DESC_INT16 = 6, DESC_TRAP16 = 7,
    DESC_TSS = 9, DESC_TSS_BUSY = 11, DESC_CALL = 12, DESC_INT = 14, DESC_TRAP = 15,
};
#define TYPE_ACCESSED 1u
#define TYPE_RW 2u         /* data: writable; code: readable */
#define TYPE_EC 4u         /* data: expands down; code: conforming */
#define TYPE_CODE 8u

static inline u16 desc_attr(const struct desc *d)
{
    return (u16)((d->lo >> 40 & 0xff) | (d->lo >> 44 & 0xf00));
}
static inline unsigned desc_type(const struct desc *d)
{
    return d->lo >> 40 & 15;
}
static inline unsigned desc_dpl(const struct desc *d)
{
    return d->lo >> 45 & 3;
}
static inline bool desc_s(const struct desc *d)       /* code or data, not a system descriptor */
{
    return d->lo >> 44 & 1;
}
static inline bool desc_p(const struct desc *d)
{
    return d->lo >> 47 & 1;
}
static inline bool desc_is_code(const struct desc *d)
{
    return desc_s(d) && desc_type(d) & TYPE_CODE;
}
static inline bool desc_is_conforming(const struct desc *d)
{
    return (desc_type(d) & (TYPE_CODE | TYPE_EC)) == (TYPE_CODE | TYPE_EC);
}
static inline u64 desc_base(const struct desc *d)
{
    return (d->lo >> 16 & 0xffffff) | (d->lo >> 32 & 0xff000000) | d->hi << 32;
}
u32 desc_limit(const struct desc *d);
void desc_to_seg(const struct desc *d, u16 sel, struct x86_seg *s);

/* Gates */
static inline u16 gate_sel(const struct desc *d)
{
    return (u16)(d->lo >> 16);
}
static inline u64 gate_offset(const struct desc *d)   /* of 32- and 64-bit gates; 16-bit ones: the low 16 bits count */
{
    return (d->lo & 0xffff) | (d->lo >> 32 & 0xffff0000) | d->hi << 32;
}

/*
 * Reads the descriptor that sel names from the GDT or LDT. A selector beyond the table raises vector(sel | ext). Null
 * selectors are the caller's affair. desc_read_hi then reads the second half where long mode has 16-byte system
 * descriptors (LDT, TSS, call gates), and checks its type field.
 */
static inline bool sel_null(u16 sel)
{
    return sel < 4;
}
int desc_read(struct icpu *c, u16 sel, unsigned vector, u32 ext, struct desc *d);
int desc_read_hi(struct icpu *c, unsigned vector, u32 ext, struct desc *d);
bool desc_in_table(const struct icpu *c, u16 sel, unsigned n, u64 *la);
/* Sets bits of the descriptor's type in memory (accessed, busy) or clears them. */
int desc_set_accessed(struct icpu *c, struct desc *d);
int desc_set_type(struct icpu *c, struct desc *d, unsigned type);

/* Is [off, off + n) inside the segment's limit (SDM vol. 3A 5.3)? Not for 64-bit mode. */
bool seg_in_limit(const struct x86_seg *s, u32 off, unsigned n);

/* Checks of a new CS for a direct transfer at the current privilege, SDM vol. 2 JMP/CALL "CONFORMING-CODE-SEGMENT",
 * "NONCONFORMING-CODE-SEGMENT". */
int code_check(struct icpu *c, const struct desc *d, u16 sel);
bool code_bits_ok(const struct icpu *c, const struct desc *d);     /* long mode: L and D are not both set */
int segment_fault(struct icpu *c, unsigned vector, u16 sel, u32 ext);
/* A new SS for privilege cpl: raises vector(sel | ext), or #SS(sel | ext) if it is not present. Reads the descriptor
 * into *d; sets its accessed bit. */
int stack_seg_read(struct icpu *c, u16 sel, unsigned cpl, unsigned vector, u32 ext, struct x86_seg *out);

/* DS, ES, FS, GS at the current privilege: raises vector(sel | ext), or #NP(sel | ext). */
int data_seg_load(struct icpu *c, unsigned seg, u16 sel, unsigned vector, u32 ext);

/* ---- modes ---- */
static inline bool in_long_mode(const struct icpu *c)  /* EFER.LMA: 64-bit or compatibility mode */
{
    return c->x->efer & EFER_LMA;
}
static inline bool in_64bit(const struct icpu *c)
{
    return c->mode == IMODE_LONG64;
}
static inline bool in_v86(const struct icpu *c)
{
    return c->mode == IMODE_V86;
}
static inline bool in_real(const struct icpu *c)
{
    return c->mode == IMODE_REAL16;
}
static inline unsigned cpu_iopl(const struct icpu *c)
{
    return c->flags >> 12 & 3;
}
static inline bool is_canonical(u64 la)
{
    return (u64)((s64)(la << 16) >> 16) == la;
}
/* May RIP be there: limit of cs, or canonical in 64-bit code? */
bool code_rip_ok(const struct icpu *c, const struct x86_seg *cs, u64 rip);
u64 next_rip(const struct icpu *c, const struct op *op);   /* the next instruction's, cut to the mode's width */
static inline bool guest_is_amd(const struct icpu *c)
{
    return cpuid_is_amd(c->v->m->cpuid);
}

/* A general register by operand size: 32-bit writes clear the upper half. */
static inline void gpr_write(struct icpu *c, unsigned n, unsigned size, u64 val)
{
    switch (size) {
    case 2:
        c->r[n] = (c->r[n] & ~0xffffull) | (u16)val;
        break;
    case 4:
        c->r[n] = (u32)val;
        break;
    default:
        c->r[n] = val;
    }
}
static inline unsigned insn_size(const struct decoded *d)  /* operand size in bytes */
{
    return d->insn.operand_width / 8;
}
static inline u8 reg_id(const struct decoded *d, unsigned operand)
{
    return (u8)ZydisRegisterGetId(d->opnd[operand].reg.value);
}
static inline bool is_mem(const struct decoded *d, unsigned operand)
{
    return d->opnd[operand].type == ZYDIS_OPERAND_TYPE_MEMORY;
}
/* Loads a 16-bit source that is a register (op->rm) or in memory. */
int load_u16(struct icpu *c, const struct op *op, u16 *val);
/* Stores a 16-bit system value: whole register of op->size, or 16 bits of memory. */
int store_system(struct icpu *c, const struct op *op, u64 val);
/* The linear address of a memory operand for instructions that make no access (INVLPG). */
u64 linear_unchecked(const struct icpu *c, const struct op *op);

/* ---- stacks: frame.c ---- */
struct stack {
    struct x86_seg ss;
    u64 rsp;
    u64 mask;              /* 0xffff, 0xffffffff or all ones: the width of the stack pointer */
    bool flat;             /* 64-bit mode: no base, no limit, but canonical */
    bool super;            /* accesses are made with supervisor privilege, whatever the CPL is now */
    u32 error;             /* error code of #SS */
};
void stack_current(const struct icpu *c, struct stack *s);
/* A new stack for code of privilege cpl. wide: the code that will run is 64-bit. */
void stack_init(const struct icpu *c, struct stack *s, const struct x86_seg *ss, u64 rsp, unsigned cpl, bool wide,
                u32 error);
int stack_put(struct icpu *c, struct stack *s, unsigned size, u64 val);
int stack_get(struct icpu *c, struct stack *s, unsigned size, u64 *val);
void stack_skip(struct stack *s, s64 delta);
/* #SS if n bytes do not fit below the top; pages are not looked at. */
int stack_room(struct icpu *c, const struct stack *s, unsigned n);
/* RSP only; SS is the caller's affair: it knows whether it changed. */
void stack_commit(struct icpu *c, const struct stack *s);

/* Stack pointers of the current TSS for privilege cpl: 32-bit modes fill ss; long mode only *rsp (ist 0: RSPn, else
 * ISTn). Raises #TS(tr | ext). */
int tss_stack(struct icpu *c, unsigned cpl, u32 ext, u16 *ss, u64 *rsp);
int tss_stack64(struct icpu *c, unsigned cpl, unsigned ist, u32 ext, u64 *rsp);
/* Sets SS to the null selector that an inner privilege level of 64-bit mode starts with. */
void seg_null_ss(struct x86_seg *s, unsigned cpl);
void seg_set_null(struct x86_seg *s, u16 sel);
/* After a return to an outer level: data segments that are too privileged for cpl become null. */
void seg_drop_inner(struct icpu *c, unsigned cpl);

/* ---- flags ---- */
/* Changes the RFLAGS bits of mask to those of val; follows up AC, VM, IF as the TLB and the loop need. Mode is the
 * caller's affair (icpu_mode). */
void flags_write(struct icpu *c, u64 val, u64 mask);

/* ---- events ---- */
/*
 * INT3, INTO (software: the gate's DPL is checked) and INT1 (not checked): as deliver_software, without the rules of
 * INT n for virtual-8086 mode.
 */
int deliver_exception_insn(struct icpu *c, unsigned vector, bool software);
/*
 * Task switches return OP_JUMP; OP_FAULT when nothing has been switched; or OP_TRAP when the new task is the current
 * one and c->fault is its first exception, which the caller delivers. task_gate first checks the selector that a task
 * gate or a far transfer names (SDM vol. 2 CALL "TASK-GATE").
 */
int task_gate(struct icpu *c, u16 tss_sel, int source, bool has_error, u32 error, u32 ext);
/* CR0 and CR3 as the instructions and task switches load them: all checks; OP_END, or OP_FAULT with nothing changed. */
int cr0_write(struct icpu *c, u64 val);
int cr3_write(struct icpu *c, u64 val);

/* ---- returns (RET, IRET): far.c ---- */
int return_code_check(struct icpu *c, u16 sel, struct desc *d);
/* SS for a return to cs at privilege cpl; the null selector is allowed where 64-bit kernels leave it. */
int return_stack_check(struct icpu *c, u16 sel, unsigned cpl, const struct x86_seg *cs, struct x86_seg *ss);
void return_commit(struct icpu *c, const struct x86_seg *cs, const struct x86_seg *ss, u64 rip, u64 rsp);

/* ---- ports: portio.c ---- */
int port_allowed(struct icpu *c, u16 port, unsigned size); /* IOPL and the TSS's permission bitmap: 0 or #GP(0) */

/* ---- debug: debug.c ---- */
/* Sets DR6 bits and c->fault for a #DB; c->rip and RFLAGS.RF are as they are to be saved. Returns OP_FAULT. */
int debug_raise(struct icpu *c, u64 dr6_bits);
/* Notes in c->db_pending which I/O breakpoints a port access meets. */
void debug_port(struct icpu *c, u16 port, unsigned size);
int bind_mov_dr(struct icpu *c, const struct decoded *d, struct op *op, unsigned arg);

