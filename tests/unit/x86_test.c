/* x86.c: power-on, INIT and SIPI against SDM vol. 3A table 10-1; save and load; what a loaded state may not be. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

#include "cpu/cpuid.h"
#include "cpu/x86.h"

static struct x86 x;

static u32 xsave32(unsigned off)
{
    u32 v;
    memcpy(&v, x.xsave + off, 4);
    return v;
}

static void power_on(void **state)
{
    (void)state;
    memset(&x, 0xa5, sizeof(x));
    x86_reset(&x, true);
    assert_int_equal(x.cr0, 0x60000010);
    assert_int_equal(x.rflags, 2);
    assert_int_equal(x.rip, 0xfff0);
    assert_int_equal(x.seg[SEG_CS].sel, 0xf000);
    assert_int_equal(x.seg[SEG_CS].base, 0xffff0000);
    assert_int_equal(x.seg[SEG_CS].limit, 0xffff);
    assert_int_equal(x.seg[SEG_CS].attr, 0x9b);
    assert_int_equal(x.seg[SEG_SS].attr, 0x93);
    assert_int_equal(x.seg[SEG_GS].base, 0);
    assert_int_equal(x.idtr.limit, 0xffff);
    assert_int_equal(x.dr6, 0xffff0ff0);
    assert_int_equal(x.dr7, 0x400);
    assert_int_equal(x.efer, 0);
    assert_int_equal(x.xcr0, 1);
    assert_true(x.pat == 0x0007040600070406ull);
    assert_int_equal(x.gpr[RDX], cpuid_host(1, 0)->eax);
    assert_int_equal(x.gpr[RAX], 0);
    assert_int_equal(xsave32(24), 0x1f80);
    assert_int_equal(x.activity, X86_RUNNING);
    assert_int_equal(x86_cpl(&x), 0);
    x86_reset(&x, false);
    assert_int_equal(x.activity, X86_WAIT_SIPI);
}

static void init_keeps(void **state)
{
    (void)state;
    x86_reset(&x, true);
    x.cr0 = CR0_PE | CR0_PG | CR0_ET;      /* caches on */
    x.cr3 = 0x1000;
    x.cr4 = CR4_PAE;
    x.efer = EFER_LME | EFER_LMA;
    x.gpr[RBX] = 7;
    x.tsc_adjust = -5;
    x.lstar = 0x1234;
    x.pat = 0x0606060606060606;
    x.xcr0 = 3;
    x.xsave[40] = 9;
    x.mtrr_def_type = 0xc06;
    x86_init(&x);
    assert_int_equal(x.cr0, CR0_ET);
    assert_int_equal(x.cr3, 0);
    assert_int_equal(x.cr4, 0);
    assert_int_equal(x.efer, 0);
    assert_int_equal(x.gpr[RBX], 0);
    assert_int_equal(x.rip, 0xfff0);
    assert_true(x.tsc_adjust == -5);
    assert_int_equal(x.lstar, 0x1234);
    assert_true(x.pat == 0x0606060606060606);
    assert_int_equal(x.xcr0, 3);
    assert_int_equal(x.xsave[40], 9);
    assert_int_equal(x.mtrr_def_type, 0xc06);
    assert_int_equal(x.activity, X86_WAIT_SIPI);
}

static void sipi(void **state)
{
    (void)state;
    x86_reset(&x, false);
    x86_sipi(&x, 0x9a);
    assert_int_equal(x.seg[SEG_CS].sel, 0x9a00);
    assert_int_equal(x.seg[SEG_CS].base, 0x9a000);
    assert_int_equal(x.seg[SEG_CS].limit, 0xffff);
    assert_int_equal(x.rip, 0);
    assert_int_equal(x.activity, X86_RUNNING);
}

