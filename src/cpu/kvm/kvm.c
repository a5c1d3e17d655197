/*
 * kvm: the engine that leaves the work to the processor's virtualization extensions, through Linux' KVM
 * (Documentation/virt/kvm/api.rst).
 *
 * Interrupt controllers and the PIT are the kernel's (chips.c), so INIT, start-up IPIs and HLT are too: run() returns
 * for the monitor's events only. All ioctls are those of an ordinary user who may open /dev/kvm.
 *
 * A kick is never lost: it sets immediate_exit, then sends a signal. run() clears immediate_exit before it looks at the
 * events, so either it sees the event, or KVM_RUN returns at once, or the signal interrupts it.
 *
 * An access that ended KVM_RUN is completed by the next KVM_RUN; before the vCPU may stand still that is done without
 * entering the guest. After a triple fault AMD's processors leave no state behind: what get() shows then is a reset
 * processor.
 *
 * Not used: coalesced MMIO, ioeventfd and irqfd (DESIGN.md, KVM). The first two let a store return before its device has seen it, which
 * the one access path (bus.h) promises; the devices' own threads raise interrupts by one ioctl as it is.
 *
 * Locking: kvm_machine.lock guards the slots; all else is the vCPU's thread's, or nobody's while it stands still.
 */
#define _GNU_SOURCE
#include "cpu/kvm/kvm.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#include "cpu/msr.h"

/* Where Intel's processors keep three pages of their own for real mode, and one for its page table: below the firmware,
   above the local APICs. */
#define IDENTITY_MAP_ADDR 0xfeffc000ull
#define TSS_ADDR 0xfeffd000ull

/* ---- memory ---- */

static int slot_set(struct kvm_machine *k, unsigned slot, const struct ram_run *run, bool log)
{
    struct kvm_userspace_memory_region r = { .slot = slot };

    if (run) {
        r.guest_phys_addr = run->gpa;
        r.memory_size = run->size;
        r.userspace_addr = (u64)run->hva;
        r.flags = log ? KVM_MEM_LOG_DIRTY_PAGES : 0;
    }
    if (ioctl(k->vm, KVM_SET_USER_MEMORY_REGION, &r) < 0 && run)
        return err(-errno, "kvm: cannot map guest memory at 0x%llx: %s", (unsigned long long)run->gpa, strerror(errno));
    return 0;
}

static bool slots_stale(const struct machine *m)
{
    return kvm_of(m)->epoch != m->ram->epoch || kvm_of(m)->logging != m->ram->tracked;
}

/* Makes the slots show the table of runs. The table changes only while all vCPUs stand still; the first that runs again
   comes here. A slot that is made anew has forgotten what it noted. */
static int slots_sync(struct machine *m)
{
    struct kvm_machine *k = kvm_of(m);
    struct ram *ram = m->ram;
    int r = 0;

    pthread_mutex_lock(&k->lock);
    bool table = k->epoch != ram->epoch, forgets = table && k->logging && ram->tracked;
    while (table && k->slots)
        slot_set(k, --k->slots, NULL, false);
    for (unsigned i = 0, slot = 0; r == 0 && slots_stale(m) && i < ram->runs; i++) {
        if (!ram->run[i].hva)
            continue;
        r = slot_set(k, slot++, &ram->run[i], ram->tracked);
        k->slots = MAX(k->slots, slot);
        if (forgets)
            ram_mark(ram, ram->run[i].gpa, ram->run[i].size);
    }
    if (r == 0) {
        k->epoch = ram->epoch;
        k->logging = ram->tracked;
    }
    pthread_mutex_unlock(&k->lock);
    return r;
}

/* ---- the log of written pages ---- */

static unsigned slot_of(const struct ram *ram, unsigned run)
{
    unsigned slot = 0;

    for (unsigned i = 0; i < run; i++)
        slot += ram->run[i].hva != NULL;
    return slot;
}

