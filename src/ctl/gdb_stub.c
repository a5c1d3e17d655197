/* gdb's remote protocol (gdb_stub.h): framing, then one function per packet, found by the table at the end. */
#include "ctl/gdb_stub.h"

#include <errno.h>
#include <stdarg.h>
#include <string.h>

#include "base/err.h"
#include "ctl/gdb_regs.h"

enum { SIGNAL_INT = 2, SIGNAL_TRAP = 5, SIGNAL_SEGV = 11 };        /* gdb's numbers, not the host's */
enum frame { FRAME_NONE, FRAME_DATA, FRAME_SUM1, FRAME_SUM2 };

/* A breakpoint as gdb counts them: software (Z0) and hardware (Z1) ones at the same place are two. */
struct point {
    u64 la;
    bool kind[2];
};

struct gdb_stub {
    struct vm_debug *d;
    const struct gdb_ops *ops;
    void *arg;
    struct gdb_regs regs;
    struct x86 *x;                                                 /* a processor's state, while a packet is handled */

    bool connected, running;
    bool no_ack, physical, swbreak, hwbreak;
    unsigned cpu_g, cpu_c;                                         /* of Hg and Hc */
    unsigned stop_cpu;
    int stop_signal;
    struct vm_debug_stop stop;
    struct point point[DEBUG_POINTS_MAX];
    unsigned points;

    enum frame frame;
    u8 sum, sum_high;
    bool too_long;
    size_t in_len, out_len;
    char in[GDB_PACKET_MAX + 1];
    u8 out[GDB_PACKET_MAX + 8];                                    /* the reply: $ data # sum; kept for being sent again */
    bool out_full;
};

/* ---- replies ---- */

static void reply_begin(struct gdb_stub *s)
{
    s->out[0] = '$';
    s->out_len = 1;
    s->out_full = false;
}

static void put_raw(struct gdb_stub *s, const void *buf, size_t n)
{
    if (n > GDB_PACKET_MAX - s->out_len) {
        s->out_full = true;
        return;
    }
    memcpy(s->out + s->out_len, buf, n);
    s->out_len += n;
}

static void put(struct gdb_stub *s, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
static void put(struct gdb_stub *s, const char *fmt, ...)
{
    char text[256];
    va_list ap;
    va_start(ap, fmt);
    int n = vsnprintf(text, sizeof(text), fmt, ap);
    va_end(ap);
    put_raw(s, text, n < 0 ? 0 : MIN((size_t)n, sizeof(text) - 1));
}

static void put_hex(struct gdb_stub *s, const u8 *buf, size_t n)
{
    static const char digit[] = "0123456789abcdef";
    for (size_t i = 0; i < n; i++)
        put_raw(s, (char[]){digit[buf[i] >> 4], digit[buf[i] & 15]}, 2);
}

static void put_binary(struct gdb_stub *s, const u8 *buf, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        if (buf[i] == '#' || buf[i] == '$' || buf[i] == '}' || buf[i] == '*')
            put_raw(s, (u8[]){'}', buf[i] ^ 0x20}, 2);
        else
            put_raw(s, &buf[i], 1);
    }
}

static void reply_end(struct gdb_stub *s)
{
    char tail[4];
    u8 sum = 0;
    if (s->out_full) {
        reply_begin(s);
        put(s, "E%02x", EMSGSIZE);
    }
    for (size_t i = 1; i < s->out_len; i++)
        sum = (u8)(sum + s->out[i]);
    snprintf(tail, sizeof(tail), "#%02x", sum);
    memcpy(s->out + s->out_len, tail, 3);
    s->out_len += 3;
    s->ops->send(s->arg, s->out, s->out_len);
}

static void reply(struct gdb_stub *s, const char *text)
{
    reply_begin(s);
    put(s, "%s", text);
    reply_end(s);
}

static void reply_error(struct gdb_stub *s, int error)
{
    reply_begin(s);
    put(s, "E%02x", (unsigned)-error & 0xff);
    reply_end(s);
}

static void reply_result(struct gdb_stub *s, int r)
{
    if (r < 0)
        reply_error(s, r);
    else
        reply(s, "OK");
}

/* ---- parsing; p moves behind what was taken ---- */

