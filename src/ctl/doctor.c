/*
 * `doppel doctor` (doctor.h): a table of checks, each of which looks at one thing and says what it found and, if it is
 * missing, how to get it.
 *
 * Nothing here waits for anybody: no network is tried and no program is started; what a host permits is tried in a child.
 */
#define _GNU_SOURCE
#include "ctl/doctor.h"

#include <cpuid.h>
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <stdarg.h>
#include <string.h>
#include <sys/auxv.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/utsname.h>
#include <sys/wait.h>
#include <unistd.h>

#include "back/virtiofsd.h"
#include "base/err.h"
#include "base/types.h"
#include "cpu/cpuid.h"
#include "ctl/engine_choice.h"
#include "ctl/guest.h"
#include "ctl/help.h"
#include "ctl/message.h"
#include "ctl/run.h"

#define MAPS_WANTED 65530                                          /* Linux's default for vm.max_map_count */
#define FILES_WANTED 256
#define SHARED_FILES_WANTED 100000
#define HWCAP2_FSGSBASE_BIT 2                                      /* Linux arch/x86/include/uapi/asm/hwcap2.h: bit 1 */

enum verdict { GOOD, NOTE, MISSING };

struct finding {
    enum verdict verdict;
    char value[256];
    char remedy[512];                                              /* "" when there is nothing to be done */
};

static void found(struct finding *f, enum verdict verdict, const char *fmt, ...) __attribute__((format(printf, 3, 4)));
static void found(struct finding *f, enum verdict verdict, const char *fmt, ...)
{
    va_list ap;
    f->verdict = verdict;
    va_start(ap, fmt);
    vsnprintf(f->value, sizeof(f->value), fmt, ap);
    va_end(ap);
}

static void remedy(struct finding *f, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
static void remedy(struct finding *f, const char *fmt, ...)
{
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(f->remedy, sizeof(f->remedy), fmt, ap);
    va_end(ap);
}

/* A number from a file of /proc; false if it cannot be read. */
static bool read_number(const char *path, u64 *v)
{
    FILE *f = fopen(path, "re");
    unsigned long long n = 0;
    bool ok = f && fscanf(f, "%llu", &n) == 1;
    if (f)
        fclose(f);
    *v = n;
    return ok;
}

static bool meminfo(const char *key, u64 *kib)
{
    FILE *f = fopen("/proc/meminfo", "re");
    char line[128];
    unsigned long long n = 0;
    bool ok = false;
    while (f && !ok && fgets(line, sizeof(line), f))
        ok = !strncmp(line, key, strlen(key)) && sscanf(line + strlen(key), ": %llu", &n) == 1;
    if (f)
        fclose(f);
    *kib = n;
    return ok;
}

/* --- the processor (Intel SDM vol. 2A, CPUID) --- */

static void check_system(struct finding *f)
{
    struct utsname u;
    uname(&u);
    found(f, GOOD, "%s %s %s", u.sysname, u.release, u.machine);
}

static void check_processor(struct finding *f)
{
    u32 r[12] = {0};
    for (unsigned i = 0; i < 3; i++)
        __get_cpuid(0x80000002 + i, &r[4 * i], &r[4 * i + 1], &r[4 * i + 2], &r[4 * i + 3]);
    char brand[sizeof(r) + 1] = "";
    memcpy(brand, r, sizeof(r));
    cpu_set_t set;
    CPU_ZERO(&set);
    sched_getaffinity(0, sizeof(set), &set);
    found(f, GOOD, "%s (%d usable)", brand[0] ? brand + strspn(brand, " ") : "unknown", CPU_COUNT(&set));
}

static void check_hypervisor(struct finding *f)
{
    u32 a, b, c, d;
    char name[13] = "";
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & BIT(31))) {
        found(f, GOOD, "none: this is the machine itself");
        return;
    }
    __cpuid(0x40000000, a, b, c, d);
    memcpy(name, &b, 4);
    memcpy(name + 4, &c, 4);
    memcpy(name + 8, &d, 4);
    for (char *p = name; *p; p++)
        if (*p < ' ' || *p > '~')
            *p = '?';
    found(f, GOOD, "this host is itself a guest (\"%s\")", name);
}

