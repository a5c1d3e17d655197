/*
 * The gdb stub: whatever a client sends, its answers stay bounded, nothing is touched while the guest runs (fake_debug.h
 * sees to that), and it can be talked to afterwards. Byte 0xfe is an event of the guest's instead: it stops.
 */
#include "ctl/gdb_stub.h"
#include "unit/fake_debug.h"

static size_t sent;

static void on_send(void *arg UNUSED, const u8 *buf, size_t n)
{
    bug_on(n > GDB_PACKET_MAX + 8 || !buf);
    sent += n;
}

static void on_drop(void *arg UNUSED) {}
static void on_kill(void *arg UNUSED) {}

static void on_monitor(void *arg UNUSED, char *line, FILE *out)
{
    fputs(line, out);
}

int LLVMFuzzerTestOneInput(const u8 *data, size_t size);
int LLVMFuzzerTestOneInput(const u8 *data, size_t size)
{
    static const struct gdb_ops ops = {.send = on_send, .drop = on_drop, .kill = on_kill, .monitor = on_monitor};
    struct vm_debug *d = aligned_alloc(64, ALIGN_UP(sizeof(*d), 64));
    struct gdb_stub *s;
    if (!size || !d) {
        free(d);
        return 0;
    }
    memset(d, 0, sizeof(*d));
    d->running = true;
    if (gdb_stub_new(d, data[0] & 1, &ops, NULL, &s) < 0)
        abort();
    gdb_stub_connect(s);
    gdb_stub_receive(s, (const u8 *)"$QStartNoAckMode#b0", data[0] & 2 ? 19 : 0);   /* then checksums do not matter */
    for (size_t i = 1; i < size; i++) {
        if (data[i] == 0xfe && d->running && d->attached) {
            d->running = false;
            d->have_stop = true;
            d->stop = (struct vm_debug_stop){.cpu = i & 1, .why = (enum debug_stop)(1 + i % 4), .access = DEBUG_WRITE};
            gdb_stub_stopped(s);
        } else {
            gdb_stub_receive(s, data + i, 1);
        }
        if (!d->attached)
            gdb_stub_connect(s);
    }
    gdb_stub_disconnect(s);
    gdb_stub_connect(s);
    sent = 0;
    gdb_stub_receive(s, (const u8 *)"$qC#b4", 6);
    bug_on(!sent);
    gdb_stub_free(s);
    free(d);
    return 0;
}
