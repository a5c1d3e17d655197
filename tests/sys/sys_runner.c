/*
 * sys_runner [--engine NAME] [--mmu NAME] [--timeout SECONDS] [--check] [--at-once] IMAGE.bin...: runs sys programs
 * (lib/sys.h) on an engine and prints their checks as TAP. --mmu: bt's way to guest memory; --check: bt beside interp
 * (cpu/bt/check.h); --at-once: bt interprets nothing before it translates it.
 *
 * The machine is as small as can be: 32 MiB of RAM, two vCPUs with local APICs, a text port (0xe9), an exit port
 * (0xf4), a scratch device of ports, one of memory, and a copier that does DMA. A program is loaded at 8000h and entered there in real mode; the
 * doubleword at 500h counts the shutdowns it has had. A program whose last line is "shutdown NAME" passes that check by
 * a triple fault and is started again; otherwise it has to end with "done". The monitor's own memory is checked, too.
 *
 * Threads: the loop's (main), where timers fire, and one per vCPU. What the vCPUs' threads write here is under
 * runner.lock.
 */
#include <errno.h>
#include <getopt.h>
#include <string.h>
#include <sys/resource.h>

#include "base/err.h"
#include "base/loop.h"
#include "cpu/cpuid.h"
#include "cpu/engine.h"
#include "cpu/vcpu.h"
#include "dev/lapic.h"
#include "io/device.h"

#define RAM_SIZE (32 * MiB)
#define ENTRY 0x8000u
#define CASE_ADDR 0x500u
#define VCPUS 2
#define CASES_MAX 64
#define OUT_MAX (1u << 20)
#define PORT_TEXT 0xe9
#define PORT_EXIT 0xf4
#define PORT_STORE 0xe0 /* eight ports that give back what was written; every access counts */
#define PORT_COUNT 0xe8
#define PORT_MAPS 0xec /* a write of a guest-physical address: this process's mappings are told there (struct maps) */
#define MMIO_STORE 0xfd000000u
#define MAPS_MAX 2000
#define PORT_COPY 0xa0 /* doublewords: to, from, bytes; a byte: 1 copies at once, 2 on the loop's thread. Reads: 1 busy, 2 failed */
#define MEMORY_MIB 320     /* of the monitor's own, beyond RAM: the caches of a vCPU when they are full */
#define MAPPINGS_MAX 50000 /* the kernel's default limit is 65530 */

enum end { END_NONE, END_EXIT, END_SHUTDOWN, END_FAILED, END_TIMEOUT };

struct runner {
    const struct engine *engine;
    unsigned timeout_s;
    struct machine_tools tools;
    struct log log;
    struct loop *loop;
    struct machine m;
    struct x86 x; /* the state that a program starts in, or that it ended in */
    struct ram ram;
    struct lapic_bus *lapics;
    struct lapic *lapic[VCPUS];
    pthread_mutex_t lock;
    enum end end;
    char message[256];
    unsigned stopped_vcpu;
    char *out;
    size_t out_len;
    u8 port_store[8], mmio_store[PAGE_SIZE];
    u32 port_count;
    struct copier {
        pthread_mutex_t lock; /* a device's: held while it writes to RAM */
        u32 reg[3];
        u8 state;
    } copier;
    unsigned mappings;       /* of the monitor, at most */
    unsigned checks, failed; /* over all programs */
};

static void stop_loop(void *arg)
{
    struct runner *r = arg;

    loop_stop(r->loop);
}

/* Any thread: the first reason counts. */
static void runner_end(struct runner *r, enum end end, unsigned vcpu, const char *message)
{
    pthread_mutex_lock(&r->lock);
    if (r->end == END_NONE) {
        r->end = end;
        r->stopped_vcpu = vcpu;
        snprintf(r->message, sizeof r->message, "%s", message);
    }
    pthread_mutex_unlock(&r->lock);
    vcpus_freeze(&r->m);
    loop_post(r->loop, stop_loop, r);
}

