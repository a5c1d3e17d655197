/* msr.c and pvclock.c. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

#include "base/loop.h"
#include "cpu/cpuid.h"
#include "cpu/msr.h"

struct rig {
    struct loop *loop;
    struct machine m;
    struct ram ram;
    struct vcpu v;
    s64 adjust;            /* as the local APIC was told */
    u32 apic_msr;
};

static int apic_read(void *chip, u32 msr, u64 *val)
{
    ((struct rig *)chip)->apic_msr = msr;
    *val = 0xfee00900;
    return 0;
}

static int apic_write(void *chip, u32 msr, u64 val)
{
    ((struct rig *)chip)->apic_msr = msr;
    return val == 0xbad ? -1 : 0;
}

static void apic_adjust(void *chip, s64 adjust)
{
    ((struct rig *)chip)->adjust = adjust;
}

static const struct intc_ops apic = {.msr_read = apic_read, .msr_write = apic_write, .tsc_adjust = apic_adjust};

static int setup(void **state)
{
    struct rig *r = aligned_alloc(64, ALIGN_UP(sizeof(*r), 64));
    memset(r, 0, sizeof(*r));
    assert_int_equal(loop_new(&r->loop), 0);
    assert_int_equal(clock_new(r->loop, &r->m.clock), 0);
    assert_int_equal(ram_init(&r->ram), 0);
    assert_int_equal(ram_add(&r->ram, 0, MiB), 0);
    assert_int_equal(cpuid_policy_new(1, clock_tsc_khz(r->m.clock), &r->m.cpuid), 0);
    r->m.ram = &r->ram;
    r->m.vcpus = 1;
    r->v.m = &r->m;
    r->v.intc = (struct intc){&apic, r};
    x86_reset(&r->v.x, true);
    *state = r;
    return 0;
}

static int teardown(void **state)
{
    struct rig *r = *state;
    cpuid_policy_free(r->m.cpuid);
    ram_close(&r->ram);
    clock_free(r->m.clock);
    loop_free(r->loop);
    free(r);
    return 0;
}

static u64 get(struct rig *r, u32 msr)
{
    u64 val = 0;
    assert_int_equal(msr_read(&r->v, &r->v.x, msr, &val), 0);
    return val;
}

static int set(struct rig *r, u32 msr, u64 val)
{
    return msr_write(&r->v, &r->v.x, msr, val);
}

static void unknown(void **state)
{
    u64 val;
    struct rig *r = *state;
    assert_int_equal(msr_read(&r->v, &r->v.x, 0x12345678, &val), -1);
    assert_int_equal(set(r, 0x12345678, 0), -1);
    assert_int_equal(msr_read(&r->v, &r->v.x, 0xc0010141, &val), -1);
    assert_int_equal(set(r, 0x17b, 0), -1);        /* MCG_CTL: MCG_CAP does not show it */
    assert_int_equal(set(r, 0xfe, 0), -1);         /* MTRRcap */
}

static void vendor_registers(void **state)
{
    struct rig *r = *state;
    u64 val;
    bool amd = cpuid_is_amd(r->m.cpuid);
    assert_int_equal(msr_read(&r->v, &r->v.x, 0xc0011029, &val), amd ? 0 : -1);    /* DE_CFG */
    if (amd)
        assert_true(val & 2);
    assert_int_equal(msr_read(&r->v, &r->v.x, 0x10a, &val), amd ? -1 : 0);         /* ARCH_CAPABILITIES */
    assert_int_equal(msr_read(&r->v, &r->v.x, 0x1a0, &val), amd ? -1 : 0);
}

static void efer_rules(void **state)
{
    struct rig *r = *state;
    u64 reserved = ~cpuid_efer_mask(r->m.cpuid);
    assert_int_equal(set(r, 0xc0000080, EFER_SCE | EFER_LME | EFER_NXE), 0);
    assert_int_equal(get(r, 0xc0000080), EFER_SCE | EFER_LME | EFER_NXE);
    assert_int_equal(set(r, 0xc0000080, EFER_LME | (reserved & -reserved)), -1);
    assert_int_equal(set(r, 0xc0000080, EFER_LME | EFER_LMA), 0);                  /* LMA is not written */
    assert_int_equal(get(r, 0xc0000080), EFER_LME);
    r->v.x.cr0 |= CR0_PG | CR0_PE;
    r->v.x.efer |= EFER_LMA;
    assert_int_equal(set(r, 0xc0000080, EFER_SCE), -1);                            /* LME while paging is on */
    assert_int_equal(set(r, 0xc0000080, EFER_LME | EFER_SCE), 0);
    assert_int_equal(get(r, 0xc0000080), EFER_LME | EFER_LMA | EFER_SCE);
}

static void canonical_addresses(void **state)
{
    struct rig *r = *state;
    static const u32 msr[] = {0xc0000082, 0xc0000083, 0xc0000100, 0xc0000101, 0xc0000102, 0x175, 0x176};
    for (unsigned i = 0; i < ARRAY_SIZE(msr); i++) {
        assert_int_equal(set(r, msr[i], 0x0000800000000000), -1);
        assert_int_equal(set(r, msr[i], 0xffff800000000000), 0);
        assert_true(get(r, msr[i]) == 0xffff800000000000);
    }
    assert_true(r->v.x.seg[SEG_FS].base == 0xffff800000000000);
}

