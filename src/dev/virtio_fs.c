/*
 * virtio file system device (see virtio_fs.h; virtio 1.2, 5.11): FUSE requests of the guest, carried out by virtiofsd (back/virtiofsd.h) in the guest's
 * memory, by way of vhost-user (back/vhost_user.h).
 *
 * Queues: 0 for requests that must not wait (FORGET, INTERRUPT), 1 for all others. The vCPU that notifies takes chains from the guest's ring and
 * hands their parts to virtiofsd; the loop's thread gives them back when they are answered.
 *
 * A virtiofsd that dies (or talks nonsense, and is ended then): all requests, and whatever comes later, are answered with EIO until the guest is
 * reset. After a reset there is a new one, since a file server's session is its guest's.
 *
 * Descriptors of virtiofsd's: requests that take one are parked when it has none to spare, and go on when others have been given back: the guest forgets names as
 * it goes (fuse_names.h), but on another processor, and virtiofsd closes them when it comes to it. When nothing is given back for a while, all are in use:
 * virtiofsd gets the requests, and the guest its error.
 *
 * A saved state has no open files; what is in flight at a save is saved as chains and sent again after the load.
 *
 * Left out: the notification queue, the DAX window.
 *
 * Locking: the device's lock guards everything; virtiofsd is started and stopped on the loop's thread, which waits some tens of milliseconds for it.
 */
#define _GNU_SOURCE
#include "dev/virtio_fs.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/fuse.h>
#include <linux/virtio_fs.h>
#include <string.h>

#include "back/vhost_user.h"
#include "back/virtiofsd.h"
#include "dev/fuse_names.h"

#define QUEUES 2
#define QUEUE_SIZE 256
#define WAIT_MS 5000
#define WAIT_STEP_MS 100
#define SPARE_DESCRIPTORS 8                                        /* what virtiofsd opens for the time of a request that is not parked */
#define LIST_BYTES_MAX (1 * MiB)
#define PARKED_NS 2000000000ull

struct request {
    struct virtq_chain chain;
    bool busy;
    unsigned takes;                                                /* descriptors, at the most */
    bool parked;
    struct request *next;                                          /* free, or parked */
};

struct virtio_fs {
    struct virtio virtio;
    struct virtio_fs_config config;
    char *folder;
    bool readonly;
    struct loop *loop;
    struct virtiofsd server;
    struct vhost_user *vhost;                                      /* NULL: it has gone */
    bool used;                                                     /* it has had requests */
    bool posted;                                                   /* renew() is */
    bool told_files;                                               /* that virtiofsd has no descriptors left */
    struct fuse_names names;                                       /* that its guest holds: a descriptor each */
    struct request request[QUEUES][QUEUE_SIZE];
    struct request *free[QUEUES];
    unsigned in_flight[QUEUES];
    u64 limit;                                                     /* of descriptors; 0: not known */
    u64 spare;                                                     /* so many may be taken before virtiofsd's are counted again */
    u64 taking;                                                    /* by requests that it has */
    struct request *parked, **parked_last;                         /* of queue 1, in their order */
    bool exhausted;                                                /* nothing is given back: no use in parking */
    u64 returned;                                                  /* requests since then, or before, that give back */
    struct timer timer;                                            /* of the guest's clock: it stands still while the guest does */
    struct vhost_part part[VHOST_USER_RING];
};

static void lock(struct virtio_fs *f)
{
    pthread_mutex_lock(&f->virtio.device.lock);
}

static void unlock(struct virtio_fs *f)
{
    pthread_mutex_unlock(&f->virtio.device.lock);
}

/* --- the server --- */

static void on_used(void *arg, unsigned n);
static void on_gone(void *arg);
static const struct vhost_user_ops vhost_ops = { .used = on_used, .gone = on_gone };

static void stop_server(struct virtio_fs *f)
{
    vhost_user_free(f->vhost);
    f->vhost = NULL;
    virtiofsd_stop(&f->server);
    f->used = f->exhausted = false;
    f->spare = f->taking = 0;
}

static int connect_server(struct virtio_fs *f, int sock)
{
    const struct ram *ram = f->virtio.ram;
    struct vhost_region region[VHOST_USER_REGIONS_MAX];
    unsigned n = 0;

    for (unsigned i = 0; i < ram->runs; i++) {
        const struct ram_run *run = &ram->run[i];

        bug_on(n == VHOST_USER_REGIONS_MAX);
        region[n++] = (struct vhost_region){ run->gpa, run->size, run->fd, run->offset, run->hva };
    }
    return vhost_user_new(sock, f->loop, region, n, QUEUES, &vhost_ops, f, &f->vhost);
}

