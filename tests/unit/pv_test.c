/* pv.c with dev/lapic and interp: the protocols, with this program in the guest's place. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <time.h>

#include <cmocka.h>

#include <errno.h>
#include <linux/kvm_para.h>

#include "base/loop.h"
#include "cpu/cpuid.h"
#include "cpu/engine.h"
#include "cpu/msr.h"
#include "cpu/pv.h"
#include "cpu/vcpu.h"
#include "dev/lapic.h"

#define CPUS 3
#define WORD 0x2000u                                               /* PV EOI */
#define RECORD 0x3000u                                             /* steal time */
enum { EOI = 0xb0, SVR = 0xf0, ISR = 0x100, IRR = 0x200, TPR = 0x80, PPR = 0xa0 };

static struct loop *loop;
static struct machine m;
static struct ram ram;
static struct lapic_bus *lb;
static struct lapic *lapic[CPUS];
static struct vcpu *cpu[CPUS];

static int setup(void **state)
{
    static const struct vcpu_hooks hooks;

    (void)state;
    memset(&m, 0, sizeof(m));
    assert_int_equal(loop_new(&loop), 0);
    assert_int_equal(clock_new(loop, &m.clock), 0);
    assert_int_equal(ram_init(&ram), 0);
    assert_int_equal(ram_add(&ram, 0, MiB), 0);
    assert_int_equal(bus_new(NULL, &m.mmio), 0);
    assert_int_equal(cpuid_policy_new(CPUS, clock_tsc_khz(m.clock), &m.cpuid), 0);
    m.ram = &ram;
    m.engine = &interp_engine;
    m.vcpus = CPUS;
    m.vcpu = cpu;
    assert_int_equal(m.engine->machine_open(&m), 0);
    struct lapic_config cfg = { .clock = m.clock, .phys_bits = 40, .x2apic = true, .tsc_deadline = true };
    assert_int_equal(lapic_bus_new(&cfg, &lb), 0);
    for (unsigned i = 0; i < CPUS; i++) {
        assert_int_equal(vcpu_new(&m, i, &hooks, &cpu[i]), 0);
        assert_int_equal(lapic_new(lb, cpu[i]->mmio, i, i == 0, vcpu_port(cpu[i]), &lapic[i]), 0);
        cpu[i]->intc = lapic_intc(lapic[i]);
        bus_write(cpu[i]->mmio, LAPIC_BASE + SVR, 0x1ff, 4);
    }
    return 0;
}

static int teardown(void **state)
{
    (void)state;
    for (unsigned i = 0; i < CPUS; i++) {
        struct device *d = (struct device *)lapic[i];

        d->ops->free(d);
        vcpu_free(cpu[i]);
    }
    m.engine->machine_close(&m);
    lapic_bus_free(lb);
    cpuid_policy_free(m.cpuid);
    bus_free(m.mmio);
    ram_close(&ram);
    clock_free(m.clock);
    loop_free(loop);
    return 0;
}

static int set(u32 msr, u64 val)
{
    return msr_write(cpu[0], &cpu[0]->x, msr, val);
}

static u32 word(void)
{
    u32 val;

    assert_int_equal(ram_read(&ram, WORD, &val, sizeof(val)), 0);
    return val;
}

static void word_set(u32 val)
{
    assert_int_equal(ram_write(&ram, WORD, &val, sizeof(val)), 0);
}

static void interrupt(u8 vector, bool level)
{
    lapic_bus_send(lb, &(struct apic_msg){ .dest = 0, .vector = vector, .level = level });
}

static int ack(void)
{
    return cpu[0]->intc.ops->ack(cpu[0]->intc.chip);
}

static bool in_service(u8 vector)
{
    return bus_read(cpu[0]->mmio, LAPIC_BASE + ISR + vector / 32 * 16, 4) >> vector % 32 & 1;
}

static void eoi(void)
{
    bus_write(cpu[0]->mmio, LAPIC_BASE + EOI, 0, 4);
}

static bool looked_at(void)
{
    return atomic_exchange(&cpu[0]->events, 0) & VCPU_EV_INTR;
}

/* ---- registers ---- */

