/*
 * Rows of the bench that read and write memory: blocks, streams, random places, chains, trees. Large buffers are
 * touched in setup; what is timed makes no system call and takes no first fault. Pages are small ones, on every system:
 * huge pages would be the host's good luck and not the engine's merit.
 */
#define _GNU_SOURCE
#include "rows.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define MIB (1ul << 20)

static void *small_pages(size_t size)
{
    void *p = must_map(size, MAP_PRIVATE);
    madvise(p, size, MADV_NOHUGEPAGE);                             /* a kernel without them refuses: as good */
    return p;
}

/* ---- memset and memcpy of libc ---- */

#define BLOCK (256ul << 10)

struct blocks {
    uint8_t *from, *to;
};

static void *setup_blocks(struct bench *b)
{
    struct blocks *s = must_map(sizeof *s, MAP_PRIVATE);
    (void)b;
    s->from = small_pages(BLOCK);
    s->to = small_pages(BLOCK);
    for (size_t i = 0; i < BLOCK; i += 8)
        memcpy(s->from + i, &(uint64_t){ mix(i) }, 8);
    memset(s->to, 0, BLOCK);
    return s;
}
static uint64_t run_memset(void *state, uint64_t count)
{
    struct blocks *s = state;
    void *(*volatile set)(void *, int, size_t) = memset;
    uint64_t wrong = 0, i;

    for (i = 0; i < count; i++) {
        set(s->to, i & 255, BLOCK);
        wrong += s->to[0] != (i & 255) || s->to[BLOCK - 1] != (i & 255);
    }
    for (size_t k = 0; k < BLOCK; k++)
        wrong += s->to[k] != ((i - 1) & 255);
    return wrong;
}
static uint64_t run_memcpy(void *state, uint64_t count)
{
    struct blocks *s = state;
    void *(*volatile copy)(void *, const void *, size_t) = memcpy;
    uint64_t wrong = 0;

    for (uint64_t i = 0; i < count; i++) {
        s->from[0] = s->from[BLOCK - 1] = i;
        copy(s->to, s->from, BLOCK);
        wrong += s->to[0] != (uint8_t)i || s->to[BLOCK - 1] != (uint8_t)i;
    }
    return wrong + (memcmp(s->from, s->to, BLOCK) != 0);
}

/* ---- sequential and random reads ---- */

struct buffer {
    uint64_t *word;
    size_t bytes;
    uint64_t x, x_before;                                          /* of random places, now and before the last run */
};

/* What each 8-byte word of a page holds. */
static uint64_t page_word(size_t page)
{
    return (page * 167 & 255) * 0x0101010101010101u;
}
static void *setup_buffer(size_t bytes)
{
    struct buffer *s = must_map(sizeof *s, MAP_PRIVATE);
    s->bytes = bytes;
    s->word = small_pages(bytes);
    for (size_t page = 0; page < bytes / 4096; page++)
        memset(&s->word[page * 512], page * 167 & 255, 4096);
    return s;
}
static void *setup_64(struct bench *b)
{
    (void)b;
    return setup_buffer(64 * MIB);
}
static void *setup_512(struct bench *b)
{
    (void)b;
    return setup_buffer(512 * MIB);
}
/* A count is 1 MiB; the end wraps around to the start. */
static uint64_t run_sequential(void *state, uint64_t count)
{
    struct buffer *s = state;
    uint64_t sum = 0;

    for (uint64_t i = 0; i < count; i++) {
        const volatile uint64_t *p = s->word + i % (s->bytes / MIB) * (MIB / 8);
        uint64_t s0 = 0, s1 = 0, s2 = 0, s3 = 0;
        for (const volatile uint64_t *end = p + MIB / 8; p != end; p += 4) {
            s0 += p[0];
            s1 += p[1];
            s2 += p[2];
            s3 += p[3];
        }
        sum += s0 + s1 + s2 + s3;
    }
    return sum;
}
static uint64_t expect_sequential(void *state, uint64_t count)
{
    struct buffer *s = state;
    uint64_t sum = 0;

    for (uint64_t i = 0; i < count; i++)
        for (size_t page = 0; page < 256; page++)
            sum += 512 * page_word(i % (s->bytes / MIB) * 256 + page);
    return sum;
}

#define READS 1000

static inline uint64_t next_place(uint64_t x)
{
    return x * 6364136223846793005u + 1442695040888963407u;
}
/* Places do not depend on what is read: as many reads are on their way as the processor can have. Each run goes on
 * where the last one ended, so that it finds nothing in the caches. */
static uint64_t run_random(void *state, uint64_t count)
{
    struct buffer *s = state;
    const volatile uint64_t *word = s->word;
    uint64_t x = s->x, sum = 0, mask = s->bytes / 8 - 1;

    s->x_before = x;
    for (uint64_t i = 0; i < count * READS; i++) {
        x = next_place(x);
        sum += word[x >> 24 & mask];
    }
    s->x = x;
    return sum;
}
static uint64_t expect_random(void *state, uint64_t count)
{
    struct buffer *s = state;
    uint64_t x = s->x_before, sum = 0, mask = s->bytes / 8 - 1;

    for (uint64_t i = 0; i < count * READS; i++) {
        x = next_place(x);
        sum += page_word((x >> 24 & mask) / 512);
    }
    return sum;
}

