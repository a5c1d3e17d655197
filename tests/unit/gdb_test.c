/* gdb's protocol: framing, every packet, and rubbish. The machine is fake_debug.h's. */
#include <setjmp.h>
#include <stdarg.h>
#include <string.h>

#include <cmocka.h>

#include "ctl/gdb_stub.h"
#include "fake_debug.h"

struct client {
    struct vm_debug *d;
    struct gdb_stub *s;
    char out[256 * 1024];
    size_t len;
    unsigned drops, kills;
    char monitor[1024];
};

static void on_send(void *arg, const u8 *buf, size_t n)
{
    struct client *c = arg;
    assert_true(n < sizeof(c->out) - c->len);
    memcpy(c->out + c->len, buf, n);
    c->len += n;
    c->out[c->len] = '\0';
}

static void on_drop(void *arg)
{
    ((struct client *)arg)->drops++;
}

static void on_kill(void *arg)
{
    ((struct client *)arg)->kills++;
}

static void on_monitor(void *arg, char *line, FILE *out)
{
    struct client *c = arg;
    snprintf(c->monitor, sizeof(c->monitor), "%s", line);
    for (unsigned i = 0; i < 3000; i++)
        fputs("0123456789", out);
}

static const struct gdb_ops ops = {.send = on_send, .drop = on_drop, .kill = on_kill, .monitor = on_monitor};

static void connect_client(struct client *c)
{
    gdb_stub_connect(c->s);
    c->len = 0;
    c->out[0] = '\0';
}

static int setup(void **state)
{
    struct client *c = calloc(1, sizeof(*c));
    c->d = aligned_alloc(64, ALIGN_UP(sizeof(*c->d), 64));
    memset(c->d, 0, sizeof(*c->d));
    c->d->running = true;
    assert_int_equal(gdb_stub_new(c->d, false, &ops, c, &c->s), 0);
    connect_client(c);
    *state = c;
    return 0;
}

static int teardown(void **state)
{
    struct client *c = *state;
    gdb_stub_free(c->s);
    free(c->d);
    free(c);
    return 0;
}

static void feed(struct client *c, const char *text)
{
    c->len = 0;
    c->out[0] = '\0';
    gdb_stub_receive(c->s, (const u8 *)text, strlen(text));
}

static void send_packet(struct client *c, const char *data, size_t n)
{
    u8 sum = 0;
    char tail[4];
    c->len = 0;
    c->out[0] = '\0';
    for (size_t i = 0; i < n; i++)
        sum = (u8)(sum + (u8)data[i]);
    snprintf(tail, sizeof(tail), "#%02x", sum);
    gdb_stub_receive(c->s, (const u8 *)"$", 1);
    gdb_stub_receive(c->s, (const u8 *)data, n);
    gdb_stub_receive(c->s, (const u8 *)tail, 3);
}

/* Sends a packet; the answer's data, without framing (which is checked). */
static const char *ask(struct client *c, const char *data)
{
    send_packet(c, data, strlen(data));
    char *p = c->out, *end;
    assert_int_equal(*p, '+');
    if (!p[1])
        return "(nothing)";
    assert_int_equal(p[1], '$');
    end = c->out + c->len - 3;
    assert_int_equal(*end, '#');
    *end = '\0';
    return p + 2;
}

#define answers(c, data, wanted) assert_string_equal(ask(c, data), wanted)

static void framing(void **state)
{
    struct client *c = *state;
    feed(c, "$qC#b4");
    assert_string_equal(c->out, "+$QC1#c5");
    feed(c, "-");
    assert_string_equal(c->out, "$QC1#c5");
    feed(c, "$qC#b5");
    assert_string_equal(c->out, "-");
    feed(c, "$qC#zz");
    assert_string_equal(c->out, "-");
    feed(c, "+++ noise $half$qC#b4");                              /* the second $ begins anew */
    assert_string_equal(c->out, "+$QC1#c5");
    answers(c, "QStartNoAckMode", "OK");
    feed(c, "+$qC#00");                                            /* no checksums any more */
    assert_string_equal(c->out, "$QC1#c5");
    feed(c, "-");
    assert_string_equal(c->out, "");
}