static void registers(void **state)
{
    u64 val;

    (void)state;
    assert_int_equal(set(MSR_KVM_PV_EOI_EN, WORD | 1), 0);
    assert_int_equal(msr_read(cpu[0], &cpu[0]->x, MSR_KVM_PV_EOI_EN, &val), 0);
    assert_int_equal(val, WORD | 1);
    assert_int_equal(set(MSR_KVM_PV_EOI_EN, WORD | 3), -1);
    assert_int_equal(set(MSR_KVM_PV_EOI_EN, MiB | 1), -1);
    assert_int_equal(set(MSR_KVM_PV_EOI_EN, (MiB - 4) | 1), 0);
    assert_int_equal(set(MSR_KVM_PV_EOI_EN, ~0ull & ~3ull), 0);    /* not enabled: any address */
    assert_int_equal(set(MSR_KVM_STEAL_TIME, RECORD | 1), 0);
    assert_int_equal(set(MSR_KVM_STEAL_TIME, RECORD | 0x20 | 1), -1);
    assert_int_equal(set(MSR_KVM_STEAL_TIME, MiB | 1), -1);
    assert_int_equal(set(MSR_KVM_STEAL_TIME, ~0x3full | 1), -1);
    x86_init(&cpu[0]->x);
    assert_int_equal(cpu[0]->x.kvm_pv_eoi | cpu[0]->x.kvm_steal_time, 0);
    assert_int_equal(cpuid_change(m.cpuid, "-pv-eoi,-steal-time"), 0);
    assert_int_equal(set(MSR_KVM_PV_EOI_EN, 0), -1);
    assert_int_equal(set(MSR_KVM_STEAL_TIME, 0), -1);
}

/* ---- PV EOI ---- */

static void an_eoi_in_memory(void **state)
{
    (void)state;
    interrupt(0x51, false);
    assert_int_equal(ack(), 0x51);
    assert_int_equal(word(), 0);                                   /* not enabled */
    eoi();
    assert_int_equal(set(MSR_KVM_PV_EOI_EN, WORD | 1), 0);
    word_set(0x80);
    interrupt(0x51, false);
    assert_int_equal(ack(), 0x51);
    assert_int_equal(word(), 0x81);                                /* only the lowest bit is ours */
    word_set(0x80);
    assert_int_equal(ack(), -1);
    assert_false(in_service(0x51));
    assert_int_equal(bus_read(cpu[0]->mmio, LAPIC_BASE + PPR, 4), 0);
    assert_int_equal(word(), 0x80);
}

/* "It is always safe for the guest to ignore the optimization": the bit is gone, and one interrupt has ended. */
static void an_eoi_by_register(void **state)
{
    (void)state;
    assert_int_equal(set(MSR_KVM_PV_EOI_EN, WORD | 1), 0);
    interrupt(0x51, false);
    assert_int_equal(ack(), 0x51);
    eoi();
    assert_int_equal(word(), 0);
    assert_false(in_service(0x51));
    assert_int_equal(ack(), -1);
}

/* Of the same class, while the local APIC still believes that the first one is in service. */
static void a_second_one_after_it(void **state)
{
    (void)state;
    assert_int_equal(set(MSR_KVM_PV_EOI_EN, WORD | 1), 0);
    interrupt(0x51, false);
    assert_int_equal(ack(), 0x51);
    word_set(0);
    looked_at();
    interrupt(0x52, false);
    assert_true(looked_at());
    assert_int_equal(ack(), 0x52);
    assert_false(in_service(0x51));
    assert_int_equal(word(), 0);                                   /* this test's look at the registers ended the offer */
    eoi();
    assert_false(in_service(0x52));
}

/* It has not ended: then it waits, and the end of the first one must be told to the local APIC. */
static void a_second_one_before_it(void **state)
{
    (void)state;
    assert_int_equal(set(MSR_KVM_PV_EOI_EN, WORD | 1), 0);
    interrupt(0x51, false);
    assert_int_equal(ack(), 0x51);
    looked_at();
    interrupt(0x41, false);
    assert_true(looked_at());
    assert_int_equal(ack(), -1);
    assert_int_equal(word(), 0);
    eoi();
    assert_true(looked_at());
    assert_int_equal(ack(), 0x41);
    assert_int_equal(word(), 1);
}

static void nested(void **state)
{
    (void)state;
    assert_int_equal(set(MSR_KVM_PV_EOI_EN, WORD | 1), 0);
    interrupt(0x51, false);
    assert_int_equal(ack(), 0x51);
    interrupt(0x61, false);
    assert_int_equal(ack(), 0x61);
    assert_int_equal(word(), 1);                                   /* for the inner one */
    word_set(0);
    eoi();                                                         /* the outer one's, which finds the bit clear */
    assert_false(in_service(0x61));
    assert_false(in_service(0x51));
}

