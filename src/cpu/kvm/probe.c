/*
 * Measures whether /dev/kvm is hardware (probe.h): a loop in ring 0 of a small guest, with memory accesses and a
 * privileged instruction, against the same loop here.
 *
 * Some hosts have a KVM without hardware behind it, which carries out a guest's kernel instruction by instruction.
 * Everything works there and takes a hundred times as long.
 *
 * The guest runs on a thread of its own, which is given up if it does not come back: a KVM that hangs must not hang
 * doppel. The thread then owns the struct, and frees it if it ever ends.
 */
#define _GNU_SOURCE
#include "cpu/probe.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "cpu/kvm/kvm.h"

#define ROUNDS 100000u
#define TRIES 5
#define FEW_ROUNDS 1000u                                 /* enough to tell the slowest kind at once */
#define FEW_TRIES 3
#define FEW_NS_MAX 20000000u
#define LIMIT_NS 300000000u
#define GRACE_NS 100000000u
#define GUEST_SIZE (8 * PAGE_SIZE)
enum { PML4 = 0x1000, PDPT = 0x2000, PD = 0x3000, CODE = 0x4000, DATA = 0x5000 };

struct job {
    pthread_mutex_t lock;
    pthread_cond_t changed;
    bool done, given_up;
    pthread_t thread;
    struct kvm_run *_Atomic run;                         /* once it may be kicked */
    atomic_bool late;
    struct probe result;
};

static u64 now_ns(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (u64)t.tv_sec * 1000000000u + (u64)t.tv_nsec;
}

static u64 native_ns(void)
{
    u64 best = UINT64_MAX, cell = 0;

    for (int i = 0; i < TRIES; i++) {
        u64 from = now_ns();
        u32 n = ROUNDS;

        __asm__ volatile("1: mov (%1), %%rax; add %%rcx, %%rax; mov %%rax, (%1); "
                         "test $15, %%cl; jnz 2f; nop; 2: dec %0; jnz 1b"
                         : "+c"(n)
                         : "r"(&cell)
                         : "rax", "memory", "cc");
        best = MIN(best, now_ns() - from);
    }
    return MAX(best, 1);
}

static void guest_image(u8 *ram)
{
    static const u8 code[] = {
        0x48, 0x8b, 0x03,                                /* 1: mov rax, [rbx] */
        0x48, 0x01, 0xc8,                                /*    add rax, rcx */
        0x48, 0x89, 0x03,                                /*    mov [rbx], rax */
        0xf6, 0xc1, 0x0f,                                /*    test cl, 15 */
        0x75, 0x03,                                      /*    jnz 2f */
        0x0f, 0x20, 0xd2,                                /*    mov rdx, cr2 */
        0xff, 0xc9,                                      /* 2: dec ecx */
        0x75, 0xeb,                                      /*    jnz 1b */
        0xf4,                                            /*    hlt */
    };
    const u64 entry[][2] = { { PML4, PDPT | 3 }, { PDPT, PD | 3 }, { PD, 0x83 } };

    for (unsigned i = 0; i < ARRAY_SIZE(entry); i++)
        memcpy(ram + entry[i][0], &entry[i][1], sizeof(u64));
    memcpy(ram + CODE, code, sizeof code);
}

static int set_mode(int vcpu)
{
    struct kvm_sregs s;
    struct kvm_segment data = { .limit = UINT32_MAX, .selector = 16, .type = 3, .s = 1, .present = 1, .db = 1, .g = 1 };

    if (ioctl(vcpu, KVM_GET_SREGS, &s) < 0)
        return -1;
    s.ds = s.es = s.fs = s.gs = s.ss = data;
    s.cs = (struct kvm_segment){ .limit = UINT32_MAX, .selector = 8, .type = 11, .s = 1, .present = 1, .l = 1, .g = 1 };
    s.cr0 = CR0_PE | CR0_MP | CR0_ET | CR0_NE | CR0_PG;
    s.cr3 = PML4;
    s.cr4 = CR4_PAE;
    s.efer = EFER_LME | EFER_LMA;
    return ioctl(vcpu, KVM_SET_SREGS, &s);
}