/* ---- pointer chase ---- */

#define LINKS (1u << 20)                                           /* 64 MiB of cache lines, one cycle through all */

struct chain {
    struct { uint32_t next, place, pad[14]; } *line;               /* place: links from line 0 to this one */
    uint32_t at;
};

static void *setup_chase(struct bench *b)
{
    struct chain *s = must_map(sizeof *s, MAP_PRIVATE);
    (void)b;
    s->line = small_pages(LINKS * sizeof *s->line);
    for (uint32_t i = 0; i < LINKS; i++)
        s->line[i].next = i;
    for (uint32_t i = LINKS - 1; i; i--) {                         /* Sattolo's algorithm: a single cycle */
        uint32_t k = mix(i) % i, t = s->line[i].next;
        s->line[i].next = s->line[k].next;
        s->line[k].next = t;
    }
    for (uint32_t at = 0, n = 0; n < LINKS; at = s->line[at].next)
        s->line[at].place = n++;
    return s;
}
static KEEP uint32_t follow(struct chain *s, uint32_t at, uint64_t steps)
{
    while (steps--)
        at = s->line[at].next;
    return at;
}
/* How far it came, modulo the length of the cycle. Each run goes on where the last one ended. */
static uint64_t run_chase(void *state, uint64_t count)
{
    struct chain *s = state;
    uint32_t from = s->at;

    s->at = follow(s, from, count * READS);
    return (s->line[s->at].place - s->line[from].place) % LINKS;
}
static uint64_t expect_chase(void *state, uint64_t count)
{
    (void)state;
    return count * READS % LINKS;
}

/* ---- binary tree with random keys ---- */

#define TREE_N 20000

struct node {
    struct node *child[2];
    uint64_t key;
};
struct tree {
    struct node *root, node[TREE_N];
    unsigned nodes;
};

static KEEP void insert(struct tree *t, uint64_t key)
{
    struct node **at = &t->root;
    while (*at)
        at = &(*at)->child[key > (*at)->key];
    *at = &t->node[t->nodes++];
    **at = (struct node){ .key = key };
}
static KEEP const struct node *look_up(const struct tree *t, uint64_t key)
{
    const struct node *n = t->root;
    while (n && n->key != key)
        n = n->child[key > n->key];
    return n;
}
static void *setup_tree(struct bench *b)
{
    struct tree *t = small_pages(sizeof *t);
    (void)b;
    for (unsigned i = 0; i < TREE_N; i++)
        insert(t, mix(i));
    return t;
}
static uint64_t run_insert(void *state, uint64_t count)
{
    struct tree *t = state;
    uint64_t wrong = 0;

    while (count--) {
        t->root = NULL;
        t->nodes = 0;
        for (unsigned i = 0; i < TREE_N; i++)
            insert(t, mix(i));
        wrong += t->nodes != TREE_N || !look_up(t, mix(TREE_N - 1)) || look_up(t, mix(TREE_N));
    }
    return wrong;
}
static uint64_t run_look_up(void *state, uint64_t count)
{
    const struct tree *t = state;
    uint64_t sum = 0;

    for (uint64_t i = 0; i < count * READS; i++) {                 /* every fourth is not there */
        const struct node *n = look_up(t, mix(i * 7919 % (TREE_N + TREE_N / 3)));
        sum += n ? n->key : 1;
    }
    return sum;
}
static uint64_t expect_look_up(void *state, uint64_t count)
{
    uint64_t sum = 0;
    (void)state;
    for (uint64_t i = 0; i < count * READS; i++) {
        uint64_t k = i * 7919 % (TREE_N + TREE_N / 3);
        sum += k < TREE_N ? mix(k) : 1;
    }
    return sum;
}

const struct row rows_mem[] = {
    { "memset", "libc memset, 256 KiB", "KiB", BLOCK / 1024.0, 16, setup_blocks, run_memset, NULL },
    { "memcpy", "libc memcpy, 256 KiB", "KiB", BLOCK / 1024.0, 16, setup_blocks, run_memcpy, NULL },
    { "seq-64M", "sequential reads, 64 MiB", "KiB", 1024, 64, setup_64, run_sequential, expect_sequential },
    { "seq-512M", "sequential reads, 512 MiB", "KiB", 1024, 512, setup_512, run_sequential, expect_sequential },
    { "rand-64M", "random reads, 64 MiB", "read", READS, 0, setup_64, run_random, expect_random },
    { "rand-512M", "random reads, 512 MiB", "read", READS, 0, setup_512, run_random, expect_random },
    { "chase", "pointer chase, 64 MiB", "step", READS, 0, setup_chase, run_chase, expect_chase },
    { "tree-insert", "tree inserts, 20000 nodes", "insert", TREE_N, 0, setup_tree, run_insert, NULL },
    { "tree-find", "tree look-ups, 20000 nodes", "look-up", READS, 0, setup_tree, run_look_up, expect_look_up },
    { 0 },
};
