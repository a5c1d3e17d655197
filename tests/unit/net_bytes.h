/* For tests of network frames: bytes in network order, and the same random numbers each time. */
#pragma once

#include "base/types.h"

static inline u32 random_u32(void)
{
    static u64 x = 88172645463325252ull;

    x ^= x << 13;
    x ^= x >> 7;
    x ^= x << 17;
    return (u32)(x >> 16);
}

static inline void be16(u8 *p, size_t v)
{
    p[0] = (u8)(v >> 8);
    p[1] = (u8)v;
}
