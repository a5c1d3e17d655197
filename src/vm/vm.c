/*
 * The life cycle of a virtual machine (vm.h). Everything here runs on the loop's thread but the vm_post_* functions and the hooks, which may come from vCPU
 * threads with device locks held: they freeze the vCPUs, record what happened, and post vm_service() to the loop.
 */
#include "vm/vm.h"

#include <errno.h>
#include <stdarg.h>
#include <string.h>

#include "cpu/cpuid.h"
#include "cpu/stats.h"
#include "cpu/vcpu.h"
#include "vm/board.h"
#include "vm/boot.h"
#include "vm/profile.h"

/* A guest that gives up so soon will not do better the next time: a kernel's panic before it can tell, with panic=-1. */
#define EARLY_RESET_NS 1000000000ull
#define EARLY_RESETS_MAX 3

struct vm {
    struct vm_config config;
    struct machine m;
    struct trace trace;
    struct board *board;
    struct sampler *sampler;                                       /* NULL: nobody samples */
    enum vm_state state;

    pthread_mutex_t lock;                                          /* guards the requests below */
    bool end_wanted, reset_wanted, pause_wanted;
    struct vm_result result;
    char message[512];
    struct x86 last;                                               /* of the vCPU that shut down */
    u64 booted_ns;                                                 /* guest time of the last boot */
    unsigned early_resets;                                         /* by the guest, in a row */
};

/* ---- from any thread ---- */

static void vm_service(void *arg);

static void vm_want(struct vm *vm, bool reset, enum vm_end end)
{
    bool first;

    vcpus_freeze(&vm->m);
    pthread_mutex_lock(&vm->lock);
    first = !vm->end_wanted && !(reset && vm->reset_wanted);
    if (first && reset) {
        vm->reset_wanted = true;
    } else if (first) {
        vm->end_wanted = true;
        vm->result.end = end;
    }
    pthread_mutex_unlock(&vm->lock);
    if (first)
        loop_post(vm->config.loop, vm_service, vm);
}

void vm_post_end(struct vm *vm, enum vm_end end)
{
    vm_want(vm, false, end);
}

void vm_post_reset(struct vm *vm)
{
    if (vm->config.no_reboot)
        vm_want(vm, false, VM_END_RESET);
    else
        vm_want(vm, true, VM_END_RESET);
}

void vm_post_host_error(struct vm *vm, const char *fmt, ...)
{
    va_list ap;

    pthread_mutex_lock(&vm->lock);
    if (!vm->message[0]) {
        va_start(ap, fmt);
        vsnprintf(vm->message, sizeof vm->message, fmt, ap);
        va_end(ap);
    }
    pthread_mutex_unlock(&vm->lock);
    vm_want(vm, false, VM_END_HOST_ERROR);
}

static void vm_service_pause(void *arg);

/* Disks may tell it in the middle of a retry by vm_resume(): the state is looked at later. */
static void vm_want_pause(struct vm *vm)
{
    bool first;

    pthread_mutex_lock(&vm->lock);
    first = !vm->pause_wanted;
    vm->pause_wanted = true;
    pthread_mutex_unlock(&vm->lock);
    if (first)
        loop_post(vm->config.loop, vm_service_pause, vm);
}

static void on_machine_event(void *arg, enum machine_event what)
{
    struct vm *vm = arg;

    switch (what) {
    case MACHINE_RESET: vm_post_reset(vm); break;
    case MACHINE_POWEROFF: vm_post_end(vm, VM_END_POWEROFF); break;
    case MACHINE_PANICKED: vm_post_end(vm, VM_END_PANIC); break;
    case MACHINE_DISK_FULL: vm_want_pause(vm); break;
    case MACHINE_CRASH_LOADED: log_msg(vm->config.log, LOG_WARN, "the guest's kernel panicked and runs its crash kernel now"); break;
    }
}

/* The first value counts: the guest executes nothing after the store, but another vCPU may be in its own. */
static void on_debug_exit(void *arg, unsigned value)
{
    struct vm *vm = arg;

    pthread_mutex_lock(&vm->lock);
    if (!vm->end_wanted)
        vm->result.value = value;
    pthread_mutex_unlock(&vm->lock);
    vm_post_end(vm, VM_END_DEBUG_EXIT);
}

