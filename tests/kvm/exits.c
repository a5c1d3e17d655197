/*
 * exits [ROUNDS]: what a guest's store to a device costs by the ways that KVM has for it: an exit to the program, an
 * eventfd (KVM_IOEVENTFD) that nobody waits for, the ring of coalesced accesses, and a device in the kernel (the PIT). Ports and memory;
 * nanoseconds each, the best of five loops. bench/kvm runs it there. And until the device has answered into the guest's memory: in the exit,
 * or by a thread that waits for the eventfd.
 *
 * A guest of one page in real mode on a bare KVM machine: nothing of doppel's is in the way.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#define CODE 0x1000u
#define PORT 0x80u
#define PIT 0x61u
#define MMIO 0xd000u                                               /* a hole in the guest's memory */

/* mov cx, N in two halves by the registers: rcx counts, dx is the port, di the address */
static const unsigned char port_loop[] = { 0xee, 0x66, 0x49, 0x75, 0xfb, 0xf4 };             /* out dx, al; dec ecx; jnz; hlt */
static const unsigned char mmio_loop[] = { 0x88, 0x05, 0x66, 0x49, 0x75, 0xfa, 0xf4 };       /* mov [di], al; ... */

/* mov [di], al; cmp byte [si], 0; je; mov byte [si], 0; ... */
static const unsigned char answer_loop[] = { 0x88, 0x05, 0x80, 0x3c, 0x00, 0x74, 0xfb, 0xc6, 0x04, 0x00, 0x66, 0x49, 0x75, 0xf2, 0xf4 };
#define ANSWER 0x800u                                              /* [si], from the page's start */

static int vm, cpu;
static volatile unsigned char *answer;
static struct kvm_run *run;

static void need(int ok, const char *what)
{
    if (!ok) {
        fprintf(stderr, "kvm_exits: %s: %s\n", what, strerror(errno));
        exit(1);
    }
}

static double now_ns(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e9 + (double)t.tv_nsec;
}

/* One loop to its HLT, which the kernel keeps to itself with interrupt chips: so its end is an exit by port 0xf4 instead. */
static double once(unsigned port, unsigned rounds)
{
    struct kvm_regs r = { .rip = CODE, .rcx = rounds, .rdx = port, .rdi = MMIO, .rsi = CODE + ANSWER, .rflags = 2 };
    double from;

    need(ioctl(cpu, KVM_SET_REGS, &r) == 0, "KVM_SET_REGS");
    from = now_ns();
    for (;;) {
        need(ioctl(cpu, KVM_RUN, 0) == 0 || errno == EINTR, "KVM_RUN");
        if (run->exit_reason == KVM_EXIT_IO && run->io.port == 0xf4)
            return (now_ns() - from) / rounds;
        need(run->exit_reason == KVM_EXIT_IO || run->exit_reason == KVM_EXIT_MMIO, "an exit");
        *answer = 1;
    }
}

enum loop { BY_PORT, BY_MEMORY, ANSWERED };

static void measure(const char *name, unsigned char *ram, enum loop kind, unsigned port, unsigned rounds)
{
    static const unsigned char end[] = { 0xe6, 0xf4, 0xf4 };       /* out 0xf4, al */
    static const unsigned char *const loops[] = { port_loop, mmio_loop, answer_loop };
    static const size_t sizes[] = { sizeof port_loop, sizeof mmio_loop, sizeof answer_loop };
    const unsigned char *code = loops[kind];
    size_t n = sizes[kind] - 1;
    double best = 1e18;

    memcpy(ram, code, n);
    memcpy(ram + n, end, sizeof end);
    for (int i = 0; i < 5; i++) {
        double ns = once(port, rounds);

        best = ns < best ? ns : best;
    }
    printf("%-44s %8.0f ns\n", name, best);
}

static void *answers(void *arg)
{
    unsigned long long n;

    while (read(*(int *)arg, &n, sizeof n) == sizeof n)
        *answer = 1;
    return NULL;
}