static void too_long(void **state)
{
    struct client *c = *state;
    char *data = malloc(GDB_PACKET_MAX + 100);
    assert_non_null(data);
    memset(data, 'm', GDB_PACKET_MAX + 100);
    send_packet(c, data, GDB_PACKET_MAX + 100);
    assert_string_equal(c->out, "+$E5a#db");
    send_packet(c, data, GDB_PACKET_MAX);                          /* just fits; it is nonsense */
    assert_string_equal(c->out, "+$E16#ac");
    free(data);
    answers(c, "qC", "QC1");
}

static void greetings(void **state)
{
    struct client *c = *state;
    assert_true(c->d->attached);
    assert_false(c->d->running);
    assert_non_null(strstr(ask(c, "qSupported:multiprocess+;swbreak+;hwbreak+"), "qXfer:features:read+"));
    assert_ptr_equal(strstr(ask(c, "?"), "T05thread:1;"), c->out + 2);
    answers(c, "vMustReplyEmpty", "");
    answers(c, "vCont?", "vCont;c;C;s;S;r");
    answers(c, "qAttached", "1");
    answers(c, "qfThreadInfo", "m1,2");
    answers(c, "qsThreadInfo", "l");
    answers(c, "T2", "OK");
    answers(c, "T3", "E16");
    answers(c, "Hg2", "OK");
    answers(c, "qC", "QC2");
    answers(c, "Hg3", "E16");
    answers(c, "Hg99999999999999999999", "E16");
    answers(c, "Hc-1", "OK");
    answers(c, "Hq1", "E16");
    answers(c, "qThreadExtraInfo,1", "7643505520302c2072756e6e696e672c2072696e672030");
}

static void description(void **state)
{
    struct client *c = *state;
    char xml[64 * 1024] = "", cmd[80];
    for (size_t n = 0;;) {
        snprintf(cmd, sizeof(cmd), "qXfer:features:read:target.xml:%zx,400", n);
        const char *p = ask(c, cmd);
        assert_true(*p == 'm' || *p == 'l');
        for (const char *q = p + 1; *q; q++)
            xml[n++] = *q;
        if (*p == 'l')
            break;
    }
    static const char *const feature[] = {"i386.core", "i386.sse", "i386.avx", "i386.avx512", "i386.segments",
                                          "i386.pkeys", "doppel.x86.system", "</target>", "\"zmm31h\"", "i386:x86-64"};
    for (size_t i = 0; i < ARRAY_SIZE(feature); i++)
        if (!strstr(xml, feature[i]))
            fail_msg("the description lacks %s", feature[i]);
    answers(c, "qXfer:features:read:target.xml:ffffff,10", "E16");
    answers(c, "qXfer:features:read:target.xml:0,", "E16");
    answers(c, "qXfer:features:read:other.xml:0,10", "");
}

static void registers(void **state)
{
    struct client *c = *state;
    struct x86 *x = &c->d->x[0];
    x->gpr[RBX] = 0x1122334455667788;
    x->rip = 0xffffffff81000000;
    x->rflags = 2;
    answers(c, "p1", "8877665544332211");
    answers(c, "p10", "00000081ffffffff");
    answers(c, "P1=0100000000000000", "OK");
    assert_int_equal(x->gpr[RBX], 1);
    answers(c, "P10=0000000000008000", "E16");                     /* not canonical */
    assert_int_equal(x->rip, 0xffffffff81000000);
    answers(c, "P11=ffffffff", "OK");
    assert_int_equal(x->rflags, 0x257fd7);                         /* neither VM nor VIF, VIP, nor reserved bits */
    answers(c, "P1=01", "E16");
    answers(c, "P1", "E16");
    answers(c, "pfff", "E16");
    answers(c, "p", "E16");
    answers(c, "P12=0f000000", "E01");                             /* CS */
    answers(c, "P12=00000000", "OK");
    /* Vectors that are in their initial state; writing one names its component. */
    answers(c, "p28", "00000000000000000000000000000000");
    memset(x->xsave + 160, 0xaa, 256);
    answers(c, "p28", "00000000000000000000000000000000");
    answers(c, "P29=01000000000000000000000000000002", "OK");
    assert_int_equal(x->xsave[512], XSTATE_SSE);
    answers(c, "p28", "00000000000000000000000000000000");
    answers(c, "p29", "01000000000000000000000000000002");
    answers(c, "p20", "7f030000");                                 /* fctrl */
    answers(c, "p22", "ffff0000");                                 /* ftag: all empty */
    answers(c, "P22=fcff0000", "OK");
    assert_int_equal(x->xsave[4], 1);
    answers(c, "p22", "fdff0000");                                 /* and that one holds zero */
    answers(c, "P38=0000010000000000", "E16");                     /* mxcsr: not its size */
    answers(c, "P38=00000100", "E16");
}