static int digit_of(char c)
{
    if (c >= '0' && c <= '9')
        return c - '0';
    if (c >= 'a' && c <= 'f')
        return c - 'a' + 10;
    return c >= 'A' && c <= 'F' ? c - 'A' + 10 : -1;
}

static bool take_number(const char **p, u64 *v)
{
    const char *start = *p;
    *v = 0;
    for (; digit_of(**p) >= 0; (*p)++) {
        if (*v >> 60)
            return false;
        *v = *v << 4 | (u64)digit_of(**p);
    }
    return *p > start;
}

static bool take_char(const char **p, char c)
{
    if (**p != c)
        return false;
    (*p)++;
    return true;
}

/* n bytes in hexadecimal. */
static bool take_bytes(const char **p, u8 *buf, size_t n)
{
    for (size_t i = 0; i < n; i++, *p += 2) {
        int high = digit_of((*p)[0]), low = high < 0 ? -1 : digit_of((*p)[1]);
        if (low < 0)
            return false;
        buf[i] = (u8)(high << 4 | low);
    }
    return true;
}

/* A thread: *all for -1; 0 means any one and gives fallback. */
static bool take_thread(struct gdb_stub *s, const char **p, unsigned fallback, unsigned *cpu, bool *all)
{
    u64 n;
    *all = false;
    *cpu = fallback;
    if ((*p)[0] == '-' && (*p)[1] == '1') {
        *p += 2;
        *all = true;
        return true;
    }
    if (!take_number(p, &n) || n > vm_debug_cpus(s->d))
        return false;
    if (n)
        *cpu = (unsigned)n - 1;
    return true;
}

static bool state_of(struct gdb_stub *s, unsigned cpu)
{
    return vm_debug_get(s->d, cpu, s->x) == 0;
}

/* ---- stops ---- */

static void put_register(struct gdb_stub *s, unsigned i, u8 cr8)
{
    u8 val[GDB_REG_BYTES_MAX];
    gdb_reg_get(&s->regs, i, s->x, cr8, val);
    put_hex(s, val, s->regs.reg[i].bytes);
}

static struct point *find_point(struct gdb_stub *s, u64 la)
{
    for (unsigned i = 0; i < s->points; i++)
        if (s->point[i].la == la)
            return &s->point[i];
    return NULL;
}

static u64 linear_rip(const struct x86 *x)
{
    bool flat = x->efer & EFER_LMA && x->seg[SEG_CS].attr & SEG_L;
    return flat ? x->rip : (u32)(x->seg[SEG_CS].base + x->rip);
}

static void put_reason(struct gdb_stub *s, bool known)
{
    const struct point *p = known ? find_point(s, linear_rip(s->x)) : NULL;
    switch (s->stop.why) {
    case DEBUG_POINT:
        if (p && p->kind[0] && s->swbreak)
            put(s, "swbreak:;");
        else if (p && p->kind[1] && s->hwbreak)
            put(s, "hwbreak:;");
        break;
    case DEBUG_WATCHED:
        put(s, "%s:%llx;", s->stop.access == DEBUG_WRITE ? "watch" : s->stop.access == DEBUG_READ ? "rwatch" : "awatch",
            (unsigned long long)s->stop.la);
        break;
    case DEBUG_NONE: case DEBUG_STEPPED: case DEBUG_SHUTDOWN:
        break;
    }
}

static void reply_stop(struct gdb_stub *s)
{
    bool known = state_of(s, s->stop_cpu);
    const unsigned expedited[] = {s->regs.rip, s->regs.rsp, s->regs.rbp};
    reply_begin(s);
    put(s, "T%02xthread:%x;", (unsigned)s->stop_signal, s->stop_cpu + 1);
    put_reason(s, known);
    for (size_t i = 0; known && i < ARRAY_SIZE(expedited); i++) {
        put(s, "%02x:", expedited[i]);
        put_register(s, expedited[i], 0);
        put(s, ";");
    }
    reply_end(s);
}

static void stop_at(struct gdb_stub *s, unsigned cpu, int signal)
{
    s->running = false;
    s->stop_cpu = s->cpu_g = s->cpu_c = cpu;
    s->stop_signal = signal;
}

