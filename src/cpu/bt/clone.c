/*
 * Copies of translations: the same guest code at another linear address.
 *
 * Translations are made for a linear address, and a program whose base is chosen at random has another one each time it is started. Its pages are the same: so
 * the translation of one start is copied for the next, instead of being made anew. While a block of user code is translated, whatever depends on its address or on
 * where the translation lies is noted (tr_reloc()); a copy takes the bytes, has these places put right, and has links and ways in of its own. A copy keeps
 * nothing of its source and can be copied in turn.
 *
 * Not copied is what compares its bytes, has an instruction in two pages, or lies where addresses have short encodings: below 4 GiB. Code of the
 * supervisor's is at one address.
 *
 * A relocation is 4 bytes: offset (16 bits, from the first instruction's code or from the beginning of the cold code), which of the two, and kind.
 */
#include <string.h>

#include "cpu/bt/tr.h"

#define IN_COLD BIT(16)
#define KIND_SHIFT 17
#define SOURCES 16                                                 /* that are looked at */

/* ---- while a block is translated ---- */
void tr_reloc(struct tr *t, const u8 *place, enum reloc what)
{
    if (!t->relocate || t->e.overflow)
        return;
    struct bt *bt = t->t;
    bool cold = place >= bt->rw + BT_ARENA_BYTES / 2;
    const u8 *base = cold ? t->tb->cold : t->tb->start + t->tb->code_off;
    bt->reloc[bt->relocs++] = (u32)(place - base) | (cold ? (u32)IN_COLD : 0) | (u32)what << KIND_SHIFT;
}

void tr_linear(struct tr *t, unsigned reg, u64 la)
{
    const u8 *p = t->e.p;
    mov_imm64(&t->e, reg, la);
    if (t->e.p - p == 10)
        tr_reloc(t, t->e.p - 8, RELOC_ADDRESS);
    else
        t->tb->copies = false;
}

/* ---- the source ---- */
/* Its way to another view is that of SYSCALL, whose target is not relative to the block. */
static u64 moved(const struct link *l, const struct tb *from, const struct tb *to)
{
    return l->key == from->key ? l->target - from->la + to->la : l->target;
}

static bool targets_canonical(const struct bt *bt, const struct tb *from, const struct tb *to)
{
    for (u32 i = 0; i < from->links; i++)
        if (!tlb_canonical(moved(&bt->link[from->link + i], from, to)))
            return false;
    return true;
}

const struct tb *clone_source(const struct bt *bt, const struct tb *tb)
{
    u32 n = tb->b->translations;
    if (!clone_possible(tb->key, tb->la))
        return NULL;
    for (unsigned i = 0; n && i < SOURCES; i++, n = bt->tb[n].block_next) {
        const struct tb *from = &bt->tb[n];
        if (from->copies && from->key == tb->key && from->slow == tb->slow && from->n == tb->n && !((from->la ^ tb->la) & ~PAGE_MASK) &&
            from->size <= BT_BLOCK_BYTES / 2 && from->cold_size <= BT_BLOCK_BYTES / 2 && BT_LINKS - bt->links > from->links && targets_canonical(bt, from, tb))
            return from;
    }
    return NULL;
}

/* ---- the copy ---- */
void clone_code(struct tr *t, const struct tb *from)
{
    struct tb *tb = t->tb;
    u32 size = from->size - from->code_off;
    const struct tb_mark *m = &t->t->mark[from->mark];
    memcpy(t->e.p, from->start + from->code_off, size);
    t->e.p += size;
    for (unsigned i = 1; i < from->marks; i++) {                   /* the first is that of the ways in */
        t->mark[t->marks] = m[i];
        t->mark[t->marks++].off = (u16)(m[i].off - from->code_off + tb->code_off);
    }
    tb->handled = from->handled;
    tb->second = from->second;
}

/* Where in the copy what p points to in the source is; what lies outside it stays. */
static u8 *led(const struct tb *from, const struct tb *to, u8 *p)
{
    u8 *code = from->start + from->code_off;
    if (p >= code && p <= from->start + from->size)
        return to->start + to->code_off + (p - code);
    if (p >= from->cold && p <= from->cold + from->cold_size)
        return to->cold + (p - from->cold);
    return p;
}

static u64 get(const u8 *p, unsigned n)
{
    u64 v = 0;
    memcpy(&v, p, n);
    return v;
}

static void put(u8 *p, u64 v, unsigned n)
{
    memcpy(p, &v, n);
}

static void relocate(struct tr *t, const struct tb *from)
{
    struct tb *tb = t->tb;
    struct bt *bt = t->t;
    u64 move = tb->la - from->la, address = 0;
    u32 site = (u32)(tb - bt->tb) << 8, link = tb->link - from->link;
    for (u32 i = 0; i < from->relocs; i++) {
        u32 r = bt->reloc[from->reloc + i];
        u8 *old = (r & IN_COLD ? from->cold : from->start + from->code_off) + (u16)r, *p = led(from, tb, old);
        switch ((enum reloc)(r >> KIND_SHIFT)) {
        case RELOC_ADDRESS:
            address = get(p, 8) + move;
            put(p, address, 8);
            break;
        case RELOC_SLOT:
            put(p, get(p, 4) + 8 * (address >> 39 & 511) - 8 * ((address - move) >> 39 & 511), 4);
            break;
        case RELOC_SITE:
            put(p, (get(p, 4) & 0xff) | site, 4);
            break;
        case RELOC_LINK:
            put(p, get(p, 4) + link, 4);
            break;
        case RELOC_JUMP:
            aim(p, led(from, tb, old + 4 + (s32)get(old, 4)));
            break;
        }
    }
}

static void copy_link(struct bt *bt, const struct link *l, const struct tb *from, const struct tb *to)
{
    u32 n = bt->links++;
    struct link *own = &bt->link[n];
    *own = (struct link){ .target = moved(l, from, to), .place = led(from, to, l->place), .stub = led(from, to, l->stub),
                          .from = (u32)(to - bt->tb), .key = l->key, .ret = l->ret };
    aim(own->place, own->stub);
    if (own->ret)
        tb_return(bt, n);
}

void clone_cold(struct tr *t, const struct tb *from)
{
    struct bt *bt = t->t;
    struct tb *tb = t->tb;
    memcpy(t->e.p, from->cold, from->cold_size);
    t->e.p += from->cold_size;
    relocate(t, from);
    for (u32 i = 0; i < from->links; i++)
        copy_link(bt, &bt->link[from->link + i], from, tb);
    tb->copies = true;
    tb->links = from->links;
    tb->reloc = from->reloc;
    tb->relocs = from->relocs;
}
