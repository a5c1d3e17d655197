/*
 * The interpreter's core: small programs on a machine of 8 MiB of RAM and nothing else. Programs end with HLT; an exception ends in a HLT of its
 * own, whose address tells the vector. Instructions against the host are tests/insn's subject, privileged mechanisms tests/sys's.
 */
#include "one_vcpu.h"
#include "cpu/interp/code.h"
#include "cpu/interp/tlb.h"

#define RAM_SIZE (8 * MiB)
#define CODE 0x100000ull
#define STACK 0x200000ull
#define DATA 0x300000ull
#define PML4 0x1000u
#define PDPT 0x2000u
#define PD   0x3000u
#define PT   0x4000u       /* four tables: 8 MiB in pages of 4 KiB */
#define GDT  0x8000u
#define IDT  0x9000u
#define STUBS 0xa000u      /* 16 bytes per vector */
#define TSS  0xc000u

struct fixture {
    struct machine m;
    struct vcpu v;
    struct ram ram;
    struct x86 *x;
};

static u8 *at(struct fixture *f, u64 gpa)
{
    return ram_hva(&f->ram, gpa);
}

static void put64(struct fixture *f, u64 gpa, u64 v)
{
    memcpy(at(f, gpa), &v, 8);
}

static u64 get64(struct fixture *f, u64 gpa)
{
    u64 v;
    memcpy(&v, at(f, gpa), 8);
    return v;
}

#define PTE(i) (PT + 8u * (unsigned)(i))
enum { P = 1, W = 2, U = 4, A = 32, D = 64 };

static void make_tables(struct fixture *f)
{
    put64(f, PML4, PDPT | P | W | U);
    put64(f, PDPT, PD | P | W | U);
    for (unsigned i = 0; i < 4; i++)
        put64(f, PD + 8 * i, (PT + i * PAGE_SIZE) | P | W | U);
    for (unsigned i = 0; i < 2048; i++)
        put64(f, PTE(i), i * PAGE_SIZE | P | W | U);
    put64(f, GDT + 8, 0x00af9b000000ffff);                         /* 08: 64-bit code */
    put64(f, GDT + 16, 0x00cf93000000ffff);                        /* 10: data */
    put64(f, GDT + 24, 0x00cff3000000ffff);                        /* 18: user data */
    put64(f, GDT + 32, 0x00affb000000ffff);                        /* 20: user code */
    for (unsigned i = 0; i < 32; i++) {
        u64 h = STUBS + 16 * i;
        put64(f, IDT + 16 * i, (h & 0xffff) | 0x08 << 16 | 0x8e00ull << 32 | (h >> 16) << 48);
        put64(f, IDT + 16 * i + 8, 0);
        *at(f, h) = 0xf4;
    }
    put64(f, TSS + 4, STACK - 0x10000);                            /* RSP0 */
}

static struct x86_seg segment(u16 sel, u16 attr)
{
    return (struct x86_seg){ .limit = 0xffffffff, .sel = sel, .attr = attr };
}

static void long_mode(struct fixture *f)
{
    struct x86 *x = f->x;
    x86_reset(x, true);
    make_tables(f);
    x->cr0 = CR0_PE | CR0_PG | CR0_WP | CR0_NE | CR0_ET;
    x->cr3 = PML4;
    x->cr4 = CR4_PAE | CR4_PGE | CR4_OSFXSR;
    x->efer = EFER_LME | EFER_LMA | EFER_NXE | EFER_SCE;
    for (unsigned i = 0; i < SEGS; i++)
        x->seg[i] = segment(0x10, 0xc93);
    x->seg[SEG_CS] = segment(0x08, 0xa9b);
    x->tr = (struct x86_seg){ .base = TSS, .limit = 0x67, .sel = 0x28, .attr = 0x8b };
    x->gdtr = (struct x86_table){ GDT, 0xff };
    x->idtr = (struct x86_table){ IDT, 16 * 32 - 1 };
    x->rip = CODE;
    x->gpr[RSP] = STACK;
    x->rflags = FLAG_1;
    x->activity = X86_RUNNING;
}

static int setup(void **state)
{
    struct fixture *f = fixture_new(sizeof *f);
    ram_make(&f->ram, RAM_SIZE);
    one_vcpu_open(&f->m, &f->v, &f->ram);
    f->x = &f->v.x;
    long_mode(f);
    *state = f;
    return 0;
}