/* A stop that the guest came to by itself; false: there is none. */
static bool take_stop(struct gdb_stub *s)
{
    if (!vm_debug_next_stop(s->d, &s->stop))
        return false;
    stop_at(s, s->stop.cpu, s->stop.why == DEBUG_SHUTDOWN ? SIGNAL_SEGV : SIGNAL_TRAP);
    return true;
}

static void interrupt(struct gdb_stub *s)
{
    if (!s->running)
        return;
    vm_debug_pause(s->d);
    if (!take_stop(s)) {
        s->stop = (struct vm_debug_stop){.why = DEBUG_NONE};
        stop_at(s, s->cpu_g, SIGNAL_INT);
    }
    reply_stop(s);
}

void gdb_stub_stopped(struct gdb_stub *s)
{
    if (s->connected && s->running && take_stop(s))
        reply_stop(s);
}

void gdb_stub_ended(struct gdb_stub *s, int status)
{
    char text[8];
    if (!s->connected)
        return;
    if (s->running) {
        snprintf(text, sizeof(text), "W%02x", (unsigned)status & 0xff);
        reply(s, text);
    }
    s->running = false;
    s->ops->drop(s->arg);
}

/* ---- registers ---- */

static void cmd_read_all(struct gdb_stub *s, const char *p UNUSED)
{
    if (!state_of(s, s->cpu_g)) {
        reply_error(s, -EIO);
        return;
    }
    u8 cr8 = vm_debug_cr8(s->d, s->cpu_g);
    reply_begin(s);
    for (unsigned i = 0; i < s->regs.n; i++)
        put_register(s, i, cr8);
    reply_end(s);
}

/* Those that cannot be written keep their values: gdb writes all at once. */
static void cmd_write_all(struct gdb_stub *s, const char *p)
{
    int r = state_of(s, s->cpu_g) ? 0 : -EIO;
    for (unsigned i = 0; r == 0 && i < s->regs.n; i++) {
        u8 val[GDB_REG_BYTES_MAX];
        if (!take_bytes(&p, val, s->regs.reg[i].bytes))
            r = -EINVAL;
        else if ((r = gdb_reg_set(&s->regs, i, s->x, val)) == -EPERM)
            r = 0;
    }
    if (r == 0)
        r = *p ? -EINVAL : vm_debug_set(s->d, s->cpu_g, s->x);
    reply_result(s, r);
}

static void cmd_read_register(struct gdb_stub *s, const char *p)
{
    u64 i;
    if (!take_number(&p, &i) || i >= s->regs.n || !state_of(s, s->cpu_g)) {
        reply_error(s, -EINVAL);
        return;
    }
    reply_begin(s);
    put_register(s, (unsigned)i, vm_debug_cr8(s->d, s->cpu_g));
    reply_end(s);
}

static void cmd_write_register(struct gdb_stub *s, const char *p)
{
    u8 val[GDB_REG_BYTES_MAX];
    u64 i;
    if (!take_number(&p, &i) || i >= s->regs.n || !take_char(&p, '=') || !take_bytes(&p, val, s->regs.reg[i].bytes) ||
        *p || !state_of(s, s->cpu_g)) {
        reply_error(s, -EINVAL);
        return;
    }
    int r = gdb_reg_set(&s->regs, (unsigned)i, s->x, val);
    reply_result(s, r < 0 ? r : vm_debug_set(s->d, s->cpu_g, s->x));
}

/* ---- memory ---- */

static bool take_range(const char **p, u64 *addr, u64 *len)
{
    return take_number(p, addr) && take_char(p, ',') && take_number(p, len);
}

static enum vm_debug_space space_of(const struct gdb_stub *s)
{
    return s->physical ? VM_DEBUG_PHYSICAL : VM_DEBUG_LINEAR;
}

/* What could be read, for `m` in hexadecimal, for `x` in binary behind a 'b'. */
static void read_memory(struct gdb_stub *s, const char *p, bool binary)
{
    u8 buf[GDB_PACKET_MAX / 2 - 8];
    u64 addr, len;
    if (!take_range(&p, &addr, &len) || *p) {
        reply_error(s, -EINVAL);
        return;
    }
    size_t n = vm_debug_read(s->d, s->cpu_g, space_of(s), addr, buf, (size_t)MIN(len, sizeof(buf)));
    if (!n && len) {
        reply_error(s, -EFAULT);
        return;
    }
    reply_begin(s);
    if (binary) {
        put(s, "b");
        put_binary(s, buf, n);
    } else {
        put_hex(s, buf, n);
    }
    reply_end(s);
}