static void open_machine(unsigned char *ram)
{
    struct kvm_userspace_memory_region slot = { .guest_phys_addr = CODE, .memory_size = 4096, .userspace_addr = (unsigned long)ram };
    struct kvm_pit_config pit = { 0 };
    struct kvm_sregs s;
    int sys = open("/dev/kvm", O_RDWR | O_CLOEXEC);

    need(sys >= 0, "/dev/kvm");
    need((vm = ioctl(sys, KVM_CREATE_VM, 0)) >= 0, "KVM_CREATE_VM");
    need(ioctl(vm, KVM_SET_TSS_ADDR, 0xfffbd000ul) == 0, "KVM_SET_TSS_ADDR");
    need(ioctl(vm, KVM_CREATE_IRQCHIP, 0) == 0 && ioctl(vm, KVM_CREATE_PIT2, &pit) == 0, "chips");
    need(ioctl(vm, KVM_SET_USER_MEMORY_REGION, &slot) == 0, "memory");
    need((cpu = ioctl(vm, KVM_CREATE_VCPU, 0)) >= 0, "KVM_CREATE_VCPU");
    run = mmap(NULL, (size_t)ioctl(sys, KVM_GET_VCPU_MMAP_SIZE, 0), PROT_READ | PROT_WRITE, MAP_SHARED, cpu, 0);
    need(run != MAP_FAILED, "mmap");
    need(ioctl(cpu, KVM_GET_SREGS, &s) == 0, "KVM_GET_SREGS");
    s.cs.base = s.cs.selector = 0;
    need(ioctl(cpu, KVM_SET_SREGS, &s) == 0, "KVM_SET_SREGS");
}

int main(int argc, char **argv)
{
    unsigned rounds = argc > 1 ? (unsigned)atoi(argv[1]) : 20000;
    unsigned char *ram = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    int fd = eventfd(0, EFD_NONBLOCK), waited = eventfd(0, 0);
    pthread_t thread;
    struct kvm_ioeventfd event = { .addr = PORT, .len = 1, .fd = fd, .flags = KVM_IOEVENTFD_FLAG_PIO };
    struct kvm_coalesced_mmio_zone zone = { .addr = MMIO, .size = 16 };

    need(ram != MAP_FAILED && fd >= 0 && rounds, "setup");
    answer = ram + ANSWER;
    open_machine(ram);
    measure("port, exit to the program", ram, BY_PORT, PORT, rounds);
    measure("port, device in the kernel", ram, BY_PORT, PIT, rounds);
    need(ioctl(vm, KVM_IOEVENTFD, &event) == 0, "KVM_IOEVENTFD");
    measure("port, eventfd", ram, BY_PORT, PORT, rounds);
    measure("memory, exit to the program", ram, BY_MEMORY, PORT, rounds);
    measure("memory, exit, until answered", ram, ANSWERED, PORT, rounds);
    event = (struct kvm_ioeventfd){ .addr = MMIO, .len = 1, .fd = fd };
    need(ioctl(vm, KVM_IOEVENTFD, &event) == 0, "KVM_IOEVENTFD");
    measure("memory, eventfd", ram, BY_MEMORY, PORT, rounds);
    event.flags = KVM_IOEVENTFD_FLAG_DEASSIGN;
    need(ioctl(vm, KVM_IOEVENTFD, &event) == 0, "KVM_IOEVENTFD");
    event = (struct kvm_ioeventfd){ .addr = MMIO, .len = 1, .fd = waited };
    need(pthread_create(&thread, NULL, answers, &waited) == 0 && ioctl(vm, KVM_IOEVENTFD, &event) == 0, "KVM_IOEVENTFD");
    measure("memory, eventfd, until a thread has answered", ram, ANSWERED, PORT, rounds);
    event.flags = KVM_IOEVENTFD_FLAG_DEASSIGN;
    need(ioctl(vm, KVM_IOEVENTFD, &event) == 0, "KVM_IOEVENTFD");
    need(ioctl(vm, KVM_REGISTER_COALESCED_MMIO, &zone) == 0, "KVM_REGISTER_COALESCED_MMIO");
    measure("memory, coalesced", ram, BY_MEMORY, PORT, rounds);
    return 0;
}