static int dirty(struct machine *m, unsigned run)
{
    struct kvm_dirty_log log = { .slot = slot_of(m->ram, run) };
    u64 *bits;
    int r;

    if (!m->ram->tracked || !m->ram->run[run].hva)
        return 0;
    r = slots_stale(m) ? slots_sync(m) : 0;
    if (r < 0)
        return r;
    bits = calloc(ram_run_words(&m->ram->run[run]), sizeof *bits);
    if (!bits)
        return err(-ENOMEM, "kvm: out of memory");
    log.dirty_bitmap = bits;
    if (ioctl(kvm_of(m)->vm, KVM_GET_DIRTY_LOG, &log) < 0)
        r = err(-errno, "kvm: cannot learn what the guest wrote: %s", strerror(errno));
    else
        ram_mark_bits(m->ram, run, bits);
    free(bits);
    return r;
}

/* ---- machine ---- */

static int open_device(struct kvm_machine *k)
{
    k->sys = open("/dev/kvm", O_RDWR | O_CLOEXEC);
    if (k->sys < 0 && errno == ENOENT)
        return err(-ENOENT, "kvm: there is no /dev/kvm: no virtualization hardware, "
                   "or its module is not loaded (modprobe kvm_intel or kvm_amd); --engine bt needs none");
    if (k->sys < 0 && errno == EACCES)
        return err(-EACCES, "kvm: no permission to use /dev/kvm; \"sudo adduser $USER kvm\" and a new login give it, "
                   "--engine bt needs none");
    if (k->sys < 0)
        return err(-errno, "kvm: cannot open /dev/kvm: %s; --engine bt needs none", strerror(errno));
    int version = ioctl(k->sys, KVM_GET_API_VERSION, 0);
    if (version != KVM_API_VERSION)
        return err(-ENOTSUP, "kvm: /dev/kvm has version %d, not %d; choose another engine", version, KVM_API_VERSION);
    return 0;
}

static int check_capabilities(struct kvm_machine *k)
{
    static const struct {
        int cap;
        const char *name;
    } needed[] = {
        {KVM_CAP_USER_MEMORY, "user memory"}, {KVM_CAP_IRQCHIP, "interrupt chips"}, {KVM_CAP_PIT2, "PIT"},
        {KVM_CAP_SET_TSS_ADDR, "TSS address"},
        {KVM_CAP_SET_IDENTITY_MAP_ADDR, "identity map"}, {KVM_CAP_EXT_CPUID, "CPUID"}, {KVM_CAP_VCPU_EVENTS,
        "vCPU events"}, {KVM_CAP_DEBUGREGS, "debug registers"},
        {KVM_CAP_XSAVE, "XSAVE"}, {KVM_CAP_XCRS, "XCRs"}, {KVM_CAP_MP_STATE, "MP state"}, {KVM_CAP_SIGNAL_MSI, "MSI"},
        {KVM_CAP_IRQ_ROUTING, "interrupt routing"},
        {KVM_CAP_PIT_STATE2, "PIT state"}, {KVM_CAP_IMMEDIATE_EXIT, "immediate exit"},
    };
    for (unsigned i = 0; i < ARRAY_SIZE(needed); i++)
        if (ioctl(k->vm, KVM_CHECK_EXTENSION, needed[i].cap) <= 0)
            return err(-ENOTSUP, "kvm: this host's /dev/kvm lacks %s (capability %d), "
                       "it is too old or too restricted; choose another engine", needed[i].name,
                       needed[i].cap);
    k->sregs2 = ioctl(k->vm, KVM_CHECK_EXTENSION, KVM_CAP_SREGS2) > 0;
    k->deadline = ioctl(k->vm, KVM_CHECK_EXTENSION, KVM_CAP_TSC_DEADLINE_TIMER) > 0;
    if (ioctl(k->vm, KVM_CHECK_EXTENSION, KVM_CAP_SET_GUEST_DEBUG) > 0) {
        int flags = ioctl(k->vm, KVM_CHECK_EXTENSION, KVM_CAP_SET_GUEST_DEBUG2);   /* 0 on kernels before 5.12 */

        k->guest_debug = KVM_GUESTDBG_ENABLE | (flags > 0 ? (u32)flags : 0);
    }
    return 0;
}

static void on_kick(int sig UNUSED)
{
}

/* The disposition is the process's; setting it again changes nothing. */
void kvm_catch_kicks(void)
{
    struct sigaction sa = { .sa_handler = on_kick };

    sigaction(KVM_KICK_SIGNAL, &sa, NULL);
}

