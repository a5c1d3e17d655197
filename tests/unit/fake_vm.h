/*
 * A virtual machine without a processor, in place of src/vm, for tests of `doppel run`: small programs play the guest.
 *
 * On the serial line the guest is chosen by --kernel (see guest_start), in command mode by the command's name (see
 * command_start). Everything happens on the loop's thread. Include it once in a test program: it defines the vm_* and
 * vport_* functions.
 */
#pragma once

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <string.h>

#include "../../guest/protocol.h"
#include "back/chardev.h"
#include "base/clock.h"
#include "dev/virtio_console.h"
#include "vm/vm.h"

#define FAKE_PORTS 4
enum { FAKE_CTL, FAKE_STDIN, FAKE_STDOUT, FAKE_STDERR };

struct vport {
    struct vm *vm;
    unsigned n;
    bool open, stalled, want_room, posted;
    u8 *buf;                                                       /* from the guest, not taken yet */
    size_t len;
};

struct vm {
    struct vm_config c;
    struct clock *clock;
    enum vm_state state;
    struct trace trace;
    struct vm_result result;
    struct x86 *x86;
    struct vport port[FAKE_PORTS];
    const char *guest;
    size_t talked;                                                 /* of "talk" */
    unsigned presses, resets;
    /* command mode */
    u8 ctl[65536];
    size_t ctl_len;
    char argv[8][256];
    struct msg_run run;
    char term[128];
    u64 in_bytes, in_end, out_bytes, err_bytes;
    bool exited;
};

static void fake_end(struct vm *vm, enum vm_end end);

/* --- the serial line --- */

static void serial_say(struct vm *vm, const char *text)
{
    chardev_write(vm->c.serial, (const u8 *)text, strlen(text));
}

static u8 fake_pattern(size_t i)
{
    return (u8)('a' + i % 25 + (i >> 12) % 2);
}

/* 300,000 bytes, and then it powers off at once: all of them must come out. */
static void talk(struct vm *vm)
{
    u8 buf[777];
    while (vm->talked < 300000) {
        size_t n = MIN(sizeof(buf), 300000 - vm->talked);
        for (size_t i = 0; i < n; i++)
            buf[i] = fake_pattern(vm->talked + i);
        size_t taken = chardev_write(vm->c.serial, buf, n);
        vm->talked += taken;
        if (taken < n)
            return;
    }
    fake_end(vm, VM_END_POWEROFF);
}

static size_t serial_can_receive(void *front)
{
    struct vm *vm = front;
    return vm->state == VM_RUNNING && strcmp(vm->guest, "hung") ? 16 : 0;
}

static void serial_receive(void *front, const u8 *buf, size_t len)
{
    struct vm *vm = front;
    for (size_t i = 0; i < len; i++) {
        if (buf[i] == 'q')
            fake_end(vm, VM_END_POWEROFF);
        if (buf[i] == 'p')
            fake_end(vm, VM_END_PANIC);
        char text[16];
        snprintf(text, sizeof(text), "<%02x>", buf[i]);
        serial_say(vm, text);
    }
}

static void serial_writable(void *front)
{
    struct vm *vm = front;
    if (!strcmp(vm->guest, "talk"))
        talk(vm);
}

static void serial_event(void *front, enum chardev_event what)
{
    struct vm *vm = front;
    if (what == CHARDEV_EOF && !strcmp(vm->guest, "shell"))
        serial_say(vm, "<eof>");
}

static const struct chardev_front_ops fake_serial_ops = {
    .can_receive = serial_can_receive, .receive = serial_receive, .writable = serial_writable, .event = serial_event,
};

static void *crash(void *arg)
{
    raise(*(int *)arg);
    return NULL;
}

static void crash_in_thread(int signo)
{
    pthread_t t;
    pthread_create(&t, NULL, crash, &signo);
    pthread_join(t, NULL);
}

