/*
 * The library of the sys tests: what a bare-metal program needs to provoke one mechanism of the processor at a time and
 * to see what came of it.
 *
 * A program NAME16.c runs in real mode, NAME32.c in flat 32-bit protected mode without paging, NAME64.c in long mode
 * with the first GiB mapped one to one for the supervisor, and its first 2 MiB once more at USER_OFF for everybody.
 * start.S brings the processor there from real mode at 0:8000h, at CPL 0 with interrupts off; then main() runs. Every
 * exception is caught: TRY("instructions") runs them and, if they fault, goes on behind them with `trap` filled in;
 * USER("instructions") does the same at CPL 3. General registers survive the fault as they were, so that a test can see
 * what the instruction had changed.
 *
 * Output is one line per check at port 0xe9 (`ok NAME`, `not ok NAME: WHAT: expected X, got Y`), the end a write to
 * port 0xf4; sys_runner.c and run-qemu read them. A program whose check ends in a shutdown announces it
 * (expect_shutdown) and is started again with the next number in run_case().
 *
 * References: "SDM 3A 6.15" is the Intel SDM, volume and section, of 2023; "APM2 8.2" the AMD APM.
 */
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef signed long long s64;
typedef unsigned long ulong;
typedef _Bool bool;
#define true 1
#define false 0
#define NULL ((void *)0)

#define BIT(n) (1ull << (n))
#define ARRAY_SIZE(a) (sizeof(a) / sizeof((a)[0]))
#define STR_(x) #x
#define STR(x) STR_(x)

/* ---- checks ---- */
void test(const char *fmt, ...)
    __attribute__((format(printf, 1, 2))); /* begins a named check and closes the one before */
void eq(const char *what, u64 got, u64 want);
void must(const char *what, bool cond);
void skip(const char *why); /* the check that is open cannot be made on this processor */
void note(const char *fmt, ...) __attribute__((format(printf, 1, 2))); /* a comment line */
void done(void) __attribute__((noreturn));                             /* closes the last check, ends the program */
void expect_shutdown(const char *name);                                /* what follows must shut the processor down */
unsigned run_case(void);                                               /* 0 at first; one more after every shutdown */
extern bool quiet_cases; /* set while run_case() > 0: test() prints nothing until expect_shutdown() */

void *memset(void *p, int c, ulong n);
void *memcpy(void *d, const void *s, ulong n);
int memcmp(const void *a, const void *b, ulong n);

/* ---- vectors, flags, control bits ---- */
enum { DE, DB, NMI, BP, OF, BR, UD, NM, DF, CSO, TS, NP, SS, GP, PF, MF = 16, AC, MC, XM };
#define VEC_DONE 0x80 /* USER() came back by itself */
#define NONE (~0u)    /* trap.vector: nothing happened; eq_trap's error: none was pushed */

#define F_CF 0x1u
#define F_1 0x2u
#define F_PF 0x4u
#define F_AF 0x10u
#define F_ZF 0x40u
#define F_SF 0x80u
#define F_TF 0x100u
#define F_IF 0x200u
#define F_DF 0x400u
#define F_OF 0x800u
#define F_IOPL 0x3000u
#define F_NT 0x4000u
#define F_RF 0x10000u
#define F_VM 0x20000u
#define F_AC 0x40000u
#define F_VIF 0x80000u
#define F_VIP 0x100000u
#define F_ID 0x200000u

#define CR0_PE 0x1u
#define CR0_MP 0x2u
#define CR0_EM 0x4u
#define CR0_TS 0x8u
#define CR0_NE 0x20u
#define CR0_WP 0x10000u
#define CR0_AM 0x40000u
#define CR0_NW 0x20000000u
#define CR0_CD 0x40000000u
#define CR0_PG 0x80000000u
#define CR4_VME 0x1u
#define CR4_PVI 0x2u
#define CR4_TSD 0x4u
#define CR4_DE 0x8u
#define CR4_PSE 0x10u
#define CR4_PAE 0x20u
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

#define PF_P 1
#define PF_W 2
#define PF_U 4
#define PF_RSVD 8
#define PF_I 16
#define PF_PK 32