static void not_offered(void **state)
{
    (void)state;
    assert_int_equal(set(MSR_KVM_PV_EOI_EN, WORD | 1), 0);
    interrupt(0x51, true);                                         /* a level: the I/O APIC must hear of its end */
    assert_int_equal(ack(), 0x51);
    assert_int_equal(word(), 0);
    eoi();
    interrupt(0x61, false);
    interrupt(0x41, false);                                        /* one waits already */
    assert_int_equal(ack(), 0x61);
    assert_int_equal(word(), 0);
    eoi();
    assert_int_equal(ack(), 0x41);
    assert_int_equal(word(), 1);
}

static void settled_before_it_stands_still(void **state)
{
    (void)state;
    assert_int_equal(set(MSR_KVM_PV_EOI_EN, WORD | 1), 0);
    interrupt(0x51, false);
    assert_int_equal(ack(), 0x51);
    pv_leave(cpu[0], &cpu[0]->x);
    assert_int_equal(word(), 0);
    assert_true(in_service(0x51));
    eoi();
    interrupt(0x51, false);
    assert_int_equal(ack(), 0x51);
    assert_int_equal(set(MSR_KVM_PV_EOI_EN, 0), 0);                /* likewise with the old word */
    assert_int_equal(word(), 0);
    eoi();
    interrupt(0x51, false);
    assert_int_equal(ack(), 0x51);
    assert_int_equal(word(), 0);
}

/* ---- steal time, TLB flush ---- */

static struct kvm_steal_time *record(void)
{
    return (struct kvm_steal_time *)ram_range(&ram, RECORD, sizeof(struct kvm_steal_time));
}

static void sleep_ms(unsigned ms)
{
    nanosleep(&(struct timespec){ .tv_nsec = (long)ms * 1000000 }, NULL);
}

static void preempted(void **state)
{
    (void)state;
    assert_false(pv_enter(cpu[0], &cpu[0]->x));
    record()->preempted = KVM_VCPU_PREEMPTED;
    assert_int_equal(set(MSR_KVM_STEAL_TIME, RECORD | 1), 0);
    assert_int_equal(record()->preempted, 0);
    pv_leave(cpu[0], &cpu[0]->x);
    assert_int_equal(record()->preempted, KVM_VCPU_PREEMPTED);
    assert_false(pv_enter(cpu[0], &cpu[0]->x));
    assert_int_equal(record()->preempted, 0);
    pv_leave(cpu[0], &cpu[0]->x);
    record()->preempted |= KVM_VCPU_FLUSH_TLB;
    assert_true(pv_enter(cpu[0], &cpu[0]->x));
    assert_int_equal(record()->preempted, 0);
    assert_false(pv_enter(cpu[0], &cpu[0]->x));
}

static void stolen(void **state)
{
    u64 before;

    (void)state;
    assert_int_equal(set(MSR_KVM_STEAL_TIME, RECORD | 1), 0);
    pv_enter(cpu[0], &cpu[0]->x);
    sleep_ms(20);
    pv_tick(cpu[0], &cpu[0]->x);
    assert_in_range(record()->steal, 19000000, 10000000000ull);
    assert_true(record()->version && !(record()->version & 1));
    pv_leave(cpu[0], &cpu[0]->x);
    before = record()->steal;
    sleep_ms(50);                                                  /* asleep in HLT: nobody steals */
    pv_enter(cpu[0], &cpu[0]->x);
    for (u64 until = clock_ns(m.clock) + 2000000; clock_ns(m.clock) < until;)
        ;
    pv_tick(cpu[0], &cpu[0]->x);
    assert_in_range(record()->steal, before, before + 40000000);
}