static void guest_start(void *arg)
{
    struct vm *vm = arg;
    const char *g = vm->guest;
    if (!strcmp(g, "poweroff"))
        fake_end(vm, VM_END_POWEROFF);
    else if (!strcmp(g, "panic"))
        fake_end(vm, VM_END_PANIC);
    else if (!strcmp(g, "triple"))
        fake_end(vm, VM_END_TRIPLE_FAULT);
    else if (!strcmp(g, "reset-loop"))
        fake_end(vm, VM_END_RESET_LOOP);
    else if (!strcmp(g, "reset"))
        vm_post_reset(vm);
    else if (!strcmp(g, "hosterror"))
        vm_post_host_error(vm, "disk vda: cannot read: Input/output error");
    else if (!strcmp(g, "segv"))
        crash_in_thread(SIGSEGV);
    else if (!strcmp(g, "abort"))
        abort();
    else if (!strcmp(g, "talk"))
        talk(vm);
    else
        serial_say(vm, "ready$");
}

/* --- ports --- */

static void port_service(void *arg)
{
    struct vport *p = arg;
    struct vm *vm = p->vm;
    p->posted = false;
    while (p->len && !p->stalled) {
        size_t n = MIN(p->len, 3000);
        size_t taken = vm->c.port[p->n].ops->guest_data(vm->c.port[p->n].arg, p->buf, n);
        memmove(p->buf, p->buf + taken, p->len - taken);
        p->len -= taken;
        p->stalled = taken < n;
    }
    if (p->want_room && vm->c.port[p->n].ops->room) {
        p->want_room = false;
        vm->c.port[p->n].ops->room(vm->c.port[p->n].arg);
    }
}

static void port_post(struct vport *p)
{
    if (!p->posted)
        loop_post(p->vm->c.loop, port_service, p);
    p->posted = true;
}

static void port_write(struct vm *vm, unsigned n, const void *data, size_t len)
{
    struct vport *p = &vm->port[n];
    if (!len)
        return;
    p->buf = realloc(p->buf, p->len + len);
    memcpy(p->buf + p->len, data, len);
    p->len += len;
    if (n == FAKE_STDOUT)
        vm->out_bytes += len;
    if (n == FAKE_STDERR)
        vm->err_bytes += len;
    port_post(p);
}

static void ctl_write(struct vm *vm, u32 type, const void *payload, u32 len)
{
    struct msg_head head = {.type = type, .len = len};
    port_write(vm, FAKE_CTL, &head, sizeof(head));
    port_write(vm, FAKE_CTL, payload, len);
}

static void command_exit(struct vm *vm, u32 how, u32 code)
{
    struct msg_exited e = {.how = how, .code = code, .stdout_bytes = vm->out_bytes, .stderr_bytes = vm->err_bytes};
    if (vm->exited)
        return;
    vm->exited = true;
    ctl_write(vm, MSG_EXITED, &e, sizeof(e));
}

/* Something to write, as long as somebody reads: 1 MiB at a time would never end. */
static void out_pattern(struct vm *vm, size_t len)
{
    u8 *p = malloc(len);
    for (size_t i = 0; i < len; i++)
        p[i] = fake_pattern(i);
    port_write(vm, FAKE_STDOUT, p, len);
    free(p);
}

