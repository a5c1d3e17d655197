/* cpuid.c: what must hold between the leaves, whatever the host is. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

#include <errno.h>

#include "cpu/cpuid.h"

static struct x86 x;

static struct cpuid_regs get(const struct cpuid_policy *p, unsigned vcpu, u32 leaf, u32 sub)
{
    struct cpuid_regs r;
    cpuid_get(p, vcpu, &x, true, leaf, sub, &r);
    return r;
}

static struct cpuid_policy *make(unsigned vcpus, u64 khz)
{
    struct cpuid_policy *p;
    assert_int_equal(cpuid_policy_new(vcpus, khz, &p), 0);
    return p;
}

static int setup(void **state)
{
    x86_reset(&x, true);
    *state = make(4, 2596122);
    return 0;
}

static int teardown(void **state)
{
    cpuid_policy_free(*state);
    return 0;
}

static void vendor_is_the_hosts(void **state)
{
    struct cpuid_regs r = get(*state, 0, 0, 0);
    assert_int_equal(r.ebx, cpuid_host(0, 0)->ebx);
    assert_true(r.eax >= 0xd && r.eax <= 0x16);
    assert_int_equal(get(*state, 0, 0x80000000, 0).ebx, cpuid_host(0x80000000, 0)->ebx);
    assert_int_equal(get(*state, 0, 1, 0).eax, cpuid_host(1, 0)->eax);
}

/* Nothing that doppel does not carry. */
static void hidden(void **state)
{
    assert_false(get(*state, 0, 1, 0).ecx & (1u << 3 | 1u << 5));          /* MONITOR VMX */
    assert_false(get(*state, 0, 0x80000001, 0).ecx & 1u << 2);             /* SVM */
    assert_false(get(*state, 0, 7, 0).ecx & (1u << 5 | 1u << 7 | 1u << 16));   /* WAITPKG CET_SS LA57 */
    assert_false(get(*state, 0, 7, 0).ebx & (1u << 4 | 1u << 11 | 1u << 25));  /* HLE RTM PT */
    assert_false(get(*state, 0, 7, 0).edx & (1u << 5 | 1u << 20 | 1u << 22 | 1u << 24 | 1u << 25));    /* UINTR CET_IBT AMX */
    struct cpuid_regs r = get(*state, 0, 0xa, 0);
    assert_int_equal(r.eax | r.ebx | r.ecx | r.edx, 0);
    assert_int_equal(get(*state, 0, 0x8000000a, 0).edx, 0);
    assert_int_equal(get(*state, 0, 0x8000001f, 0).eax, 0);
    assert_int_equal(get(*state, 0, 0x80000008, 0).eax >> 8 & 0xff, 48);
}

/* Only what the host has, but for what doppel emulates itself. */
static void subset_of_host(void **state)
{
    u32 own_ecx = 1u << 21 | 1u << 24 | 1u << 31;
    assert_false(get(*state, 0, 1, 0).ecx & ~(cpuid_host(1, 0)->ecx | own_ecx));
    assert_false(get(*state, 0, 7, 0).ebx & ~(cpuid_host(7, 0)->ebx | 2));
    assert_false(get(*state, 0, 7, 0).ecx & ~(cpuid_host(7, 0)->ecx | 4));
    assert_false(cpuid_xcr0_mask(*state) & ~(u64)cpuid_host(0xd, 0)->eax);
}

static void dynamic_bits(void **state)
{
    assert_false(get(*state, 0, 1, 0).ecx & 1u << 27);
    x.cr4 = CR4_OSXSAVE | CR4_PKE;
    assert_true(get(*state, 0, 1, 0).ecx & 1u << 27);
    assert_true(get(*state, 0, 7, 0).ecx & 1u << 4);
    x.cr4 = 0;
    struct cpuid_regs r;
    cpuid_get(*state, 0, &x, false, 1, 0, &r);
    assert_false(r.edx & 1u << 9);
    assert_true(get(*state, 0, 1, 0).edx & 1u << 9);
}

/* SDM vol. 1 13.2: sizes follow XCR0; every component lies inside the size of all. */
static void xsave_sizes(void **state)
{
    u64 mask = cpuid_xcr0_mask(*state);
    if (!cpuid_has(*state, CPU_XSAVE)) {
        print_message("# skip: this processor has no XSAVE\n");
        skip();
    }
    x.xcr0 = 1;
    assert_int_equal(get(*state, 0, 0xd, 0).ebx, 576);
    x.xcr0 = mask;
    struct cpuid_regs r = get(*state, 0, 0xd, 0);
    assert_int_equal(r.eax, (u32)mask);
    assert_int_equal(r.ebx, r.ecx);
    assert_true(r.ecx <= X86_XSAVE_MAX);
    for (unsigned i = 2; i < 32; i++) {
        struct cpuid_regs c = get(*state, 0, 0xd, i);
        if (mask & BIT(i))
            assert_true(c.eax && c.ebx >= 576 && c.ebx + c.eax <= r.ecx);
        else
            assert_int_equal(c.eax, 0);
    }
}