static void on_stopped(void *arg, struct vcpu *v, int why, const char *message)
{
    runner_end(arg, why == RUN_SHUTDOWN ? END_SHUTDOWN : END_FAILED, v->id, message);
}

static void on_timeout(void *arg) { runner_end(arg, END_TIMEOUT, 0, ""); }

/* ---- the monitor's own memory ---- */

/* Lines of /proc/self/maps: what the kernel's limit on mappings counts. */
static unsigned mappings(void)
{
    FILE *f = fopen("/proc/self/maps", "r");
    unsigned n = 0;
    int c;

    while (f && (c = getc(f)) != EOF)
        n += c == '\n';
    if (f)
        fclose(f);
    return n;
}

/* Whatever a program has done, the monitor is not larger than its guest's RAM and a fixed amount. */
static void check_memory(struct runner *r)
{
    struct rusage u;
    u64 mib;
    bool ok;

    getrusage(RUSAGE_SELF, &u);
    mib = (u64)u.ru_maxrss / 1024;
    r->mappings = MAX(r->mappings, mappings());
    ok = mib <= RAM_SIZE / MiB + MEMORY_MIB && r->mappings <= MAPPINGS_MAX;
    r->checks++;
    r->failed += !ok;
    printf("%sok %u - the monitor's memory is bounded\n# %lu MiB resident at most, %u mappings\n", ok ? "" : "not ", r->checks, mib, r->mappings);
}

/* ---- ports and memory of the test machine ---- */

static void text_write(void *dev, u64 off UNUSED, u64 val, unsigned size UNUSED)
{
    struct runner *r = dev;

    pthread_mutex_lock(&r->lock);
    if (r->out_len < OUT_MAX - 1)
        r->out[r->out_len++] = (char)val;
    pthread_mutex_unlock(&r->lock);
}

static u64 text_read(void *dev UNUSED, u64 off UNUSED, unsigned size UNUSED) { return 0xe9; }

static void exit_write(void *dev, u64 off UNUSED, u64 val UNUSED, unsigned size UNUSED)
{
    runner_end(dev, END_EXIT, 0, "");
}

static u64 port_read(void *dev, u64 off, unsigned size)
{
    struct runner *r = dev;
    u64 v = 0;

    pthread_mutex_lock(&r->lock);
    r->port_count++;
    memcpy(&v, r->port_store + off, size);
    pthread_mutex_unlock(&r->lock);
    return v;
}

static void port_write(void *dev, u64 off, u64 val, unsigned size)
{
    struct runner *r = dev;

    pthread_mutex_lock(&r->lock);
    r->port_count++;
    memcpy(r->port_store + off, &val, size);
    pthread_mutex_unlock(&r->lock);
}

static u64 count_read(void *dev, u64 off UNUSED, unsigned size UNUSED)
{
    struct runner *r = dev;
    u64 v;

    pthread_mutex_lock(&r->lock);
    v = r->port_count & 0xff;
    pthread_mutex_unlock(&r->lock);
    return v;
}

/* For tests of isolation: where the monitor is in its own address space, now. A count, and pairs of first address and
 * end; of more than MAPS_MAX, every second, third, ... one. */
static void maps_write(void *dev, u64 off UNUSED, u64 val, unsigned size UNUSED)
{
    static const char path[] = "/proc/self/maps";
    struct runner *r = dev;
    u64 range[2], count = 0, lines = 0, step, n = 0;
    char line[400];
    FILE *f = fopen(path, "r");

    while (f && fgets(line, sizeof line, f))
        lines += !!strchr(line, '\n');
    step = lines / MAPS_MAX + 1;
    if (f)
        rewind(f);
    while (f && fgets(line, sizeof line, f))
        if (sscanf(line, "%lx-%lx", &range[0], &range[1]) == 2 && n++ % step == 0 && count < MAPS_MAX)
            if (ram_write(&r->ram, val + 8 + 16 * count, range, sizeof range) == 0)
                count++;
    if (f)
        fclose(f);
    if (ram_write(&r->ram, val, &count, sizeof count))
        fprintf(stderr, "sys_runner: the program wants addresses where there is no memory\n");
}

