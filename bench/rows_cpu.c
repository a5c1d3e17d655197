/*
 * Rows of the bench that compute: calls, branches, integers, floating point. They touch little memory and make no
 * system call.
 */
#define _GNU_SOURCE
#include "rows.h"

#include <immintrin.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

/* ---- recursive calls ---- */

#define FIB_N 20
#define FIB_VALUE 6765
#define FIB_CALLS 21891                                            /* 2 fib(n + 1) - 1 */

static KEEP uint64_t fib(unsigned n)
{
    keep();
    return n < 2 ? n : fib(n - 1) + fib(n - 2);
}
static uint64_t run_calls(void *state, uint64_t count)
{
    uint64_t sum = 0;
    (void)state;
    while (count--)
        sum += fib(FIB_N);
    return sum;
}
static uint64_t expect_calls(void *state, uint64_t count)
{
    (void)state;
    return count * FIB_VALUE;
}

/* ---- sort with a comparison callback ---- */

#define SORT_N 4096

struct sort {
    uint32_t from[SORT_N], work[SORT_N];
    uint64_t sum;                                                  /* of places times values, when sorted */
};

static int compare(const void *a, const void *b)
{
    uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
    return (x > y) - (x < y);
}
/* Another algorithm, for the expected result: a radix sort. */
static void radix_sort(uint32_t *v, uint32_t *other, size_t n)
{
    for (unsigned shift = 0; shift < 32; shift += 8) {
        size_t at[257] = { 0 };
        for (size_t i = 0; i < n; i++)
            at[(v[i] >> shift & 255) + 1]++;
        for (size_t i = 0; i < 256; i++)
            at[i + 1] += at[i];
        for (size_t i = 0; i < n; i++)
            other[at[v[i] >> shift & 255]++] = v[i];
        memcpy(v, other, n * sizeof *v);
    }
}
static uint64_t weigh(const uint32_t *v)
{
    uint64_t sum = 0;
    for (size_t i = 0; i < SORT_N; i++)
        sum += v[i] * (uint64_t)(i + 1);
    return sum;
}
static void *setup_sort(struct bench *b)
{
    struct sort *s = must_map(sizeof *s, MAP_PRIVATE);
    uint32_t other[SORT_N];
    (void)b;
    for (size_t i = 0; i < SORT_N; i++)
        s->from[i] = mix(i);
    memcpy(s->work, s->from, sizeof s->work);
    radix_sort(s->work, other, SORT_N);
    s->sum = weigh(s->work);
    return s;
}
static uint64_t run_sort(void *state, uint64_t count)
{
    struct sort *s = state;
    uint64_t sum = 0;
    while (count--) {
        memcpy(s->work, s->from, sizeof s->work);
        qsort(s->work, SORT_N, sizeof *s->work, compare);
        sum += weigh(s->work);
    }
    return sum;
}
static uint64_t expect_sort(void *state, uint64_t count)
{
    return count * ((struct sort *)state)->sum;
}

/* ---- indirect calls ---- */

#define TARGETS 16
#define CALL_STEPS 1024

#define TARGET(n) static KEEP uint64_t target##n(uint64_t x) { return (x ^ (n) * 0x1111u) + (x >> ((n) + 1)); }
TARGET(0) TARGET(1) TARGET(2) TARGET(3) TARGET(4) TARGET(5) TARGET(6) TARGET(7)
TARGET(8) TARGET(9) TARGET(10) TARGET(11) TARGET(12) TARGET(13) TARGET(14) TARGET(15)
static uint64_t (*volatile const targets[TARGETS])(uint64_t) = {
    target0, target1, target2, target3, target4, target5, target6, target7,
    target8, target9, target10, target11, target12, target13, target14, target15
};
/* The order of targets is a fixed sequence of 1024: branch prediction learns some of it, as in real programs. */
static uint64_t run_indirect(void *state, uint64_t count)
{
    uint64_t x = 1;
    (void)state;
    while (count--)
        for (unsigned i = 0; i < CALL_STEPS; i++)
            x = targets[(i * 2654435761u >> 20) % TARGETS](x);
    return x;
}
static uint64_t expect_indirect(void *state, uint64_t count)
{
    uint64_t x = 1;
    (void)state;
    while (count--)
        for (unsigned i = 0; i < CALL_STEPS; i++) {
            unsigned n = (i * 2654435761u >> 20) % TARGETS;
            x = (x ^ n * 0x1111u) + (x >> (n + 1));
        }
    return x;
}

/* ---- integer mix ---- */

#define MIX_STEPS 1000