static void fill(struct x86 *s)
{
    x86_reset(s, true);
    for (unsigned i = 0; i < 16; i++)
        s->gpr[i] = 0x1111111111111111ull * i;
    s->cr0 = CR0_PE | CR0_PG | CR0_ET;
    s->cr4 = CR4_PAE;
    s->efer = EFER_LME | EFER_LMA | EFER_SCE;
    s->rip = 0xffffffff81000000ull;
    s->seg[SEG_CS].attr = 0xa9b;
    s->tsc_adjust = -77;
    s->xcr0 = 7;
    s->mtrr_mask[7] = 0xfff000800;
    s->kvm_system_time = 0x1001;
    s->activity = X86_HALTED;
    s->shadow = s->nmi_blocked = true;
    s->xsave[1000] = 0x5a;
}

static int reload(struct x86 *from, struct x86 *to)
{
    struct stream out, in;
    stream_save_init(&out);
    x86_state(from, &out);
    assert_int_equal(out.error, 0);
    stream_load_init(&in, out.buf, out.len);
    x86_state(to, &in);
    int e = in.error;
    if (!e)
        assert_int_equal(in.pos, in.len);
    stream_free(&out);
    return e;
}

static void round_trip(void **state)
{
    (void)state;
    static struct x86 y;
    memset(&x, 0, sizeof(x));              /* also the padding, so that memcmp is fair */
    memset(&y, 0, sizeof(y));
    fill(&x);
    assert_int_equal(reload(&x, &y), 0);
    assert_memory_equal(y.gpr, x.gpr, sizeof(x.gpr));
    assert_memory_equal(y.xsave, x.xsave, sizeof(x.xsave));
    assert_memory_equal(y.seg, x.seg, sizeof(x.seg));
    assert_true(y.rip == x.rip && y.efer == x.efer && y.tsc_adjust == -77 && y.mtrr_mask[7] == x.mtrr_mask[7]);
    assert_true(y.activity == X86_HALTED && y.shadow && y.nmi_blocked && !y.nmi_pending && y.kvm_system_time == 0x1001);
}

#define REJECTS(change)                                                                               \
    do {                                                                                              \
        static struct x86 bad, got;                                                                   \
        fill(&bad);                                                                                   \
        change;                                                                                       \
        assert_int_not_equal(reload(&bad, &got), 0);                                                  \
    } while (0)

static void untrusted(void **state)
{
    (void)state;
    REJECTS(bad.cr0 &= ~(u64)CR0_PE);
    REJECTS(bad.efer &= ~(u64)EFER_LMA);
    REJECTS(bad.efer |= BIT(40));
    REJECTS(bad.cr4 = 0);
    REJECTS(bad.rip = 0x1000000000000000);
    REJECTS(bad.rflags |= FLAG_VM);
    REJECTS(bad.seg[SEG_FS].base = 0x8000000000000000ull);
    REJECTS(bad.seg[SEG_DS].attr = 0xf093);
    REJECTS(bad.xsave[26] = 1);            /* MXCSR bit 16 */
    REJECTS(bad.xsave[519] = 0x80);        /* XSTATE_BV bit 63 */
    REJECTS(bad.xsave[527] = 0x80);        /* compacted */
    REJECTS(bad.xcr0 = 5);
    REJECTS(bad.pat = 0x02);
    REJECTS(bad.activity = 9);
}

static void truncated(void **state)
{
    (void)state;
    static struct x86 y;
    struct stream out, in;
    fill(&x);
    stream_save_init(&out);
    x86_state(&x, &out);
    for (size_t len = 0; len < out.len; len += 97) {
        stream_load_init(&in, out.buf, len);
        x86_state(&y, &in);
        assert_int_not_equal(in.error, 0);
    }
    stream_free(&out);
}

static void prints(void **state)
{
    (void)state;
    char *text = NULL;
    size_t len;
    FILE *f = open_memstream(&text, &len);
    fill(&x);
    x86_print(&x, f);
    fclose(f);
    assert_non_null(strstr(text, "rip ffffffff81000000"));
    assert_non_null(strstr(text, "cr3 "));
    assert_non_null(strstr(text, "halted"));
    free(text);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(power_on),   cmocka_unit_test(init_keeps), cmocka_unit_test(sipi),   cmocka_unit_test(round_trip),
        cmocka_unit_test(untrusted),  cmocka_unit_test(truncated),  cmocka_unit_test(prints),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
