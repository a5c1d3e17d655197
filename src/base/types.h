/* Integers, checked arithmetic and the few macros that every file needs. */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef uint64_t u64;
typedef int8_t s8;
typedef int16_t s16;
typedef int32_t s32;
typedef int64_t s64;
typedef unsigned __int128 u128;

#define likely(x)   __builtin_expect(!!(x), 1)
#define unlikely(x) __builtin_expect(!!(x), 0)
#define ARRAY_SIZE(a) (sizeof(a) / sizeof((a)[0]))
#define container_of(p, type, member) ((type *)((char *)(p) - offsetof(type, member)))
#define BIT(n) (1ull << (n))
#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define MAX(a, b) ((a) > (b) ? (a) : (b))
#define ALIGN_DOWN(x, a) ((x) & ~((u64)(a) - 1))
#define ALIGN_UP(x, a) ALIGN_DOWN((u64)(x) + (a) - 1, a)
#define UNUSED __attribute__((unused))

#define PAGE_SHIFT 12
#define PAGE_SIZE 4096ull
#define PAGE_MASK (~(PAGE_SIZE - 1))

#define KiB 1024ull
#define MiB (1024 * KiB)
#define GiB (1024 * MiB)

/* Ours: a state that no guest and no host can bring about. Always compiled in. */
#define bug_on(cond)                                                                                  \
    do {                                                                                              \
        if (unlikely(cond)) {                                                                         \
            fprintf(stderr, "doppel: bug: %s at %s:%d\n", #cond, __FILE__, __LINE__);                 \
            abort();                                                                                  \
        }                                                                                             \
    } while (0)

/* Is [start, start + len) inside [0, size)? Never wraps. */
static inline bool range_in(u64 start, u64 len, u64 size)
{
    return start <= size && len <= size - start;
}
