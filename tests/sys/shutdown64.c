/*
 * Double faults and shutdown: SDM vol. 3A 6.15 (interrupt 8, table 6-5), and #DF's own rules.
 */
#include "sys.h"

/* The handler of the first vector is taken away by making its gate absent: that gives #NP, a contributory exception,
 * while the first is delivered. */
static void absent(unsigned v) { idt_set(v, KCS, trap_entry + v * 16, TYPE_INT, 0); }

static void ss_div(void) { asm volatile(TRY("xorl %%ecx, %%ecx; divl %%ecx")::: "rax", "rcx", "rdx", "cc"); }
static void ss_gp(void) { asm volatile(TRY("movl $0x1ff8, %%eax; mov %%eax, %%ds")::: "rax"); }
static void ss_pf(void) { asm volatile(TRY("movb (%0), %%al")::"r"(VA_TEST) : "rax"); }
static void ss_ud(void) { asm volatile(TRY("ud2")::: "memory"); }
static void ss_np(void)
{
    gdt[T0 / 8] = descriptor(0, 0xfffff, D_DATA | D_W | D_DB | D_G);
    asm volatile(TRY("mov %0, %%ds")::"r"(T0));
}
static void ss_ss(void)
{
    gdt[T0 / 8] = descriptor(0, 0xfffff, D_DATA | D_W | D_DB | D_G);
    asm volatile(TRY("mov %0, %%ss")::"r"(T0));
}

static void doubles(void)
{
    static const struct {
        unsigned first;
        void (*raise)(void);
        const char *name;
    } c[] = {{DE, ss_div, "#DE"}, {GP, ss_gp, "#GP"}, {NP, ss_np, "#NP"}, {SS, ss_ss, "#SS"}, {PF, ss_pf, "#PF"}};

    for (unsigned i = 0; i < ARRAY_SIZE(c); i++) {
        test("double: %s, and #NP while it is delivered: #DF with error code 0", c[i].name);
        absent(c[i].first);
        c[i].raise();
        idt_default(c[i].first);
        eq_trap(DF, 0);
    }
    test("double: #UD (benign), and #NP while it is delivered: #NP");
    absent(UD);
    ss_ud();
    idt_default(UD);
    eq_trap(NP, UD * 8 + 3);

    /* a page fault while delivering: the gate's stack (IST) is on an absent page */
    tss.ist[0] = VA_TEST + 0x1000;
    idt_set(GP, KCS, trap_entry + GP * 16, D_P | TYPE_INT, 1);
    test("double: #GP, and #PF while it is delivered: #PF");
    ss_gp();
    idt_default(GP);
    eq_trap(PF, PF_W);
    test("double: #PF, and #PF while it is delivered: #DF; CR2 is the second one's");
    idt_set(PF, KCS, trap_entry + PF * 16, D_P | TYPE_INT, 1);
    ss_pf();
    idt_default(PF);
    eq_trap(DF, 0);
    must("CR2 in the stack's page", trap.cr2 != VA_TEST && trap.cr2 >> 12 == VA_TEST >> 12);
    test("double: #UD, and #PF while it is delivered: #PF");
    idt_set(UD, KCS, trap_entry + UD * 16, D_P | TYPE_INT, 1);
    ss_ud();
    idt_default(UD);
    eq_trap(PF, PF_W);
    test("double: INT n (not an exception), and #PF while it is delivered: #PF");
    idt_set(0x44, KCS, trap_entry + 0x44 * 16, D_P | TYPE_INT, 1);
    asm volatile(TRY("int $0x44")::: "memory");
    idt_default(0x44);
    eq_trap(PF, PF_W);
    test("double: RSP0 on an absent page: a #GP at CPL 3 becomes #PF, a #PF becomes #DF on its IST");
    static u8 ist_stack[1024] __attribute__((aligned(16)));
    ulong keep = tss.rsp[0];
    tss.ist[1] = (ulong)ist_stack + sizeof(ist_stack);
    idt_set(PF, KCS, trap_entry + PF * 16, D_P | TYPE_INT, 2);
    idt_set(DF, KCS, trap_entry + DF * 16, D_P | TYPE_INT, 2);
    tss.rsp[0] = VA_TEST + 0x1000;
    asm volatile(USER("cli")::: "memory");
    eq_trap(PF, PF_W);
    eq("CS", trap.cs, UCS64);
    idt_set(PF, KCS, trap_entry + PF * 16, D_P | TYPE_INT, 0);
    asm volatile(USER("movb (%0), %%al")::"r"(VA_TEST) : "rax");
    eq_trap(DF, 0);
    tss.rsp[0] = keep;
    idt_default(PF), idt_default(DF);
}

int main(void)
{
    static struct table_reg none;

    doubles();
    switch (run_case()) {
    case 0:
        expect_shutdown("shutdown: an exception with an IDT of limit 0");
        lidt(&none);
        asm volatile("ud2");
        break;
    case 1:
        expect_shutdown("shutdown: a contributory exception during #DF");
        absent(GP);
        absent(DF);
        ss_gp();
        break;
    case 2:
        expect_shutdown("shutdown: a page fault during #DF");
        tss.ist[0] = VA_TEST + 0x1000;
        idt_set(PF, KCS, trap_entry, D_P | TYPE_INT, 1);
        idt_set(DF, KCS, trap_entry, D_P | TYPE_INT, 1);
        ss_pf();
        break;
    case 3:
        expect_shutdown("shutdown: the GDT is not mapped");
        map(VA_TEST, 0, 0);
        none.base = VA_TEST, none.limit = 0xfff;
        lgdt(&none);
        asm volatile("ud2");
        break;
    case 4:
        expect_shutdown("shutdown: an interrupt's stack is not canonical and #SS, #DF have no other");
        tss.rsp[0] = 0x0000800000000000;
        asm volatile(USER("ud2")::: "memory");
        break;
    case 5:
        expect_shutdown("shutdown: page tables that map nothing");
        asm volatile("mov %0, %%cr3" ::"r"(page_new()));
        break;
    case 6:
        expect_shutdown("shutdown: IST beyond the TSS's limit for all");
        tss_limit(20);
        for (unsigned i = 0; i < 32; i++)
            idt_set(i, KCS, trap_entry + 16 * i, D_P | TYPE_INT, 1);
        ss_ud();
        break;
    default: done();
    }
    test("shutdown");
    must("reached", false);
    done();
}