static void on_vcpu_stopped(void *arg, struct vcpu *v, int why, const char *message)
{
    struct vm *vm = arg;

    if (why == RUN_FAILED) {
        vm_post_host_error(vm, "vCPU %u: %s", v->id, message);
        return;
    }
    pthread_mutex_lock(&vm->lock);
    if (!vm->end_wanted && !vm->reset_wanted) {
        vcpu_get(v, &vm->last);
        vm->result.x86 = &vm->last;
        vm->result.vcpu = v->id;
    }
    pthread_mutex_unlock(&vm->lock);
    if (vm->m.debug.attached) {                                    /* its user wants to look before all ends */
        v->debug.stop = DEBUG_SHUTDOWN;
        vm->m.debug.stopped(vm->m.debug.arg, v);
        return;
    }
    vm_post_end(vm, VM_END_TRIPLE_FAULT);
}

/* ---- on the loop's thread ---- */

/* Puts the machine into its state at power-on, with the kernel loaded; vCPUs are held. */
static int vm_boot(struct vm *vm)
{
    struct boot_config boot = {
        .firmware = vm->config.firmware, .kernel = vm->config.kernel, .initrd = vm->config.initrd, .cmdline = vm->config.cmdline, .map = board_map(vm->board),
        .phys_bits = (u8)cpuid_phys_bits(vm->m.cpuid),
    };
    struct x86 *x;
    int r = 0;

    r = board_reset(vm->board);
    if (r < 0)
        return r;
    vm->booted_ns = clock_ns(vm->m.clock);
    x = aligned_alloc(64, ALIGN_UP(sizeof *x, 64));
    if (!x)
        return err(-ENOMEM, "out of memory");
    for (unsigned i = 0; r == 0 && i < vm->m.vcpus; i++) {
        x86_reset(x, i == 0);
        if (i == 0 && !boot.firmware)
            r = board_tables(vm->board, &boot.rsdp_gpa);
        if (i == 0 && r == 0)
            r = boot_load(vm->m.ram, &boot, x);
        if (i > 0 && !boot.firmware)
            boot_mtrrs(&boot, x);
        if (r == 0)
            r = vcpu_reset(vm->m.vcpu[i], x);
    }
    free(x);
    return r;
}

static void vm_end(struct vm *vm)
{
    vm->state = VM_ENDED;
    board_quiesce(vm->board);
    vm->result.message = vm->message;
    vm->config.ended(vm->config.ended_arg, &vm->result);
}

/* Does what vm_want() recorded. */
static void vm_service(void *arg)
{
    struct vm *vm = arg;
    bool reset, end;

    pthread_mutex_lock(&vm->lock);
    reset = vm->reset_wanted;
    end = vm->end_wanted;
    vm->reset_wanted = false;
    pthread_mutex_unlock(&vm->lock);
    if (vm->state == VM_ENDED || (!reset && !end))
        return;
    vcpus_hold(&vm->m);
    if (end) {
        vm_end(vm);
        return;
    }
    vm->early_resets = clock_ns(vm->m.clock) - vm->booted_ns < EARLY_RESET_NS ? vm->early_resets + 1 : 0;
    if (vm->early_resets == EARLY_RESETS_MAX) {
        vm_post_end(vm, VM_END_RESET_LOOP);
        return;
    }
    if (vm_reset(vm) < 0) {
        vm_post_host_error(vm, "cannot boot again after a reset: %s", err_last());
        return;
    }
}

static void vm_service_pause(void *arg)
{
    struct vm *vm = arg;

    pthread_mutex_lock(&vm->lock);
    vm->pause_wanted = false;
    pthread_mutex_unlock(&vm->lock);
    if (vm->state != VM_RUNNING)
        return;
    vm_pause(vm);
    log_msg(vm->config.log, LOG_ERROR, "the host has no room for what the guest writes to a disk: it is paused and nothing is lost; make room, then say "
                                       "resume at the monitor prompt, or doppel resume NAME (--disk FILE,on-full=error lets the guest see an error instead)");
}

