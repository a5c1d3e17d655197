/*
 * A loop with two bases (cpu/bt/loop.c) reaches memory by its deltas, whatever branches stand in it: where one is lost, the fault's handler makes the access mostly,
 * so that the outcome is right and only the number of such faults tells. What it must not tell in any case: memory of the monitor's, read in place of the guest's.
 */
#include <string.h>

#include "cpu/bt/bt.h"
#include "cpu/trap.h"
#include "insn.h"

#define ROUNDS 400u

/* Copies ROUNDS words from PAGE_DATA0 to PAGE_DATA1; a branch backwards in its midst is never taken. */
static const u8 text[] = {
    /* 00 */ 0xb9, ROUNDS & 0xff, ROUNDS >> 8, 0, 0,               /* mov ecx, ROUNDS */
    /* 05 */ 0x48, 0x8d, 0x35, 0xf4, 0x2f, 0, 0,                   /* lea rsi, [rip + 2ff4h]: PAGE_DATA0 */
    /* 0c */ 0x48, 0x8d, 0x3d, 0xed, 0x3f, 0, 0,                   /* lea rdi, [rip + 3fedh]: PAGE_DATA1 */
    /* 13 */ 0x48, 0x8b, 0x06,                                     /* again: mov rax, [rsi] */
    /* 16 */ 0x48, 0x83, 0xc6, 0x08,                               /* add rsi, 8 */
    /* 1a */ 0x48, 0x85, 0xd2,                                     /* test rdx, rdx */
    /* 1d */ 0x75, 0xed,                                           /* jnz 0ch */
    /* 1f */ 0x48, 0x89, 0x07,                                     /* mov [rdi], rax */
    /* 22 */ 0x48, 0x83, 0xc7, 0x08,                               /* add rdi, 8 */
    /* 26 */ 0xff, 0xc9,                                           /* dec ecx */
    /* 28 */ 0x75, 0xe9,                                           /* jnz again */
    /* 2a */ 0x31, 0xc9,                                           /* xor ecx, ecx */
    /* 2c */ 0xf7, 0xf1,                                           /* div ecx */
};

int main(void)
{
    static u8 pattern[PAGES * PAGE_SIZE];
    static struct outcome out;
    struct guest_config config = {.engine = &bt_engine, .tools = {.mmu = MACHINE_MMU_SHADOW, .translate_at_once = true}};
    struct icase i = {.in.rip = CODE_VA, .in.rflags = FLAG_1, .in.v.mxcsr = 0x1f80, .in.v.fcw = 0x37f, .text = text, .text_len = sizeof text};
    unsigned wrong = 0;
    u64 faults = 0;
    struct guest *g;
    gen_pattern(1, pattern);
    i.in.gpr[RSP] = PAGE_VA(PAGE_STACK1);
    if (guest_open(&config, &g)) {
        printf("Bail out! %s\n", err_last());
        return 1;
    }
    for (unsigned n = 0; n < 4; n++) {
        u64 before = guest_vcpu(g)->count[COUNT_EXIT_ACCESS];
        bool ended = guest_run(g, &i, pattern, &out) == 0;
        faults = guest_vcpu(g)->count[COUNT_EXIT_ACCESS] - before; /* of the last round: all is translated and mapped then */
        wrong += !ended || out.vector != VEC_DE || memcmp(out.mem[PAGE_DATA1], out.mem[PAGE_DATA0], 8 * ROUNDS) != 0;
    }
    guest_close(g);
    printf("1..2\n%sok 1 - a loop with two bases and a branch backwards in its midst copies\n", wrong ? "not " : "");
    printf("%sok 2 - and no access leaves its window\n", faults > 4 ? "not " : "");
    if (faults > 4)
        printf("# %llu faults in %u rounds\n", (unsigned long long)faults, ROUNDS);
    return wrong || faults > 4;
}