static void machine_close(struct machine *m)
{
    struct kvm_machine *k = kvm_of(m);

    if (!k)
        return;
    for (unsigned i = 0; k->logging && m->ram->tracked && i < m->ram->runs; i++)
        if (dirty(m, i) < 0)                                       /* another engine goes on: better too many than too few */
            ram_mark(m->ram, m->ram->run[i].gpa, m->ram->run[i].size);
    if (k->vm >= 0)
        close(k->vm);
    if (k->sys >= 0)
        close(k->sys);
    pthread_mutex_destroy(&k->lock);
    free(k);
    m->engine_data = NULL;
}

static int vm_create(struct kvm_machine *k)
{
    u64 identity = IDENTITY_MAP_ADDR;

    do
        k->vm = ioctl(k->sys, KVM_CREATE_VM, 0);
    while (k->vm < 0 && errno == EINTR);
    if (k->vm < 0)
        return err(-errno, "kvm: cannot make a machine: %s", strerror(errno));
    int r = check_capabilities(k);
    if (r < 0)
        return r;
    int size = ioctl(k->sys, KVM_GET_VCPU_MMAP_SIZE, 0);
    if (size < (int)sizeof(struct kvm_run))
        return err(-EIO, "kvm: impossible size of a vCPU's page");
    k->run_size = (size_t)size;
    if (ioctl(k->vm, KVM_SET_IDENTITY_MAP_ADDR, &identity) < 0 || ioctl(k->vm, KVM_SET_TSS_ADDR, TSS_ADDR) < 0)
        return err(-errno, "kvm: cannot place the processor's own pages: %s", strerror(errno));
    return 0;
}

static int machine_open(struct machine *m)
{
    struct kvm_machine *k = calloc(1, sizeof *k);
    int r;

    if (!k)
        return err(-ENOMEM, "kvm: out of memory");
    k->sys = k->vm = -1;
    pthread_mutex_init(&k->lock, NULL);
    m->engine_data = k;
    kvm_catch_kicks();
    r = open_device(k);
    if (r == 0)
        r = vm_create(k);
    if (r == 0)
        r = kvm_chips_create(m);
    if (r == 0) {
        kvm_msr_policy(k);
        r = slots_sync(m);
    }
    if (r < 0)
        machine_close(m);
    return r;
}

/* ---- vCPUs ---- */

static void vcpu_close(struct vcpu *v)
{
    struct kvm_vcpu *c = kvcpu_of(v);

    if (!c)
        return;
    if (c->run)
        munmap(c->run, kvm_of(v->m)->run_size);
    if (c->fd >= 0)
        close(c->fd);
    free(c);
    v->engine_data = NULL;
}

static int vcpu_open(struct vcpu *v)
{
    struct kvm_machine *k = kvm_of(v->m);
    struct kvm_vcpu *c = calloc(1, sizeof *c);
    struct kvm_device_attr offset = { .group = KVM_VCPU_TSC_CTRL, .attr = KVM_VCPU_TSC_OFFSET };

    if (!c)
        return err(-ENOMEM, "vCPU %u: out of memory", v->id);
    v->engine_data = c;
    c->fd = ioctl(k->vm, KVM_CREATE_VCPU, (unsigned long)v->id);
    if (c->fd < 0) {
        int r = err(-errno, "kvm: cannot make vCPU %u: %s", v->id, strerror(errno));
        vcpu_close(v);
        return r;
    }
    void *p = mmap(NULL, k->run_size, PROT_READ | PROT_WRITE, MAP_SHARED, c->fd, 0);
    if (p == MAP_FAILED) {
        int r = err(-errno, "kvm: cannot map vCPU %u: %s", v->id, strerror(errno));
        vcpu_close(v);
        return r;
    }
    c->run = p;
    k->tsc_offset = ioctl(c->fd, KVM_HAS_DEVICE_ATTR, &offset) == 0;
    int r = kvm_cpuid_set(v);
    if (r == 0) {
        kvm_find_msrs(v);
        /* who waits for a start-up IPI waits in the kernel */
        v->x.activity = X86_RUNNING;
    } else {
        vcpu_close(v);
    }
    return r;
}

/* ---- running ---- */

