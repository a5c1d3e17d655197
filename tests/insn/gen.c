/*
 * Cases are not listed by hand: every opcode of every map is combined with prefixes, ModRM forms, vector lengths and masks, Zydis says what that is, and
 * up to a quota of each mnemonic and operand form becomes cases. Then the state is bent so that the instruction has something to do: addresses
 * solved for a target in the test's pages, branch targets on an int3, small counts for REP, and so on.
 */
#include <string.h>

#include "insn.h"

#define FORMS 65536u

struct gen {
    struct rng r;
    struct xlayout layout;
    const u8 *pattern;
    ZydisDecoder decoder[2];
    u64 at;                                                        /* how far the enumeration is */
    unsigned number, rounds;
    struct {
        u64 key;
        unsigned used;
    } form[FORMS];
    u8 image[1024] __attribute__((aligned(64)));
};

/* ---- what is left out ---- */

static const struct {
    ZydisMnemonic m;
    const char *why;
} excluded[] = {
    {ZYDIS_MNEMONIC_CPUID, "answers by policy"}, {ZYDIS_MNEMONIC_XGETBV, "answers by policy"},
    {ZYDIS_MNEMONIC_RDTSC, "time"}, {ZYDIS_MNEMONIC_RDTSCP, "time"}, {ZYDIS_MNEMONIC_RDPMC, "time"}, {ZYDIS_MNEMONIC_RDPID, "the host's processor number"},
    {ZYDIS_MNEMONIC_RDRAND, "random"}, {ZYDIS_MNEMONIC_RDSEED, "random"},
    {ZYDIS_MNEMONIC_SYSCALL, "enters the host's kernel"}, {ZYDIS_MNEMONIC_SYSENTER, "enters the host's kernel"},
    {ZYDIS_MNEMONIC_VMCALL, "enters the host's hypervisor"}, {ZYDIS_MNEMONIC_VMMCALL, "enters the host's hypervisor"},
    {ZYDIS_MNEMONIC_SGDT, "emulated by the host's kernel (UMIP): sys tests"}, {ZYDIS_MNEMONIC_SIDT, "emulated by the host's kernel (UMIP): sys tests"},
    {ZYDIS_MNEMONIC_SLDT, "emulated by the host's kernel (UMIP): sys tests"}, {ZYDIS_MNEMONIC_STR, "emulated by the host's kernel (UMIP): sys tests"},
    {ZYDIS_MNEMONIC_SMSW, "emulated by the host's kernel (UMIP): sys tests"},
    {ZYDIS_MNEMONIC_LAR, "reads the host's GDT: sys tests"}, {ZYDIS_MNEMONIC_LSL, "reads the host's GDT: sys tests"},
    {ZYDIS_MNEMONIC_VERR, "reads the host's GDT: sys tests"}, {ZYDIS_MNEMONIC_VERW, "reads the host's GDT: sys tests"},
    {ZYDIS_MNEMONIC_LDS, "segment load: sys tests"}, {ZYDIS_MNEMONIC_LES, "segment load: sys tests"}, {ZYDIS_MNEMONIC_LFS, "segment load: sys tests"},
    {ZYDIS_MNEMONIC_LGS, "segment load: sys tests"}, {ZYDIS_MNEMONIC_LSS, "segment load: sys tests"},
    {ZYDIS_MNEMONIC_IRET, "far transfer: sys tests"}, {ZYDIS_MNEMONIC_IRETD, "far transfer: sys tests"}, {ZYDIS_MNEMONIC_IRETQ, "far transfer: sys tests"},
    {ZYDIS_MNEMONIC_INT1, "#DB that the host's kernel takes for a breakpoint: sys tests"},
    {ZYDIS_MNEMONIC_CLI, "the host's kernel emulates it: sys tests"}, {ZYDIS_MNEMONIC_STI, "the host's kernel emulates it: sys tests"},
    {ZYDIS_MNEMONIC_XSAVEOPT, "may skip what has not changed"}, {ZYDIS_MNEMONIC_XSAVEOPT64, "may skip what has not changed"},
    {ZYDIS_MNEMONIC_RDPRU, "hidden by the CPUID policy"}, {ZYDIS_MNEMONIC_CLZERO, "hidden by the CPUID policy"},
    {ZYDIS_MNEMONIC_MONITORX, "hidden by the CPUID policy"}, {ZYDIS_MNEMONIC_MWAITX, "hidden by the CPUID policy"},
    {ZYDIS_MNEMONIC_MCOMMIT, "hidden by the CPUID policy"}, {ZYDIS_MNEMONIC_RDPKRU, "depends on the host's CR4.PKE: sys tests"},
    {ZYDIS_MNEMONIC_WRPKRU, "depends on the host's CR4.PKE: sys tests"},
};