/* A translation that was cached before is not used after the flush. */
static void flush_reaches_the_tlb(void **state)
{
    enum { PD = 0x10000, DATA = 0x20000, CODE = 0x1000 };
    static const u8 code[] = {0xa1, 0, 0, 0x40, 0, 0xf4, 0xeb, 0xf8}; /* again: mov eax, [0x400000]; hlt; jmp again */
    struct x86 *x = &cpu[0]->x;
    u32 entry = 0x83;                                              /* 4 MiB: present, writable */

    (void)state;
    assert_int_equal(ram_write(&ram, CODE, code, sizeof(code)), 0);
    assert_int_equal(ram_write(&ram, PD, &entry, 4), 0);
    entry = 0x11003;
    assert_int_equal(ram_write(&ram, PD + 4, &entry, 4), 0);
    entry = DATA | 3;
    assert_int_equal(ram_write(&ram, 0x11000, &entry, 4), 0);
    assert_int_equal(ram_write(&ram, DATA, "ABCD", 4), 0);
    assert_int_equal(ram_write(&ram, DATA + 0x1000, "abcd", 4), 0);
    for (unsigned i = 0; i < SEGS; i++)
        x->seg[i] = (struct x86_seg){ .limit = 0xffffffff, .attr = i == SEG_CS ? 0xc9b : 0xc93 };
    x->cr0 = CR0_PE | CR0_PG | CR0_ET;
    x->cr4 = CR4_PSE;
    x->cr3 = PD;
    x->rip = CODE;
    assert_int_equal(interp_engine.set(cpu[0], x), 0);
    assert_int_equal(set(MSR_KVM_STEAL_TIME, RECORD | 1), 0);
    assert_int_equal(interp_engine.run(cpu[0]), RUN_HALTED);
    assert_memory_equal(&x->gpr[RAX], "ABCD", 4);
    assert_int_equal(record()->preempted, KVM_VCPU_PREEMPTED);
    entry = (DATA + 0x1000) | 3;
    assert_int_equal(ram_write(&ram, 0x11000, &entry, 4), 0);
    x->kvm_unhalted = true;
    assert_int_equal(interp_engine.run(cpu[0]), RUN_HALTED);
    assert_memory_equal(&x->gpr[RAX], "ABCD", 4);                  /* nobody has flushed */
    record()->preempted |= KVM_VCPU_FLUSH_TLB;
    x->kvm_unhalted = true;
    assert_int_equal(interp_engine.run(cpu[0]), RUN_HALTED);
    assert_memory_equal(&x->gpr[RAX], "abcd", 4);
}

/* ---- hypercalls ---- */

static s64 call(u64 number, u64 a0, u64 a1, u64 a2, u64 a3)
{
    return pv_hypercall(cpu[0], &cpu[0]->x, number, (const u64[]){ a0, a1, a2, a3 }, true);
}

static bool requested(unsigned i, u8 vector)
{
    return bus_read(cpu[i]->mmio, LAPIC_BASE + IRR + vector / 32 * 16, 4) >> vector % 32 & 1;
}

static void ipis(void **state)
{
    (void)state;
    assert_int_equal(call(KVM_HC_SEND_IPI, 6, 0, 0, 0x71), 2);
    assert_false(requested(0, 0x71));
    assert_true(requested(1, 0x71) && requested(2, 0x71));
    assert_int_equal(call(KVM_HC_SEND_IPI, 2, 0, 1, 0x72), 1);     /* counted from APIC ID 1 on */
    assert_true(requested(2, 0x72) && !requested(1, 0x72));
    assert_int_equal(call(KVM_HC_SEND_IPI, ~0ull, ~0ull, 2, 0x73), 1); /* most of them do not exist */
    assert_int_equal(call(KVM_HC_SEND_IPI, ~0ull, ~0ull, 0xffffffff, 0x73), 0);
    assert_int_equal(call(KVM_HC_SEND_IPI, 2, 0, 0, 0x400), 1);    /* NMI */
    assert_true(atomic_load(&cpu[1]->events) & VCPU_EV_NMI);
    assert_int_equal(call(KVM_HC_SEND_IPI, 2, 0, 0, 0x80071), -EINVAL);
    assert_int_equal(call(KVM_HC_SEND_IPI, 2, 0, 0, 0x871), -EINVAL);
    assert_int_equal(call(KVM_HC_SEND_IPI, 2, 0, 0, 0x500), -EINVAL); /* INIT */
    bus_write(cpu[1]->mmio, LAPIC_BASE + SVR, 0xff, 4);
    assert_int_equal(call(KVM_HC_SEND_IPI, 6, 0, 0, 0x74), 1);     /* one is disabled */
}

/* 32 destinations per word for a caller that is not in 64-bit mode. */
static void ipis_of_32_bits(void **state)
{
    const u64 arg[] = { 0, 1, 0, 0x71 }, wraps[] = { 0, 2, 0xffffffe1u, 0x71 };
    struct vcpu *many[33] = { [32] = cpu[2] };

    (void)state;
    assert_int_equal(pv_hypercall(cpu[0], &cpu[0]->x, KVM_HC_SEND_IPI, wraps, false), 0); /* not round to 2 */
    m.vcpu = many;
    m.vcpus = ARRAY_SIZE(many);
    assert_int_equal(pv_hypercall(cpu[0], &cpu[0]->x, KVM_HC_SEND_IPI, arg, true), 0);
    assert_int_equal(pv_hypercall(cpu[0], &cpu[0]->x, KVM_HC_SEND_IPI, arg, false), 1);
    m.vcpu = cpu;
    m.vcpus = CPUS;
    assert_true(requested(2, 0x71));
}