static const struct feature {
    const char *name;
    u32 leaf;
    unsigned reg, bit;                                             /* reg: 0 eax .. 3 edx */
    /* by the interpreter, which runs vector instructions as they are */
    bool required;
} features[] = {
    {"SSE4.2", 1, 2, 20, true}, {"POPCNT", 1, 2, 23, true}, {"AVX", 1, 2, 28, false}, {"AVX2", 7, 1, 5, false},
    {"BMI2", 7, 1, 8, false},
    {"FSGSBASE", 7, 1, 0, false}, {"PKU", 7, 2, 3, false}, {"AVX512F", 7, 1, 16, false}, {"AES", 1, 2, 25, false},
    {"SHA", 7, 1, 29, false},
    {"RDRAND", 1, 2, 30, false}, {"RDSEED", 7, 1, 18, false}, {"INVARIANT-TSC", 0x80000007, 3, 8, false},
};

static void check_features(struct finding *f)
{
    char has[200] = "", lacks[200] = "";
    bool bad = false;
    for (size_t i = 0; i < ARRAY_SIZE(features); i++) {
        const struct cpuid_regs *h = cpuid_host(features[i].leaf, 0);
        const u32 r[4] = {h->eax, h->ebx, h->ecx, h->edx};
        bool there = r[features[i].reg] & BIT(features[i].bit);
        char *list = there ? has : lacks;
        size_t len = strlen(list);
        snprintf(list + len, sizeof(has) - len, " %s", features[i].name);
        bad |= !there && features[i].required;
    }
    found(f, bad ? MISSING : *lacks ? NOTE : GOOD, "%s%s%s", has[0] ? has + 1 : "none", *lacks ? "; not" : "", lacks);
    if (bad)
        remedy(f, "the processor is older than doppel supports (x86-64-v2)");
    else if (*lacks)
        remedy(f, "guests are not offered what the host lacks");
}

static void check_fsgsbase(struct finding *f)
{
    bool on = getauxval(AT_HWCAP2) & HWCAP2_FSGSBASE_BIT;
    found(f, on ? GOOD : NOTE, on ? "usable by programs" : "not usable by programs");
    if (!on)
        remedy(f, "not needed by doppel, which sets the base once in a thread's life; Linux 5.9 or later enables it where the processor has it");
}

/* --- engines --- */

/* Linux' parameter of the module for machines inside machines: of a host that is itself a guest, its host's counts. */
static const char *nested_advice(void)
{
    u32 a, b, c, d;
    bool guest = __get_cpuid(1, &a, &b, &c, &d) && (c & BIT(31));

    if (guest)
        return "this host is a guest: its own host must offer nested virtualization (kvm_intel.nested=1 or kvm_amd.nested=1 "
               "there, and the processor type passed through)";
    return "enable VT-x or SVM in the BIOS, then \"modprobe kvm_intel\" or \"modprobe kvm_amd\" as root";
}

static void check_kvm(struct finding *f)
{
    struct probe p;

    kvm_probe(&p);
    found(f, NOTE, "/dev/kvm is there and does not work: %s", p.error);
    switch (p.verdict) {
    case PROBE_REAL:
        found(f, GOOD, "real: a loop in ring 0 takes %u times as long as here", p.times);
        return;
    case PROBE_EMULATED:
        found(f, NOTE, "/dev/kvm is there, but a loop in ring 0 takes %u times as long as here: it emulates", p.times);
        remedy(f, "a host with virtualization hardware would run guests faster; here another engine is the better one");
        return;
    case PROBE_STUCK:
        found(f, NOTE, "/dev/kvm is there, but a small loop of a guest does not end on it");
        break;
    case PROBE_FORBIDDEN:
        found(f, NOTE, "/dev/kvm is there but cannot be used: permission denied");
        remedy(f, "\"sudo adduser $USER kvm\" and a new login give access; other engines need none");
        return;
    case PROBE_ABSENT:
        found(f, NOTE, "no /dev/kvm");
        break;
    case PROBE_UNUSABLE:
        break;
    }
    remedy(f, "not needed; %s", nested_advice());
}