static u64 mmio_read(void *dev, u64 off, unsigned size)
{
    struct runner *r = dev;
    u64 v = 0;

    pthread_mutex_lock(&r->lock);
    memcpy(&v, r->mmio_store + off, size);
    pthread_mutex_unlock(&r->lock);
    return v;
}

static void mmio_write(void *dev, u64 off, u64 val, unsigned size)
{
    struct runner *r = dev;

    pthread_mutex_lock(&r->lock);
    memcpy(r->mmio_store + off, &val, size);
    pthread_mutex_unlock(&r->lock);
}

static void copy_now(void *arg)
{
    struct runner *r = arg;
    struct copier *c = &r->copier;
    u8 buf[PAGE_SIZE];

    pthread_mutex_lock(&c->lock);
    u32 n = c->reg[2];
    bool ok = n <= sizeof buf && !ram_read(&r->ram, c->reg[1], buf, n) && !ram_write(&r->ram, c->reg[0], buf, n);
    c->state = ok ? 0 : 2;
    pthread_mutex_unlock(&c->lock);
}

static void copy_write(void *dev, u64 off, u64 val, unsigned size UNUSED)
{
    struct runner *r = dev;
    struct copier *c = &r->copier;

    pthread_mutex_lock(&c->lock);
    if (off < 12)
        c->reg[off / 4] = (u32)val;
    else
        c->state = 1;
    pthread_mutex_unlock(&c->lock);
    if (off >= 12 && val == 1)
        copy_now(r);
    else if (off >= 12)
        loop_post(r->loop, copy_now, r);
}

static u64 copy_read(void *dev, u64 off UNUSED, unsigned size UNUSED)
{
    struct runner *r = dev;
    u64 v;

    pthread_mutex_lock(&r->copier.lock);
    v = r->copier.state;
    pthread_mutex_unlock(&r->copier.lock);
    return v;
}

static int add_devices(struct runner *r)
{
    const struct region port[] = {
        { .base = PORT_TEXT,
          .size = 1,
          .min = 1,
          .max = 1,
          .read = text_read,
          .write = text_write,
          .dev = r,
          .name = "text" },
        { .base = PORT_EXIT,
          .size = 4,
          .min = 1,
          .max = 4,
          .read = text_read,
          .write = exit_write,
          .dev = r,
          .name = "exit" },
        { .base = PORT_STORE,
          .size = 8,
          .min = 1,
          .max = 4,
          .read = port_read,
          .write = port_write,
          .dev = r,
          .name = "store" },
        { .base = PORT_COUNT,
          .size = 1,
          .min = 1,
          .max = 1,
          .read = count_read,
          .write = port_write,
          .dev = r,
          .name = "count" },
        { .base = PORT_MAPS,
          .size = 4,
          .min = 4,
          .max = 4,
          .read = text_read,
          .write = maps_write,
          .dev = r,
          .name = "maps" },
        { .base = PORT_COPY,
          .size = 16,
          .min = 1,
          .max = 4,
          .read = copy_read,
          .write = copy_write,
          .dev = r,
          .name = "copier" },
    };
    const struct region mmio = {
        .base = MMIO_STORE,
        .size = PAGE_SIZE,
        .min = 1,
        .max = 8,
        .read = mmio_read,
        .write = mmio_write,
        .dev = r,
        .name = "mmio store",
    };
    int rc = 0;

    for (unsigned i = 0; rc >= 0 && i < ARRAY_SIZE(port); i++)
        rc = bus_add(r->m.pio, &port[i]);
    return rc < 0 ? rc : bus_add(r->m.mmio, &mmio);
}

/* ---- one machine, made for every start of a program ---- */