static int start_server(struct virtio_fs *f)
{
    char words[256], why[256];
    int sock = virtiofsd_start(&f->server, f->folder, f->readonly), r;

    if (sock < 0)
        return sock;
    r = connect_server(f, sock);
    f->limit = virtiofsd_descriptors(&f->server);
    f->names = (struct fuse_names){ .bound = f->limit / 2 };
    if (r == 0)
        return 0;
    snprintf(why, sizeof(why), "%s", err_last());
    virtiofsd_words(&f->server, words, sizeof(words));
    virtiofsd_stop(&f->server);
    return err(r, "--share %s: virtiofsd does not start: %s; share the folder by 9p: leave fs=virtiofs out", f->folder, *words ? words : why);
}

/* --- requests --- */

static void release(struct virtio_fs *f, unsigned n, struct request *r)
{
    r->busy = false;
    r->next = f->free[n];
    f->free[n] = r;
}

/* An answer that is nothing but EIO, if one is expected. */
static u32 refuse(struct virtq_chain *c)
{
    struct fuse_in_header in = { 0 };
    struct fuse_out_header out = { .len = sizeof(out), .error = -EIO };

    virtq_read(c, &in, sizeof(in));
    out.unique = in.unique;
    return (u32)virtq_write(c, &out, sizeof(out));
}

struct open_request {
    struct fuse_in_header head;
    struct fuse_open_in open;
};
_Static_assert(sizeof(struct open_request) <= VHOST_USER_SLOT_BYTES && QUEUE_SIZE <= VHOST_USER_SLOTS, "an open request goes into a slot");

/* What the guest sees only as an error of its own. */
static void look_at_answer(struct virtio_fs *f, const struct virtq_chain *c)
{
    struct fuse_out_header out;

    if (f->told_files || !fuse_peek(c->in, c->ins, 0, &out, sizeof(out)) || out.len != sizeof(out) || (out.error != -EMFILE && out.error != -ENFILE))
        return;
    f->told_files = true;
    log_msg(f->virtio.log, LOG_WARN, "share %s: the guest uses as many files as virtiofsd may have descriptors; raise the limit (ulimit -Hn), or share the folder by 9p: "
            "leave fs=virtiofs out, or, for --root, set DOPPEL_VIRTIOFSD=none", f->folder);
}

/*
 * Linux's overlayfs opens what is below it with O_NOATIME, which the host permits to a file's owner alone: an ordinary user's guest could read nothing
 * but the user's files. So it is left out, in a copy of the request; when atimes change is the host's affair. The number of parts, 0: it is no such request.
 */
static unsigned without_noatime(struct virtio_fs *f, unsigned n, struct request *r)
{
    const struct virtq_chain *c = &r->chain;
    struct open_request o;
    unsigned parts = 1;
    u64 gpa;

    if (c->out_total != sizeof(o) || !fuse_peek(c->out, c->outs, 0, &o, sizeof(o)) || (o.head.opcode != FUSE_OPEN && o.head.opcode != FUSE_OPENDIR) ||
        !(o.open.flags & O_NOATIME))
        return 0;
    o.open.flags &= ~(u32)O_NOATIME;
    memcpy(vhost_user_slot(f->vhost, n, (unsigned)(r - f->request[n]), &gpa), &o, sizeof(o));
    f->part[0] = (struct vhost_part){ gpa, sizeof(o), false };
    for (unsigned i = 0; i < c->parts; i++)
        if (c->part[i].writable)
            f->part[parts++] = (struct vhost_part){ c->part[i].gpa, c->part[i].len, true };
    return parts;
}

/* False: there is no room for it now. */
static bool send_request(struct virtio_fs *f, unsigned n, struct request *r)
{
    const struct virtq_chain *c = &r->chain;
    unsigned parts = without_noatime(f, n, r);

    if (!parts)
        for (; parts < c->parts; parts++)
            f->part[parts] = (struct vhost_part){ c->part[parts].gpa, c->part[parts].len, c->part[parts].writable };
    f->used = true;
    if (!vhost_user_add(f->vhost, n, f->part, parts, r))
        return false;
    fuse_names_request(&f->names, c->out, c->outs);
    r->busy = true;
    f->in_flight[n]++;
    f->taking += r->takes;
    return true;
}

/* --- descriptors --- */

static u32 opcode(const struct virtq_chain *c)
{
    struct fuse_in_header in;

    return fuse_peek(c->out, c->outs, 0, &in, sizeof(in)) ? in.opcode : 0;
}