const char *gen_excluded(const ZydisDecodedInstruction *z)
{
    for (unsigned n = 0; n < ARRAY_SIZE(excluded); n++) {
        if (excluded[n].m == z->mnemonic)
            return excluded[n].why;
    }
    if (z->meta.branch_type == ZYDIS_BRANCH_TYPE_FAR)
        return "far transfer: sys tests";
    if (z->attributes & ZYDIS_ATTRIB_IS_PRIVILEGED)
        return "privileged: sys tests";
    switch (z->meta.isa_set) {
    case ZYDIS_ISA_SET_SSE4A: case ZYDIS_ISA_SET_AMD3DNOW: case ZYDIS_ISA_SET_CET: case ZYDIS_ISA_SET_MPX: case ZYDIS_ISA_SET_SVM: case ZYDIS_ISA_SET_VTX:
    case ZYDIS_ISA_SET_SGX: case ZYDIS_ISA_SET_SGX_ENCLV: case ZYDIS_ISA_SET_SMX: case ZYDIS_ISA_SET_UINTR: case ZYDIS_ISA_SET_WAITPKG:
    case ZYDIS_ISA_SET_SNP: case ZYDIS_ISA_SET_AMD_INVLPGB: case ZYDIS_ISA_SET_PT: case ZYDIS_ISA_SET_MOVDIR: case ZYDIS_ISA_SET_ENQCMD:
    case ZYDIS_ISA_SET_SERIALIZE: case ZYDIS_ISA_SET_RTM: case ZYDIS_ISA_SET_TSX_LDTRK: case ZYDIS_ISA_SET_PCONFIG: case ZYDIS_ISA_SET_TDX:
    case ZYDIS_ISA_SET_KEYLOCKER: case ZYDIS_ISA_SET_KEYLOCKER_WIDE: case ZYDIS_ISA_SET_HRESET: case ZYDIS_ISA_SET_LWP: case ZYDIS_ISA_SET_AMX_TILE:
    case ZYDIS_ISA_SET_AMX_INT8: case ZYDIS_ISA_SET_AMX_BF16: case ZYDIS_ISA_SET_CLDEMOTE: case ZYDIS_ISA_SET_PADLOCK_ACE:
    case ZYDIS_ISA_SET_PADLOCK_PHE: case ZYDIS_ISA_SET_PADLOCK_PMM: case ZYDIS_ISA_SET_PADLOCK_RNG:
        return "hidden by the CPUID policy, or decoded as something else";
    default:
        return NULL;
    }
}

/* Forms that this comparison cannot have, though the mnemonic can. */
static bool form_excluded(const struct icase *i)
{
    const ZydisDecodedInstruction *z = &i->z;
    bool near = z->meta.branch_type != ZYDIS_BRANCH_TYPE_NONE;

    for (unsigned n = 0; n < z->operand_count; n++) {
        const ZydisDecodedOperand *o = &i->o[n];

        if (o->type != ZYDIS_OPERAND_TYPE_REGISTER || o->visibility == ZYDIS_OPERAND_VISIBILITY_HIDDEN)
            continue;
        switch (ZydisRegisterGetClass(o->reg.value)) {
        case ZYDIS_REGCLASS_SEGMENT:
            if (o->actions & ZYDIS_OPERAND_ACTION_MASK_WRITE)
                return true;
            break;
        case ZYDIS_REGCLASS_CONTROL: case ZYDIS_REGCLASS_DEBUG: case ZYDIS_REGCLASS_TEST:
            return true;
        default:
            break;
        }
    }
    /* AMD and Intel differ in near branches with an operand-size prefix in 64-bit mode. */
    if (near && !i->compat && (z->attributes & ZYDIS_ATTRIB_HAS_OPERANDSIZE))
        return true;
    /* A repeat prefix before LOOPcc is undefined; AMD takes it for the condition. */
    for (unsigned n = 0; n < z->raw.prefix_count; n++) {
        if ((z->mnemonic == ZYDIS_MNEMONIC_LOOPE || z->mnemonic == ZYDIS_MNEMONIC_LOOPNE) && (z->raw.prefixes[n].value & 0xfe) == 0xf2)
            return true;
    }
    if (z->mnemonic == ZYDIS_MNEMONIC_INT)                         /* the host's own system calls; #DB */
        return i->o[0].imm.value.u == 0x80 || i->o[0].imm.value.u == 1;
    return false;
}

void gen_form(const struct icase *i, char *buf, size_t n)
{
    size_t used = 0;

    buf[0] = 0;
    for (unsigned k = 0; k < i->z.operand_count && used < n; k++) {
        const ZydisDecodedOperand *o = &i->o[k];
        const char *t = "imm";

        if (o->visibility == ZYDIS_OPERAND_VISIBILITY_HIDDEN)
            continue;
        if (o->type == ZYDIS_OPERAND_TYPE_MEMORY)
            t = o->mem.type == ZYDIS_MEMOP_TYPE_VSIB ? "vm" : "m";
        else if (o->type == ZYDIS_OPERAND_TYPE_REGISTER) {
            switch (ZydisRegisterGetClass(o->reg.value)) {
            case ZYDIS_REGCLASS_XMM: t = "x"; break;
            case ZYDIS_REGCLASS_YMM: t = "y"; break;
            case ZYDIS_REGCLASS_ZMM: t = "z"; break;
            case ZYDIS_REGCLASS_MMX: t = "mm"; break;
            case ZYDIS_REGCLASS_MASK: t = o->encoding == ZYDIS_OPERAND_ENCODING_MASK ? "{k}" : "k"; break;
            case ZYDIS_REGCLASS_X87: t = "st"; break;
            case ZYDIS_REGCLASS_SEGMENT: t = "seg"; break;
            default: t = "r"; break;
            }
            if (o->encoding == ZYDIS_OPERAND_ENCODING_MASK && o->reg.value == ZYDIS_REGISTER_K0)
                continue;
        }
        used += (size_t)snprintf(buf + used, n - used, "%s%s%u", used ? "," : "", t, o->size);
    }
    if (i->z.avx.broadcast.mode && !i->z.avx.broadcast.is_static && used < n)
        used += (size_t)snprintf(buf + used, n - used, "{b}");
    if (i->compat && used < n)
        snprintf(buf + used, n - used, " (32)");
}