static void kick(struct vcpu *v)
{
    struct kvm_vcpu *c = kvcpu_of(v);

    __atomic_store_n(&c->run->immediate_exit, 1, __ATOMIC_SEQ_CST);
    if (atomic_load(&c->known))
        pthread_kill(c->thread, KVM_KICK_SIGNAL);
}

void kvm_take_kicks(void)
{
    sigset_t set;

    sigemptyset(&set);
    sigaddset(&set, KVM_KICK_SIGNAL);
    pthread_sigmask(SIG_UNBLOCK, &set, NULL);
}

static void learn_thread(struct kvm_vcpu *c)
{
    c->thread = pthread_self();
    atomic_store(&c->known, true);
    kvm_take_kicks();
}

static void exit_io(struct vcpu *v)
{
    struct kvm_run *run = kvcpu_of(v)->run;
    u8 *data = (u8 *)run + run->io.data_offset;
    bool out = run->io.direction == KVM_EXIT_IO_OUT;
    unsigned size = run->io.size;

    for (u32 i = 0; i < run->io.count; i++, data += size) {
        u64 val = 0;

        if (out)
            memcpy(&val, data, size);
        vcpu_pio(v, run->io.port, size, out, &val);
        if (!out)
            memcpy(data, &val, size);
    }
}

static void exit_mmio(struct vcpu *v)
{
    struct kvm_run *run = kvcpu_of(v)->run;
    u64 val = 0;

    if (run->mmio.is_write)
        memcpy(&val, run->mmio.data, run->mmio.len);
    vcpu_mmio(v, run->mmio.phys_addr, run->mmio.len, run->mmio.is_write, &val);
    if (!run->mmio.is_write)
        memcpy(run->mmio.data, &val, run->mmio.len);
}

static const char *exit_name(u32 reason)
{
    static const char *const name[] = {
        [KVM_EXIT_UNKNOWN] = "unknown", [KVM_EXIT_IO] = "io", [KVM_EXIT_DEBUG] = "debug", [KVM_EXIT_HLT] = "hlt", [KVM_EXIT_MMIO] = "mmio",
        [KVM_EXIT_SHUTDOWN] = "shutdown",
        [KVM_EXIT_FAIL_ENTRY] = "failed entry", [KVM_EXIT_INTR] = "signal",
        [KVM_EXIT_INTERNAL_ERROR] = "internal error",
        [KVM_EXIT_SYSTEM_EVENT] = "system event", [KVM_EXIT_X86_RDMSR] = "rdmsr", [KVM_EXIT_X86_WRMSR] = "wrmsr",
    };
    return reason < ARRAY_SIZE(name) && name[reason] ? name[reason] : "other";
}

static enum run_exit failed(struct vcpu *v)
{
    const struct kvm_run *run = kvcpu_of(v)->run;
    struct kvm_regs regs = { 0 };
    unsigned long long rip;

    ioctl(kvcpu_of(v)->fd, KVM_GET_REGS, &regs);
    rip = regs.rip;
    if (run->exit_reason == KVM_EXIT_INTERNAL_ERROR)
        err(-EIO, "KVM gave up at RIP 0x%llx: internal error %u%s; choose another engine", rip, run->internal.suberror,
            run->internal.suberror == KVM_INTERNAL_ERROR_EMULATION ? " (an instruction that it cannot emulate)" : "");
    else if (run->exit_reason == KVM_EXIT_FAIL_ENTRY)
        err(-EIO, "KVM gave up at RIP 0x%llx: the processor refused to enter the guest, reason 0x%llx", rip,
            (unsigned long long)run->fail_entry.hardware_entry_failure_reason);
    else
        err(-EIO, "KVM gave up at RIP 0x%llx: exit %u (%s)", rip, run->exit_reason, exit_name(run->exit_reason));
    return RUN_FAILED;
}