/* How many it may leave virtiofsd with. */
static unsigned takes(const struct virtq_chain *c)
{
    switch (opcode(c)) {
    case FUSE_LOOKUP:
    case FUSE_SYMLINK:
    case FUSE_MKNOD:
    case FUSE_MKDIR:
    case FUSE_OPEN:
    case FUSE_OPENDIR:
        return 1;
    case FUSE_CREATE:
        return 2;
    case FUSE_READDIRPLUS:
        return (unsigned)(MIN(c->in_total, LIST_BYTES_MAX) / FUSE_NAME_OFFSET_DIRENTPLUS);
    default:
        return 0;
    }
}

static bool gives_back(const struct virtq_chain *c)
{
    u32 op = opcode(c);

    return op == FUSE_FORGET || op == FUSE_BATCH_FORGET || op == FUSE_RELEASE || op == FUSE_RELEASEDIR;
}

static void count_descriptors(struct virtio_fs *f)
{
    u64 open = f->limit ? virtiofsd_open_descriptors(&f->server) : 0, used = open + f->taking + SPARE_DESCRIPTORS;

    f->spare = !open ? UINT64_MAX : used < f->limit ? f->limit - used : 0;
}

static bool has_descriptors(struct virtio_fs *f, unsigned n)
{
    if (n <= f->spare)
        return true;
    count_descriptors(f);
    return n <= f->spare;
}

static void park(struct virtio_fs *f, struct request *r)
{
    if (!f->parked)
        timer_arm(&f->timer, clock_ns(f->timer.clock) + PARKED_NS);
    r->busy = r->parked = true;
    r->next = NULL;
    *f->parked_last = r;
    f->parked_last = &r->next;
}

static struct request *unpark(struct virtio_fs *f)
{
    struct request *r = f->parked;

    f->parked = r->next;
    if (!f->parked) {
        f->parked_last = &f->parked;
        timer_disarm(&f->timer);
    }
    r->parked = false;
    return r;
}

static void send_parked(struct virtio_fs *f)
{
    struct request *r;
    bool kick = false;

    while ((r = f->parked) && (f->exhausted || has_descriptors(f, r->takes)) && send_request(f, 1, r)) {
        unpark(f);
        f->spare -= MIN(f->spare, (u64)r->takes);
        kick = true;
    }
    if (kick)
        vhost_user_kick(f->vhost, 1);
}

/*
 * So many requests have given back what they could. Where Linux is older than 6.2, counting takes as long as there are descriptors: not without need. An eighth has to
 * be there before parking is worth while again.
 */
static void given_back(struct virtio_fs *f, unsigned n)
{
    f->returned += n;
    if (f->exhausted && f->returned >= f->limit / 16) {
        f->returned = 0;
        count_descriptors(f);
        f->exhausted = f->spare < f->limit / 8;
    }
    if (!f->parked)
        return;
    f->spare = 0;
    timer_arm(&f->timer, clock_ns(f->timer.clock) + PARKED_NS);
    send_parked(f);
}

/* False: the ring is not to be gone on with now. */
static bool take(struct virtio_fs *f, unsigned n, struct request *r, bool *kick)
{
    struct virtio *v = &f->virtio;
    struct virtq *q = &v->queue[n];
    struct virtq_chain *c = &r->chain;

    if (c->out_total < sizeof(struct fuse_in_header) || (c->in_total && c->in_total < sizeof(struct fuse_out_header)) || c->parts > VHOST_USER_RING) {
        virtq_drop(q, c);
        virtio_break(v, "a request to the file system without its head, or of too many pieces");
        return false;
    }
    if (!f->vhost) {
        virtq_push(q, c, refuse(c));
        return true;
    }
    r->takes = takes(c);
    if (n == 1 && r->takes && !f->exhausted && (f->parked || !has_descriptors(f, r->takes))) {
        f->free[n] = r->next;
        park(f, r);
        return true;
    }
    if (!send_request(f, n, r)) {
        virtq_unpop(q, c);                                         /* goes on when something is answered */
        return false;
    }
    f->spare -= MIN(f->spare, (u64)r->takes);
    f->free[n] = r->next;
    *kick = true;
    return true;
}

static bool in_flight(const struct virtio_fs *f)
{
    return f->in_flight[0] || f->in_flight[1];
}

/* A guest whose other processors bring requests as fast as they are refused must not keep this one here for ever: hence the budget. */
static void process(struct virtio_fs *f, unsigned n)
{
    struct virtio *v = &f->virtio;
    struct virtq *q = &v->queue[n];
    struct request *r;
    unsigned budget = 4u * QUEUE_SIZE;
    bool kick = false, go_on = true;

    while (go_on && virtio_running(v)) {
        virtq_ignore(q);
        while (go_on && budget && (r = f->free[n]) && virtio_pop(v, n, &r->chain)) {
            budget--;
            go_on = take(f, n, r, &kick);
        }
        if (!f->free[n] || !virtq_listen(q) || !budget)
            break;
    }
    if (kick)
        vhost_user_kick(f->vhost, n);
    virtio_interrupt(v, n);
    if (n == 1 && f->parked)
        process(f, 0);                                             /* FORGETs of a processor that has not come to notify of them */
}