static int vm_machine_open(struct vm *vm)
{
    struct machine *m = &vm->m;
    const struct vm_config *c = &vm->config;
    struct vcpu_hooks hooks = { .stopped = on_vcpu_stopped, .arg = vm };
    int r;

    m->engine = c->engine;
    m->log = c->log;
    m->trace = &vm->trace;
    m->tools = c->tools;
    pthread_mutex_init(&m->split_lock, NULL);
    r = clock_new(c->loop, &m->clock);
    if (r < 0)
        return r;
    clock_pause(m->clock);
    vm->trace = c->trace;
    vm->trace.clock = m->clock;
    r = cpuid_policy_new(c->vcpus, clock_tsc_khz(m->clock), &m->cpuid);
    if (r < 0)
        return r;
    if (c->engine->cpuid_limit)
        c->engine->cpuid_limit(m->cpuid);
    if (c->also && c->also->cpuid_limit)
        c->also->cpuid_limit(m->cpuid);
    if (c->cpuid && (r = cpuid_change(m->cpuid, c->cpuid)) < 0)
        return r;
    r = board_new(c, m, (struct machine_hook){ .fn = on_machine_event, .arg = vm, .exit = on_debug_exit }, &vm->board);
    if (r < 0)
        return r;
    r = c->engine->machine_open(m);
    if (r < 0)
        return r;
    m->vcpu = calloc(c->vcpus, sizeof *m->vcpu);
    if (!m->vcpu)
        return err(-ENOMEM, "out of memory");
    for (unsigned i = 0; i < c->vcpus; i++) {
        r = vcpu_new(m, i, &hooks, &m->vcpu[i]);
        if (r < 0)
            return r;
        m->vcpus = i + 1;
    }
    return board_connect_cpus(vm->board);
}

int vm_new(const struct vm_config *config, struct vm **out)
{
    struct vm *vm;
    int r;

    bug_on(config->vcpus < 1 || config->vcpus > VM_VCPUS_MAX || config->disks > VM_DISKS_MAX || config->shares > VM_SHARES_MAX);
    vm = aligned_alloc(64, ALIGN_UP(sizeof *vm, 64));
    if (!vm)
        return err(-ENOMEM, "out of memory");
    memset(vm, 0, sizeof *vm);
    vm->config = *config;
    pthread_mutex_init(&vm->lock, NULL);
    r = vm_machine_open(vm);
    if (r == 0)
        r = vm_boot(vm);
    if (r < 0) {
        vm_free(vm);
        return r;
    }
    *out = vm;
    return 0;
}

void vm_free(struct vm *vm)
{
    struct machine *m;

    if (!vm)
        return;
    m = &vm->m;
    if (vm->board && vm->state != VM_ENDED && vm->state != VM_BUILT) {
        vcpus_hold(m);
        board_quiesce(vm->board);
    }
    sampler_free(vm->sampler);
    board_free(vm->board);                                         /* devices first: they signal vCPUs */
    for (unsigned i = 0; i < m->vcpus; i++)
        vcpu_free(m->vcpu[i]);
    if (m->vcpu && m->engine->machine_close)
        m->engine->machine_close(m);
    free(m->vcpu);
    cpuid_policy_free(m->cpuid);
    clock_free(m->clock);
    pthread_mutex_destroy(&m->split_lock);
    pthread_mutex_destroy(&vm->lock);
    free(vm);
}

int vm_start(struct vm *vm)
{
    for (unsigned i = 0; i < vm->m.vcpus; i++) {
        int r = vcpu_start(vm->m.vcpu[i]);

        if (r < 0)
            return r;
    }
    if (vm->config.sample || vm->m.tools.profile) {
        int r = sampler_new(&vm->m, vm->m.tools.profile, &vm->sampler);

        if (r < 0)
            return r;
    }
    vm->state = VM_PAUSED;
    if (!vm->config.start_paused)
        vm_resume(vm);
    return 0;
}

void vm_pause(struct vm *vm)
{
    if (vm->state != VM_RUNNING)
        return;
    vcpus_hold(&vm->m);
    if (vm->m.engine->time_stop)
        vm->m.engine->time_stop(&vm->m);
    clock_pause(vm->m.clock);
    vm->state = VM_PAUSED;
}

void vm_resume(struct vm *vm)
{
    if (vm->state != VM_PAUSED)
        return;
    clock_resume(vm->m.clock);
    if (vm->m.engine->time_start)
        vm->m.engine->time_start(&vm->m);
    vm->state = VM_RUNNING;
    for (unsigned i = 0; i < vm->m.vcpus; i++)
        vcpu_raise(vm->m.vcpu[i], VCPU_EV_CLOCK);
    vcpus_release(&vm->m);
    if (vm->config.resumed)
        vm->config.resumed(vm->config.ended_arg);
    board_retry_disks(vm->board);
}

int vm_reset(struct vm *vm)
{
    int r;

    if (vm->state != VM_RUNNING && vm->state != VM_PAUSED)
        return 0;
    vcpus_hold(&vm->m);
    board_quiesce(vm->board);
    r = vm_boot(vm);
    if (r < 0)
        return r;
    if (vm->state == VM_RUNNING)
        vcpus_release(&vm->m);
    return 0;
}

int vm_resize_disk(struct vm *vm, unsigned n, u64 size)
{
    return board_resize_disk(vm->board, n, size);
}

/* ---- from one engine to another ---- */