static void all_registers(void **state)
{
    struct client *c = *state;
    c->d->x[0].gpr[RAX] = 0x55;
    char *all = strdup(ask(c, "g"));
    assert_memory_equal(all, "5500000000000000", 16);
    assert_true(strlen(all) > 4900);
    char *cmd = malloc(strlen(all) + 2);
    assert_non_null(cmd);
    all[0] = '7';
    cmd[0] = 'G';
    memcpy(cmd + 1, all, strlen(all) + 1);
    answers(c, cmd, "OK");
    assert_int_equal(c->d->x[0].gpr[RAX], 0x75);
    cmd[strlen(cmd) - 1] = '\0';
    answers(c, cmd, "E16");
    answers(c, "G", "E16");
    answers(c, "Gzz", "E16");
    free(cmd);
    free(all);
}

static void memory(void **state)
{
    struct client *c = *state;
    memcpy(c->d->memory, "#$}*abc", 7);
    answers(c, "m10000,4", "23247d2a");
    answers(c, "x10000,7", "b}\x03}\x04}]}\nabc");
    answers(c, "m13ffe,10", "0000");                               /* as far as there is memory */
    answers(c, "m14000,4", "E0e");
    answers(c, "mffffffffffffffff,ffffffffffffffff", "E0e");
    answers(c, "m10000", "E16");
    answers(c, "m10000,", "E16");
    answers(c, "m,4", "E16");
    answers(c, "m11111111111111111,4", "E16");                     /* 17 digits */
    assert_true(strlen(ask(c, "m10000,ffffffff")) < GDB_PACKET_MAX);
    answers(c, "M10001,2:4142", "OK");
    assert_memory_equal(c->d->memory, "#AB*", 4);
    answers(c, "M10001,2:41", "E16");
    answers(c, "M10001,2:414243", "E16");
    answers(c, "M10001,ffffffffffffffff:41", "E16");
    answers(c, "M13fff,2:4142", "E0e");
    assert_int_equal(c->d->memory[FAKE_BYTES - 1], 0);             /* nothing was written */
    answers(c, "X10000,3:}\x03z}]", "OK");
    assert_memory_equal(c->d->memory, "#z}*", 4);
    answers(c, "X10000,0:", "OK");
    answers(c, "X10000,5:ab", "E16");
    answers(c, "m0,1", "E0e");
    answers(c, "Qqemu.PhyMemMode:1", "OK");
    answers(c, "qqemu.PhyMemMode", "1");
    answers(c, "m0,1", "23");
    answers(c, "Qqemu.PhyMemMode:7", "E16");
    answers(c, "Qqemu.PhyMemMode:0", "OK");
    answers(c, "m0,1", "E0e");
}

static void binary_with_nul(void **state)
{
    struct client *c = *state;
    send_packet(c, "X10000,4:a\0b\0", 13);
    assert_string_equal(c->out, "+$OK#9a");
    assert_memory_equal(c->d->memory, "a\0b\0", 4);
}

