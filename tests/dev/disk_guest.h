/* A disk's image for tests of disk devices, and the guest beside it: each word of the image says which sector it lies in, and where there. */
#pragma once

#include <fcntl.h>

#include "back/block.h"
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