/* An engine with all that it has made for this machine. */
struct engine_open {
    const struct engine *engine;
    void *machine, *vcpu[VM_VCPUS_MAX];
};

static void engine_put(struct machine *m, const struct engine_open *e)
{
    m->engine = e->engine;
    m->engine_data = e->machine;
    for (unsigned i = 0; i < m->vcpus; i++)
        m->vcpu[i]->engine_data = e->vcpu[i];
}

static void engine_look(const struct machine *m, struct engine_open *e)
{
    e->engine = m->engine;
    e->machine = m->engine_data;
    for (unsigned i = 0; i < m->vcpus; i++)
        e->vcpu[i] = m->vcpu[i]->engine_data;
}

static void engine_shut(struct machine *m, const struct engine_open *e)
{
    engine_put(m, e);
    for (unsigned i = 0; i < m->vcpus; i++)
        if (e->vcpu[i])
            e->engine->vcpu_close(m->vcpu[i]);
    e->engine->machine_close(m);
}

/* Opens it beside the one that is open. */
static int engine_open(struct machine *m, const struct engine *engine, struct engine_open *e)
{
    struct engine_open old;
    int r;

    engine_look(m, &old);
    *e = (struct engine_open){ .engine = engine };
    engine_put(m, e);
    r = engine->machine_open(m);
    for (unsigned i = 0; r == 0 && i < m->vcpus; i++)
        r = engine->vcpu_open(m->vcpu[i]);
    engine_look(m, e);
    if (r < 0 && e->machine)
        engine_shut(m, e);
    engine_put(m, &old);
    return r;
}

/* Everything but RAM, which stays where it is, and the clock, which stands still. */
static int machine_state(struct vm *vm, struct stream *s)
{
    struct x86 *x = aligned_alloc(64, ALIGN_UP(sizeof *x, 64));
    int r = x ? 0 : err(-ENOMEM, "out of memory");

    for (unsigned i = 0; r == 0 && i < vm->m.vcpus; i++) {
        if (!s->load)
            r = vcpu_get(vm->m.vcpu[i], x);
        if (r == 0)
            x86_state(x, s);
        if (r == 0)
            r = s->error;
        if (r == 0 && s->load)
            r = vcpu_set(vm->m.vcpu[i], x);
    }
    free(x);
    if (r == 0)
        board_state(vm->board, s);
    return r < 0 ? r : s->error;
}

static int engine_enter(struct vm *vm, const struct engine_open *e, const struct stream *saved)
{
    struct stream s;

    engine_put(&vm->m, e);
    board_attach_chips(vm->board);
    if (e->engine->time_stop)
        e->engine->time_stop(&vm->m);
    stream_load_init(&s, saved->buf, saved->len);
    return machine_state(vm, &s);
}

static int engine_change(struct vm *vm, const struct engine *engine)
{
    struct engine_open old, new;
    struct stream saved;
    int r;

    for (unsigned i = 0; i < vm->m.vcpus; i++)
        vcpu_settle(vm->m.vcpu[i]);
    board_quiesce(vm->board);
    engine_look(&vm->m, &old);
    stream_save_init(&saved);
    r = machine_state(vm, &saved);
    if (r == 0)
        r = engine_open(&vm->m, engine, &new);
    if (r == 0) {
        r = engine_enter(vm, &new, &saved);
        engine_shut(&vm->m, r < 0 ? &new : &old);
        if (r < 0)
            bug_on(engine_enter(vm, &old, &saved) < 0);            /* it has just come from there */
        else
            engine_put(&vm->m, &new);
    }
    stream_free(&saved);
    return r;
}

int vm_switch_engine(struct vm *vm, const struct engine *engine)
{
    bool running = vm->state == VM_RUNNING;
    int r;

    bug_on(engine != vm->config.engine && engine != vm->config.also);
    if (vm->state != VM_RUNNING && vm->state != VM_PAUSED)
        return err(-EINVAL, "the guest does not run");
    if (running)
        vm_pause(vm);
    r = engine_change(vm, engine);
    if (running)
        vm_resume(vm);
    return r;
}

void vm_power_button(struct vm *vm)
{
    board_power_button(vm->board);
}

int vm_set_link(struct vm *vm, unsigned n, bool up)
{
    return board_set_link(vm->board, n, up);
}

void vm_quit(struct vm *vm)
{
    vm_post_end(vm, VM_END_QUIT);
}

enum vm_state vm_state(const struct vm *vm)
{
    return vm->state;
}