/* ---- candidates ---- */

static const u8 prefix_sets[][3] = {
    {0}, {0x66}, {0xf3}, {0xf2}, {0x48}, {0x66, 0x48}, {0xf3, 0x48}, {0xf2, 0x48}, {0xf0}, {0xf0, 0x48}, {0xf0, 0x66}, {0x40}, {0x67}, {0x64}, {0x65}, {0x66, 0xf3},
    {0x66, 0xf2}, {0x67, 0x48},
};
enum { KIND_LEGACY, KIND_VEX, KIND_EVEX, KINDS };
static const u64 kind_size[KINDS] = {
    4ull * 256 * ARRAY_SIZE(prefix_sets) * 8 * 2,                  /* map, opcode, prefixes, ModRM.reg, memory or register */
    3ull * 4 * 2 * 2 * 256 * 8 * 2,                                /* map, pp, L, W, opcode, ModRM.reg, memory or register */
    5ull * 4 * 4 * 2 * 256 * 2 * 4 * 2,                            /* map, pp, L'L, W, opcode, memory or register, {masked, z}, b */
};
#define ROUNDS 10u

static u64 take(u64 *index, u64 n)
{
    u64 v = *index % n;

    *index /= n;
    return v;
}

/* ModRM and what follows: SIB, displacement, immediates are random; bytes that the instruction does not use do not matter. */
static unsigned put_tail(struct rng *r, u8 *p, unsigned reg, bool mem, bool compat)
{
    static const u8 edge[] = {0, 1, 2, 0x7f, 0x80, 0xff};
    unsigned n = 0, rm = rnd_below(r, 8), mod = mem ? rnd_below(r, 3) : 3;

    if (mem && one_in(r, 6))
        rm = 4;
    p[n++] = (u8)(mod << 6 | reg << 3 | rm);
    for (unsigned k = 0; k < 13; k++)
        p[n + k] = one_in(r, 4) ? edge[rnd_below(r, ARRAY_SIZE(edge))] : (u8)rnd(r);
    (void)compat;
    return n + 13;
}

static unsigned put_legacy(struct rng *r, u64 index, u8 *p, bool compat)
{
    bool mem = take(&index, 2);
    unsigned reg = (unsigned)take(&index, 8), n = 0;
    const u8 *prefix = prefix_sets[take(&index, ARRAY_SIZE(prefix_sets))];
    unsigned opcode = (unsigned)take(&index, 256), map = (unsigned)index, rex = 0;

    for (unsigned k = 0; k < 3 && prefix[k]; k++) {
        if ((prefix[k] & 0xf0) == 0x40)
            rex = prefix[k];
        else
            p[n++] = prefix[k];
    }
    if (rex && compat)
        return 0;
    if (!compat && (rex || one_in(r, 3)))
        p[n++] = (u8)(0x40 | rex | (unsigned)(rnd(r) & 7));
    if (map)
        p[n++] = 0x0f;
    if (map >= 2)
        p[n++] = map == 2 ? 0x38 : 0x3a;
    p[n++] = (u8)opcode;
    return n + put_tail(r, p + n, reg, mem, compat);
}

static unsigned put_vex(struct rng *r, u64 index, u8 *p, bool compat)
{
    bool mem = take(&index, 2);
    unsigned reg = (unsigned)take(&index, 8), opcode = (unsigned)take(&index, 256), w = (unsigned)take(&index, 2), l = (unsigned)take(&index, 2);
    unsigned pp = (unsigned)take(&index, 4), map = 1 + (unsigned)index, vvvv = one_in(r, 2) ? 15 : (unsigned)rnd_below(r, 16);
    unsigned rxb = compat ? 7 : (unsigned)(rnd(r) & 7) | (one_in(r, 2) ? 7 : 0);

    if (map == 1 && w == 0 && (rxb & 3) == 3 && one_in(r, 2)) {
        p[0] = 0xc5;
        p[1] = (u8)((rxb >> 2) << 7 | vvvv << 3 | l << 2 | pp);
        p[2] = (u8)opcode;
        return 3 + put_tail(r, p + 3, reg, mem, compat);
    }
    p[0] = 0xc4;
    p[1] = (u8)(rxb << 5 | map);
    p[2] = (u8)(w << 7 | vvvv << 3 | l << 2 | pp);
    p[3] = (u8)opcode;
    return 4 + put_tail(r, p + 4, reg, mem, compat);
}