static void command_start(struct vm *vm)
{
    const char *name = vm->argv[0];
    char text[400];
    if (!strcmp(name, "exit")) {
        command_exit(vm, EXIT_STATUS, (u32)atoi(vm->argv[1]));
    } else if (!strcmp(name, "killed")) {
        command_exit(vm, EXIT_SIGNAL, (u32)atoi(vm->argv[1]));
    } else if (!strcmp(name, "exec")) {
        command_exit(vm, EXIT_EXEC, (u32)atoi(vm->argv[1]));
    } else if (!strcmp(name, "print")) {
        port_write(vm, FAKE_STDOUT, vm->argv[1], strlen(vm->argv[1]));
        port_write(vm, FAKE_STDERR, vm->argv[2], strlen(vm->argv[2]));
        command_exit(vm, EXIT_STATUS, 3);
    } else if (!strcmp(name, "burst")) {
        out_pattern(vm, 300000);
        command_exit(vm, EXIT_STATUS, 0);
    } else if (!strcmp(name, "burstdie")) {
        out_pattern(vm, 300000);
        fake_end(vm, VM_END_POWEROFF);
    } else if (!strcmp(name, "yes")) {
        out_pattern(vm, 1 << 20);
    } else if (!strcmp(name, "flags")) {
        int n = snprintf(text, sizeof(text), "flags=%u size=%ux%u %s argc=%u\n", vm->run.flags, vm->run.cols,
                         vm->run.rows, vm->term, vm->run.argc);
        port_write(vm, FAKE_STDOUT, text, (size_t)n);
        command_exit(vm, EXIT_STATUS, 0);
    } else if (!strcmp(name, "panic")) {
        serial_say(vm, "all is well\r\nKernel panic - not syncing: test\r\n");
        fake_end(vm, VM_END_PANIC);
    } else if (!strcmp(name, "early-panic")) {
        serial_say(vm, "Kernel panic - not syncing: early\r\nRebooting\r\n");
        vm_post_reset(vm);
    } else if (!strcmp(name, "die")) {
        fake_end(vm, VM_END_POWEROFF);
    } else if (!strcmp(name, "reboot")) {
        vm_post_reset(vm);
    } else if (!strcmp(name, "kexec")) {
        struct msg_ready again = {.version = PROTOCOL_VERSION};
        if (vm->argv[1][0])
            command_exit(vm, EXIT_STATUS, (u32)atoi(vm->argv[1]));
        ctl_write(vm, MSG_READY, &again, sizeof(again));
    } else if (!strcmp(name, "nonsense")) {
        ctl_write(vm, 99, "skipped", 7);
        struct msg_head head = {.type = MSG_EXITED, .len = MSG_MAX + 1};
        port_write(vm, FAKE_CTL, &head, sizeof(head));
    } else if (!strcmp(name, "nostatus")) {
        command_exit(vm, EXIT_STATUS, 256);
    } else if (!strcmp(name, "endout")) {
        struct msg_count count = {.bytes = 3};
        port_write(vm, FAKE_STDOUT, "end", 3);
        ctl_write(vm, MSG_STDOUT_EOF, &count, sizeof(count));
    } else if (!strcmp(name, "noinput")) {
        ctl_write(vm, MSG_STDIN_CLOSED, NULL, 0);
    }
}

static void command_run(struct vm *vm, const u8 *payload, u32 len)
{
    memcpy(&vm->run, payload, sizeof(vm->run));
    const char *p = (const char *)payload + sizeof(vm->run), *end = (const char *)payload + len;
    bug_on(*p);                                                    /* the working directory: the default */
    p++;
    for (u32 i = 0; i < vm->run.argc; i++, p += strlen(p) + 1)
        if (i < ARRAY_SIZE(vm->argv))
            snprintf(vm->argv[i], sizeof(vm->argv[i]), "%s", p);
    if (vm->run.envc)
        snprintf(vm->term, sizeof(vm->term), "%s", p);
    for (u32 i = 0; i < vm->run.envc; i++)
        p += strlen(p) + 1;
    bug_on(p != end);
    command_start(vm);
}

static void cat_check_end(struct vm *vm)
{
    if (!strcmp(vm->argv[0], "cat") && vm->in_bytes == vm->in_end)
        command_exit(vm, EXIT_STATUS, 0);
}

static void ctl_message(struct vm *vm, const struct msg_head *head, const u8 *payload)
{
    struct msg_signal s = {0};
    struct msg_count count = {0};
    struct msg_winsize w = {0};
    struct msg_time time = {0};
    char text[64];
    switch (head->type) {
    case MSG_RUN:
        command_run(vm, payload, head->len);
        break;
    case MSG_STDIN_EOF:
        memcpy(&count, payload, sizeof(count));
        vm->in_end = count.bytes;
        cat_check_end(vm);
        break;
    case MSG_STDOUT_CLOSED:
        vm->port[FAKE_STDOUT].stalled = false;
        port_post(&vm->port[FAKE_STDOUT]);
        command_exit(vm, EXIT_SIGNAL, SIGPIPE);
        break;
    case MSG_SIGNAL:
        memcpy(&s, payload, sizeof(s));
        if (!strcmp(vm->argv[0], "sleep") || !strcmp(vm->argv[0], "endout"))
            command_exit(vm, EXIT_SIGNAL, s.signal);
        break;
    case MSG_WINSIZE:
        memcpy(&w, payload, sizeof(w));
        snprintf(text, sizeof(text), "<%ux%u>", w.cols, w.rows);
        if (vm->c.ports > 1)
            port_write(vm, FAKE_STDOUT, text, strlen(text));
        else
            serial_say(vm, text);
        break;
    case MSG_TIME:
        memcpy(&time, payload, sizeof(time));
        serial_say(vm, time.ns + 10000000000 > clock_wall_ns() && time.ns <= clock_wall_ns() ? "<time>" : "<wrong time>");
        break;
    case MSG_DONE:
        fake_end(vm, VM_END_POWEROFF);
        break;
    }
}