const char *vm_state_name(enum vm_state s)
{
    static const char *const name[] = { [VM_BUILT] = "built", [VM_RUNNING] = "running", [VM_PAUSED] = "paused", [VM_ENDED] = "ended" };

    return name[s];
}

bool vm_waits_for_room(const struct vm *vm)
{
    return vm->state == VM_PAUSED && board_waiting(vm->board) > 0;
}

struct trace *vm_trace(struct vm *vm)
{
    return &vm->trace;
}

struct vport *vm_port(struct vm *vm, unsigned n)
{
    return board_port(vm->board, n);
}

struct machine *vm_machine(struct vm *vm)
{
    return &vm->m;
}

struct clock *vm_clock(struct vm *vm)
{
    return vm->m.clock;
}

u64 vm_insns(const struct vm *vm)
{
    u64 n = 0;

    for (unsigned i = 0; i < vm->m.vcpus; i++)
        n += *(volatile const u64 *)&vm->m.vcpu[i]->insns;
    return n;
}

static u64 count_of(const struct vcpu *v, unsigned what)
{
    return *(volatile const u64 *)&v->count[what];
}

u64 vm_counted(const struct vm *vm, enum vcpu_counted what)
{
    u64 n = 0;

    for (unsigned i = 0; i < vm->m.vcpus; i++)
        n += count_of(vm->m.vcpu[i], what);
    return n;
}

const char *vm_count(const struct vm *vm, unsigned what, u64 *n)
{
    if (what >= COUNTS || vcpu_count_group(what) != GROUP_HANDLED)
        return NULL;
    *n = vm_counted(vm, what);
    return vcpu_count_name(what);
}

static void counts_print(const struct vcpu *v, FILE *f)
{
    fprintf(f, "handled:");
    for (unsigned i = 0; i < COUNTS && vcpu_count_group(i) == GROUP_HANDLED; i++)
        fprintf(f, "%s %s %llu", i ? "," : "", vcpu_count_name(i), (unsigned long long)count_of(v, i));
    fputc('\n', f);
}

int vm_profile(struct vm *vm, const char *map, FILE *f)
{
    return vm->sampler ? profile_print(&vm->m, vm->sampler, map, f) : 0;
}

void vm_stats(struct vm *vm, FILE *f, bool json)
{
    const struct machine *m = &vm->m;
    struct stats s;
    u64 ns = clock_ns(m->clock);

    stats_open(&s, f, json);
    if (json) {
        fprintf(f, "\"engine\":\"%s\",\"guest-seconds\":%.3f,\"memory-bytes\":%llu", m->engine->name, (double)ns / 1e9, (unsigned long long)m->ram->size);
        s.more = true;
    } else {
        fprintf(f, "engine %s, %u vCPU%s, %.3f s of guest time\n", m->engine->name, m->vcpus, m->vcpus == 1 ? "" : "s", (double)ns / 1e9);
    }
    stats_vcpus(&s);
    for (unsigned i = 0; i < m->vcpus; i++)
        stats_vcpu(&s, m->vcpu[i], vm->sampler);
    stats_vcpus_end(&s);
    board_stats(vm->board, &s);
    stats_close(&s);
}

void vm_info_disks(struct vm *vm, FILE *f)
{
    board_info_disks(vm->board, f);
}

void vm_info(struct vm *vm, FILE *f)
{
    bool running = vm->state == VM_RUNNING;
    struct x86 *x = aligned_alloc(64, ALIGN_UP(sizeof *x, 64));
    u64 ns = clock_ns(vm->m.clock);

    fprintf(f, "state: %s, engine %s, %u vCPU%s, %llu MiB, guest time %llu.%03llu s", vm_state_name(vm->state),
            vm->m.engine->name, vm->m.vcpus, vm->m.vcpus == 1 ? "" : "s", (unsigned long long)(vm->m.ram->size / MiB),
            (unsigned long long)(ns / 1000000000), (unsigned long long)(ns / 1000000 % 1000));
    if (vm->m.engine->counts_insns || vm->m.tools.insns)
        fprintf(f, ", %llu million instructions", (unsigned long long)(vm_insns(vm) / 1000000));
    fputc('\n', f);
    board_info(vm->board, f);
    if (running)
        vcpus_hold(&vm->m);
    for (unsigned i = 0; x && i < vm->m.vcpus; i++) {
        fprintf(f, "vcpu %u:\n", i);
        counts_print(vm->m.vcpu[i], f);
        if (vcpu_get(vm->m.vcpu[i], x) == 0)
            x86_print(x, f);
    }
    if (running)
        vcpus_release(&vm->m);
    free(x);
}