static unsigned put_evex(struct rng *r, u64 index, u8 *p, bool compat)
{
    unsigned b = (unsigned)take(&index, 2), mask = (unsigned)take(&index, 4);
    bool mem = take(&index, 2);
    unsigned opcode = (unsigned)take(&index, 256), w = (unsigned)take(&index, 2), ll = (unsigned)take(&index, 4), pp = (unsigned)take(&index, 4);
    static const u8 maps[] = {1, 2, 3, 5, 6};
    unsigned map = maps[index], rxbr = compat ? 15 : (unsigned)(rnd(r) & 15) | (one_in(r, 2) ? 15 : 0);
    unsigned vvvv = one_in(r, 2) ? 31 : (unsigned)rnd_below(r, 32), aaa = mask & 1 ? 1 + rnd_below(r, 7) : 0;

    if (compat)
        vvvv |= 24;
    p[0] = 0x62;
    p[1] = (u8)(rxbr << 4 | map);
    p[2] = (u8)(w << 7 | (vvvv & 15) << 3 | 4 | pp);
    p[3] = (u8)((mask >> 1) << 7 | ll << 5 | b << 4 | (vvvv >> 4) << 3 | aaa);
    p[4] = (u8)opcode;
    return 5 + put_tail(r, p + 5, rnd_below(r, 8), mem, compat);
}

/* ---- addresses ---- */

static const struct {
    const char *name;
    unsigned weight;
} targets[] = {
    {"aligned", 5}, {"misaligned", 3}, {"crossing", 2}, {"crossing into nothing", 1}, {"unmapped", 1}, {"read-only", 1}, {"crossing into read-only", 1},
    {"non-canonical", 1}, {"upper half", 1},
};

static u64 target(struct gen *g, struct icase *i, unsigned size)
{
    struct rng *r = &g->r;
    unsigned total = 0, pick, kind = 0;

    for (unsigned n = 0; n < ARRAY_SIZE(targets); n++)
        total += targets[n].weight;
    pick = rnd_below(r, total);
    while (pick >= targets[kind].weight)
        pick -= targets[kind++].weight;
    if (size == 0)
        size = 1;
    if (i->compat && kind >= 7)
        kind = 0;
    i->what = targets[kind].name;
    switch (kind) {
    case 0: return PAGE_VA(PAGE_DATA0) + 64 * (2 + rnd_below(r, 40));
    case 1: return PAGE_VA(PAGE_DATA0) + 256 + rnd_below(r, 2000);
    case 2: return PAGE_VA(PAGE_DATA1) - 1 - rnd_below(r, MAX(size - 1, 1u));
    case 3: return PAGE_VA(PAGE_GAP1) - 1 - rnd_below(r, MAX(size - 1, 1u));
    case 4: return PAGE_VA(PAGE_GAP1) + rnd_below(r, 4000);
    case 5: return PAGE_VA(PAGE_RO) + 64 * rnd_below(r, 40) + (one_in(r, 2) ? rnd_below(r, 64) : 0);
    case 6: return PAGE_VA(PAGE_RO) - 1 - rnd_below(r, MAX(size - 1, 1u));
    case 7: return 0x0000800000000000 + (rnd(r) & 0xffffffff);
    default: return 0xffffffff80000000 + (rnd(r) & 0xffffff);
    }
}

static u64 *gpr(struct icase *i, ZydisRegister reg)
{
    ZydisRegisterClass cls = ZydisRegisterGetClass(reg);
    int id = (int)ZydisRegisterGetId(reg);

    if (cls == ZYDIS_REGCLASS_GPR8) {
        unsigned n = reg - ZYDIS_REGISTER_AL;

        return &i->in.gpr[n < 8 ? n & 3 : n - 4];
    }
    if (cls != ZYDIS_REGCLASS_GPR16 && cls != ZYDIS_REGCLASS_GPR32 && cls != ZYDIS_REGCLASS_GPR64)
        return NULL;
    return &i->in.gpr[id & 15];
}

static void patch_disp32(struct icase *i, s64 v)
{
    if (i->z.raw.disp.size == 32)
        memcpy(i->code + i->z.raw.disp.offset, &(s32){(s32)v}, 4);
}

