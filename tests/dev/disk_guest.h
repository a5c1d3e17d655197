/* A disk's image for tests of disk devices, and the guest beside it: each word of the image says which sector it lies in, and where there. */
#pragma once

#include <fcntl.h>

#include "back/block_host.h"
#include "virtio_guest.h"

static struct guest g;
static char image[] = "/tmp/doppel-disk-XXXXXX";

static inline void write_image(u32 sectors)
{
    int fd = open(image, O_RDWR | O_TRUNC);
    u32 sector[128];

    assert_true(fd >= 0);
    for (u32 s = 0; s < sectors; s++) {
        for (u32 i = 0; i < 128; i++)
            sector[i] = s << 8 | i;
        assert_int_equal(write(fd, sector, sizeof(sector)), sizeof(sector));
    }
    close(fd);
}

static inline struct block *open_image(bool readonly)
{
    struct block *b;

    assert_int_equal(block_open(&(struct block_config){ .path = image, .readonly = readonly }, &b), 0);
    return b;
}

/* A host that answers when the test does: by block_done() of the request that it was given last; but a device's own flush at once. */
static struct block_req *asked;

static inline bool host_submit(struct block *b UNUSED, struct block_req *r)
{
    if (r->op == BLOCK_FLUSH && r->never_held)
        return true;
    asked = r;
    return false;
}

static inline int host_size(struct block *b UNUSED, u64 *size)
{
    *size = 1 * MiB;
    return 0;
}

static inline bool host_close(struct block *b)
{
    block_destroy(b);
    free(b);
    return true;
}

static inline struct block *open_host(void)
{
    static const struct block_ops ops = { .submit = host_submit, .size = host_size, .close = host_close };
    struct block *b = calloc(1, sizeof(*b));

    asked = NULL;
    assert_int_equal(block_init(b, &ops, "asked", "image", false), 0);
    assert_int_equal(block_refresh(b), 0);
    return b;
}

static inline void nobody(void *arg UNUSED)
{
}

/* What was asked finds the host full, a while after the caller has begun to wait. */
static atomic_bool is_full;

static inline void *becomes_full(void *arg)
{
    usleep(200000);
    atomic_store(&is_full, true);
    asked->result = -ENOSPC;
    block_done(arg, asked);
    return NULL;
}

static inline void count_warnings(void *arg, enum log_level level, const char *msg UNUSED)
{
    *(unsigned *)arg += level == LOG_WARN;
}

/* A request that comes to be held while a device waits for all to end: nobody is told that the host does not answer. */
static inline void full_meanwhile(struct block *b, struct device *dev, void (*wait)(struct device *dev), const unsigned *warnings)
{
    pthread_t t;

    assert_non_null(asked);
    atomic_store(&is_full, false);
    assert_int_equal(pthread_create(&t, NULL, becomes_full, b), 0);
    wait(dev);
    assert_true(is_full);
    pthread_join(t, NULL);
    assert_int_equal(*warnings, 0);
}

static inline u32 word_at(u64 gpa)
{
    u32 w;

    get(&g, gpa, &w, 4);
    return w;
}

static inline int make_image(void **state UNUSED)
{
    int fd = mkstemp(image);

    return fd < 0 ? -1 : close(fd);
}

static inline int remove_image(void **state UNUSED)
{
    return unlink(image);
}