static void ctl_received(struct vm *vm)
{
    struct msg_head head;
    while (vm->ctl_len >= sizeof(head)) {
        memcpy(&head, vm->ctl, sizeof(head));
        if (vm->ctl_len < sizeof(head) + head.len)
            return;
        ctl_message(vm, &head, vm->ctl + sizeof(head));
        vm->ctl_len -= sizeof(head) + head.len;
        memmove(vm->ctl, vm->ctl + sizeof(head) + head.len, vm->ctl_len);
    }
}

static void ports_open(void *arg)
{
    struct vm *vm = arg;
    struct msg_ready ready = {.version = PROTOCOL_VERSION};
    for (unsigned n = 0; n < vm->c.ports; n++) {
        vm->port[n].open = true;
        if (vm->c.port[n].ops->guest_open)
            vm->c.port[n].ops->guest_open(vm->c.port[n].arg, true);
    }
    if (vm->c.ports > 1)
        ctl_write(vm, MSG_READY, &ready, sizeof(ready));
}

/* At most 1000 bytes at a time, so that the other side has to wait for room. */
size_t vport_send(struct vport *p, const void *data, size_t len)
{
    struct vm *vm = p->vm;
    if (!p->open || vm->state != VM_RUNNING)
        return 0;
    size_t n = MIN(len, 1000);
    if (n < len) {
        p->want_room = true;
        port_post(p);
    }
    if (p->n == FAKE_CTL) {
        bug_on(vm->ctl_len + n > sizeof(vm->ctl));
        memcpy(vm->ctl + vm->ctl_len, data, n);
        vm->ctl_len += n;
        ctl_received(vm);
    } else if (p->n == FAKE_STDIN) {
        vm->in_bytes += n;
        if (vm->run.flags & RUN_TTY && memchr(data, 'q', n))
            command_exit(vm, EXIT_STATUS, 5);
        else
            port_write(vm, FAKE_STDOUT, data, n);
        cat_check_end(vm);
    }
    return n;
}

void vport_resume(struct vport *p)
{
    if (!p->stalled)
        return;
    p->stalled = false;
    port_post(p);
}

bool vport_guest_open(const struct vport *p)
{
    return p->open;
}

/* --- the machine --- */

static void call_ended(void *arg)
{
    struct vm *vm = arg;
    vm->c.ended(vm->c.ended_arg, &vm->result);
}

static void fake_end(struct vm *vm, enum vm_end end)
{
    if (vm->state == VM_ENDED)
        return;
    vm->state = VM_ENDED;
    vm->result.end = end;
    if (!vm->result.message)
        vm->result.message = "";
    if (end == VM_END_TRIPLE_FAULT)
        vm->result.x86 = vm->x86;
    loop_post(vm->c.loop, call_ended, vm);
}

int vm_new(const struct vm_config *config, struct vm **out)
{
    const char *slash = strrchr(config->kernel, '/');
    if (!strcmp(config->kernel, "bad"))
        return err(-ENOENT, "kernel %s: cannot be opened: %s; name a bzImage", config->kernel, strerror(ENOENT));
    struct vm *vm = calloc(1, sizeof(*vm));
    vm->c = *config;
    bug_on(clock_new(config->loop, &vm->clock) < 0);
    vm->guest = slash ? slash + 1 : config->kernel;
    vm->trace = config->trace;
    vm->in_end = UINT64_MAX;
    vm->x86 = aligned_alloc(64, ALIGN_UP(sizeof(struct x86), 64));
    memset(vm->x86, 0, sizeof(struct x86));
    for (unsigned n = 0; n < FAKE_PORTS; n++)
        vm->port[n] = (struct vport){.vm = vm, .n = n};
    chardev_connect(config->serial, &fake_serial_ops, vm);
    *out = vm;
    return 0;
}

void vm_free(struct vm *vm)
{
    if (!vm)
        return;
    for (unsigned n = 0; n < FAKE_PORTS; n++)
        free(vm->port[n].buf);
    clock_free(vm->clock);
    free(vm->x86);
    free(vm);
}