static struct device *device_of(struct lapic *l) { return (struct device *)l; /* it begins with it */ }

static int machine_cpus(struct runner *r)
{
    struct machine *m = &r->m;
    struct vcpu_hooks hooks = { .stopped = on_stopped, .arg = r };
    struct lapic_config lc = {
        .clock = m->clock,
        .phys_bits = cpuid_phys_bits(m->cpuid),
        .x2apic = cpuid_has(m->cpuid, CPU_X2APIC),
        .tsc_deadline = cpuid_has(m->cpuid, CPU_TSC_DEADLINE),
    };
    int rc = lapic_bus_new(&lc, &r->lapics);

    if (rc == 0)
        lapic_bus_attach(r->lapics, (struct irqchip){ m->engine->irqchip, m });
    if (rc == 0)
        rc = m->engine->machine_open(m);
    if (rc < 0)
        return rc;
    m->vcpu = calloc(VCPUS, sizeof *m->vcpu);
    if (!m->vcpu)
        return err(-ENOMEM, "out of memory");
    for (unsigned i = 0; i < VCPUS; i++) {
        struct vcpu *v;

        rc = vcpu_new(m, i, &hooks, &v);
        if (rc < 0)
            return rc;
        m->vcpu[m->vcpus++] = v;
        rc = lapic_new(r->lapics, v->mmio, i, i == 0, vcpu_port(v), &r->lapic[i]);
        if (rc < 0)
            return rc;
        device_of(r->lapic[i])->ops->reset(device_of(r->lapic[i]));
        v->intc = lapic_intc(r->lapic[i]);
    }
    return 0;
}

static int machine_open(struct runner *r)
{
    struct machine *m = &r->m;
    int rc;

    memset(m, 0, sizeof *m);
    m->engine = r->engine;
    m->ram = &r->ram;
    m->tools = r->tools;
    m->log = &r->log;
    pthread_mutex_init(&m->split_lock, NULL);
    if ((rc = loop_new(&r->loop)) < 0 || (rc = clock_new(r->loop, &m->clock)) < 0)
        return rc;
    if ((rc = cpuid_policy_new(VCPUS, clock_tsc_khz(m->clock), &m->cpuid)) < 0)
        return rc;
    if (m->engine->cpuid_limit)
        m->engine->cpuid_limit(m->cpuid);
    if ((rc = ram_init(&r->ram)) < 0 || (rc = ram_add(&r->ram, 0, RAM_SIZE)) < 0)
        return rc;
    if ((rc = bus_new(NULL, &m->pio)) < 0 || (rc = bus_new(NULL, &m->mmio)) < 0 || (rc = add_devices(r)) < 0)
        return rc;
    return machine_cpus(r);
}

static void machine_close(struct runner *r)
{
    struct machine *m = &r->m;

    for (unsigned i = 0; i < VCPUS; i++)
        if (r->lapic[i])
            device_of(r->lapic[i])->ops->free(device_of(r->lapic[i]));
    memset(r->lapic, 0, sizeof r->lapic);
    if (r->lapics)
        lapic_bus_free(r->lapics);
    r->lapics = NULL;
    for (unsigned i = 0; i < m->vcpus; i++)
        vcpu_free(m->vcpu[i]);
    if (m->vcpu && m->engine->machine_close)
        m->engine->machine_close(m);
    free(m->vcpu);
    bus_free(m->pio);
    bus_free(m->mmio);
    cpuid_policy_free(m->cpuid);
    clock_free(m->clock);
    loop_free(r->loop);
    ram_close(&r->ram);
    pthread_mutex_destroy(&m->split_lock);
}