static void check_engine(struct finding *f)
{
    char reason[128];
    const struct engine *e = engine_choose(reason, sizeof(reason));
    found(f, GOOD, "%s (%s)", e->name, reason);
}

/* --- the system --- */

static void check_memory(struct finding *f)
{
    u64 total = 0, available = 0;
    if (!meminfo("MemTotal", &total) || !meminfo("MemAvailable", &available)) {
        found(f, NOTE, "unknown: /proc/meminfo cannot be read");
        return;
    }
    bool low = available < 640 * KiB;
    found(f, low ? NOTE : GOOD, "%llu MiB, %llu MiB free for a guest", (unsigned long long)(total / KiB),
          (unsigned long long)(available / KiB));
    if (low)
        remedy(f, "the default guest has 512 MiB; give it less with --memory, or end something");
}

static void check_memfd(struct finding *f)
{
    int fd = memfd_create("doppel-doctor", MFD_CLOEXEC);
    bool ok = fd >= 0 && ftruncate(fd, (off_t)PAGE_SIZE) == 0;
    void *p = ok ? mmap(NULL, PAGE_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0) : MAP_FAILED;
    void *x = p != MAP_FAILED ? mmap(NULL, PAGE_SIZE, PROT_READ | PROT_EXEC, MAP_SHARED, fd, 0) : MAP_FAILED;
    int error = errno;
    if (x != MAP_FAILED)
        found(f, GOOD, "works, also for code");
    else
        found(f, MISSING, "%s: %s", p == MAP_FAILED ? "does not work" : "works, but not for code", strerror(error));
    if (x == MAP_FAILED)
        remedy(f, "guest memory and generated code live in memfd; a security policy (SELinux, a container's seccomp "
                  "profile, vm.memfd_noexec) forbids it");
    if (p != MAP_FAILED)
        munmap(p, PAGE_SIZE);
    if (x != MAP_FAILED)
        munmap(x, PAGE_SIZE);
    if (fd >= 0)
        close(fd);
}

static void check_maps(struct finding *f)
{
    u64 n;
    if (!read_number("/proc/sys/vm/max_map_count", &n)) {
        found(f, NOTE, "unknown: /proc/sys/vm/max_map_count cannot be read");
        return;
    }
    found(f, n < MAPS_WANTED ? NOTE : GOOD, "%llu mappings", (unsigned long long)n);
    if (n < MAPS_WANTED)
        remedy(f, "\"sysctl vm.max_map_count=%d\" as root gives the usual number", MAPS_WANTED);
}

static void check_files(struct finding *f)
{
    struct rlimit l = {0, 0};
    getrlimit(RLIMIT_NOFILE, &l);
    bool few = l.rlim_cur != RLIM_INFINITY && l.rlim_cur < FILES_WANTED;
    if (l.rlim_cur == RLIM_INFINITY)
        found(f, GOOD, "unlimited");
    else
        found(f, few ? NOTE : GOOD, "%llu", (unsigned long long)l.rlim_cur);
    if (few)
        remedy(f, "\"ulimit -n %d\" raises the limit", FILES_WANTED);
}

static void check_address_space(struct finding *f)
{
    struct rlimit l = {0, 0};
    getrlimit(RLIMIT_AS, &l);
    bool limited = l.rlim_cur != RLIM_INFINITY;
    if (!limited)
        found(f, GOOD, "unlimited");
    else
        found(f, NOTE, "%llu MiB", (unsigned long long)(l.rlim_cur / MiB));
    if (limited)
        remedy(f, "a guest needs its memory and some 100 MiB more; \"ulimit -v unlimited\" lifts the limit");
}

static void check_seccomp(struct finding *f)
{
    char actions[256] = "";
    FILE *file = fopen("/proc/sys/kernel/seccomp/actions_avail", "re");
    bool ok = file && fgets(actions, sizeof(actions), file) && strstr(actions, "trap");
    if (file)
        fclose(file);
    found(f, ok ? GOOD : NOTE, ok ? "available, with trap" : "not available");
    if (!ok)
        remedy(f, "not needed by this version; a kernel with CONFIG_SECCOMP_FILTER has it");
}