/* What KVM_RUN came back for. True: the guest goes on; otherwise *why. */
static bool handle_exit(struct vcpu *v, enum run_exit *why)
{
    struct kvm_vcpu *c = kvcpu_of(v);
    u32 reason = c->run->exit_reason;

    trace(v->m->trace, TRACE_EXITS, (int)v->id, "%s", exit_name(reason));
    switch (reason) {
    case KVM_EXIT_IO:
        exit_io(v);
        c->unfinished = true;
        return true;
    case KVM_EXIT_MMIO:
        exit_mmio(v);
        c->unfinished = true;
        return true;
    case KVM_EXIT_X86_RDMSR:
    case KVM_EXIT_X86_WRMSR:
        kvm_msr_exit(v);
        c->unfinished = true;
        return true;
    case KVM_EXIT_INTR:
        return true;
    case KVM_EXIT_DEBUG:
        if (kvm_debug_exit(v) == 0 && !v->debug.stop)
            return true;
        *why = v->debug.stop ? RUN_DEBUG : RUN_FAILED;
        return false;
    case KVM_EXIT_SHUTDOWN:
        c->shut_down = true;
        *why = RUN_SHUTDOWN;
        return false;
    }
    *why = failed(v);
    return false;
}

/* One KVM_RUN. True: go on. */
static bool run_once(struct vcpu *v, enum run_exit *why)
{
    struct kvm_vcpu *c = kvcpu_of(v);

    int r = ioctl(c->fd, KVM_RUN, 0);
    c->unfinished = false;
    if (r == 0)
        return handle_exit(v, why);
    if (errno == EINTR || errno == EAGAIN)
        return true;
    *why = RUN_FAILED;
    err(-errno, "KVM_RUN: %s", strerror(errno));
    return false;
}

/* The accesses that are under way are completed, without another instruction of the guest; then its state is whole. */
static bool come_to_rest(struct vcpu *v, enum run_exit *why)
{
    struct kvm_vcpu *c = kvcpu_of(v);

    while (c->unfinished) {
        __atomic_store_n(&c->run->immediate_exit, 1, __ATOMIC_SEQ_CST);
        if (!run_once(v, why))
            return false;
    }
    if (kvm_settle(v) == 0)
        return true;
    *why = RUN_FAILED;
    return false;
}

static void take_events(struct vcpu *v, u32 events)
{
    atomic_fetch_and(&v->events, ~(events & ~(u32)VCPU_EV_OUTSIDE));
    if (events & VCPU_EV_NMI)
        ioctl(kvcpu_of(v)->fd, KVM_NMI, 0);
}

static enum run_exit run_guest(struct vcpu *v)
{
    struct kvm_vcpu *c = kvcpu_of(v);
    enum run_exit why = RUN_OUTSIDE;

    do {
        __atomic_store_n(&c->run->immediate_exit, 0, __ATOMIC_SEQ_CST);
        u32 events = atomic_load(&v->events);
        if (unlikely(events & VCPU_EV_OUTSIDE))
            return come_to_rest(v, &why) ? RUN_OUTSIDE : why;
        if (unlikely(events))
            take_events(v, events);
        if (unlikely(slots_stale(v->m)) && slots_sync(v->m) < 0)
            return RUN_FAILED;
    } while (run_once(v, &why));
    return why;
}

static enum run_exit run(struct vcpu *v)
{
    struct kvm_vcpu *c = kvcpu_of(v);
    enum run_exit why;

    if (!atomic_load_explicit(&c->known, memory_order_relaxed))
        learn_thread(c);
    if (c->shut_down)
        return RUN_SHUTDOWN;
    if (unlikely(v->debug.stop))
        return RUN_DEBUG;
    if (unlikely(v->m->debug.attached || c->debug.control) && kvm_debug_enter(v) < 0)
        return RUN_FAILED;
    why = run_guest(v);
    if (unlikely(c->step.active) && kvm_debug_leave(v) < 0)
        why = RUN_FAILED;
    if (why == RUN_DEBUG)
        v->debug.step = v->debug.pass = false;
    return why;
}

const struct engine kvm_engine = {
    .name = "kvm",
    .machine_open = machine_open,
    .machine_close = machine_close,
    .vcpu_open = vcpu_open,
    .vcpu_close = vcpu_close,
    .run = run,
    .kick = kick,
    .get = kvm_get,
    .set = kvm_set,
    .cpuid_limit = kvm_cpuid_limit,
    .time_stop = kvm_time_stop,
    .time_start = kvm_time_start,
    .dirty = dirty,
    .debug_points = DEBUG_POINTS_MAX,
    .debug_check = kvm_debug_check,
    .irqchip = &kvm_irqchip,
};