/* Makes the memory operand point at t. */
static void solve(struct gen *g, struct icase *i, const ZydisDecodedOperand *o, u64 t)
{
    u64 *base = gpr(i, o->mem.base), *index = gpr(i, o->mem.index), rest;
    s64 disp = o->mem.disp.value;

    if (o->mem.segment == ZYDIS_REGISTER_FS || o->mem.segment == ZYDIS_REGISTER_GS) {
        u64 b = one_in(&g->r, 2) ? rnd_below(&g->r, 100000) : PAGE_VA(PAGE_DATA0) + rnd_below(&g->r, 4096);

        *(o->mem.segment == ZYDIS_REGISTER_FS ? &i->in.fs_base : &i->in.gs_base) = b;
        t -= b;
    }
    if (o->mem.base == ZYDIS_REGISTER_RIP || o->mem.base == ZYDIS_REGISTER_EIP) {
        patch_disp32(i, (s64)(t - i->in.rip - i->z.length));
        return;
    }
    if (index && index != base)
        *index = one_in(&g->r, 4) ? value_integer(&g->r) : rnd_below(&g->r, 64);
    rest = t - (u64)disp - (index && index != base ? *index * o->mem.scale : 0);
    if (base && base == index)
        *base = rest / (1 + o->mem.scale);
    else if (base)
        *base = rest;
    else if (index)
        patch_disp32(i, (s64)(t - *index * o->mem.scale));
    else
        patch_disp32(i, (s64)t);
    if (i->z.address_width == 32 && !i->compat && base && !one_in(&g->r, 4))
        *base = (u32)*base | rnd(&g->r) << 32;                     /* the upper half does not count */
}

static u64 memory_at(const struct gen *g, u64 va, unsigned size)
{
    u64 v = 0;

    if (va >= REGION && va + size <= PAGE_VA(PAGES))
        memcpy(&v, g->pattern + (va - REGION), MIN(size, 8u));
    return v;
}

static void patch(struct icase *i, u64 va, u64 v)
{
    for (unsigned n = 0; n < ARRAY_SIZE(i->patch_va); n++) {
        if (i->patch_va[n])
            continue;
        if (va < REGION || va >= PAGE_VA(PAGES) - 8 || page_kind((unsigned)((va - REGION) / PAGE_SIZE)) != KIND_RW ||
            page_kind((unsigned)((va + 7 - REGION) / PAGE_SIZE)) != KIND_RW)
            return;
        i->patch_va[n] = va;
        i->patch[n] = v;
        return;
    }
}

/* ---- state for particular instructions ---- */

static u64 code_pointer(struct gen *g, const struct icase *i)
{
    switch (rnd_below(&g->r, 8)) {
    case 0: return PAGE_VA(PAGE_DATA0) + 64;                       /* not executable */
    case 1: return i->compat ? PAGE_VA(PAGE_GAP0) : rnd(&g->r);
    default: return CODE_VA + 16 + rnd_below(&g->r, 1000);
    }
}

static void bend_branch(struct gen *g, struct icase *i, u64 t)
{
    const ZydisDecodedOperand *o = &i->o[0];

    if (i->z.mnemonic == ZYDIS_MNEMONIC_CALL)                      /* a bad stack or a bad target: which comes first differs */
        i->in.gpr[RSP] = PAGE_VA(PAGE_STACK0) + 2048;
    if (i->z.mnemonic == ZYDIS_MNEMONIC_RET) {
        patch(i, i->in.gpr[RSP], code_pointer(g, i));
    } else if (o->type == ZYDIS_OPERAND_TYPE_IMMEDIATE) {
        unsigned at = i->z.raw.imm[0].offset;
        u64 to;

        if (i->z.raw.imm[0].size == 32)
            memcpy(i->code + at, &(s32){(s32)rnd_below(&g->r, 3000) - 1500}, 4);
        to = i->in.rip + i->len + (i->z.raw.imm[0].size == 8 ? (u64)(s8)i->code[at] : 0);
        if (i->z.raw.imm[0].size == 32)
            to = i->in.rip + i->len + (u64)(s64)(s32)(i->code[at] | i->code[at + 1] << 8 | i->code[at + 2] << 16 | (s32)((u32)i->code[at + 3] << 24));
        if (to >= i->in.rip && to < i->in.rip + i->len)            /* into itself: forever, or anything */
            i->code[at] = (u8)(i->code[at] + 32);
    } else if (o->type == ZYDIS_OPERAND_TYPE_MEMORY) {
        patch(i, t, code_pointer(g, i));
    } else if (gpr(i, o->reg.value)) {
        *gpr(i, o->reg.value) = code_pointer(g, i);
    }
    if (one_in(&g->r, 2))
        i->in.gpr[RCX] = rnd_below(&g->r, 3);
}

static void bend_string(struct gen *g, struct icase *i)
{
    static const u8 sizes[] = {1, 2, 4, 8};
    unsigned size = sizes[rnd_below(&g->r, 4)];

    i->in.gpr[RSI] = target(g, i, size);
    i->in.gpr[RDI] = one_in(&g->r, 3) ? i->in.gpr[RSI] + rnd_below(&g->r, 9) - 4 : target(g, i, size);
    i->in.gpr[RCX] = one_in(&g->r, 12) ? 5000 : rnd_below(&g->r, 40);
    if (one_in(&g->r, 3))
        i->in.gpr[RSI] = PAGE_VA(PAGE_DATA1) - rnd_below(&g->r, 64);
    if (one_in(&g->r, 3))
        i->in.rflags |= FLAG_DF;
    if (one_in(&g->r, 2))
        i->in.gpr[RAX] = memory_at(g, i->in.gpr[RDI] + 8, 8);
    if (i->z.meta.category == ZYDIS_CATEGORY_IOSTRINGOP && !i->in.gpr[RCX])
        i->in.gpr[RCX] = 1;                                        /* INS, OUTS: whether none of them is allowed is up to the processor */
    if (i->compat)
        i->in.gpr[RSI] = (u32)i->in.gpr[RSI], i->in.gpr[RDI] = (u32)i->in.gpr[RDI];
}