/* The child only tries; a fork of this small process takes no time. */
static void check_namespaces(struct finding *f)
{
    int status = -1;
    pid_t child = fork();
    if (child == 0)
        _exit(unshare(CLONE_NEWUSER) == 0 ? 0 : 1);
    bool ok = child > 0 && waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0;
    found(f, ok ? GOOD : NOTE, ok ? "can be made" : "cannot be made");
    if (!ok)
        remedy(f, "only virtio-fs takes them; \"sysctl kernel.unprivileged_userns_clone=1\" or user.max_user_namespaces=10000 as root allow them, where no container "
                  "forbids it");
}

/* --- the default guest --- */

static void check_guest(struct finding *f)
{
    struct guest g;
    char script[PATH_MAX], dir[PATH_MAX];
    if (guest_find(&g) == 0) {
        found(f, GOOD, "%.240s", g.dir);
        return;
    }
    found(f, NOTE, "%.240s", err_last());
    if (guest_build_paths(script, dir) == 0)
        remedy(f, "the first \"doppel run\" makes it, or you do: %.220s %.220s (needs the network once)", script, dir);
    else
        remedy(f, "%.500s", err_last());
    f->verdict = f->verdict == NOTE && !*f->remedy ? MISSING : f->verdict;
}

static bool in_folders(const char *program, const char *p)
{
    char path[PATH_MAX];
    while (p && *p) {
        size_t len = strcspn(p, ":");
        int n = snprintf(path, sizeof(path), "%.*s/%s", (int)MIN(len, 2000), p, program);
        if (n > 0 && n < PATH_MAX && access(path, X_OK) == 0)
            return true;
        p += len + (p[len] == ':');
    }
    return false;
}

/* Where guest/build and image/build look. */
static bool in_path(const char *program)
{
    const char *path = getenv("PATH");
    return in_folders(program, path ? path : "") || in_folders(program, "/usr/sbin:/sbin");
}

static void check_tools(struct finding *f)
{
    static const char *const tools[] = {"bash", "apt-get", "apt-cache", "dpkg", "flock", "sha256sum"};
    char lacks[200] = "";
    for (size_t i = 0; i < ARRAY_SIZE(tools); i++) {
        size_t len = strlen(lacks);
        if (!in_path(tools[i]))
            snprintf(lacks + len, sizeof(lacks) - len, " %s", tools[i]);
    }
    if (!*lacks) {
        found(f, GOOD, "all there");
        return;
    }
    found(f, NOTE, "missing:%s", lacks);
    remedy(f, "only needed to build the default guest, on Debian and its relatives; elsewhere copy a guest and set "
              "DOPPEL_GUEST, or give --kernel");
}

/* --- shared folders, images, networks --- */

static void check_virtiofs(struct finding *f)
{
    struct rlimit l = {0, 0};
    getrlimit(RLIMIT_NOFILE, &l);
    if (virtiofsd_usable("/", true) < 0) {
        found(f, NOTE, "%.240s", err_last());
        remedy(f, "folders are shared by 9p without it, and --root takes that then; virtio-fs takes the package qemu-system-common (or virtiofsd), and user namespaces");
        return;
    }
    bool few = l.rlim_max != RLIM_INFINITY && l.rlim_max < SHARED_FILES_WANTED;
    if (l.rlim_max == RLIM_INFINITY)
        found(f, GOOD, "virtiofsd can run");
    else
        found(f, few ? NOTE : GOOD, "virtiofsd can run; a guest may use %llu files of a folder at once", (unsigned long long)l.rlim_max);
    if (few)
        remedy(f, "more at once take a higher limit (\"ulimit -Hn\", /etc/security/limits.conf), or 9p, which has none");
}

static void check_image_tools(struct finding *f)
{
    static const struct { const char *program, *package; } tools[] = {
        {"mmdebstrap", "mmdebstrap"}, {"fakechroot", "fakechroot"}, {"fakeroot", "fakeroot"}, {"mke2fs", "e2fsprogs"}, {"dpkg", "dpkg"}, {"perl", "perl"},
    };
    char lacks[200] = "";
    for (size_t i = 0; i < ARRAY_SIZE(tools); i++) {
        size_t len = strlen(lacks);
        if (!in_path(tools[i].program))
            snprintf(lacks + len, sizeof(lacks) - len, " %s", tools[i].package);
    }
    if (!*lacks) {
        found(f, GOOD, "\"doppel image build\" has all that it needs; it takes neither user namespaces nor ranges in /etc/subuid");
        return;
    }
    found(f, NOTE, "\"doppel image build\" lacks:%s", lacks);
    remedy(f, "\"apt-get install%s\" as root; images can be imported without them", lacks);
}

