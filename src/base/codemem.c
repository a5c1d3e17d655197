/* Memory for generated code (see codemem.h). */
#define _GNU_SOURCE
#include "base/codemem.h"

#include <errno.h>
#include <sys/mman.h>
#include <unistd.h>

int codemem_map(const char *name, size_t bytes, u8 **rw, u8 **rx)
{
    int fd = memfd_create(name, MFD_CLOEXEC);
    void *w = MAP_FAILED, *x = MAP_FAILED;

    if (fd >= 0 && !ftruncate(fd, (off_t)bytes)) {
        w = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
        x = mmap(NULL, bytes, PROT_READ | PROT_EXEC, MAP_SHARED, fd, 0);
    }
    if (fd >= 0)
        close(fd);
    if (w == MAP_FAILED || x == MAP_FAILED) {
        if (w != MAP_FAILED)
            munmap(w, bytes);
        if (x != MAP_FAILED)
            munmap(x, bytes);
        w = x = mmap(NULL, bytes, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    }
    if (w == MAP_FAILED)
        return -ENOMEM;
    *rw = w;
    *rx = x;
    return 0;
}

void codemem_unmap(u8 *rw, u8 *rx, size_t bytes)
{
    munmap(rw, bytes);
    if (rx != rw)
        munmap(rx, bytes);
}

void codemem_forget(u8 *rw, u8 *rx, size_t from, size_t bytes)
{
    madvise(rw + from, bytes, rx == rw ? MADV_DONTNEED : MADV_REMOVE); /* a shared mapping's pages are the file's */
}