int vm_start(struct vm *vm)
{
    vm->state = VM_RUNNING;
    if (vm->trace.mask)
        trace_line(&vm->trace, TRACE_EXITS, 0, "started with \"%s\"", vm->c.cmdline);
    if (vm->c.ports <= 1 || strcmp(vm->guest, "vmlinuz"))
        loop_post(vm->c.loop, guest_start, vm);
    loop_post(vm->c.loop, ports_open, vm);
    return 0;
}

void vm_pause(struct vm *vm)
{
    if (vm->state == VM_RUNNING)
        vm->state = VM_PAUSED;
}

void vm_resume(struct vm *vm)
{
    if (vm->state != VM_PAUSED)
        return;
    vm->state = VM_RUNNING;
    chardev_rx_ready(vm->c.serial);
    vm->c.resumed(vm->c.ended_arg);
}

int vm_reset(struct vm *vm)
{
    vm->resets++;
    serial_say(vm, "<reset>");
    return 0;
}

void vm_power_button(struct vm *vm)
{
    vm->presses++;
    if (!strcmp(vm->guest, "deaf") || !strcmp(vm->guest, "hung"))
        return;
    if (!strcmp(vm->guest, "sleepy") && vm->presses < 2)
        return;
    if (vm->c.ports > 1 && !vm->exited && !strcmp(vm->argv[0], "sleep"))
        command_exit(vm, EXIT_SIGNAL, SIGTERM);
    else
        fake_end(vm, VM_END_POWEROFF);
}

void vm_quit(struct vm *vm)
{
    fake_end(vm, VM_END_QUIT);
}

void vm_post_reset(struct vm *vm)
{
    if (vm->c.no_reboot)
        fake_end(vm, VM_END_RESET);
    else
        vm_reset(vm);
}

void vm_post_end(struct vm *vm, enum vm_end end)
{
    fake_end(vm, end);
}

void vm_post_host_error(struct vm *vm, const char *fmt, ...)
{
    static char message[128];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(message, sizeof(message), fmt, ap);
    va_end(ap);
    vm->result.message = message;
    fake_end(vm, VM_END_HOST_ERROR);
}

enum vm_state vm_state(const struct vm *vm)
{
    return vm->state;
}

const char *vm_state_name(enum vm_state s)
{
    return (const char *[]){"built", "running", "paused", "ended"}[s];
}

bool vm_waits_for_room(const struct vm *vm UNUSED)
{
    return false;
}

struct trace *vm_trace(struct vm *vm)
{
    return &vm->trace;
}

struct vport *vm_port(struct vm *vm, unsigned n)
{
    return &vm->port[n];
}

struct clock *vm_clock(struct vm *vm)
{
    return vm->clock;
}

void vm_info_disks(struct vm *vm UNUSED, FILE *f) { fputs("disk 0: fake\n", f); }

int vm_resize_disk(struct vm *vm UNUSED, unsigned n, u64 size UNUSED) { return n ? err(-ENOENT, "there is no disk %u", n) : 0; }

int vm_set_link(struct vm *vm UNUSED, unsigned n, bool up UNUSED) { return n ? err(-ENOENT, "there is no network card %u", n) : 0; }

void vm_info(struct vm *vm, FILE *f)
{
    fprintf(f, "state: %s\npresses %u resets %u\n", vm_state_name(vm->state), vm->presses, vm->resets);
}

struct machine *vm_machine(struct vm *vm UNUSED)
{
    return NULL;                                                   /* for the debugger, which no test here uses */
}

u64 vm_insns(const struct vm *vm UNUSED)
{
    return 1000000;
}

u64 vm_counted(const struct vm *vm UNUSED, enum vcpu_counted what UNUSED)
{
    return 42;
}

int vm_profile(struct vm *vm UNUSED, const char *map, FILE *f)
{
    fprintf(f, "profile by %s\n", map ? map : "memory");
    return 0;
}

void vm_stats(struct vm *vm UNUSED, FILE *f, bool json)
{
    fputs(json ? "{}\n" : "figures of things\n", f);
}

const char *vm_count(const struct vm *vm UNUSED, unsigned what, u64 *n)
{
    *n = 42;
    return what ? NULL : "things";
}