static void points(void **state)
{
    struct client *c = *state;
    answers(c, "Z0,1234,1", "OK");
    answers(c, "Z1,1234,1", "OK");
    assert_int_equal(c->d->last_point, 0x1234);
    answers(c, "z0,1234,1", "OK");
    assert_int_equal(c->d->points, 2);                             /* the hardware one keeps it */
    answers(c, "z1,1234,1", "OK");
    assert_int_equal(c->d->points, 1);                             /* (the fake counts both insertions) */
    answers(c, "z1,1234,1", "OK");
    assert_int_equal(c->d->points, 1);
    answers(c, "Z2,2000,8", "OK");
    assert_int_equal(c->d->last_watch.access, DEBUG_WRITE);
    answers(c, "Z3,2000,8", "OK");
    assert_int_equal(c->d->last_watch.access, DEBUG_READ);
    answers(c, "Z4,2000,8", "OK");
    assert_int_equal(c->d->last_watch.access, DEBUG_READ | DEBUG_WRITE);
    answers(c, "Z2,2000,0", "E16");
    answers(c, "Z2,fffffffffffffff0,11", "E16");
    answers(c, "Z2,fffffffffffffff0,10", "OK");
    answers(c, "Z5,0,1", "");
    answers(c, "Z", "E16");
    answers(c, "Z0,", "E16");
    c->d->full = true;
    answers(c, "Z0,4000,1", "E1c");
    answers(c, "Z2,4000,1", "E1c");
}

static void many_points(void **state)
{
    struct client *c = *state;
    char cmd[40];
    for (unsigned i = 0; i < DEBUG_POINTS_MAX; i++) {
        snprintf(cmd, sizeof(cmd), "Z0,%x,1", i);
        answers(c, cmd, "OK");
    }
    answers(c, "Z0,ffff,1", "E1c");
    answers(c, "z0,5,1", "OK");
    answers(c, "Z0,ffff,1", "OK");
}

static void goes_on(void **state)
{
    struct client *c = *state;
    answers(c, "vCont;s:2;c", "(nothing)");
    assert_int_equal(c->d->cpu[0].action, VM_DEBUG_GO);
    assert_int_equal(c->d->cpu[1].action, VM_DEBUG_STEP);
    answers(c, "g", "E10");                                        /* it runs */
    answers(c, "m10000,1", "E10");
    answers(c, "vCont;c", "E10");
    answers(c, "qfThreadInfo", "m1,2");
    c->d->running = false;
    c->d->have_stop = true;
    c->d->stop = (struct vm_debug_stop){.cpu = 1, .why = DEBUG_STEPPED};
    c->len = 0;
    gdb_stub_stopped(c->s);
    assert_ptr_equal(strstr(c->out, "$T05thread:2;10:"), c->out);
    answers(c, "vCont;r1000,1010:1", "(nothing)");                 /* the other one stays */
    assert_int_equal(c->d->cpu[0].action, VM_DEBUG_STEP);
    assert_int_equal(c->d->cpu[0].start, 0x1000);
    assert_int_equal(c->d->cpu[0].end, 0x1010);
    assert_int_equal(c->d->cpu[1].action, VM_DEBUG_STAY);
    feed(c, "\x03");
    assert_ptr_equal(strstr(c->out, "$T02thread:2;"), c->out);
    assert_false(c->d->running);
    feed(c, "\x03");                                               /* it stands already */
    assert_string_equal(c->out, "");
    answers(c, "vCont;q", "E16");
    answers(c, "vCont;", "E16");
    answers(c, "vCont;c:9", "E16");
    answers(c, "vCont;r5", "E16");
    answers(c, "Czz", "E16");
    assert_int_equal(c->d->goes, 2);
    answers(c, "Hc1", "OK");
    answers(c, "s", "(nothing)");
    assert_int_equal(c->d->cpu[0].action, VM_DEBUG_STEP);
    assert_int_equal(c->d->cpu[1].action, VM_DEBUG_GO);
    feed(c, "\x03");
    c->d->no_steps = true;                                         /* an engine that has none */
    answers(c, "vCont;s", "E5f");
    answers(c, "vCont;c", "(nothing)");
}

