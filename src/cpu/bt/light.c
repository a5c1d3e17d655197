/*
 * memcpy() and its kin for light code (fpstate.h): what the compiler calls for structures and what the sources call become these, since
 * libc's own use vector registers. Plain loops would be recognized and turned into calls of themselves.
 */
#include "base/types.h"

typedef u64 __attribute__((aligned(1), may_alias)) word;
typedef u32 __attribute__((aligned(1), may_alias)) half;

void *light_memcpy(void *to, const void *from, size_t n);
void *light_memmove(void *to, const void *from, size_t n);
void *light_memset(void *to, int v, size_t n);
int light_memcmp(const void *a, const void *b, size_t n);
int light_bcmp(const void *a, const void *b, size_t n);

/* Up to 16 bytes as two accesses that overlap, read before either is written. */
static inline void copy_small(u8 *d, const u8 *s, size_t n)
{
    if (n >= 8) {
        u64 a = *(const word *)s, b = *(const word *)(s + n - 8);
        *(word *)d = a;
        *(word *)(d + n - 8) = b;
    } else if (n >= 4) {
        u32 a = *(const half *)s, b = *(const half *)(s + n - 4);
        *(half *)d = a;
        *(half *)(d + n - 4) = b;
    } else if (n) {
        u8 a = s[0], b = s[n >> 1], c = s[n - 1];
        d[0] = a;
        d[n >> 1] = b;
        d[n - 1] = c;
    }
}

void *light_memcpy(void *to, const void *from, size_t n)
{
    void *d = to;
    if (n <= 16)
        copy_small(to, from, n);
    else
        asm volatile("rep movsb" : "+D"(d), "+S"(from), "+c"(n) : : "memory");
    return to;
}

void *light_memmove(void *to, const void *from, size_t n)
{
    const u8 *s = (const u8 *)from + n - 1;
    u8 *d = (u8 *)to + n - 1;
    if (n <= 16 || (u64)(uintptr_t)to - (u64)(uintptr_t)from >= n)
        return light_memcpy(to, from, n);
    asm volatile("std\n\trep movsb\n\tcld" : "+D"(d), "+S"(s), "+c"(n) : : "memory");
    return to;
}

void *light_memset(void *to, int v, size_t n)
{
    u8 *d = to;
    u64 all = (u8)v * 0x0101010101010101ull;
    if (n < 8) {
        for (size_t i = 0; i < n; i++)
            *(volatile u8 *)(d + i) = (u8)v;
        return to;
    }
    *(word *)(d + n - 8) = all;
    n /= 8;
    asm volatile("rep stosq" : "+D"(d), "+c"(n) : "a"(all) : "memory");
    return to;
}

int light_memcmp(const void *a, const void *b, size_t n)
{
    const u8 *p = a, *q = b;
    for (; n >= 8; n -= 8, p += 8, q += 8) {
        u64 v = *(const volatile word *)p, w = *(const volatile word *)q;
        if (v != w)
            return __builtin_bswap64(v) < __builtin_bswap64(w) ? -1 : 1;
    }
    for (; n; n--, p++, q++) {
        u8 v = *(const volatile u8 *)p, w = *(const volatile u8 *)q;
        if (v != w)
            return v < w ? -1 : 1;
    }
    return 0;
}

/* Clang's for memcmp() where only equality counts. */
int light_bcmp(const void *a, const void *b, size_t n)
{
    return light_memcmp(a, b, n);
}