/* One run of the loop: its time; cut short, the time it would have taken, 0 if nothing was done; UINT64_MAX with errno.
   */
static u64 guest_ns(struct job *j, int vcpu, struct kvm_run *run, u32 rounds)
{
    struct kvm_regs r = { .rip = CODE, .rbx = DATA, .rcx = rounds, .rsp = DATA, .rflags = FLAG_1 };
    u64 from;

    if (ioctl(vcpu, KVM_SET_REGS, &r) < 0)
        return UINT64_MAX;
    from = now_ns();
    while (!atomic_load(&j->late)) {
        int e = ioctl(vcpu, KVM_RUN, 0);

        if (e == 0 && run->exit_reason == KVM_EXIT_HLT)
            return MAX(now_ns() - from, 1);
        if (e == 0 && run->exit_reason != KVM_EXIT_INTR)
            return errno = EIO, UINT64_MAX;
        if (e < 0 && errno != EINTR && errno != EAGAIN)
            return UINT64_MAX;
    }
    u64 passed = now_ns() - from;

    if (ioctl(vcpu, KVM_GET_REGS, &r) < 0 || r.rcx >= rounds || r.rcx == 0)
        return 0;
    return passed * rounds / (rounds - r.rcx);
}

/* The best of a few runs, as if of ROUNDS; 0 if none was completed in time. False: a guest does not run. */
static bool best_of(struct job *j, int vcpu, struct kvm_run *run, u32 rounds, int tries, u64 enough, u64 *best)
{
    *best = 0;
    for (int i = 0; i < tries && (!*best || *best > enough); i++) {
        u64 ns = guest_ns(j, vcpu, run, rounds);

        if (ns == UINT64_MAX) {
            snprintf(j->result.error, sizeof j->result.error, "a guest does not run: %s", strerror(errno));
            return false;
        }
        ns *= ROUNDS / rounds;
        if (ns && (!*best || ns < *best))
            *best = ns;
    }
    return true;
}

/* A few rounds tell the slowest kind; they take too little time to tell more. */
static void judge(struct job *j, int vcpu, struct kvm_run *run)
{
    u64 few, best, native = native_ns(), hopeless = (u64)FEW_NS_MAX * (ROUNDS / FEW_ROUNDS);

    if (!best_of(j, vcpu, run, FEW_ROUNDS, FEW_TRIES, hopeless, &few))
        return;
    best = few;
    if (few && few <= hopeless && !best_of(j, vcpu, run, ROUNDS, TRIES, 2 * native, &best))
        return;
    if (!best)
        best = few;
    j->result.verdict = PROBE_STUCK;
    if (!best)
        return;
    j->result.times = (unsigned)MIN(MAX(best / native, 1), 1000000);
    j->result.verdict = j->result.times > PROBE_TIMES_MAX ? PROBE_EMULATED : PROBE_REAL;
}