static int teardown(void **state)
{
    struct fixture *f = *state;
    one_vcpu_close(&f->m, &f->v, &f->ram);
    free(f);
    return 0;
}

static void load(struct fixture *f, u64 gpa, const void *bytes, size_t n)
{
    memcpy(at(f, gpa), bytes, n);
}
#define CODE_AT(f, gpa, ...) load(f, gpa, (const u8[]){ __VA_ARGS__ }, sizeof((const u8[]){ __VA_ARGS__ }))

/* Guest code, position-independent, assembled with this file. */
#define PROGRAM(name, text)                                                                           \
    asm(".pushsection .rodata\n" #name ":\n" text "\n" #name "_end:\n.popsection");                   \
    extern const u8 name[], name##_end[];
#define LOAD_AT(f, gpa, name) load(f, gpa, name, (size_t)(name##_end - name))
#define LOAD(f, name) LOAD_AT(f, CODE, name)

/* Runs until HLT. Returns the vector of the exception that ended the program, or -1. */
static int go(struct fixture *f)
{
    f->x->activity = X86_RUNNING;
    assert_int_equal(interp_engine.run(&f->v), RUN_HALTED);
    u64 rip = f->x->rip - 1;
    return rip >= STUBS && rip < STUBS + 16 * 32 ? (int)((rip - STUBS) / 16) : -1;
}

/* What an exception has pushed: error code (if it has one), RIP, CS, RFLAGS, RSP. */
static u64 pushed(struct fixture *f, unsigned slot)
{
    return get64(f, f->x->gpr[RSP] + 8 * slot);
}

static void again(struct fixture *f)
{
    f->x->rip = CODE;
    f->x->gpr[RSP] = STACK;
    f->x->seg[SEG_CS] = segment(0x08, 0xa9b);
    f->x->seg[SEG_SS] = segment(0x10, 0xc93);
    f->x->rflags = FLAG_1;
}

/* ---- running ---- */
PROGRAM(prog_loop, "mov $10, %eax; xor %ecx, %ecx; 1: add %rax, %rcx; dec %eax; jnz 1b; push %rcx; pop %rdx; call 2f; hlt; 2: shl $3, %rdx; ret")
static void test_program(void **state)
{
    struct fixture *f = *state;
    LOAD(f, prog_loop);
    assert_int_equal(go(f), -1);
    assert_int_equal(f->x->gpr[RCX], 55);
    assert_int_equal(f->x->gpr[RDX], 440);
    assert_int_equal(f->x->gpr[RSP], STACK);
    assert_int_equal(f->x->rip, CODE + (u64)(prog_loop_end - prog_loop) - 5);
    assert_int_equal(f->v.insns, 2 + 3 * 10 + 2 + 1 + 2 + 1);
}

/* Kicked: run() returns between instructions, and goes on where it was. */
PROGRAM(prog_forever, "1: inc %rax; jmp 1b")
static void test_outside(void **state)
{
    struct fixture *f = *state;
    LOAD(f, prog_forever);
    atomic_store(&f->v.events, VCPU_EV_KICK);
    assert_int_equal(interp_engine.run(&f->v), RUN_OUTSIDE);
    assert_int_equal(f->x->rip, CODE);
    assert_int_equal(atomic_load(&f->v.events), VCPU_EV_KICK);     /* left to the vCPU's thread */
}

/* ---- interrupts ---- */
static int pending = -1;
static int peek_pending(void *chip)
{
    (void)chip;
    return pending;
}
static int ack_pending(void *chip)
{
    (void)chip;
    int v = pending;
    pending = -1;
    return v;
}
static const struct intc_ops one_interrupt = { .peek = peek_pending, .ack = ack_pending };

PROGRAM(prog_sti, "nop; sti; nop; nop; hlt")
static void test_interrupt_after_sti(void **state)
{
    struct fixture *f = *state;
    LOAD(f, prog_sti);
    f->v.intc.ops = &one_interrupt;
    pending = 0x1e;
    atomic_store(&f->v.events, VCPU_EV_INTR);
    assert_int_equal(go(f), 0x1e);
    assert_int_equal(pushed(f, 0), CODE + 3);                      /* one instruction after STI, not before */
    assert_int_equal(pending, -1);
    assert_int_equal(atomic_load(&f->v.events), 0);
}

/* With IF clear, HLT stays halted whatever is pending; when IF is set the same interrupt comes without a new event. */
static void test_halted(void **state)
{
    struct fixture *f = *state;
    CODE_AT(f, CODE, 0xf4, 0x90);
    f->v.intc.ops = &one_interrupt;
    pending = 0x1f;
    atomic_store(&f->v.events, VCPU_EV_INTR);
    assert_int_equal(interp_engine.run(&f->v), RUN_HALTED);
    assert_int_equal(f->x->rip, CODE + 1);
    assert_int_equal(f->x->activity, X86_HALTED);
    assert_int_equal(pending, 0x1f);
    f->x->rflags |= FLAG_IF;
    assert_int_equal(interp_engine.run(&f->v), RUN_HALTED);
    assert_int_equal(pending, -1);
    assert_int_equal(f->x->rip, STUBS + 16 * 0x1f + 1);
    assert_int_equal(pushed(f, 0), CODE + 1);
}

static void test_nmi(void **state)
{
    struct fixture *f = *state;
    CODE_AT(f, CODE, 0x90, 0xf4);
    atomic_store(&f->v.events, VCPU_EV_NMI);
    assert_int_equal(go(f), VEC_NMI);
    assert_true(f->x->nmi_blocked);
    atomic_store(&f->v.events, VCPU_EV_NMI);                       /* a second one waits for IRET */
    assert_int_equal(interp_engine.run(&f->v), RUN_HALTED);
    assert_true(f->x->nmi_pending);
}

/* ---- faults ---- */
struct fault_case {
    u8 bytes[16];
    int vector;
    u64 error;         /* ~0: none is pushed */
};

static void test_faults(void **state)
{
    struct fixture *f = *state;
    static const struct fault_case cases[] = {
        { { 0x0f, 0x0b }, VEC_UD, ~0ull },
        { { 0xf0, 0x90 }, VEC_UD, ~0ull },                         /* lock nop */
        { { 0xf0, 0x01, 0xc0 }, VEC_UD, ~0ull },                   /* lock add to a register */
        { { 0xf0, 0x3b, 0x00 }, VEC_UD, ~0ull },                   /* lock cmp */
        { { 0x06 }, VEC_UD, ~0ull },                               /* push es, not in 64-bit mode */
        { { 0x31, 0xc9, 0xf7, 0xf1 }, VEC_DE, ~0ull },
        { { 0x48, 0xb8, 0, 0, 0, 0, 0, 0x80, 0, 0, 0xff, 0xe0 }, VEC_GP, 0 }, /* jump to a non-canonical address */
        { { 0x48, 0xb8, 0, 0, 0, 0, 0, 0x80, 0, 0, 0x8b, 0x00 }, VEC_GP, 0 }, /* load from it */
        { { 0x48, 0xbd, 0, 0, 0, 0, 0, 0x80, 0, 0, 0x8b, 0x45, 0 }, VEC_SS, 0 }, /* by rBP: #SS */
        { { 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x90 }, VEC_GP, 0 }, /* 16 bytes */
    };
    for (unsigned i = 0; i < ARRAY_SIZE(cases); i++) {
        again(f);
        load(f, CODE, cases[i].bytes, 16);
        assert_int_equal(go(f), cases[i].vector);
        if (cases[i].error != ~0ull)
            assert_int_equal(pushed(f, 0), cases[i].error);
    }
    again(f);
    CODE_AT(f, CODE, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x90, 0xf4); /* 15 bytes are fine */
    assert_int_equal(go(f), -1);
}

/* Loads first, registers last: an instruction that faults on its store has changed nothing. */
PROGRAM(prog_push_fault, "mov $0x300008, %esp; mov $1, %eax; push %rax; push %rax; hlt")
static void test_fault_changes_nothing(void **state)
{
    struct fixture *f = *state;
    LOAD(f, prog_push_fault);
    put64(f, PTE(0x2ff), 0);
    f->x->tr.base = TSS;
    put64(f, IDT + 16 * VEC_PF + 4, 0);
    put64(f, IDT + 16 * VEC_PF, (STUBS + 16 * VEC_PF) | 0x08 << 16 | 0x8e01ull << 32); /* IST1 */
    put64(f, TSS + 36, STACK);
    assert_int_equal(go(f), VEC_PF);
    assert_int_equal(f->x->cr2, 0x2ffff8);
    assert_int_equal(pushed(f, 0), PF_W);
    assert_int_equal(pushed(f, 1), CODE + 11);
    assert_int_equal(pushed(f, 4), 0x300000);                      /* RSP as before the second PUSH */
}

/* ---- pages ---- */
PROGRAM(prog_cross, "mov $0x300ffc, %ebx; movabs $0x1122334455667788, %rax; mov %rax, (%rbx); mov (%rbx), %rcx; mov 1(%rbx), %edx; lock addq $1, (%rbx); hlt")
static void test_page_crossing(void **state)
{
    struct fixture *f = *state;
    LOAD(f, prog_cross);
    put64(f, PTE(0x301), 0x500000 | P | W | U);                    /* the second page lies elsewhere */
    assert_int_equal(go(f), -1);
    assert_int_equal(f->x->gpr[RCX], 0x1122334455667788);
    assert_int_equal(f->x->gpr[RDX], 0x44556677);
    u32 lo, hi;
    memcpy(&lo, at(f, 0x300ffc), 4);
    memcpy(&hi, at(f, 0x500000), 4);
    assert_true(lo == 0x55667789 && hi == 0x11223344);
}

static void test_page_crossing_fault(void **state)
{
    struct fixture *f = *state;
    LOAD(f, prog_cross);
    put64(f, PTE(0x301), 0x301000 | P | U);                        /* read-only second page */
    assert_int_equal(go(f), VEC_PF);
    assert_int_equal(f->x->cr2, 0x301000);
    assert_int_equal(pushed(f, 0), PF_P | PF_W);
    assert_int_equal(get64(f, 0x300ff8), 0);                       /* nothing was written to the first */
}

static void test_accessed_dirty(void **state)
{
    struct fixture *f = *state;
    CODE_AT(f, CODE, 0x8b, 0x04, 0x25, 0, 0, 0x30, 0, 0xf4);       /* mov eax, [300000h] */
    assert_int_equal(go(f), -1);
    assert_int_equal(get64(f, PTE(0x300)), 0x300000 | P | W | U | A);
    again(f);
    CODE_AT(f, CODE, 0x89, 0x04, 0x25, 0, 0, 0x30, 0, 0xf4);       /* the same page is in the TLB; the store must set D */
    assert_int_equal(go(f), -1);
    assert_int_equal(get64(f, PTE(0x300)), 0x300000 | P | W | U | A | D);
}

/* A changed entry counts after INVLPG, INVLPG drops global pages too, MOV CR3 does not. */
PROGRAM(prog_invlpg,
        "mov 0x300000, %eax; movq $0x500103, 0x5800; invlpg 0x300000; mov 0x300000, %ecx;"
        "movq $0x300103, 0x5800; mov %cr3, %rdx; mov %rdx, %cr3; mov 0x300000, %edx; invlpg 0x300000; mov 0x300000, %ebx; hlt")
static void test_invlpg(void **state)
{
    struct fixture *f = *state;
    _Static_assert(PTE(0x300) == 0x5800, "as in the program");
    LOAD(f, prog_invlpg);
    put64(f, PTE(0x300), 0x300103);
    *at(f, 0x300000) = 1;
    *at(f, 0x500000) = 2;
    assert_int_equal(go(f), -1);
    assert_int_equal(f->x->gpr[RAX], 1);
    assert_int_equal(f->x->gpr[RCX], 2);
    assert_int_equal(f->x->gpr[RDX], 2);                           /* kept: global */
    assert_int_equal(f->x->gpr[RBX], 1);
}

/* INVLPG of any address in a large page drops all of it. */
PROGRAM(prog_large, "mov 0x400000, %eax; mov 0x410000, %ecx; movq $0x200083, 0x3010; invlpg 0x5ff000; mov 0x410000, %edx; hlt")
static void test_invlpg_large(void **state)
{
    struct fixture *f = *state;
    LOAD(f, prog_large);
    put64(f, PD + 16, 0x400000 | P | W | 0x80);
    *at(f, 0x410000) = 1;
    *at(f, 0x210000) = 2;
    assert_int_equal(go(f), -1);
    assert_int_equal(f->x->gpr[RCX], 1);
    assert_int_equal(f->x->gpr[RDX], 2);
}

static void test_state_replaced(void **state)                      /* engine->set(): nothing cached survives */
{
    struct fixture *f = *state;
    struct x86 x;
    CODE_AT(f, CODE, 0x8b, 0x04, 0x25, 0, 0, 0x30, 0, 0xf4);
    *at(f, 0x300000) = 1;
    *at(f, 0x500000) = 2;
    assert_int_equal(go(f), -1);
    assert_int_equal(interp_engine.get(&f->v, &x), 0);
    put64(f, PTE(0x300), 0x500000 | P | W);
    x.rip = CODE;
    assert_int_equal(interp_engine.set(&f->v, &x), 0);
    assert_int_equal(go(f), -1);
    assert_int_equal(f->x->gpr[RAX], 2);
}

/* ---- fetch ---- */
static void test_fetch_fault(void **state)
{
    struct fixture *f = *state;
    u64 last = CODE + PAGE_SIZE - 3;
    put64(f, PTE(0x101), 0);
    CODE_AT(f, CODE, 0xe9, 0xf8, 0x0f, 0, 0);                      /* jmp last */
    CODE_AT(f, last, 0xb8, 1, 2);                                  /* mov eax, imm32: two of its bytes are missing */
    assert_int_equal(go(f), VEC_PF);
    assert_int_equal(f->x->cr2, CODE + PAGE_SIZE);
    assert_int_equal(pushed(f, 0), PF_I);
    assert_int_equal(pushed(f, 1), last);
    again(f);
    CODE_AT(f, last, 0x90, 0x90, 0xf4);                            /* ends in the first page: the second is not touched */
    assert_int_equal(go(f), -1);
}

static void test_crossing_instruction(void **state)
{
    struct fixture *f = *state;
    u64 last = CODE + PAGE_SIZE - 3;
    put64(f, PTE(0x101), 0x500000 | P | W | U);
    CODE_AT(f, CODE, 0xe9, 0xf8, 0x0f, 0, 0);
    CODE_AT(f, last, 0xb8, 1, 2);
    CODE_AT(f, 0x500000, 3, 4, 0xf4);
    assert_int_equal(go(f), -1);
    assert_int_equal(f->x->gpr[RAX], 0x04030201);
    again(f);
    CODE_AT(f, 0x500000, 5);                                       /* a change in the second page is seen */
    assert_int_equal(go(f), -1);
    assert_int_equal(f->x->gpr[RAX], 0x04050201);
    again(f);
    put64(f, PTE(0x101), 0x600000 | P | W | U);                    /* and so is another second page */
    f->x->cr3 = PML4 | 8;                                          /* as MOV CR3 would: translations are dropped */
    CODE_AT(f, 0x600000, 7, 8, 0xf4);
    assert_int_equal(go(f), -1);
    assert_int_equal(f->x->gpr[RAX], 0x08070201);
}

static void test_nx(void **state)
{
    struct fixture *f = *state;
    put64(f, PTE(0x300), 0x300000 | P | W | U | BIT(63));
    CODE_AT(f, CODE, 0x8b, 0x04, 0x25, 0, 0, 0x30, 0, 0xb8, 0, 0, 0x30, 0, 0xff, 0xe0); /* load from it first: it is in the TLB */
    assert_int_equal(go(f), VEC_PF);
    assert_int_equal(f->x->cr2, 0x300000);
    assert_int_equal(pushed(f, 0), PF_P | PF_I);
}

/* ---- self-modification ---- */
/* The store changes the immediate of the very next instruction, in the same block; on the second round the block is cached. */
PROGRAM(prog_next, "mov $3, %ecx; xor %edx, %edx; 1: lea 2f(%rip), %rbx; inc %edx; mov %dl, 1(%rbx); 2: mov $0x55, %al; loop 1b; hlt")
static void test_modify_next(void **state)
{
    struct fixture *f = *state;
    LOAD(f, prog_next);
    assert_int_equal(go(f), -1);
    assert_int_equal(f->x->gpr[RAX] & 0xff, 3);
}

/* By an alias, from outside, and many times: the page stops being a code page and becomes one again. */
static void test_modify_alias(void **state)
{
    struct fixture *f = *state;
    put64(f, PTE(0x300), CODE | P | W | U);
    /* mov al, 0; inc byte [300001h]; dec ecx; jnz CODE; hlt */
    CODE_AT(f, CODE, 0xb0, 0, 0xfe, 0x04, 0x25, 1, 0, 0x30, 0, 0xff, 0xc9, 0x75, 0xf3, 0xf4);
    f->x->gpr[RCX] = 1000;
    assert_int_equal(go(f), -1);
    assert_int_equal(f->x->gpr[RAX] & 0xff, (1000 - 1) & 0xff);
    again(f);
    *at(f, CODE + 1) = 77;                                         /* as a device would */
    f->x->gpr[RCX] = 1;
    assert_int_equal(go(f), -1);
    assert_int_equal(f->x->gpr[RAX] & 0xff, 77);
}

PROGRAM(prog_fill, "mov %esi, %ecx; 1: mov %rcx, 0x300000; mov 0x300000, %rax; dec %ecx; jnz 1b; hlt")
static void test_data_beside_code(void **state)                    /* stores to a page with code are right, and become fast */
{
    struct fixture *f = *state;
    struct icpu *c = f->v.engine_data;
    LOAD_AT(f, 0x300800, prog_fill);
    f->x->rip = 0x300800;
    f->x->gpr[RSI] = 100;
    assert_int_equal(go(f), -1);
    assert_int_equal(f->x->gpr[RAX], 1);
    assert_true(code_in_page(c->code, 0x300000));
    again(f);
    f->x->rip = 0x300800;
    f->x->gpr[RSI] = 10000;
    assert_int_equal(go(f), -1);
    assert_int_equal(get64(f, 0x300000), 1);
}

/* More code than the cache holds: everything is dropped and decoded again. */
static void test_cache_overflow(void **state)
{
    struct fixture *f = *state;
    struct icpu *c = f->v.engine_data;
    for (u64 i = 0; i < 1000; i++)                                 /* inc eax; jmp +2; ... */
        CODE_AT(f, CODE + 4 * i, 0xff, 0xc0, 0xeb, 0x00);
    CODE_AT(f, CODE + 4000, 0xf4);
    assert_int_equal(go(f), -1);
    assert_int_equal(f->x->gpr[RAX], 1000);
    code_flush_later(c);
    again(f);
    f->x->rip = CODE + 4000 - 8;
    assert_int_equal(go(f), -1);
    again(f);
    assert_int_equal(go(f), -1);
    assert_int_equal(f->x->gpr[RAX], 2002);
}

/* ---- devices ---- */
struct counter {
    u64 value;
    unsigned reads, writes, size;
};
static u64 counter_read(void *dev, u64 off, unsigned size)
{
    struct counter *d = dev;
    (void)off;
    d->reads++;
    d->size = size;
    return d->value;
}
static void counter_write(void *dev, u64 off, u64 val, unsigned size)
{
    struct counter *d = dev;
    (void)off;
    d->writes++;
    d->value = val;
    d->size = size;
}

PROGRAM(prog_mmio, "mov (%rbx), %eax; mov %ax, (%rbx); add %rax, (%rbx); lock incl (%rbx); xchg %ecx, (%rbx); mov 0x40(%rbx), %rdx; hlt")
static void test_mmio(void **state)
{
    struct fixture *f = *state;
    struct counter dev = { .value = 0x12345 };
    struct region r = { .base = 0x10000000, .size = 8, .min = 1, .max = 8, .read = counter_read, .write = counter_write, .dev = &dev, .name = "counter" };
    assert_true(bus_add(f->m.mmio, &r) >= 0);
    LOAD(f, prog_mmio);
    put64(f, PTE(0x300), 0x10000000 | P | W);
    f->x->gpr[RBX] = 0x300000;
    f->x->gpr[RCX] = 99;
    assert_int_equal(go(f), -1);
    assert_int_equal(f->x->gpr[RAX], 0x12345);
    assert_int_equal(f->x->gpr[RCX], 0x2345 + 0x12345 + 1);
    assert_int_equal(dev.value, 99);
    assert_int_equal(dev.reads, 4);
    assert_int_equal(dev.writes, 4);
    assert_int_equal(f->x->gpr[RDX], ~0ull);                       /* nothing is there */
}

/* ---- strings ---- */
PROGRAM(prog_overlap, "mov $0x300ff0, %esi; lea 3(%rsi), %edi; mov $100, %ecx; rep movsb; hlt")
static void test_movs_overlap(void **state)                        /* forward byte by byte: a pattern of three spreads */
{
    struct fixture *f = *state;
    LOAD(f, prog_overlap);
    memcpy(at(f, 0x300ff0), "abc", 3);
    assert_int_equal(go(f), -1);
    for (unsigned i = 0; i < 103; i++)
        assert_int_equal(*at(f, 0x300ff0 + i), "abc"[i % 3]);
    assert_int_equal(f->x->gpr[RCX], 0);
    assert_int_equal(f->x->gpr[RSI], 0x300ff0 + 100);
}

PROGRAM(prog_backwards, "std; mov $0x301010, %esi; mov $0x301018, %edi; mov $6, %ecx; rep movsq; cld; hlt")
static void test_movs_backwards(void **state)
{
    struct fixture *f = *state;
    LOAD(f, prog_backwards);
    for (u64 i = 0; i < 8; i++)
        put64(f, 0x300fe8 + 8 * i, i);
    assert_int_equal(go(f), -1);
    for (u64 i = 0; i < 6; i++)
        assert_int_equal(get64(f, 0x300ff0 + 8 * i), i);
    assert_int_equal(f->x->gpr[RDI], 0x301018 - 48);
}

PROGRAM(prog_movs_fault, "mov $0x300f00, %esi; mov $0x302f80, %edi; mov $0x400, %ecx; rep movsb; hlt")
static void test_movs_fault(void **state)                          /* registers show what is done, and the instruction resumes */
{
    struct fixture *f = *state;
    LOAD(f, prog_movs_fault);
    memset(at(f, 0x300f00), 7, 0x400);
    put64(f, PTE(0x303), 0);
    assert_int_equal(go(f), VEC_PF);
    assert_int_equal(f->x->cr2, 0x303000);
    assert_int_equal(pushed(f, 0), PF_W);
    assert_int_equal(f->x->gpr[RCX], 0x400 - 0x80);
    assert_int_equal(f->x->gpr[RSI], 0x300f80);
    assert_int_equal(f->x->gpr[RDI], 0x303000);
    put64(f, PTE(0x303), 0x303000 | P | W);
    f->x->rip = pushed(f, 1);
    assert_int_equal(go(f), -1);
    assert_int_equal(f->x->gpr[RCX], 0);
    assert_int_equal(*at(f, 0x30337f), 7);
    assert_int_equal(*at(f, 0x303380), 0);
}

PROGRAM(prog_scan, "mov $0x300000, %edi; mov $0x2000, %ecx; mov $5, %al; repne scasb; hlt")
static void test_scas(void **state)
{
    struct fixture *f = *state;
    LOAD(f, prog_scan);
    *at(f, 0x301234) = 5;
    assert_int_equal(go(f), -1);
    assert_int_equal(f->x->gpr[RDI], 0x301235);
    assert_int_equal(f->x->gpr[RCX], 0x2000 - 0x1235);
    assert_true(f->x->rflags & FLAG_ZF);
}

static void test_string_event(void **state)                        /* a long repetition looks at events: nothing is lost */
{
    struct fixture *f = *state;
    LOAD(f, prog_scan);
    f->x->gpr[RCX] = 0;
    f->v.intc.ops = &one_interrupt;
    f->x->rflags |= FLAG_IF;
    CODE_AT(f, CODE, 0xbf, 0, 0, 0x30, 0, 0xb9, 0, 0, 0x40, 0, 0xf3, 0xaa, 0xf4); /* 4 MiB of STOSB from 300000h; the end is #PF */
    pending = 0x1d;
    struct icpu *c = f->v.engine_data;
    (void)c;
    atomic_store(&f->v.events, 0);
    assert_int_equal(go(f), 0x1d);                                 /* taken at once: run() asks the APIC first */
    assert_int_equal(pushed(f, 0), CODE);
}

/* ---- single-step and breakpoints ---- */
PROGRAM(prog_tf, "pushf; orl $0x100, (%rsp); popf; nop; nop; hlt")
static void test_single_step(void **state)
{
    struct fixture *f = *state;
    LOAD(f, prog_tf);
    assert_int_equal(go(f), VEC_DB);
    assert_int_equal(f->x->dr6 & 0x4000, 0x4000);
    assert_int_equal(pushed(f, 0), CODE + 10);                     /* after the instruction that follows POPF */
}

PROGRAM(prog_tf_rep, "mov $0x300000, %edi; mov $5, %ecx; pushf; orl $0x100, (%rsp); popf; rep stosb; hlt")
static void test_single_step_rep(void **state)                     /* a trap after each iteration */
{
    struct fixture *f = *state;
    LOAD(f, prog_tf_rep);
    assert_int_equal(go(f), VEC_DB);
    assert_int_equal(f->x->gpr[RCX], 4);
    assert_int_equal(pushed(f, 0), CODE + 19);
}

static void test_watchpoint(void **state)
{
    struct fixture *f = *state;
    /* mov [300004h], eax; nop; mov [300008h], eax; nop; hlt */
    CODE_AT(f, CODE, 0x89, 0x04, 0x25, 4, 0, 0x30, 0, 0x90, 0x89, 0x04, 0x25, 8, 0, 0x30, 0, 0x90, 0xf4);
    f->x->dr[1] = 0x300008;
    f->x->dr7 = 0x400 | 1 << 2 | 0xdull << 20;                     /* L1; write; 4 bytes */
    assert_int_equal(go(f), VEC_DB);
    assert_int_equal(f->x->dr6 & 15, 2);
    assert_int_equal(pushed(f, 0), CODE + 15);                     /* a trap: after the store */
}

static void test_breakpoint(void **state)
{
    struct fixture *f = *state;
    CODE_AT(f, CODE, 0x90, 0x90, 0x90, 0xf4);
    f->x->dr[0] = CODE + 2;
    f->x->dr7 = 0x400 | 2;                                         /* G0; execution */
    assert_int_equal(go(f), VEC_DB);
    assert_int_equal(f->x->dr6 & 15, 1);
    assert_int_equal(pushed(f, 0), CODE + 2);                      /* a fault: before the instruction */
    again(f);
    f->x->rip = CODE + 2;
    f->x->rflags |= FLAG_RF;                                       /* RF lets it pass once */
    assert_int_equal(go(f), -1);
    assert_false(f->x->rflags & FLAG_RF);
}

/* ---- alignment check: CPL 3, CR0.AM, RFLAGS.AC ---- */
PROGRAM(prog_ac, "mov 0x300001, %al; mov 0x300002, %ax; mov 0x300001, %eax; hlt")
static void test_alignment(void **state)
{
    struct fixture *f = *state;
    LOAD(f, prog_ac);
    f->x->cr0 |= CR0_AM;
    f->x->rflags |= FLAG_AC;
    f->x->seg[SEG_CS] = segment(0x23, 0xafb);
    f->x->seg[SEG_SS] = segment(0x1b, 0xcf3);
    assert_int_equal(go(f), VEC_AC);
    assert_int_equal(pushed(f, 0), 0);
    assert_int_equal(pushed(f, 1), CODE + 15);
}

int main(void)
{
#define T(f) cmocka_unit_test_setup_teardown(f, setup, teardown)
    const struct CMUnitTest tests[] = {
        T(test_program), T(test_outside), T(test_interrupt_after_sti), T(test_halted), T(test_nmi), T(test_faults), T(test_fault_changes_nothing),
        T(test_page_crossing), T(test_page_crossing_fault), T(test_accessed_dirty), T(test_invlpg), T(test_invlpg_large), T(test_state_replaced),
        T(test_fetch_fault), T(test_crossing_instruction), T(test_nx), T(test_modify_next), T(test_modify_alias), T(test_data_beside_code),
        T(test_cache_overflow), T(test_mmio), T(test_movs_overlap), T(test_movs_backwards), T(test_movs_fault), T(test_scas), T(test_string_event),
        T(test_single_step), T(test_single_step_rep), T(test_watchpoint), T(test_breakpoint), T(test_alignment),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