static void bend_indices(struct gen *g, struct icase *i, const ZydisDecodedOperand *o)
{
    u8 *v = i->in.v.zmm[(u8)ZydisRegisterGetId(o->mem.index) & 31];
    bool qword = i->z.opcode & 1;

    for (unsigned n = 0; n < 16; n++) {
        s64 x = (s64)rnd_below(&g->r, 400) - 200;

        if (one_in(&g->r, 40))
            x *= 64;
        if (qword && n < 8)
            memcpy(v + 8 * n, &x, 8);
        else if (!qword)
            memcpy(v + 4 * n, &x, 4);
    }
}

/* A valid image for FXRSTOR and XRSTOR where the operand lies. */
static void bend_image(struct gen *g, struct icase *i, const ZydisDecodedOperand *o)
{
    struct vectors v;
    struct xlayout l = {0};
    u64 t = PAGE_VA(PAGE_DATA0) + 128, bv = rnd(&g->r) & 7 & g->layout.xcr0;

    if (one_in(&g->r, 5))
        t = PAGE_VA(PAGE_DATA1) - 256;
    solve(g, i, o, t);
    i->in.gpr[RAX] = rnd(&g->r) & 7;
    i->in.gpr[RDX] = 0;
    value_vectors(&g->r, &g->layout, &v);
    l.mxcsr_mask = g->layout.mxcsr_mask;
    l.avx = g->layout.avx && g->layout.avx + 256 <= sizeof g->image ? g->layout.avx : 0;
    memset(g->image, 0, sizeof g->image);
    vectors_put(&v, &l, g->image);
    memcpy(g->image + 512, &bv, 8);
    if (one_in(&g->r, 8))
        g->image[512 + 8 + rnd_below(&g->r, 16)] = 1;              /* reserved header bits */
    i->image = g->image;
    memset(i->patch_va, 0, sizeof i->patch_va);
    i->patch_va[0] = t;
    memcpy(&i->patch[0], g->image, 8);
}

static void bend(struct gen *g, struct icase *i, const ZydisDecodedOperand *mem, u64 t)
{
    u64 *r = i->in.gpr;

    if (i->z.meta.branch_type != ZYDIS_BRANCH_TYPE_NONE)
        bend_branch(g, i, t);
    if (i->z.meta.category == ZYDIS_CATEGORY_STRINGOP || i->z.meta.category == ZYDIS_CATEGORY_IOSTRINGOP)
        bend_string(g, i);
    if (mem && mem->mem.type == ZYDIS_MEMOP_TYPE_VSIB)
        bend_indices(g, i, mem);
    switch (i->z.mnemonic) {
    case ZYDIS_MNEMONIC_DIV: case ZYDIS_MNEMONIC_IDIV:
        if (!one_in(&g->r, 4))
            r[RDX] = r[RAX] >> 63 && one_in(&g->r, 2) ? ~0ull : 0;
        if (one_in(&g->r, 2))
            r[RAX] &= 0xffff;
        break;
    case ZYDIS_MNEMONIC_CMPXCHG: case ZYDIS_MNEMONIC_CMPXCHG8B: case ZYDIS_MNEMONIC_CMPXCHG16B:
        if (mem && one_in(&g->r, 2)) {
            r[RAX] = memory_at(g, t, 8);
            r[RDX] = memory_at(g, t + 8, 8);
            if (i->z.mnemonic == ZYDIS_MNEMONIC_CMPXCHG8B)
                r[RDX] = r[RAX] >> 32;
        }
        break;
    case ZYDIS_MNEMONIC_BT: case ZYDIS_MNEMONIC_BTC: case ZYDIS_MNEMONIC_BTR: case ZYDIS_MNEMONIC_BTS:
        if (mem && i->o[1].type == ZYDIS_OPERAND_TYPE_REGISTER && gpr(i, i->o[1].reg.value) != gpr(i, mem->mem.base))
            *gpr(i, i->o[1].reg.value) = (u64)((s64)rnd_below(&g->r, 4000) - 2000);
        break;
    case ZYDIS_MNEMONIC_POPF: case ZYDIS_MNEMONIC_POPFD: case ZYDIS_MNEMONIC_POPFQ:
        patch(i, r[RSP], rnd(&g->r) & 0x3f7e3dull & ~(u64)FLAG_TF);
        break;
    case ZYDIS_MNEMONIC_LEAVE:
        r[RBP] = r[RSP] + 64;
        break;
    case ZYDIS_MNEMONIC_ENTER:
        i->code[i->z.raw.imm[0].offset + 1] &= 1;
        i->code[i->z.raw.imm[0].offset + 2] &= 7;
        r[RBP] = r[RSP] + 512;
        break;
    case ZYDIS_MNEMONIC_XLAT:
        r[RBX] = target(g, i, 1);
        break;
    case ZYDIS_MNEMONIC_MASKMOVQ: case ZYDIS_MNEMONIC_MASKMOVDQU: case ZYDIS_MNEMONIC_VMASKMOVDQU:
        r[RDI] = PAGE_VA(PAGE_DATA1) - rnd_below(&g->r, 64);       /* with no byte selected a fault is up to the processor, so there is none */
        break;
    case ZYDIS_MNEMONIC_LDMXCSR: case ZYDIS_MNEMONIC_VLDMXCSR:
        patch(i, t, rnd(&g->r) & (one_in(&g->r, 4) ? ~0u : 0xffff));
        break;
    case ZYDIS_MNEMONIC_PCMPESTRI: case ZYDIS_MNEMONIC_PCMPESTRM: case ZYDIS_MNEMONIC_VPCMPESTRI: case ZYDIS_MNEMONIC_VPCMPESTRM:
        r[RAX] = (u64)((s64)rnd_below(&g->r, 40) - 20);
        r[RDX] = (u64)((s64)rnd_below(&g->r, 40) - 20);
        break;
    case ZYDIS_MNEMONIC_FXRSTOR: case ZYDIS_MNEMONIC_FXRSTOR64: case ZYDIS_MNEMONIC_XRSTOR: case ZYDIS_MNEMONIC_XRSTOR64:
        if (!one_in(&g->r, 4))
            bend_image(g, i, mem);
        break;
    case ZYDIS_MNEMONIC_WRFSBASE: case ZYDIS_MNEMONIC_WRGSBASE:
        if (one_in(&g->r, 2) && gpr(i, i->o[0].reg.value))
            *gpr(i, i->o[0].reg.value) &= 0x7fffffffffff;
        break;
    default:
        break;
    }
}