static void check_firmware(struct finding *f)
{
    bool there = access(RUN_FIRMWARE, R_OK) == 0;
    found(f, there ? GOOD : NOTE, there ? RUN_FIRMWARE : "no " RUN_FIRMWARE);
    if (!there)
        remedy(f, "imported disks with a boot sector boot by it; install the package seabios");
}

static void check_network(struct finding *f)
{
    int fd = open("/dev/net/tun", O_RDWR | O_CLOEXEC);
    bool tun = fd >= 0, passt = in_path("passt");
    found(f, tun && passt ? GOOD : NOTE, "user: built in; tap: /dev/net/tun %s; passt: %s", tun ? "can be opened" : strerror(errno), passt ? "there" : "not installed");
    if (tun)
        close(fd);
    if (!tun || !passt)
        remedy(f, "--net user needs neither; tap devices are made by root (ip tuntap add NAME mode tap user YOU), passt is a package of that name");
}

static void check_terminal(struct finding *f)
{
    bool tty = isatty(STDIN_FILENO) && isatty(STDOUT_FILENO);
    found(f, GOOD, tty ? "a terminal" : "standard input or output is no terminal: no raw mode");
}

static const struct check {
    const char *name;                                              /* NULL: text is the heading of those that follow */
    const char *heading;
    void (*run)(struct finding *f);
} checks[] = {
    {NULL, "Host", NULL},
    {"system", NULL, check_system},
    {"processor", NULL, check_processor},
    {"hypervisor", NULL, check_hypervisor},
    {"features", NULL, check_features},
    {"fsgsbase", NULL, check_fsgsbase},
    {"memory", NULL, check_memory},
    {NULL, "Engines", NULL},
    {"kvm", NULL, check_kvm},
    {"auto takes", NULL, check_engine},
    {NULL, "System services", NULL},
    {"memfd", NULL, check_memfd},
    {"max_map_count", NULL, check_maps},
    {"open files", NULL, check_files},
    {"address space", NULL, check_address_space},
    {"seccomp", NULL, check_seccomp},
    {"user namespaces", NULL, check_namespaces},
    {"console", NULL, check_terminal},
    {NULL, "Default guest", NULL},
    {"guest", NULL, check_guest},
    {"tools", NULL, check_tools},
    {NULL, "Shared folders, images, networks", NULL},
    {"virtio-fs", NULL, check_virtiofs},
    {"image build", NULL, check_image_tools},
    {"firmware", NULL, check_firmware},
    {"network", NULL, check_network},
};

static void show(const struct check *c, const struct finding *f)
{
    static const char *const marks[] = {[GOOD] = "ok", [NOTE] = "--", [MISSING] = "!!"};
    printf("  %s  %-16s ", marks[f->verdict], c->name);
    help_fill(stdout, f->value, 23, 23);
    if (!*f->remedy)
        return;
    printf("%23s", "");
    help_fill(stdout, f->remedy, 23, 23);
}

int doctor_main(int argc, char **argv)
{
    unsigned missing = 0;
    if (argc) {
        message_error("doctor: \"%.100s\": takes no words; write doppel doctor", argv[0]);
        return EXIT_USAGE;
    }
    printf("doppel %s\n", DOPPEL_VERSION);
    for (size_t i = 0; i < ARRAY_SIZE(checks); i++) {
        struct finding f = {.verdict = GOOD};
        if (!checks[i].run) {
            printf("\n%s\n", checks[i].heading);
            continue;
        }
        fflush(stdout);
        checks[i].run(&f);
        show(&checks[i], &f);
        missing += f.verdict == MISSING;
    }
    puts(missing ? "\nLines with !! must be mended before doppel can run a guest."
                 : "\nThis host can run guests. Lines with -- are for information.");
    fflush(stdout);
    return 0;
}