#define MSR_SYSENTER_CS 0x174
#define MSR_SYSENTER_ESP 0x175
#define MSR_SYSENTER_EIP 0x176
#define MSR_EFER 0xc0000080
#define MSR_STAR 0xc0000081
#define MSR_LSTAR 0xc0000082
#define MSR_CSTAR 0xc0000083
#define MSR_SFMASK 0xc0000084
#define MSR_FS_BASE 0xc0000100
#define MSR_GS_BASE 0xc0000101
#define MSR_KERNEL_GS_BASE 0xc0000102
#define MSR_TSC_AUX 0xc0000103
#define EFER_SCE 1u
#define EFER_LME 0x100u
#define EFER_LMA 0x400u
#define EFER_NXE 0x800u

/* ---- what was caught ---- */
struct trap {
    u32 vector;                  /* NONE: nothing */
    u32 count;                   /* how many since TRY began; more than one only with a hook */
    ulong error;                 /* NONE: no error code was pushed */
    ulong ip, cs, flags, sp, ss; /* 32-bit: sp and ss only valid when from_user or V86 */
    ulong cr2, dr6;
    ulong handler_sp;                   /* RSP as the handler found it, at the first byte of the frame */
    u32 v86_es, v86_ds, v86_fs, v86_gs; /* pushed by a trap out of virtual-8086 mode */
    u16 ds, es, fs, gs;                 /* as the handler found them */
};
extern volatile struct trap trap;
void eq_trap(u32 vector, u32 error); /* error NONE: must not have one */

/* ---- small instructions ---- */
static inline void outb(u16 port, u8 v) { asm volatile("outb %0, %1" ::"a"(v), "Nd"(port)); }
static inline void outw(u16 port, u16 v) { asm volatile("outw %0, %1" ::"a"(v), "Nd"(port)); }
static inline void outl(u16 port, u32 v) { asm volatile("outl %0, %1" ::"a"(v), "Nd"(port)); }
static inline u8 inb(u16 port)
{
    u8 v;
    asm volatile("inb %1, %0" : "=a"(v) : "Nd"(port));
    return v;
}
static inline u16 inw(u16 port)
{
    u16 v;
    asm volatile("inw %1, %0" : "=a"(v) : "Nd"(port));
    return v;
}
static inline u32 inl(u16 port)
{
    u32 v;
    asm volatile("inl %1, %0" : "=a"(v) : "Nd"(port));
    return v;
}

struct cpuid {
    u32 a, b, c, d;
};
static inline struct cpuid cpuid(u32 leaf, u32 sub)
{
    struct cpuid r;
    asm volatile("cpuid" : "=a"(r.a), "=b"(r.b), "=c"(r.c), "=d"(r.d) : "a"(leaf), "c"(sub));
    return r;
}
bool cpu_amd(void); /* AMD's choices where the two manuals differ */
static inline u64 rdmsr(u32 msr)
{
    u32 lo, hi;
    asm volatile("rdmsr" : "=a"(lo), "=d"(hi) : "c"(msr));
    return (u64)hi << 32 | lo;
}
static inline void wrmsr(u32 msr, u64 v)
{
    asm volatile("wrmsr" ::"a"((u32)v), "d"((u32)(v >> 32)), "c"(msr) : "memory");
}