/* ---- cases ---- */

static unsigned *form_used(struct gen *g, const struct icase *i)
{
    u64 key = 1469598103934665603ull;
    u64 words[] = {i->z.mnemonic, i->z.operand_width, i->compat, i->z.attributes & (ZYDIS_ATTRIB_HAS_LOCK | ZYDIS_ATTRIB_HAS_REP | ZYDIS_ATTRIB_HAS_REPNE),
                   i->z.avx.mask.mode, i->z.avx.broadcast.mode, i->z.avx.has_sae, i->z.encoding, i->z.raw.modrm.mod == 3};
    unsigned slot;

    for (unsigned n = 0; n < ARRAY_SIZE(words); n++)
        key = (key ^ words[n]) * 1099511628211ull;
    for (unsigned n = 0; n < i->z.operand_count_visible; n++) {
        key = (key ^ i->o[n].type ^ (u64)i->o[n].size << 8) * 1099511628211ull;
        if (i->o[n].type == ZYDIS_OPERAND_TYPE_REGISTER)
            key = (key ^ ZydisRegisterGetClass(i->o[n].reg.value)) * 1099511628211ull;
    }
    key |= 1;
    for (slot = (unsigned)(key >> 20) % FORMS; g->form[slot].key && g->form[slot].key != key; slot = (slot + 1) % FORMS)
        ;
    g->form[slot].key = key;
    return &g->form[slot].used;
}

static unsigned quota(const struct icase *i)
{
    bool mem = i->z.raw.modrm.offset && i->z.raw.modrm.mod != 3;

    if (i->z.encoding == ZYDIS_INSTRUCTION_ENCODING_EVEX)
        return i->compat ? 0 : mem ? 4 : 2;
    if (i->z.encoding == ZYDIS_INSTRUCTION_ENCODING_VEX || i->z.meta.isa_ext != ZYDIS_ISA_EXT_BASE)
        return i->compat ? 2 : mem ? 8 : 5;
    return i->compat ? 8 : mem ? 24 : 14;
}

static void make_state(struct gen *g, struct icase *i)
{
    struct rng *r = &g->r;
    struct state *s = &i->in;

    for (unsigned n = 0; n < 16; n++)
        s->gpr[n] = i->compat ? (u32)value_integer(r) : value_integer(r);
    s->gpr[RSP] = PAGE_VA(PAGE_STACK0) + 2048 + 8 * rnd_below(r, 16) + (one_in(r, 8) ? rnd_below(r, 8) : 0);
    if (one_in(r, 12))
        s->gpr[RSP] = PAGE_VA(one_in(r, 2) ? PAGE_STACK0 : PAGE_STACK1) + rnd_below(r, 16) - 8;
    s->rflags = (rnd(r) & FLAGS_ARITH) | FLAG_1 | FLAG_IF | (one_in(r, 8) ? FLAG_DF : 0) | (one_in(r, 32) ? FLAG_AC : 0);
    s->fs_base = one_in(r, 2) ? 0 : rnd(r) & 0x7fffffff;
    s->gs_base = one_in(r, 2) ? 0 : rnd(r) & 0x7fffffff;
    value_vectors(r, &g->layout, &s->v);
}