static void reasons(void **state)
{
    static const struct {
        struct vm_debug_stop stop;
        const char *text;
    } t[] = {
        {{.why = DEBUG_POINT}, "T05thread:1;swbreak:;"},
        {{.why = DEBUG_WATCHED, .la = 0x2000, .access = DEBUG_WRITE}, "T05thread:1;watch:2000;"},
        {{.why = DEBUG_WATCHED, .la = 0x2000, .access = DEBUG_READ}, "T05thread:1;rwatch:2000;"},
        {{.why = DEBUG_WATCHED, .la = 0x2000, .access = DEBUG_READ | DEBUG_WRITE}, "T05thread:1;awatch:2000;"},
        {{.why = DEBUG_SHUTDOWN}, "T0bthread:1;"},
    };
    struct client *c = *state;
    ask(c, "qSupported:swbreak+;hwbreak+");
    answers(c, "Z0,fff0,1", "OK");
    c->d->x[0].seg[SEG_CS].base = 0xf000;                          /* the place is linear */
    c->d->x[0].rip = 0xff0;
    for (size_t i = 0; i < ARRAY_SIZE(t); i++) {
        answers(c, "c", "(nothing)");
        c->d->running = false;
        c->d->have_stop = true;
        c->d->stop = t[i].stop;
        c->len = 0;
        gdb_stub_stopped(c->s);
        if (strncmp(c->out + 1, t[i].text, strlen(t[i].text)))
            fail_msg("%s instead of %s", c->out, t[i].text);
    }
}

static void monitor_commands_of_gdb(void **state)
{
    struct client *c = *state;
    send_packet(c, "qRcmd,696e666f", 14);
    assert_string_equal(c->monitor, "info");
    assert_ptr_equal(strstr(c->out, "+$O3031323334"), c->out);
    assert_non_null(strstr(c->out, "$OK#9a"));
    size_t hex = 0, packets = 0;
    for (const char *p = c->out; (p = strstr(p, "$O3")); p++) {
        size_t n = strcspn(p, "#");
        assert_true(n <= GDB_PACKET_MAX);
        hex += n - 2;
        packets++;
    }
    assert_int_equal(hex, 2 * 30000);
    assert_true(packets > 1);
    answers(c, "qRcmd,6", "E16");
    answers(c, "qRcmd,zz", "E16");
    assert_non_null(strstr((send_packet(c, "qRcmd,70687973206f6e", 20), c->out), "$OK#9a"));
    answers(c, "qqemu.PhyMemMode", "1");
}

static void leaves(void **state)
{
    struct client *c = *state;
    answers(c, "Z0,10,1", "OK");
    answers(c, "D", "OK");
    assert_false(c->d->attached);
    assert_true(c->d->running);
    assert_int_equal(c->drops, 1);
    feed(c, "$g#67");                                              /* nobody is there any more */
    assert_string_equal(c->out, "");
    connect_client(c);
    assert_false(c->d->running);
    answers(c, "qC", "QC1");
    answers(c, "k", "(nothing)");
    assert_int_equal(c->kills, 1);
    gdb_stub_disconnect(c->s);
    gdb_stub_disconnect(c->s);
    assert_true(c->d->running);
}

static void guest_ends(void **state)
{
    struct client *c = *state;
    answers(c, "c", "(nothing)");
    c->len = 0;
    gdb_stub_ended(c->s, 71);
    assert_string_equal(c->out, "$W47#c2");
    assert_int_equal(c->drops, 1);
}

/* Whatever is sent, nothing crashes, answers are well framed, and the stub can be talked to afterwards. */
static void rubbish(void **state)
{
    static const char alphabet[] = "$#+-\x03}0123456789abcdef,:;=gGpPmMxXzZcCsSHTDkqvQRr?\xff";
    struct client *c = *state;
    u32 random = 1;
    for (unsigned round = 0; round < 20000; round++) {
        char data[64];
        size_t n = 0;
        for (random = random * 1664525 + 1013904223; n < (random >> 24) % 60; n++) {
            random = random * 1664525 + 1013904223;
            data[n] = alphabet[(random >> 16) % (sizeof(alphabet) - 1)];
        }
        if (round & 1)
            send_packet(c, data, n);
        else
            gdb_stub_receive(c->s, (const u8 *)data, n);
        c->len = 0;
        if (!c->d->attached)
            connect_client(c);
    }
    gdb_stub_disconnect(c->s);
    connect_client(c);
    answers(c, "qC", "QC1");
}

int main(void)
{
#define T(f) cmocka_unit_test_setup_teardown(f, setup, teardown)
    const struct CMUnitTest tests[] = {
        T(framing), T(too_long), T(greetings), T(description), T(registers), T(all_registers), T(memory),
        T(binary_with_nul), T(points), T(many_points), T(goes_on), T(reasons), T(monitor_commands_of_gdb), T(leaves),
        T(guest_ends), T(rubbish),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