static uint64_t run_mix(void *state, uint64_t count)
{
    uint64_t x = 0;
    (void)state;
    for (uint64_t i = 0; i < count * MIX_STEPS; i++)
        x = mix(x);
    return x;
}
/* The same function by way of another: the multiplications done with 32-bit halves. */
static KEEP uint64_t multiply(uint64_t a, uint64_t b)
{
    return (a & UINT32_MAX) * (b & UINT32_MAX) + (((a >> 32) * (b & UINT32_MAX) + (b >> 32) * (a & UINT32_MAX)) << 32);
}
static uint64_t expect_mix(void *state, uint64_t count)
{
    uint64_t x = 0;
    (void)state;
    for (uint64_t i = 0; i < count * MIX_STEPS; i++) {
        x += 0x9e3779b97f4a7c15u;
        x = multiply(x ^ x >> 30, 0xbf58476d1ce4e5b9u);
        x = multiply(x ^ x >> 27, 0x94d049bb133111ebu);
        x ^= x >> 31;
    }
    return x;
}

/* ---- a switch-based interpreter ---- */

enum { OP_PUSH, OP_LOAD, OP_STORE, OP_ADD, OP_SUB, OP_MUL, OP_XOR, OP_JNZ, OP_END };
#define LOOPS 100
#define OPS_PER_LOOP 14

/* sum = (sum * 31 + i) ^ 7, i from LOOPS down to 1. Variables: 0 is i, 1 is sum. */
static const uint8_t program[] = {
    OP_PUSH, LOOPS, OP_STORE, 0, OP_PUSH, 1, OP_STORE, 1,
    /* 8: */
    OP_LOAD, 1, OP_PUSH, 31, OP_MUL, 0, OP_LOAD, 0, OP_ADD, 0, OP_PUSH, 7, OP_XOR, 0, OP_STORE, 1,
    OP_LOAD, 0, OP_PUSH, 1, OP_SUB, 0, OP_STORE, 0, OP_LOAD, 0, OP_JNZ, 8,
    OP_LOAD, 1, OP_END, 0
};
static KEEP uint64_t interpret(const uint8_t *code)
{
    uint64_t stack[16], var[4] = { 0 }, *top = stack;

    keep();
    for (const uint8_t *pc = code;; pc += 2) {
        switch (pc[0]) {
        case OP_PUSH: *top++ = pc[1]; break;
        case OP_LOAD: *top++ = var[pc[1]]; break;
        case OP_STORE: var[pc[1]] = *--top; break;
        case OP_ADD: top--; top[-1] += *top; break;
        case OP_SUB: top--; top[-1] -= *top; break;
        case OP_MUL: top--; top[-1] *= *top; break;
        case OP_XOR: top--; top[-1] ^= *top; break;
        case OP_JNZ: if (*--top) pc = code + pc[1] - 2; break;
        case OP_END: return top[-1];
        default: __builtin_unreachable();
        }
    }
}
static uint64_t run_interpreter(void *state, uint64_t count)
{
    uint64_t sum = 0;
    (void)state;
    while (count--)
        sum += interpret(program);
    return sum;
}
static uint64_t expect_interpreter(void *state, uint64_t count)
{
    uint64_t sum = 1;
    (void)state;
    for (uint64_t i = LOOPS; i; i--)
        sum = (sum * 31 + i) ^ 7;
    return count * sum;
}

/* ---- scalar floating point ---- */

#define FP_STEPS 1000

/* Points of the logistic map, and roots: each value depends on the last one. Exact by IEEE 754, so any machine that
 * rounds as it says gives the same bits. */
static KEEP double fp_steps(double x)
{
    for (unsigned i = 0; i < FP_STEPS; i++) {
        x = 3.9375 * x * (1.0 - x);
        x = x / (1.0 + 1.0 / 1048576) + 1.0 / 2097152;
    }
    return __builtin_sqrt(x) * 0.5;
}
static uint64_t run_fp(void *state, uint64_t count)
{
    double x = *(double *)state;
    uint64_t bits;
    while (count--)
        x = fp_steps(x);
    memcpy(&bits, &x, sizeof bits);
    return bits;
}
/* The same with the x87, its precision set to 53 bits: no exponent here is near a limit, so the bits are the same. */
static uint64_t expect_fp(void *state, uint64_t count)
{
    const uint16_t word = 0x27f;
    uint16_t old;
    volatile double x = *(double *)state;
    double result;
    uint64_t bits;

    __asm__ volatile("fnstcw %0" : "=m"(old));
    __asm__ volatile("fldcw %0" ::"m"(word));
    while (count--) {
        for (unsigned i = 0; i < FP_STEPS; i++) {
            volatile double a = (long double)3.9375 * x;
            volatile double b = (long double)1 - x;
            volatile double c = (long double)a * b;
            volatile double d = (long double)c / (1.0L + 1.0L / 1048576);
            x = (long double)d + 1.0L / 2097152;
        }
        volatile double root = __builtin_sqrt(x);
        x = (long double)root * 0.5L;
    }
    __asm__ volatile("fldcw %0" ::"m"(old));
    result = x;
    memcpy(&bits, &result, sizeof bits);
    return bits;
}
static void *setup_fp(struct bench *b)
{
    double *x = must_map(sizeof *x, MAP_PRIVATE);
    (void)b;
    *x = 0.3;
    return x;
}