static void cmd_read_memory(struct gdb_stub *s, const char *p)
{
    read_memory(s, p, false);
}

static void cmd_read_binary(struct gdb_stub *s, const char *p)
{
    read_memory(s, p, true);
}

/* All or nothing, as far as it can be known before: the target's pages are read first. */
static int write_memory(struct gdb_stub *s, u64 addr, const u8 *buf, size_t n)
{
    u8 old[GDB_PACKET_MAX];
    if (vm_debug_read(s->d, s->cpu_g, space_of(s), addr, old, n) != n)
        return -EFAULT;
    return vm_debug_write(s->d, s->cpu_g, space_of(s), addr, buf, n) == n ? 0 : -EFAULT;
}

static void cmd_write_memory(struct gdb_stub *s, const char *p)
{
    u8 buf[GDB_PACKET_MAX / 2];
    u64 addr, len;
    if (!take_range(&p, &addr, &len) || !take_char(&p, ':') || len > sizeof(buf) || !take_bytes(&p, buf, len) || *p)
        reply_error(s, -EINVAL);
    else
        reply_result(s, write_memory(s, addr, buf, len));
}

static void cmd_write_binary(struct gdb_stub *s, const char *p)
{
    u64 addr, len;
    if (!take_range(&p, &addr, &len) || !take_char(&p, ':') || len != (size_t)(s->in + s->in_len - p))
        reply_error(s, -EINVAL);
    else
        reply_result(s, write_memory(s, addr, (const u8 *)p, len));
}

/* ---- breakpoints and watchpoints ---- */

static int point_insert(struct gdb_stub *s, u64 la, unsigned kind)
{
    struct point *p = find_point(s, la);
    if (!p && s->points == DEBUG_POINTS_MAX)
        return -ENOSPC;
    int r = vm_debug_add_point(s->d, la);
    if (r < 0)
        return r;
    if (!p) {
        p = &s->point[s->points++];
        *p = (struct point){.la = la};
    }
    p->kind[kind] = true;
    return 0;
}

static void point_remove(struct gdb_stub *s, u64 la, unsigned kind)
{
    struct point *p = find_point(s, la);
    if (!p)
        return;
    p->kind[kind] = false;
    if (p->kind[!kind])
        return;
    vm_debug_del_point(s->d, la);
    *p = s->point[--s->points];
}

static void change_point(struct gdb_stub *s, const char *p, bool insert)
{
    static const u8 access[] = {[2] = DEBUG_WRITE, [3] = DEBUG_READ, [4] = DEBUG_READ | DEBUG_WRITE};
    u64 kind, la, len;
    int r = 0;
    if (!take_number(&p, &kind) || !take_char(&p, ',') || !take_range(&p, &la, &len)) {
        reply_error(s, -EINVAL);
        return;
    }
    if (kind > 4) {
        reply(s, "");
        return;
    }
    struct debug_watch w = {.la = la, .len = len, .access = access[kind]};
    if (kind < 2 && insert)
        r = point_insert(s, la, (unsigned)kind);
    else if (kind < 2)
        point_remove(s, la, (unsigned)kind);
    else if (!len || len - 1 > ~la)
        r = -EINVAL;
    else if (insert)
        r = vm_debug_add_watch(s->d, &w);
    else
        vm_debug_del_watch(s->d, &w);
    if (r == -EOPNOTSUPP)
        reply(s, "");                                              /* gdb then makes do with another kind */
    else
        reply_result(s, r);
}

static void cmd_insert(struct gdb_stub *s, const char *p)
{
    change_point(s, p, true);
}

static void cmd_remove(struct gdb_stub *s, const char *p)
{
    change_point(s, p, false);
}

/* ---- going on ---- */

static void go(struct gdb_stub *s)
{
    int r = vm_debug_go(s->d);
    s->running = r == 0;
    if (r < 0)
        reply_error(s, r);
}