static void on_kick(struct virtio *v, unsigned n)
{
    process(container_of(v, struct virtio_fs, virtio), n);
}

static void take_answers(struct virtio_fs *f, unsigned n)
{
    struct virtq *q = &f->virtio.queue[n];
    struct request *r;
    unsigned given = 0;
    u32 len;

    while (f->vhost && (r = vhost_user_take(f->vhost, n, &len))) {
        look_at_answer(f, &r->chain);
        given += gives_back(&r->chain);
        f->taking -= r->takes;
        if (f->virtio.resetting || q->broken) {
            virtq_drop(q, &r->chain);
        } else {
            fuse_names_answer(&f->names, r->chain.out, r->chain.outs, r->chain.in, r->chain.ins);
            virtq_push(q, &r->chain, (u32)MIN((u64)len, r->chain.in_total));
        }
        release(f, n, r);
        f->in_flight[n]--;
    }
    if (given)
        given_back(f, given);
}

static void on_used(void *arg, unsigned n)
{
    struct virtio_fs *f = arg;

    lock(f);
    take_answers(f, n);
    send_parked(f);                                                /* what found no room in the ring */
    process(f, n);
    unlock(f);
}

static void on_timer(void *arg)
{
    struct virtio_fs *f = arg;

    lock(f);
    if (f->parked && clock_ns(f->timer.clock) >= f->timer.deadline_ns) {
        process(f, 1);
        f->exhausted = !f->in_flight[0];
        if (!f->exhausted)
            timer_arm(&f->timer, clock_ns(f->timer.clock) + PARKED_NS);
        send_parked(f);
    }
    unlock(f);
}

/* Nobody writes to them any more: all chains come back, refused, or forgotten where the driver has reset the device. */
static void give_back(struct virtio_fs *f)
{
    f->parked = NULL;
    f->parked_last = &f->parked;
    timer_disarm(&f->timer);
    for (unsigned n = 0; n < QUEUES; n++) {
        struct virtq *q = &f->virtio.queue[n];

        for (unsigned i = 0; i < QUEUE_SIZE; i++) {
            struct request *r = &f->request[n][i];

            if (!r->busy)
                continue;
            if (f->virtio.resetting || q->broken)
                virtq_drop(q, &r->chain);
            else
                virtq_push(q, &r->chain, refuse(&r->chain));
            if (r->parked)
                r->parked = false;
            else
                f->in_flight[n]--;
            release(f, n, r);
        }
        if (!f->virtio.resetting)
            process(f, n);
    }
}

static void on_gone(void *arg)
{
    struct virtio_fs *f = arg;
    char words[256];

    lock(f);
    virtiofsd_words(&f->server, words, sizeof(words));
    stop_server(f);
    log_msg(f->virtio.log, LOG_ERROR, "share %s: virtiofsd has ended%s%s; the guest sees I/O errors there until it is reset", f->folder,
            *words ? ": " : "", words);
    give_back(f);
    unlock(f);
}

/* --- reset --- */

/* A new server for a new session. Under the lock, on the loop's thread. */
static void renew_server(struct virtio_fs *f)
{
    if (f->vhost && !f->used)
        return;
    stop_server(f);
    give_back(f);
    if (start_server(f) < 0)
        log_msg(f->virtio.log, LOG_ERROR, "%s", err_last());
}

static void renew(void *arg)
{
    struct virtio_fs *f = arg;

    lock(f);
    f->posted = false;
    if (f->virtio.resetting) {
        renew_server(f);
        virtio_stopped(&f->virtio);
    }
    unlock(f);
}

static bool on_stop(struct virtio *v)
{
    struct virtio_fs *f = container_of(v, struct virtio_fs, virtio);

    if (f->vhost && !f->used)
        return true;
    if (!f->posted) {
        f->posted = true;
        loop_post(f->loop, renew, f);
    }
    return false;
}

static void fs_reset(struct device *d)
{
    struct virtio_fs *f = container_of(d, struct virtio_fs, virtio.device);

    lock(f);
    f->virtio.resetting = true;
    renew_server(f);
    virtio_device_reset(&f->virtio);
    unlock(f);
}

/* --- device --- */