static void kicks(void **state)
{
    static const u8 code[] = {0xf4, 0xf4, 0xf4};
    struct x86 *x = &cpu[1]->x;

    (void)state;
    assert_int_equal(ram_write(&ram, 0x1000, code, sizeof(code)), 0);
    x->seg[SEG_CS] = (struct x86_seg){ .limit = 0xffff, .attr = 0x9b };
    x->rip = 0x1000;
    x->activity = X86_RUNNING;
    assert_int_equal(interp_engine.set(cpu[1], x), 0);
    assert_int_equal(interp_engine.run(cpu[1]), RUN_HALTED);
    assert_int_equal(x->rip, 0x1001);
    assert_int_equal(interp_engine.run(cpu[1]), RUN_HALTED);       /* with IF clear it stays there */
    assert_int_equal(x->rip, 0x1001);
    assert_int_equal(call(KVM_HC_KICK_CPU, 0, 1, 0, 0), 0);
    assert_int_equal(interp_engine.run(cpu[1]), RUN_HALTED);
    assert_int_equal(x->rip, 0x1002);
    x->rip = 0x1001;
    x->activity = X86_RUNNING;
    assert_int_equal(call(KVM_HC_KICK_CPU, 0, 1, 0, 0), 0);        /* before the HLT */
    vcpu_settle(cpu[1]);                                           /* part of its state now */
    assert_true(x->kvm_unhalted);
    assert_int_equal(interp_engine.run(cpu[1]), RUN_HALTED);
    assert_int_equal(x->rip, 0x1003);
    assert_int_equal(call(KVM_HC_KICK_CPU, 0, CPUS, 0, 0), 0);     /* nobody */
    assert_int_equal(call(KVM_HC_KICK_CPU, 0, ~0ull, 0, 0), 0);
}

static void clock_pairing(void **state)
{
    struct kvm_clock_pairing p;
    u64 before = clock_tsc(m.clock), wall = clock_wall_ns();

    (void)state;
    assert_int_equal(call(KVM_HC_CLOCK_PAIRING, 0x4000, KVM_CLOCK_PAIRING_WALLCLOCK, 0, 0), 0);
    assert_int_equal(ram_read(&ram, 0x4000, &p, sizeof(p)), 0);
    assert_in_range(p.tsc, before, clock_tsc(m.clock));
    assert_in_range((u64)p.sec * 1000000000 + (u64)p.nsec, wall, wall + 5000000000ull);
    assert_int_equal(call(KVM_HC_CLOCK_PAIRING, MiB - 8, KVM_CLOCK_PAIRING_WALLCLOCK, 0, 0), -EFAULT);
    assert_int_equal(call(KVM_HC_CLOCK_PAIRING, 0x4000, 1, 0, 0), -KVM_EOPNOTSUPP);
}

static void refused(void **state)
{
    (void)state;
    assert_int_equal(call(99, 0, 0, 0, 0), -KVM_ENOSYS);
    assert_int_equal(cpuid_change(m.cpuid, "-pv-ipi,-pv-unhalt"), 0);
    assert_int_equal(call(KVM_HC_SEND_IPI, 6, 0, 0, 0x71), -KVM_ENOSYS);
    assert_int_equal(call(KVM_HC_KICK_CPU, 0, 1, 0, 0), -KVM_ENOSYS);
    assert_false(requested(1, 0x71));
    cpu[0]->x.seg[SEG_SS].attr = 0xf3;                             /* CPL 3 */
    assert_int_equal(call(KVM_HC_CLOCK_PAIRING, 0x4000, 0, 0, 0), -EPERM);
    assert_int_equal(cpu[0]->count[COUNT_HYPERCALL], 4);
}

#define T(f) cmocka_unit_test_setup_teardown(f, setup, teardown)

int main(void)
{
    const struct CMUnitTest tests[] = {
        T(registers), T(an_eoi_in_memory), T(an_eoi_by_register), T(a_second_one_after_it), T(a_second_one_before_it),
        T(nested), T(not_offered), T(settled_before_it_stands_still), T(preempted), T(stolen), T(flush_reaches_the_tlb),
        T(ipis), T(ipis_of_32_bits), T(kicks), T(clock_pairing), T(refused),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