static bool make_case(struct gen *g, struct icase *i, const u8 *bytes, unsigned len, bool compat)
{
    const ZydisDecodedOperand *mem = NULL;
    unsigned *used;
    u64 t = 0;

    memset(i, 0, offsetof(struct icase, what));
    i->what = "register";
    i->compat = compat;
    if (ZYAN_FAILED(ZydisDecoderDecodeFull(&g->decoder[compat], bytes, MIN(len, 15u), &i->z, i->o)) || gen_excluded(&i->z) || form_excluded(i))
        return false;
    used = form_used(g, i);
    if (*used >= quota(i))
        return false;
    ++*used;
    i->len = i->z.length;
    memcpy(i->code, bytes, i->len);
    i->number = g->number++;
    make_state(g, i);
    i->in.rip = CODE_VA + 1500 + rnd_below(&g->r, 512);
    if (i->z.mnemonic == ZYDIS_MNEMONIC_UD0 || i->z.mnemonic == ZYDIS_MNEMONIC_UD1)
        ;                                                          /* whether they have a ModRM byte, and so a second page, differs */
    else if (one_in(&g->r, 10))
        i->in.rip = PAGE_VA(PAGE_CODE1) - 1 - rnd_below(&g->r, i->len);
    else if (one_in(&g->r, 40))
        i->in.rip = PAGE_VA(PAGE_GAP0) - 1 - rnd_below(&g->r, i->len);
    for (unsigned n = 0; n < i->z.operand_count; n++) {
        if (i->o[n].type == ZYDIS_OPERAND_TYPE_MEMORY && i->o[n].encoding != ZYDIS_OPERAND_ENCODING_NONE)
            mem = &i->o[n];
    }
    if (mem) {
        t = target(g, i, mem->size / 8);
        solve(g, i, mem, t);
    }
    bend(g, i, mem, t);
    if (i->z.mnemonic == ZYDIS_MNEMONIC_MASKMOVQ || i->z.mnemonic == ZYDIS_MNEMONIC_MASKMOVDQU || i->z.mnemonic == ZYDIS_MNEMONIC_VMASKMOVDQU)
        i->in.rflags &= ~(u64)FLAG_AC;
    if (mem && (i->z.encoding == ZYDIS_INSTRUCTION_ENCODING_EVEX || i->z.encoding == ZYDIS_INSTRUCTION_ENCODING_VEX))
        i->in.rflags &= ~(u64)FLAG_AC;                             /* what it means for masked operands differs */
    if (i->in.gpr[RSP] == 0)
        i->in.gpr[RSP] = 8;
    for (unsigned n = 0; n < 16 && compat; n++)
        i->in.gpr[n] = (u32)i->in.gpr[n];
    /* Displacements and immediates have changed: what the case is called follows. */
    return ZYAN_SUCCESS(ZydisDecoderDecodeFull(&g->decoder[compat], i->code, i->len, &i->z, i->o));
}

void gen_rounds(struct gen *g, unsigned n)
{
    g->rounds = n;
}

bool gen_next(struct gen *g, struct icase *i)
{
    static unsigned (*const put[])(struct rng *, u64, u8 *, bool) = {put_legacy, put_vex, put_evex};
    u64 total = 2 * (kind_size[KIND_LEGACY] + kind_size[KIND_VEX] + kind_size[KIND_EVEX]);

    while (g->at < g->rounds * total) {
        u64 index = g->at++ % total / 2;
        bool compat = (g->at - 1) & 1;
        unsigned kind = 0, len;
        u8 bytes[32];

        while (index >= kind_size[kind])
            index -= kind_size[kind++];
        if (kind == KIND_EVEX && !g->layout.opmask)
            continue;
        len = put[kind](&g->r, index, bytes, compat);
        if (len && make_case(g, i, bytes, len, compat))
            return true;
    }
    return false;
}

void gen_pattern(u64 seed, u8 *pattern)
{
    struct rng r = {seed ^ 0x9e3779b97f4a7c15};

    for (u64 at = 0; at < PAGES * PAGE_SIZE; at += 64)
        value_fill(&r, pattern + at, 64);
}

struct gen *gen_open(u64 seed, const struct xlayout *l, const u8 *pattern)
{
    struct gen *g = aligned_alloc(64, ALIGN_UP(sizeof *g, 64));

    if (!g)
        return NULL;
    memset(g, 0, sizeof *g);
    g->r.s = seed * 0x9e3779b97f4a7c15 + 1;
    g->layout = *l;
    g->pattern = pattern;
    g->rounds = ROUNDS;
    ZydisDecoderInit(&g->decoder[0], ZYDIS_MACHINE_MODE_LONG_64, ZYDIS_STACK_WIDTH_64);
    ZydisDecoderInit(&g->decoder[1], ZYDIS_MACHINE_MODE_LONG_COMPAT_32, ZYDIS_STACK_WIDTH_32);
    for (unsigned n = 0; n < 2; n++) {
        ZydisDecoderEnableMode(&g->decoder[n], ZYDIS_DECODER_MODE_MPX, false);
        ZydisDecoderEnableMode(&g->decoder[n], ZYDIS_DECODER_MODE_CET, false);
        ZydisDecoderEnableMode(&g->decoder[n], ZYDIS_DECODER_MODE_CLDEMOTE, false);
    }
    return g;
}

void gen_close(struct gen *g)
{
    free(g);
}