/* On the loop's thread, which would see the answers else. */
static void fs_quiesce(struct device *d)
{
    struct virtio_fs *f = container_of(d, struct virtio_fs, virtio.device);

    lock(f);
    for (int ms = 0; f->vhost && in_flight(f) && ms < WAIT_MS; ms += WAIT_STEP_MS) {
        for (unsigned n = 0; n < QUEUES; n++)
            take_answers(f, n);
        if (in_flight(f))
            vhost_user_wait(f->vhost, WAIT_STEP_MS);
    }
    for (unsigned n = 0; n < QUEUES; n++)
        virtio_interrupt(&f->virtio, n);
    if (in_flight(f))
        log_msg(f->virtio.log, LOG_WARN, "share %s: virtiofsd has not answered for %d seconds", f->folder, WAIT_MS / 1000);
    unlock(f);
}

static void load_in_flight(struct virtio_fs *f, struct stream *s, unsigned n, u16 count)
{
    bool kick = false;

    if (count > QUEUE_SIZE || f->in_flight[n]) {
        stream_bad(s, "a shared folder has too many requests in flight");
        return;
    }
    while (count-- && !s->error) {
        struct request *r = f->free[n];

        virtq_chain_state(&f->virtio.queue[n], &r->chain, s);
        if (s->error || !take(f, n, r, &kick))
            break;
    }
    if (kick)
        vhost_user_kick(f->vhost, n);
}

static u16 busy(const struct virtio_fs *f, unsigned n)
{
    u16 count = 0;

    for (unsigned i = 0; i < QUEUE_SIZE; i++)
        count = (u16)(count + f->request[n][i].busy);
    return count;
}

static void fs_state(struct device *d, struct stream *s)
{
    struct virtio_fs *f = container_of(d, struct virtio_fs, virtio.device);

    if (!stream_section(s, "virtio_fs", 1))
        return;
    virtio_state(&f->virtio, s);
    for (unsigned n = 0; n < QUEUES; n++) {
        u16 count = f->virtio.resetting || f->virtio.queue[n].broken ? 0 : busy(f, n);

        stream_u16(s, &count);
        if (s->load && !s->error && count)
            load_in_flight(f, s, n, count);
        for (unsigned i = 0; !s->load && count && i < QUEUE_SIZE; i++)
            if (f->request[n][i].busy)
                virtq_chain_state(&f->virtio.queue[n], &f->request[n][i].chain, s);
    }
}

static void fs_destroy(struct virtio_fs *f)
{
    stop_server(f);
    for (unsigned n = 0; n < QUEUES; n++)
        for (unsigned i = 0; i < QUEUE_SIZE; i++)
            virtq_chain_free(&f->request[n][i].chain);
    free(f->folder);
    free(f);
}

static void fs_free(struct device *d)
{
    struct virtio_fs *f = container_of(d, struct virtio_fs, virtio.device);

    loop_unpost(f->loop, renew, f);
    timer_disarm(&f->timer);
    virtio_destroy(&f->virtio);
    fs_destroy(f);
}

static const struct device_ops device_ops = { .name = "virtio_fs", .reset = fs_reset, .quiesce = fs_quiesce, .state = fs_state, .free = fs_free };
static const struct virtio_ops virtio_ops = { .kick = on_kick, .stop = on_stop };

int virtio_fs_new(struct ram *ram, const struct log *log, struct loop *loop, struct clock *clock, const char *folder, const char *tag, bool readonly,
                  struct virtio_fs **out)
{
    static const u16 size[QUEUES] = { QUEUE_SIZE, QUEUE_SIZE };
    struct virtio_fs *f = calloc(1, sizeof(*f));
    int r;

    if (!f || !(f->folder = strdup(folder))) {
        free(f);
        return err(-ENOMEM, "virtio_fs: out of memory");
    }
    f->readonly = readonly;
    f->loop = loop;
    f->parked_last = &f->parked;
    timer_init(&f->timer, clock, on_timer, f);
    memcpy(f->config.tag, tag, strnlen(tag, sizeof(f->config.tag)));
    f->config.num_request_queues = 1;
    for (unsigned n = 0; n < QUEUES; n++)
        for (unsigned i = QUEUE_SIZE; i--;)
            release(f, n, &f->request[n][i]);
    r = virtio_init(&f->virtio, &device_ops, &virtio_ops, VIRTIO_ID_FS, ram, log, 0, &f->config, sizeof(f->config), size, QUEUES);
    if (r == 0 && (r = start_server(f)) < 0)
        virtio_destroy(&f->virtio);
    if (r < 0) {
        fs_destroy(f);
        return r;
    }
    *out = f;
    return 0;
}
