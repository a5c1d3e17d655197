/* The log of stores (store_log.h). */
#include "cpu/interp/store_log.h"

#include <string.h>

void store_log_begin(struct store_log *l)
{
    l->stop = false;
    l->entries = l->bytes = l->pages = 0;
}

static bool note_page(struct store_log *l, u8 *page)
{
    for (u32 i = l->pages; i > 0; i--)                             /* mostly the last one */
        if (l->page[i - 1] == page)
            return true;
    if (l->pages == STORE_LOG_PAGES)
        return false;
    l->page[l->pages++] = page;
    return true;
}

bool store_log_note(struct store_log *l, u8 *host, unsigned n)
{
    u8 *page = (u8 *)((uintptr_t)host & ~(uintptr_t)(PAGE_SIZE - 1));
    if (l->entries == STORE_LOG_ENTRIES || n > STORE_LOG_BYTES - l->bytes || !note_page(l, page)) {
        l->stop = true;
        return false;
    }
    l->entry[l->entries++] = (struct stored){ host, n, l->bytes };
    memcpy(l->old + l->bytes, host, n);
    l->bytes += n;
    return true;
}

void store_log_undo(struct store_log *l)
{
    for (u32 i = l->entries; i > 0; i--)
        memcpy(l->entry[i - 1].host, l->old + l->entry[i - 1].at, l->entry[i - 1].n);
}