/* c, s: [ADDRESS]; C, S: SIGNAL[;ADDRESS]. A step is the processor's of Hc; the others go on. */
static void resume(struct gdb_stub *s, const char *p, bool signal, bool step)
{
    u64 ignored, rip;
    bool where = true;
    if (signal && !take_number(&p, &ignored)) {
        reply_error(s, -EINVAL);
        return;
    }
    if (signal)
        where = take_char(&p, ';');
    if (where && *p) {
        if (!take_number(&p, &rip) || !state_of(s, s->cpu_c)) {
            reply_error(s, -EINVAL);
            return;
        }
        s->x->rip = rip;
        vm_debug_set(s->d, s->cpu_c, s->x);
    }
    for (unsigned i = 0; i < vm_debug_cpus(s->d); i++)
        vm_debug_set_action(s->d, i, step && i == s->cpu_c ? VM_DEBUG_STEP : VM_DEBUG_GO, 0, 0);
    go(s);
}

static void cmd_continue(struct gdb_stub *s, const char *p)
{
    resume(s, p, false, false);
}

static void cmd_continue_signal(struct gdb_stub *s, const char *p)
{
    resume(s, p, true, false);
}

static void cmd_step(struct gdb_stub *s, const char *p)
{
    resume(s, p, false, true);
}

static void cmd_step_signal(struct gdb_stub *s, const char *p)
{
    resume(s, p, true, true);
}

struct action {
    enum vm_debug_action what;
    u64 start, end;
    unsigned cpu;
    bool all;
};

static bool take_action(struct gdb_stub *s, const char **p, struct action *a)
{
    char c = **p;
    u64 signal;
    *a = (struct action){.all = true};
    if (!c)
        return false;
    (*p)++;
    switch (c) {
    case 'c': a->what = VM_DEBUG_GO; break;
    case 's': a->what = VM_DEBUG_STEP; break;
    case 'C': case 'S':
        if (!take_number(p, &signal))
            return false;
        a->what = c == 'C' ? VM_DEBUG_GO : VM_DEBUG_STEP;
        break;
    case 'r':
        if (!take_range(p, &a->start, &a->end))
            return false;
        a->what = VM_DEBUG_STEP;
        break;
    default:
        return false;
    }
    return !take_char(p, ':') || take_thread(s, p, s->cpu_c, &a->cpu, &a->all);
}

/* The first action that names a processor is its action; who is not named stays where it is. */
static void cmd_vcont(struct gdb_stub *s, const char *p)
{
    u64 named = 0;
    unsigned cpus = vm_debug_cpus(s->d);
    struct action a;
    for (unsigned i = 0; i < cpus; i++)
        vm_debug_set_action(s->d, i, VM_DEBUG_STAY, 0, 0);
    do {
        if (!take_action(s, &p, &a)) {
            reply_error(s, -EINVAL);
            return;
        }
        for (unsigned i = 0; i < cpus; i++) {
            if (named & BIT(i) || !(a.all || a.cpu == i))
                continue;
            named |= BIT(i);
            vm_debug_set_action(s->d, i, a.what, a.start, a.end);
        }
    } while (take_char(&p, ';'));
    if (*p || !named)
        reply_error(s, -EINVAL);
    else
        go(s);
}

static void cmd_vcont_query(struct gdb_stub *s, const char *p UNUSED)
{
    reply(s, "vCont;c;C;s;S;r");
}

/* ---- threads ---- */

static void cmd_select(struct gdb_stub *s, const char *p)
{
    char which = *p;
    unsigned cpu;
    bool all;
    if ((which != 'g' && which != 'c') || (p++, !take_thread(s, &p, s->stop_cpu, &cpu, &all)) || *p) {
        reply_error(s, -EINVAL);
        return;
    }
    if (which == 'g')
        s->cpu_g = cpu;
    else
        s->cpu_c = cpu;
    reply(s, "OK");
}

static void cmd_alive(struct gdb_stub *s, const char *p)
{
    u64 n;
    reply_result(s, take_number(&p, &n) && n >= 1 && n <= vm_debug_cpus(s->d) ? 0 : -EINVAL);
}

static void cmd_current(struct gdb_stub *s, const char *p UNUSED)
{
    reply_begin(s);
    put(s, "QC%x", s->cpu_g + 1);
    reply_end(s);
}