#define CR_RW(n)                                                                                                       \
    static inline ulong read_cr##n(void)                                                                               \
    {                                                                                                                  \
        ulong v;                                                                                                       \
        asm volatile("mov %%cr" #n ", %0" : "=r"(v));                                                                  \
        return v;                                                                                                      \
    }                                                                                                                  \
    static inline void write_cr##n(ulong v) { asm volatile("mov %0, %%cr" #n ::"r"(v) : "memory"); }
CR_RW(0)
CR_RW(2) CR_RW(3) CR_RW(4)
#define DR_RW(n)                                                                                                       \
    static inline ulong read_dr##n(void)                                                                               \
    {                                                                                                                  \
        ulong v;                                                                                                       \
        asm volatile("mov %%dr" #n ", %0" : "=r"(v));                                                                  \
        return v;                                                                                                      \
    }                                                                                                                  \
    static inline void write_dr##n(ulong v) { asm volatile("mov %0, %%dr" #n ::"r"(v)); }
    DR_RW(0) DR_RW(1) DR_RW(2) DR_RW(3) DR_RW(6) DR_RW(7)

        struct __attribute__((packed)) table_reg {
    u16 limit;
    ulong base;
};
static inline void lgdt(const struct table_reg *r) { asm volatile("lgdt %0" ::"m"(*r)); }
static inline void lidt(const struct table_reg *r) { asm volatile("lidt %0" ::"m"(*r)); }
static inline void sidt(struct table_reg *r) { asm volatile("sidt %0" : "=m"(*r)); }
static inline void sgdt(struct table_reg *r) { asm volatile("sgdt %0" : "=m"(*r)); }

/* ---- segments and gates (not in real-mode programs) ---- */
#define KCS 0x08 /* CPL 0 code of the program's mode */
#define KDS 0x10
#define UCS32 0x1b /* CPL 3, 32-bit: SYSRET's and SYSEXIT's layout */
#define UDS 0x23
#define UCS64 0x2b
#define UDS2 0x33 /* where SYSEXIT to 64-bit code expects its stack segment */
#define KCS32 0x38
#define KCS16 0x40
#define KDS16 0x48
#define TSS_SEL 0x50 /* two slots in long mode */
#define T0 0x60      /* the first of the slots that tests fill */
#define GDT_SLOTS 256
extern u64 gdt[GDT_SLOTS];
extern struct table_reg gdt_reg, idt_reg;

/* Descriptor access byte and flags: SDM 3A 3.4.5 */
#define D_P 0x80
#define D_S 0x10
#define D_DPL(n) ((n) << 5)
#define D_DATA 0x10
#define D_CODE 0x18
#define D_W 0x02    /* of data: writable */
#define D_R 0x02    /* of code: readable */
#define D_DOWN 0x04 /* of data: expands down */
#define D_CONF 0x04 /* of code: conforming */
#define D_A 0x01
#define D_L 0x200 /* bits 8.. are the flags' nibble: AVL L D/B G */
#define D_DB 0x400
#define D_G 0x800
void trap_unexpected(void) __attribute__((noreturn)); /* nobody had asked for it: prints it, ends the program */
u64 descriptor(u32 base, u32 limit, u32 access);      /* limit is the field itself, 20 bits */
#define TYPE_TSS16 1
#define TYPE_LDT 2
#define TYPE_TSS16_BUSY 3
#define TYPE_CALL16 4
#define TYPE_TASK 5
#define TYPE_INT16 6
#define TYPE_TRAP16 7
#define TYPE_TSS 9
#define TYPE_TSS_BUSY 11
#define TYPE_CALL 12
#define TYPE_INT 14
#define TYPE_TRAP 15
u64 gate(u16 sel, u32 offset, u32 access, u8 low);                               /* low: parameter count, or IST */
void idt_set(unsigned vector, u16 sel, const void *handler, u32 access, u8 ist); /* access: D_P | D_DPL | TYPE */
void idt_default(unsigned vector); /* back to the catcher: interrupt gate, DPL 0 (0x80: DPL 3) */
extern char trap_entry[];          /* the catcher: 16 bytes per vector */

/* Called by the catcher with the interrupted general registers before anything else; returns true to resume where the
 * trap came from (trap.ip, trap.flags may be changed). */
extern bool (*trap_hook)(void);
extern ulong *trap_gpr; /* during the hook: AX CX DX BX - BP SI DI (R8..R15), as x86 numbers them; writable */
/* Where and how the catcher resumes; set by TRY and USER. */
extern volatile ulong trap_fix, trap_sp;
extern volatile ulong user_flags;           /* EFLAGS that USER begins with */
extern u8 user_stack[], user_stack_end[];   /* 8 KiB for CPL 3 (by its supervisor address) */
extern u8 ring0_stack[], ring0_stack_end[]; /* the TSS's */
extern u8 image_end[];

/* Runs n bytes of code as a procedure, at CPL 0 or (user) 3: general registers are zero, except SI, DI and BX, which
 * point to 1 KiB at exec_data. The result is in `trap` (NONE: it returned). exec_ip() is where the first byte was, as
 * `trap.ip` would show it. */
void exec(const void *code, unsigned n, bool user);
ulong exec_ip(bool user);
extern u8 exec_data[];
#define EXEC(user, ...) exec((const u8[]){__VA_ARGS__}, sizeof((const u8[]){__VA_ARGS__}), user)

#if defined(__x86_64__)
#include "sys64.h"
#elif defined(REAL_MODE)
#include "sys16.h"
#else
#include "sys32.h"
#endif