/* N single-threaded cores, told in the same way by every leaf. */
static void topology(void **state)
{
    for (unsigned n = 1; n <= 64; n = n * 2 + 1) {
        struct cpuid_policy *p = make(n, 2000000);
        bool amd = cpuid_is_amd(p);
        unsigned last = n - 1, bits = 0;
        while (1u << bits < n)
            bits++;
        assert_int_equal(get(p, last, 1, 0).ebx >> 24, last);
        assert_int_equal(get(p, last, 1, 0).edx >> 28 & 1, n > 1);
        assert_true((get(p, 0, 1, 0).ebx >> 16 & 0xff) >= n);
        assert_int_equal(get(p, last, 0xb, 0).edx, last);
        assert_int_equal(get(p, last, 0xb, 0).eax, 0);
        assert_int_equal(get(p, last, 0xb, 0).ebx, 1);
        assert_int_equal(get(p, last, 0xb, 1).eax, bits);
        assert_int_equal(get(p, last, 0xb, 1).ebx, n);
        assert_int_equal(get(p, last, 0xb, 2).ebx, 0);
        if (amd) {
            assert_int_equal(get(p, last, 0x80000008, 0).ecx & 0xff, last);
            assert_int_equal(get(p, last, 0x80000008, 0).ecx >> 12 & 15, bits);
            assert_int_equal(get(p, last, 0x8000001e, 0).ebx >> 8, 0);
        } else {
            assert_true((get(p, 0, 4, 0).eax >> 26) + 1 >= n);
        }
        cpuid_policy_free(p);
    }
    (void)state;
}

static void kvm_leaves(void **state)
{
    char name[13] = "";
    struct cpuid_regs r = get(*state, 0, 0x40000000, 0);
    memcpy(name, &r.ebx, 4);
    memcpy(name + 4, &r.ecx, 4);
    memcpy(name + 8, &r.edx, 4);
    assert_string_equal(name, "KVMKVMKVM");
    assert_int_equal(r.eax, 0x40000010);
    assert_int_equal(get(*state, 0, 0x40000001, 0).eax,
                     1u << 1 | 1u << 3 | 1u << 5 | 1u << 6 | 1u << 7 | 1u << 9 | 1u << 11 | 1u << 24);
    assert_int_equal(get(*state, 0, 0x40000010, 0).eax, 2596122);
    assert_int_equal(get(*state, 0, 0x40000010, 0).ebx, 1000000);
    assert_true(get(*state, 0, 1, 0).ecx >> 31);
}

/* Leaf 0x15 as guests compute with it: in 32 bits, exact to a millionth. */
static void tsc_frequency(void **state)
{
    (void)state;
    static const u64 khz[] = {800000, 999999, 1000000, 2000000, 2596122, 2899998, 3693061, 4200000};
    for (unsigned i = 0; i < ARRAY_SIZE(khz); i++) {
        struct cpuid_policy *p = make(1, khz[i]);
        struct cpuid_regs r = get(p, 0, 0x15, 0);
        assert_true(r.eax && r.ebx);
        assert_true((u64)(r.ecx / 1000) * r.ebx <= 0xffffffff);
        u64 got = (u64)(r.ecx / 1000) * r.ebx / r.eax, diff = got > khz[i] ? got - khz[i] : khz[i] - got;
        assert_true(diff * 1000000 <= 2 * khz[i]);
        cpuid_policy_free(p);
    }
}

static void clearing_takes_dependents(void **state)
{
    cpuid_clear(*state, CPU_XSAVE);
    assert_false(cpuid_has(*state, CPU_AVX));
    assert_false(cpuid_has(*state, CPU_AVX2));
    assert_false(cpuid_has(*state, CPU_AVX512F));
    assert_false(cpuid_has(*state, CPU_XSAVEOPT));
    assert_false(get(*state, 0, 1, 0).ecx & (1u << 12 | 1u << 29));
    assert_int_equal(cpuid_xcr0_mask(*state), 3);
    assert_false(cpuid_cr4_mask(*state) & CR4_OSXSAVE);
    assert_int_equal(get(*state, 0, 0xd, 0).eax, 0);
    cpuid_clear(*state, CPU_PCID);
    assert_false(cpuid_has(*state, CPU_INVPCID));
    assert_false(cpuid_cr4_mask(*state) & CR4_PCIDE);
}