static void cmd_threads(struct gdb_stub *s, const char *p UNUSED)
{
    reply_begin(s);
    for (unsigned i = 0; i < vm_debug_cpus(s->d); i++)
        put(s, "%c%x", i ? ',' : 'm', i + 1);
    reply_end(s);
}

static void cmd_threads_more(struct gdb_stub *s, const char *p UNUSED)
{
    reply(s, "l");
}

static void cmd_thread_info(struct gdb_stub *s, const char *p)
{
    static const char *const activity[] = {"running", "halted", "waits for its start", "shut down"};
    char text[64];
    u64 n;
    if (!take_number(&p, &n) || n < 1 || n > vm_debug_cpus(s->d) || !state_of(s, (unsigned)n - 1)) {
        reply_error(s, -EINVAL);
        return;
    }
    int len = snprintf(text, sizeof(text), "vCPU %u, %s, ring %u", (unsigned)n - 1, activity[s->x->activity & 3],
                       x86_cpl(s->x));
    reply_begin(s);
    put_hex(s, (const u8 *)text, (size_t)len);
    reply_end(s);
}

/* ---- questions and settings ---- */

static bool offers(const char *features, const char *name)
{
    size_t n = strlen(name);
    for (const char *p = features; (p = strstr(p, name)); p += n)
        if ((p == features || p[-1] == ';') && (p[n] == ';' || !p[n]))
            return true;
    return false;
}

static void cmd_supported(struct gdb_stub *s, const char *p)
{
    s->swbreak = offers(p, "swbreak+");
    s->hwbreak = offers(p, "hwbreak+");
    reply_begin(s);
    put(s, "PacketSize=%x;qXfer:features:read+;QStartNoAckMode+;vContSupported+;swbreak+;hwbreak+;binary-upload+;"
           "PhyMemMode+", GDB_PACKET_MAX - 8);
    reply_end(s);
}

static void cmd_no_ack(struct gdb_stub *s, const char *p UNUSED)
{
    reply(s, "OK");
    s->no_ack = true;
}

static void cmd_features(struct gdb_stub *s, const char *p)
{
    u64 off, len;
    if (!take_range(&p, &off, &len) || *p || off > s->regs.xml_len) {
        reply_error(s, -EINVAL);
        return;
    }
    /* Half of the packet: each byte may need two. */
    size_t left = s->regs.xml_len - off, n = (size_t)MIN(MIN(len, left), GDB_PACKET_MAX / 2 - 8);
    reply_begin(s);
    put(s, "%c", n < left ? 'm' : 'l');
    put_binary(s, (const u8 *)s->regs.xml + off, n);
    reply_end(s);
}

static void cmd_reason(struct gdb_stub *s, const char *p UNUSED)
{
    reply_stop(s);
}

static void cmd_attached(struct gdb_stub *s, const char *p UNUSED)
{
    reply(s, "1");                                                 /* so that gdb detaches when its user quits */
}

static void cmd_symbols(struct gdb_stub *s, const char *p UNUSED)
{
    reply(s, "OK");
}

static void cmd_phys_query(struct gdb_stub *s, const char *p UNUSED)
{
    reply(s, s->physical ? "1" : "0");
}

static void cmd_phys_set(struct gdb_stub *s, const char *p)
{
    if (strcmp(p, "0") && strcmp(p, "1")) {
        reply_error(s, -EINVAL);
        return;
    }
    s->physical = *p == '1';
    reply(s, "OK");
}

/* Console output goes in packets of its own, before the OK. */
static void send_console(struct gdb_stub *s, const char *text, size_t len)
{
    for (size_t done = 0; done < len;) {
        size_t n = MIN(len - done, GDB_PACKET_MAX / 2 - 8);
        reply_begin(s);
        put(s, "O");
        put_hex(s, (const u8 *)text + done, n);
        reply_end(s);
        done += n;
    }
}

static void monitor_phys(struct gdb_stub *s, const char *word, FILE *out)
{
    if (!strcmp(word, "on") || !strcmp(word, "off"))
        s->physical = !strcmp(word, "on");
    else if (*word)
        fprintf(out, "phys: say phys on or phys off\n");
    fprintf(out, "memory is read and written by %s address\n", s->physical ? "physical" : "linear");
}