/* The last step that failed stays as the reason. */
static void measure(struct job *j)
{
    static const char *const step[] = { "open", "machine", "memory", "vCPU", "its page", "its state" };
    struct kvm_userspace_memory_region slot = { .memory_size = GUEST_SIZE };
    int sys = open("/dev/kvm", O_RDWR | O_CLOEXEC), vm = -1, vcpu = -1, size = -1, at = 0, e = errno;
    u8 *ram = mmap(NULL, GUEST_SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    struct kvm_run *run = MAP_FAILED;

    j->result.verdict = PROBE_UNUSABLE;
    if (sys < 0 && (e == ENOENT || e == EACCES))
        j->result.verdict = e == ENOENT ? PROBE_ABSENT : PROBE_FORBIDDEN;
    if (sys >= 0) {
        at = 1;
        if (ioctl(sys, KVM_GET_API_VERSION, 0) == KVM_API_VERSION && (vm = ioctl(sys, KVM_CREATE_VM, 0)) >= 0)
            at = 2;
        slot.userspace_addr = (u64)ram;
        if (at == 2 && ram != MAP_FAILED && ioctl(vm, KVM_SET_TSS_ADDR, 0xfeffd000ul) == 0 &&
            ioctl(vm, KVM_SET_USER_MEMORY_REGION, &slot) == 0)
            at = 3;
        if (at == 3 && (vcpu = ioctl(vm, KVM_CREATE_VCPU, 0)) >= 0)
            at = 4;
        if (at == 4 && (size = ioctl(sys, KVM_GET_VCPU_MMAP_SIZE, 0)) >= (int)sizeof *run &&
            (run = mmap(NULL, (size_t)size, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, 0)) != MAP_FAILED)
            at = 5;
        if (at == 5) {
            guest_image(ram);
            if (set_mode(vcpu) == 0)
                at = 6;
        }
        e = errno;
    }
    if (at == 6) {
        atomic_store(&j->run, run);
        judge(j, vcpu, run);
        atomic_store(&j->run, NULL);
    } else {
        snprintf(j->result.error, sizeof j->result.error, "%s: %s", step[at], strerror(e));
    }
    if (vcpu >= 0)
        close(vcpu);
    if (vm >= 0)
        close(vm);
    if (sys >= 0)
        close(sys);
    if (ram != MAP_FAILED)
        munmap(ram, GUEST_SIZE);
    /* `run` stays mapped until the thread has been told that nobody will kick it any more: see kvm_probe(). */
    pthread_mutex_lock(&j->lock);
    if (run != MAP_FAILED)
        munmap(run, (size_t)size);
    pthread_mutex_unlock(&j->lock);
}

static void job_free(struct job *j)
{
    pthread_mutex_destroy(&j->lock);
    pthread_cond_destroy(&j->changed);
    free(j);
}

static void *job_main(void *arg)
{
    struct job *j = arg;
    bool given_up;

    kvm_take_kicks();
    measure(j);
    pthread_mutex_lock(&j->lock);
    j->done = true;
    given_up = j->given_up;
    pthread_cond_signal(&j->changed);
    pthread_mutex_unlock(&j->lock);
    if (given_up)
        job_free(j);
    return NULL;
}

/* Waits until the job is done, at most ns. Under the lock. */
static bool wait_done(struct job *j, u64 ns)
{
    struct timespec t;
    u64 at = now_ns() + ns;

    t.tv_sec = (time_t)(at / 1000000000u);
    t.tv_nsec = (long)(at % 1000000000u);
    while (!j->done)
        if (pthread_cond_timedwait(&j->changed, &j->lock, &t) == ETIMEDOUT)
            return j->done;
    return true;
}

static int job_start(struct job *j)
{
    pthread_condattr_t monotonic;
    sigset_t all, old;
    int r;

    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_mutex_init(&j->lock, NULL);
    pthread_cond_init(&j->changed, &monotonic);
    pthread_condattr_destroy(&monotonic);
    kvm_catch_kicks();
    sigfillset(&all);
    pthread_sigmask(SIG_BLOCK, &all, &old);
    r = pthread_create(&j->thread, NULL, job_main, j);
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    return r;
}

void kvm_probe(struct probe *p)
{
    struct job *j = calloc(1, sizeof *j);
    pthread_t thread;
    bool given_up;

    *p = (struct probe){ .verdict = PROBE_UNUSABLE, .error = "out of memory" };
    if (!j)
        return;
    if (job_start(j)) {
        job_free(j);
        return;
    }
    thread = j->thread;
    pthread_mutex_lock(&j->lock);
    if (!wait_done(j, LIMIT_NS)) {
        atomic_store(&j->late, true);
        if (atomic_load(&j->run))
            __atomic_store_n(&atomic_load(&j->run)->immediate_exit, 1, __ATOMIC_SEQ_CST);
        pthread_kill(j->thread, KVM_KICK_SIGNAL);
        wait_done(j, GRACE_NS);
    }
    *p = j->result;
    given_up = j->given_up = !j->done;
    pthread_mutex_unlock(&j->lock);                      /* the job is the thread's from here on, if it is given up */
    if (given_up) {
        *p = (struct probe){ .verdict = PROBE_STUCK };
        pthread_detach(thread);
        return;
    }
    pthread_join(thread, NULL);
    job_free(j);
}