/* An engine on the bare processor: what it lacks goes; what it says about speculation counts. */
static void keeping_follows_the_engine(void **state)
{
    struct cpuid_regs all = {~0u, ~0u, ~0u, ~0u}, none = {0}, spec = {.ebx = 1u << 12 | 1u << 14};
    u32 before = get(*state, 0, 1, 0).ecx;

    cpuid_keep(*state, 1, 0, &all);
    assert_int_equal(get(*state, 0, 1, 0).ecx, before);
    cpuid_keep(*state, 0x80000008, 0, &spec);
    assert_true(cpuid_has(*state, CPU_AMD_IBPB) && cpuid_has(*state, CPU_AMD_IBRS));
    assert_false(cpuid_has(*state, CPU_AMD_STIBP));
    cpuid_keep(*state, 0x40000001, 0, &none);
    assert_int_equal(get(*state, 0, 0x40000001, 0).eax, 0);
    cpuid_keep(*state, 1, 0, &none);
    assert_false(cpuid_has(*state, CPU_XSAVE) || cpuid_has(*state, CPU_AVX) || cpuid_has(*state, CPU_PAE));
    assert_true(get(*state, 0, 1, 0).ecx & 1u << 31);              /* it is a guest all the same */
}

static void named_by_the_user(void **state)
{
    assert_int_equal(cpuid_change(NULL, "-pv-ipi,-avx"), 0);
    assert_true(cpuid_pv(*state, 11));                             /* that was a check only */
    assert_int_equal(cpuid_change(*state, "-pv-ipi,-avx,-x2apic"), 0);
    assert_false(cpuid_pv(*state, 11) || cpuid_has(*state, CPU_AVX) || cpuid_has(*state, CPU_X2APIC));
    assert_false(cpuid_has(*state, CPU_AVX2));                     /* needs AVX */
    assert_true(cpuid_pv(*state, 6));
    assert_int_equal(get(*state, 0, 1, 0).ecx & (1u << 21 | 1u << 28), 0);
    static const char *const bad[] = {"", "-", "avx", "+avx", "-avx,", ",-avx", "-av", "-avxx", "-avx -fma", "-AVX"};
    for (unsigned i = 0; i < ARRAY_SIZE(bad); i++)
        assert_int_equal(cpuid_change(NULL, bad[i]), -EINVAL);
}

static void out_of_range(void **state)
{
    struct cpuid_regs r = get(*state, 0, 0x7fffffff, 0), top = get(*state, 0, get(*state, 0, 0, 0).eax, 0);
    if (cpuid_is_amd(*state))
        assert_int_equal(r.eax | r.ebx | r.ecx | r.edx, 0);
    else
        assert_memory_equal(&r, &top, sizeof(r));
}

/* The last one: the host stays less. What was masked is gone for the monitor and for guests, with what needs it, and all else is there. */
static void a_masked_host_lacks_it(void **state UNUSED)
{
    bool bmi2 = cpuid_host_has(CPU_BMI2), avx512 = cpuid_host_has(CPU_AVX512F), fsgsbase = cpuid_host_has(CPU_FSGSBASE), xgetbv1 = cpuid_host_has(CPU_XGETBV1);
    assert_int_equal(cpuid_host_mask(""), 0);
    assert_int_equal(cpuid_host_mask("avx512"), -EINVAL);
    assert_int_equal(cpuid_host_mask("bmi2,,avx"), -EINVAL);
    cpuid_host_mask("avx512f,fsgsbase");
    struct cpuid_policy *p = make(2, 2596122);
    assert_false(cpuid_host_has(CPU_AVX512F) || cpuid_host_has(CPU_AVX512BW) || cpuid_host_has(CPU_AVX512VL) || cpuid_host_has(CPU_FSGSBASE));
    assert_false(cpuid_has(p, CPU_AVX512F) || cpuid_has(p, CPU_FSGSBASE));
    assert_int_equal(cpuid_xcr0_mask(p) & XSTATE_AVX512, 0);
    assert_int_equal(cpuid_cr4_mask(p) & CR4_FSGSBASE, 0);
    assert_int_equal(cpuid_host_has(CPU_XGETBV1), xgetbv1);
    assert_int_equal(cpuid_has(p, CPU_XGETBV1), xgetbv1);
    cpuid_policy_free(p);
    cpuid_host_mask("xsave");
    p = make(2, 2596122);
    assert_false(cpuid_host_has(CPU_AVX) || cpuid_host_has(CPU_XGETBV1) || cpuid_has(p, CPU_AVX) || cpuid_has(p, CPU_XSAVE) || cpuid_has(p, CPU_PKU));
    assert_int_equal(cpuid_xcr0_mask(p), 3);
    cpuid_policy_free(p);
    if (!avx512 && !fsgsbase && !bmi2)
        print_message("# this host has none of what was masked\n");
}

int main(void)
{
#define T(f) cmocka_unit_test_setup_teardown(f, setup, teardown)
    const struct CMUnitTest tests[] = {
        T(vendor_is_the_hosts), T(hidden),        T(subset_of_host),            T(dynamic_bits), T(xsave_sizes), T(topology),
        T(kvm_leaves),          T(tsc_frequency), T(clearing_takes_dependents), T(out_of_range),
        T(keeping_follows_the_engine), T(named_by_the_user), T(a_masked_host_lacks_it),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