static int start(struct runner *r, const u8 *image, size_t size, u32 run_case)
{
    struct x86 *x = &r->x;
    int rc;

    if (ram_write(&r->ram, ENTRY, image, size) || ram_write(&r->ram, CASE_ADDR, &run_case, sizeof run_case))
        return err(-EINVAL, "the image does not fit");
    x86_reset(x, true);
    x->seg[SEG_CS].sel = 0;
    x->seg[SEG_CS].base = 0;
    x->rip = ENTRY;
    rc = vcpu_set(r->m.vcpu[0], x);
    for (unsigned i = 0; rc == 0 && i < VCPUS; i++)
        rc = vcpu_start(r->m.vcpu[i]);
    return rc;
}

/* Runs the image once. The end and the output are in r. */
static int run_once(struct runner *r, const u8 *image, size_t size, u32 run_case)
{
    struct timer timeout;
    int rc = machine_open(r);

    r->end = END_NONE;
    r->out_len = 0;
    r->port_count = 0;
    memset(r->port_store, 0, sizeof r->port_store);
    memset(r->mmio_store, 0, sizeof r->mmio_store);
    if (rc == 0)
        rc = start(r, image, size, run_case);
    if (rc == 0) {
        timer_init(&timeout, r->m.clock, on_timeout, r);
        timer_arm(&timeout, clock_ns(r->m.clock) + r->timeout_s * 1000000000ull);
        vcpus_release(&r->m);
        rc = loop_run(r->loop);
        timer_disarm(&timeout);
        vcpus_hold(&r->m);
        r->out[r->out_len] = 0;
        if (r->end == END_SHUTDOWN || r->end == END_TIMEOUT)
            vcpu_get(r->m.vcpu[r->stopped_vcpu], &r->x);
    }
    return rc;
}

/* ---- TAP ---- */

static void tap(struct runner *r, bool ok, const char *program, const char *rest)
{
    r->checks++;
    r->failed += !ok;
    printf("%sok %u - %s: %s\n", ok ? "" : "not ", r->checks, program, rest);
}

/* Prints the lines of one run. Returns the name after a last line "shutdown NAME", else NULL; *done: the last line was
 * "done". */
static const char *print_lines(struct runner *r, const char *program, bool *done)
{
    const char *shutdown = NULL;
    char *save = NULL;

    *done = false;
    for (char *line = strtok_r(r->out, "\n", &save); line; line = strtok_r(NULL, "\n", &save)) {
        shutdown = NULL;
        if (strncmp(line, "ok ", 3) == 0)
            tap(r, true, program, line + 3);
        else if (strncmp(line, "not ok ", 7) == 0)
            tap(r, false, program, line + 7);
        else if (strncmp(line, "shutdown ", 9) == 0)
            shutdown = line + 9;
        else if (strcmp(line, "done") == 0)
            *done = true;
        else
            printf("# %s: %s\n", program, line);
    }
    return shutdown;
}

static void print_failure(struct runner *r, const char *program)
{
    static const char *const why[] = { "stopped", "ended without `done`", "unexpected shutdown", "engine failed",
                                       "timeout" };
    char text[400];

    snprintf(text, sizeof text, "runs to its end: %s%s%s", why[r->end], r->message[0] ? ": " : "", r->message);
    tap(r, false, program, text);
    if (r->end == END_SHUTDOWN || r->end == END_TIMEOUT) {
        printf("# state of vCPU %u:\n", r->stopped_vcpu);
        x86_print(&r->x, stdout);
    }
}

static int run_program(struct runner *r, const char *program, const u8 *image, size_t size)
{
    bool done = false;

    for (u32 run_case = 0; !done && run_case < CASES_MAX; run_case++) {
        const char *shutdown;
        int rc = run_once(r, image, size, run_case);

        if (rc < 0)
            return rc;
        r->mappings = MAX(r->mappings, mappings());
        shutdown = print_lines(r, program, &done);
        if (shutdown)
            tap(r, r->end == END_SHUTDOWN, program, shutdown);
        if (!done && !(shutdown && r->end == END_SHUTDOWN)) {
            print_failure(r, program);
            done = true;
        }
        machine_close(r);
    }
    fflush(stdout);
    return 0;
}