static void memory_types(void **state)
{
    struct rig *r = *state;
    u64 high = BIT(cpuid_phys_bits(r->m.cpuid));
    assert_int_equal(get(r, 0xfe), 0x508);
    assert_int_equal(set(r, 0x277, 0x0007040600070405), 0);
    assert_int_equal(set(r, 0x277, 0x0007040600070402), -1);       /* type 2 */
    assert_int_equal(set(r, 0x2ff, 0xc06), 0);
    assert_int_equal(set(r, 0x2ff, 0xc07), -1);                    /* UC- is PAT's only */
    assert_int_equal(set(r, 0x2ff, 0x1c06), -1);
    assert_int_equal(set(r, 0x20e, 0x80000006), 0);
    assert_int_equal(get(r, 0x20e), 0x80000006);
    assert_int_equal(set(r, 0x20e, 0x80000106), -1);
    assert_int_equal(set(r, 0x20f, (high - 1) & ~0x7ffull), 0);
    assert_int_equal(set(r, 0x20f, high | 0x800), -1);
    assert_int_equal(set(r, 0x210, 0), -1);                        /* a ninth range */
    assert_int_equal(set(r, 0x26f, 0x0606060606060606), 0);
    assert_int_equal(set(r, 0x26f, 0x0606060606060603), -1);
    assert_true(r->v.x.mtrr_fixed[10] == 0x0606060606060606);
}

static void tsc(void **state)
{
    struct rig *r = *state;
    assert_int_equal(set(r, 0x10, 1ull << 50), 0);
    u64 now = get(r, 0x10);
    assert_true(now >= 1ull << 50 && now < (1ull << 50) + (1ull << 40));
    assert_true((s64)get(r, 0x3b) == r->v.x.tsc_adjust);
    assert_true(r->adjust == r->v.x.tsc_adjust);
    assert_int_equal(set(r, 0x3b, 0), 0);
    assert_true(r->adjust == 0 && get(r, 0x10) < 1ull << 50);
    assert_int_equal(set(r, 0xc0000103, 0x100000000), -1);
    assert_int_equal(set(r, 0xc0000103, 5), 0);
}

static void apic_registers(void **state)
{
    struct rig *r = *state;
    static const u32 msr[] = {0x1b, 0x6e0, 0x800, 0x80b, 0x8ff};
    for (unsigned i = 0; i < ARRAY_SIZE(msr); i++) {
        assert_int_equal(get(r, msr[i]), 0xfee00900);
        assert_int_equal(r->apic_msr, msr[i]);
    }
    assert_int_equal(set(r, 0x1b, 0xbad), -1);
}

struct time_info {
    u32 version, pad0;
    u64 tsc_timestamp, system_time;
    u32 mul;
    s8 shift;
    u8 flags, pad[2];
};

static u64 clock_of(const struct time_info *t, u64 tsc)
{
    u64 delta = tsc - t->tsc_timestamp;
    delta = t->shift < 0 ? delta >> -t->shift : delta << t->shift;
    return t->system_time + (u64)((u128)delta * t->mul >> 32);
}

static void paravirtual_clock(void **state)
{
    struct rig *r = *state;
    struct time_info t;
    assert_int_equal(set(r, 0x3b, (u64)-12345), 0);
    assert_int_equal(set(r, 0x4b564d01, 0x2001), 0);
    assert_int_equal(ram_read(&r->ram, 0x2000, &t, sizeof(t)), 0);
    assert_true(t.version && !(t.version & 1));
    assert_int_equal(t.flags, 1);
    u64 before = clock_ns(r->m.clock), got = clock_of(&t, get(r, 0x10)), after = clock_ns(r->m.clock);
    assert_true(got + 2000000 > before && got < after + 2000000);
    /* One second of TSC is one second, to a few parts in a million. */
    u64 second = clock_of(&t, t.tsc_timestamp + clock_tsc_khz(r->m.clock) * 1000);
    assert_true(second > 999999990 && second < 1000000010);
    u32 version = t.version;
    pvclock_update(&r->v, &r->v.x);
    assert_int_equal(ram_read(&r->ram, 0x2000, &t, sizeof(t)), 0);
    assert_true(t.version == version + 2);
    assert_int_equal(set(r, 0x4b564d01, 0xffffffff00000001), 0);   /* outside RAM: no harm */
    assert_int_equal(set(r, 0x12, 0), 0);
}

static void wall_clock(void **state)
{
    struct rig *r = *state;
    struct {
        u32 version, sec, nsec;
    } w;
    assert_int_equal(set(r, 0x4b564d00, 0x3000), 0);
    assert_int_equal(ram_read(&r->ram, 0x3000, &w, sizeof(w)), 0);
    u64 wall = (u64)w.sec * 1000000000 + w.nsec + clock_ns(r->m.clock), now = clock_wall_ns();
    assert_true(w.version && !(w.version & 1));
    assert_true(wall < now + 1000000000 && now < wall + 1000000000);
}

int main(void)
{
#define T(f) cmocka_unit_test_setup_teardown(f, setup, teardown)
    const struct CMUnitTest tests[] = {
        T(unknown), T(vendor_registers), T(efer_rules),     T(canonical_addresses), T(memory_types),
        T(tsc),     T(apic_registers),   T(paravirtual_clock), T(wall_clock),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