/* ---- AVX2 matrix multiply ---- */

#define MAT_N 64

struct matrices {
    float a[MAT_N][MAT_N], b[MAT_N][MAT_N], c[MAT_N][MAT_N];
    uint64_t sum;
};

static uint64_t weigh_matrix(float (*m)[MAT_N])
{
    uint64_t sum = 0;
    for (unsigned i = 0; i < MAT_N; i++)
        for (unsigned j = 0; j < MAT_N; j++)
            sum += (uint64_t)m[i][j] * (i * MAT_N + j + 1);
    return sum;
}
static void *setup_avx2(struct bench *b)
{
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) {
        strcpy(b->skip, "this processor has no AVX2 and FMA");
        return NULL;
    }
    struct matrices *m = must_map(sizeof *m, MAP_PRIVATE);
    for (unsigned i = 0; i < MAT_N * MAT_N; i++) {                 /* small integers: all sums are exact */
        (&m->a[0][0])[i] = mix(i) % 16;
        (&m->b[0][0])[i] = mix(i + MAT_N * MAT_N) % 16;
    }
    for (unsigned i = 0; i < MAT_N; i++)
        for (unsigned j = 0; j < MAT_N; j++) {
            unsigned sum = 0;
            for (unsigned k = 0; k < MAT_N; k++)
                sum += (unsigned)m->a[i][k] * (unsigned)m->b[k][j];
            m->c[i][j] = sum;
        }
    m->sum = weigh_matrix(m->c);
    memset(m->c, 0, sizeof m->c);
    return m;
}
__attribute__((target("avx2,fma"))) static KEEP void multiply_avx2(struct matrices *m)
{
    for (unsigned i = 0; i < MAT_N; i++)
        for (unsigned j = 0; j < MAT_N; j += 32) {
            __m256 s0 = _mm256_setzero_ps(), s1 = s0, s2 = s0, s3 = s0;
            for (unsigned k = 0; k < MAT_N; k++) {
                __m256 a = _mm256_broadcast_ss(&m->a[i][k]);
                s0 = _mm256_fmadd_ps(a, _mm256_loadu_ps(&m->b[k][j]), s0);
                s1 = _mm256_fmadd_ps(a, _mm256_loadu_ps(&m->b[k][j + 8]), s1);
                s2 = _mm256_fmadd_ps(a, _mm256_loadu_ps(&m->b[k][j + 16]), s2);
                s3 = _mm256_fmadd_ps(a, _mm256_loadu_ps(&m->b[k][j + 24]), s3);
            }
            _mm256_storeu_ps(&m->c[i][j], s0);
            _mm256_storeu_ps(&m->c[i][j + 8], s1);
            _mm256_storeu_ps(&m->c[i][j + 16], s2);
            _mm256_storeu_ps(&m->c[i][j + 24], s3);
        }
}
static uint64_t run_avx2(void *state, uint64_t count)
{
    while (count--)
        multiply_avx2(state);
    return weigh_matrix(((struct matrices *)state)->c);
}
static uint64_t expect_avx2(void *state, uint64_t count)
{
    (void)count;
    return ((struct matrices *)state)->sum;
}

const struct row rows_cpu[] = {
    { "calls", "recursive calls (fib)", "call", FIB_CALLS, 0, NULL, run_calls, expect_calls },
    { "sort", "sort, comparison callback", "element", SORT_N, 0, setup_sort, run_sort, expect_sort },
    { "indirect", "indirect calls, 16 targets", "call", CALL_STEPS, 0, NULL, run_indirect, expect_indirect },
    { "mix", "integer mix (hash)", "hash", MIX_STEPS, 0, NULL, run_mix, expect_mix },
    { "switch", "switch-based interpreter loop", "bytecode", LOOPS *OPS_PER_LOOP, 0, NULL, run_interpreter,
      expect_interpreter },
    { "fp", "FP scalar (double)", "step", FP_STEPS, 0, setup_fp, run_fp, expect_fp },
    { "avx2", "AVX2 matrix multiply, 64 x 64", "multiply-add", MAT_N *MAT_N *MAT_N, 0, setup_avx2, run_avx2,
      expect_avx2 },
    { 0 },
};