static void cmd_monitor(struct gdb_stub *s, const char *p)
{
    char line[1024] = "", *text = NULL;
    size_t n = strlen(p) / 2, len = 0;
    if (strlen(p) % 2 || n >= sizeof(line) || !take_bytes(&p, (u8 *)line, n)) {
        reply_error(s, -EINVAL);
        return;
    }
    FILE *out = open_memstream(&text, &len);
    if (!out) {
        reply_error(s, -ENOMEM);
        return;
    }
    if (!strncmp(line, "phys", 4) && (!line[4] || line[4] == ' '))
        monitor_phys(s, line + 4 + strspn(line + 4, " "), out);
    else
        s->ops->monitor(s->arg, line, out);
    if (fclose(out) == 0 && s->connected)
        send_console(s, text, len);
    free(text);
    reply(s, "OK");
}

static void cmd_detach(struct gdb_stub *s, const char *p UNUSED)
{
    reply(s, "OK");
    gdb_stub_disconnect(s);
    s->ops->drop(s->arg);
}

static void cmd_kill(struct gdb_stub *s, const char *p UNUSED)
{
    s->ops->kill(s->arg);
}

static void cmd_vkill(struct gdb_stub *s, const char *p UNUSED)
{
    reply(s, "OK");
    s->ops->kill(s->arg);
}

/* ---- packets ---- */

enum when { STOPPED, ALWAYS };
static const struct packet {
    const char *name;                                              /* what it begins with; longer ones first */
    void (*fn)(struct gdb_stub *s, const char *p);                 /* p: what stands behind the name */
    enum when when;
} packets[] = {
    {"vCont?", cmd_vcont_query, ALWAYS}, {"vCont;", cmd_vcont, STOPPED}, {"vKill;", cmd_vkill, ALWAYS},
    {"qSupported:", cmd_supported, ALWAYS}, {"qSupported", cmd_supported, ALWAYS},
    {"QStartNoAckMode", cmd_no_ack, ALWAYS},
    {"qXfer:features:read:target.xml:", cmd_features, ALWAYS},
    {"qRcmd,", cmd_monitor, STOPPED},
    {"qThreadExtraInfo,", cmd_thread_info, STOPPED}, {"qfThreadInfo", cmd_threads, ALWAYS},
    {"qsThreadInfo", cmd_threads_more, ALWAYS}, {"qAttached", cmd_attached, ALWAYS},
    {"qSymbol:", cmd_symbols, ALWAYS}, {"qqemu.PhyMemMode", cmd_phys_query, ALWAYS},
    {"Qqemu.PhyMemMode:", cmd_phys_set, ALWAYS},
    {"qC", cmd_current, ALWAYS},
    {"?", cmd_reason, STOPPED}, {"g", cmd_read_all, STOPPED}, {"G", cmd_write_all, STOPPED},
    {"p", cmd_read_register, STOPPED}, {"P", cmd_write_register, STOPPED}, {"m", cmd_read_memory, STOPPED},
    {"M", cmd_write_memory, STOPPED}, {"x", cmd_read_binary, STOPPED}, {"X", cmd_write_binary, STOPPED},
    {"Z", cmd_insert, STOPPED}, {"z", cmd_remove, STOPPED}, {"c", cmd_continue, STOPPED},
    {"C", cmd_continue_signal, STOPPED}, {"s", cmd_step, STOPPED}, {"S", cmd_step_signal, STOPPED},
    {"H", cmd_select, ALWAYS}, {"T", cmd_alive, ALWAYS}, {"D", cmd_detach, ALWAYS}, {"k", cmd_kill, ALWAYS},
};

static void handle(struct gdb_stub *s)
{
    if (!s->running)
        vm_debug_pause(s->d);                                      /* somebody at the monitor may have let it go on */
    for (size_t i = 0; i < ARRAY_SIZE(packets); i++) {
        size_t n = strlen(packets[i].name);
        if (strncmp(s->in, packets[i].name, n))
            continue;
        if (packets[i].when == STOPPED && s->running)
            reply_error(s, -EBUSY);
        else
            packets[i].fn(s, s->in + n);
        return;
    }
    reply(s, "");                                                  /* the protocol's "I do not know that" */
}