/* The file's contents, or NULL with errno set. */
static u8 *read_image(const char *path, size_t *size)
{
    FILE *f = fopen(path, "rb");
    u8 *p = NULL;
    long n = -1;

    if (!f)
        return NULL;
    if (fseek(f, 0, SEEK_END) == 0 && (n = ftell(f)) > 0 && (p = malloc((size_t)n))) {
        rewind(f);
        *size = fread(p, 1, (size_t)n, f);
    }
    fclose(f);
    return p;
}

static void program_name(const char *path, char *name, size_t n)
{
    const char *slash = strrchr(path, '/');
    char *dot;

    snprintf(name, n, "%s", slash ? slash + 1 : path);
    if ((dot = strrchr(name, '.')))
        *dot = 0;
}

static void print_log(void *arg UNUSED, enum log_level level UNUSED, const char *msg) { printf("# %s\n", msg); }

static bool mmu_named(const char *name, enum machine_mmu *mmu)
{
    static const char *const names[] = { [MACHINE_MMU_AUTO] = "auto", [MACHINE_MMU_SHADOW] = "shadow", [MACHINE_MMU_SOFTTLB] = "softtlb" };

    for (unsigned i = 0; i < ARRAY_SIZE(names); i++)
        if (!strcmp(name, names[i])) {
            *mmu = (enum machine_mmu)i;
            return true;
        }
    return false;
}

static int usage(void)
{
    fprintf(stderr, "usage: sys_runner [--engine %s] [--mmu auto|shadow|softtlb] [--timeout SECONDS] [--check] [--at-once] IMAGE.bin...\n",
            engine_names());
    return 64;
}

int main(int argc, char **argv)
{
    static const struct option opts[] = { { "engine", required_argument, NULL, 'e' },
                                          { "timeout", required_argument, NULL, 't' },
                                          { "mmu", required_argument, NULL, 'm' },
                                          { "check", no_argument, NULL, 'c' },
                                          { "at-once", no_argument, NULL, 'o' },
                                          { NULL, 0, NULL, 0 } };
    static struct runner r = { .timeout_s = 60,
                               .lock = PTHREAD_MUTEX_INITIALIZER,
                               .copier.lock = PTHREAD_MUTEX_INITIALIZER,
                               .log = { .sink = print_log } };
    const char *mask = getenv("DOPPEL_HOST_MASK");
    int c;

    if (mask && cpuid_host_mask(mask) < 0) {
        fprintf(stderr, "sys_runner: DOPPEL_HOST_MASK: %s\n", err_last());
        return 64;
    }
    r.engine = engine_find("interp");
    while ((c = getopt_long(argc, argv, "", opts, NULL)) != -1) {
        if (c == 'e')
            r.engine = engine_find(optarg);
        else if (c == 't')
            r.timeout_s = (unsigned)atoi(optarg);
        else if (c == 'c')
            r.tools.check = true;
        else if (c == 'o')
            r.tools.translate_at_once = true;
        else if (c == 'm' && mmu_named(optarg, &r.tools.mmu))
            ;
        else
            return usage();
    }
    r.out = malloc(OUT_MAX);
    if (!r.engine || optind == argc || !r.out || !r.timeout_s)
        return usage();
    for (; optind < argc; optind++) {
        char name[64];
        size_t size = 0;
        u8 *image = read_image(argv[optind], &size);

        program_name(argv[optind], name, sizeof name);
        if (!image || !size) {
            fprintf(stderr, "sys_runner: %s: %s\n", argv[optind], strerror(errno));
            return 1;
        }
        if (run_program(&r, name, image, size) < 0) {
            fprintf(stderr, "sys_runner: %s: %s\n", name, err_last());
            return 1;
        }
        free(image);
    }
    if (!r.tools.check) /* which keeps caches of both engines */
        check_memory(&r);
    printf("1..%u\n", r.checks);
    free(r.out);
    return r.failed ? 1 : 0;
}