/* "}c" stands for c ^ 0x20. */
static void unescape(struct gdb_stub *s)
{
    size_t n = 0;
    for (size_t i = 0; i < s->in_len; i++) {
        char c = s->in[i];
        if (c == '}' && i + 1 < s->in_len)
            c = (char)(s->in[++i] ^ 0x20);
        s->in[n++] = c;
    }
    s->in_len = n;
    s->in[n] = '\0';
}

static void packet_done(struct gdb_stub *s, int sum)
{
    bool good = sum == s->sum || s->no_ack;
    if (!s->no_ack)
        s->ops->send(s->arg, (const u8 *)(good ? "+" : "-"), 1);
    if (!good)
        return;
    if (s->too_long) {
        reply_error(s, -EMSGSIZE);
        return;
    }
    unescape(s);
    handle(s);
}

static void frame_begin(struct gdb_stub *s)
{
    s->frame = FRAME_DATA;
    s->in_len = 0;
    s->sum = 0;
    s->too_long = false;
}

static void frame_data(struct gdb_stub *s, u8 c)
{
    if (c == '#') {
        s->frame = FRAME_SUM1;
    } else if (c == '$') {
        frame_begin(s);                                            /* the end of the one before was lost */
    } else {
        s->sum = (u8)(s->sum + c);
        if (s->in_len < GDB_PACKET_MAX)
            s->in[s->in_len++] = (char)c;
        else
            s->too_long = true;
    }
}

static void frame_none(struct gdb_stub *s, u8 c)
{
    if (c == '$')
        frame_begin(s);
    else if (c == 3)
        interrupt(s);
    else if (c == '-' && !s->no_ack && s->out_len)
        s->ops->send(s->arg, s->out, s->out_len);
}

void gdb_stub_receive(struct gdb_stub *s, const u8 *buf, size_t n)
{
    for (size_t i = 0; i < n && s->connected; i++) {
        int digit = digit_of((char)buf[i]);
        switch (s->frame) {
        case FRAME_NONE:
            frame_none(s, buf[i]);
            break;
        case FRAME_DATA:
            frame_data(s, buf[i]);
            break;
        case FRAME_SUM1:
            s->sum_high = (u8)(digit < 0 ? 0xff : digit);
            s->frame = FRAME_SUM2;
            break;
        case FRAME_SUM2:
            s->frame = FRAME_NONE;
            packet_done(s, digit < 0 || s->sum_high > 15 ? -1 : s->sum_high << 4 | digit);
            break;
        }
    }
}

/* ---- coming and going ---- */

void gdb_stub_connect(struct gdb_stub *s)
{
    s->connected = true;
    s->no_ack = s->physical = s->swbreak = s->hwbreak = false;
    s->frame = FRAME_NONE;
    s->out_len = 0;
    s->points = 0;
    s->stop = (struct vm_debug_stop){.why = DEBUG_NONE};
    vm_debug_attach(s->d);
    stop_at(s, 0, SIGNAL_TRAP);
}

void gdb_stub_disconnect(struct gdb_stub *s)
{
    if (!s->connected)
        return;
    s->connected = s->running = false;
    vm_debug_detach(s->d);
}

int gdb_stub_new(struct vm_debug *d, bool bits32, const struct gdb_ops *ops, void *arg, struct gdb_stub **out)
{
    struct gdb_stub *s = calloc(1, sizeof(*s));
    if (!s)
        return err(-ENOMEM, "--gdb: no memory");
    *s = (struct gdb_stub){.d = d, .ops = ops, .arg = arg};
    s->x = aligned_alloc(64, ALIGN_UP(sizeof(*s->x), 64));
    int r = s->x ? gdb_regs_init(&s->regs, d, bits32) : err(-ENOMEM, "--gdb: no memory");
    if (r < 0) {
        gdb_stub_free(s);
        return r;
    }
    *out = s;
    return 0;
}

void gdb_stub_free(struct gdb_stub *s)
{
    if (!s)
        return;
    gdb_stub_disconnect(s);
    gdb_regs_free(&s->regs);
    free(s->x);
    free(s);
}
