/*
 * Registers for gdb (gdb_regs.h). x87, SSE, AVX and AVX-512 live in x86.xsave in XSAVE's standard format (SDM vol. 1
 * 13.4): what XSTATE_BV does not name is in its initial state; what is written gets named there.
 *
 * Not writable: selectors (their hidden parts would not follow), CR0, CR4, CR8, EFER.
 */
#include "ctl/gdb_regs.h"

#include <errno.h>
#include <stdarg.h>
#include <string.h>

#include "base/err.h"

enum kind {
    K_GPR, K_RIP, K_FLAGS, K_SELECTOR, K_ST, K_X87, K_XMM, K_MXCSR, K_BASE, K_YMMH, K_OPMASK, K_ZMMH, K_HI_XMM, K_HI_YMMH,
    K_HI_ZMMH, K_PKRU, K_SYSTEM,
};
enum { X87_CTRL, X87_STAT, X87_TAG, X87_ISEG, X87_IOFF, X87_OSEG, X87_OOFF, X87_OP };
enum { SYS_CR0, SYS_CR2, SYS_CR3, SYS_CR4, SYS_CR8, SYS_EFER };

#define XS_BV 512                                                  /* the header's XSTATE_BV */
#define FLAGS_FREE (FLAGS_ARITH | FLAG_TF | FLAG_IF | FLAG_DF | FLAG_IOPL | FLAG_NT | FLAG_RF | FLAG_AC | FLAG_ID)

/* ---- the description ---- */

static void add(struct gdb_regs *r, FILE *f, enum kind kind, unsigned n, unsigned bytes, const char *type,
                const char *fmt, ...) __attribute__((format(printf, 7, 8)));
static void add(struct gdb_regs *r, FILE *f, enum kind kind, unsigned n, unsigned bytes, const char *type,
                const char *fmt, ...)
{
    va_list ap;
    bug_on(r->n == GDB_REGS_MAX);
    struct gdb_reg *g = &r->reg[r->n++];
    *g = (struct gdb_reg){.bytes = (u8)bytes, .kind = (u8)kind, .n = (u8)n};
    va_start(ap, fmt);
    vsnprintf(g->name, sizeof(g->name), fmt, ap);
    va_end(ap);
    fprintf(f, "<reg name=\"%s\" bitsize=\"%u\" type=\"%s\"/>\n", g->name, 8 * bytes, type);
}

struct flag {
    const char *name;
    u8 bit;
};

static void flags_type(FILE *f, const char *id, unsigned bytes, const struct flag *flag, unsigned n)
{
    fprintf(f, "<flags id=\"%s\" size=\"%u\">\n", id, bytes);
    for (unsigned i = 0; i < n; i++)
        fprintf(f, "<field name=\"%s\" start=\"%u\" end=\"%u\"/>\n", flag[i].name, flag[i].bit, flag[i].bit);
    fputs("</flags>\n", f);
}

static const struct flag eflags[] = {
    {"CF", 0}, {"", 1}, {"PF", 2}, {"AF", 4}, {"ZF", 6}, {"SF", 7}, {"TF", 8}, {"IF", 9}, {"DF", 10}, {"OF", 11},
    {"NT", 14}, {"RF", 16}, {"VM", 17}, {"AC", 18}, {"VIF", 19}, {"VIP", 20}, {"ID", 21},
};
static const struct flag mxcsr[] = {
    {"IE", 0}, {"DE", 1}, {"ZE", 2}, {"OE", 3}, {"UE", 4}, {"PE", 5}, {"DAZ", 6}, {"IM", 7}, {"DM", 8}, {"ZM", 9},
    {"OM", 10}, {"UM", 11}, {"PM", 12}, {"FZ", 15},
};
static const struct flag cr0[] = {
    {"PE", 0}, {"MP", 1}, {"EM", 2}, {"TS", 3}, {"ET", 4}, {"NE", 5}, {"WP", 16}, {"AM", 18}, {"NW", 29}, {"CD", 30},
    {"PG", 31},
};
static const struct flag cr4[] = {
    {"VME", 0}, {"PVI", 1}, {"TSD", 2}, {"DE", 3}, {"PSE", 4}, {"PAE", 5}, {"MCE", 6}, {"PGE", 7}, {"PCE", 8},
    {"OSFXSR", 9}, {"OSXMMEXCPT", 10}, {"UMIP", 11}, {"LA57", 12}, {"VMXE", 13}, {"FSGSBASE", 16}, {"PCIDE", 17},
    {"OSXSAVE", 18}, {"SMEP", 20}, {"SMAP", 21}, {"PKE", 22},
};
static const struct flag efer[] = {
    {"SCE", 0}, {"LME", 8}, {"LMA", 10}, {"NXE", 11}, {"SVME", 12}, {"LMSLE", 13}, {"FFXSR", 14}, {"TCE", 15},
};

static void begin(FILE *f, const char *feature)
{
    fprintf(f, "<feature name=\"%s\">\n", feature);
}

static void end(FILE *f)
{
    fputs("</feature>\n", f);
}

/* gdb's order of the general registers is its own. */
static void core(struct gdb_regs *r, FILE *f, bool bits32)
{
    static const u8 order64[] = {RAX, RBX, RCX, RDX, RSI, RDI, RBP, RSP, R8, R9, R10, R11, R12, R13, R14, R15};
    static const u8 order32[] = {RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI};
    static const char *const name[] = {"ax", "cx", "dx", "bx", "sp", "bp", "si", "di"};
    static const struct {
        char name[3];
        u8 seg;
    } selector[] = {{"cs", SEG_CS}, {"ss", SEG_SS}, {"ds", SEG_DS}, {"es", SEG_ES}, {"fs", SEG_FS}, {"gs", SEG_GS}};
    static const char *const x87[] = {"fctrl", "fstat", "ftag", "fiseg", "fioff", "foseg", "fooff", "fop"};
    unsigned bytes = bits32 ? 4 : 8;
    begin(f, "org.gnu.gdb.i386.core");
    flags_type(f, "i386_eflags", 4, eflags, ARRAY_SIZE(eflags));
    for (unsigned i = 0; i < (bits32 ? ARRAY_SIZE(order32) : ARRAY_SIZE(order64)); i++) {
        unsigned n = bits32 ? order32[i] : order64[i];
        bool pointer = n == RSP || n == RBP;
        if (n == RSP)
            r->rsp = r->n;
        if (n == RBP)
            r->rbp = r->n;
        if (n < 8)
            add(r, f, K_GPR, n, bytes, pointer ? "data_ptr" : bits32 ? "int32" : "int64", "%c%s", bits32 ? 'e' : 'r',
                name[n]);
        else
            add(r, f, K_GPR, n, bytes, "int64", "r%u", n);
    }
    r->rip = r->n;
    add(r, f, K_RIP, 0, bytes, "code_ptr", bits32 ? "eip" : "rip");
    add(r, f, K_FLAGS, 0, 4, "i386_eflags", "eflags");
    for (unsigned i = 0; i < ARRAY_SIZE(selector); i++)
        add(r, f, K_SELECTOR, selector[i].seg, 4, "int32", "%s", selector[i].name);
    for (unsigned i = 0; i < 8; i++)
        add(r, f, K_ST, i, 10, "i387_ext", "st%u", i);
    for (unsigned i = 0; i < ARRAY_SIZE(x87); i++)
        add(r, f, K_X87, i, 4, "int", "%s", x87[i]);
    end(f);
}

static void vector_type(FILE *f)
{
    static const struct {
        const char *id, *type, *field;
        u8 count;
    } v[] = {{"v4f", "ieee_single", "v4_float", 4}, {"v2d", "ieee_double", "v2_double", 2},
             {"v16i8", "int8", "v16_int8", 16}, {"v8i16", "int16", "v8_int16", 8}, {"v4i32", "int32", "v4_int32", 4},
             {"v2i64", "int64", "v2_int64", 2}};
    for (unsigned i = 0; i < ARRAY_SIZE(v); i++)
        fprintf(f, "<vector id=\"%s\" type=\"%s\" count=\"%u\"/>\n", v[i].id, v[i].type, v[i].count);
    fputs("<union id=\"vec128\">\n", f);
    for (unsigned i = 0; i < ARRAY_SIZE(v); i++)
        fprintf(f, "<field name=\"%s\" type=\"%s\"/>\n", v[i].field, v[i].id);
    fputs("<field name=\"uint128\" type=\"uint128\"/>\n</union>\n", f);
}

static void vectors(struct gdb_regs *r, FILE *f, bool bits32)
{
    unsigned n = bits32 ? 8 : 16;
    begin(f, "org.gnu.gdb.i386.sse");
    vector_type(f);
    flags_type(f, "i386_mxcsr", 4, mxcsr, ARRAY_SIZE(mxcsr));
    for (unsigned i = 0; i < n; i++)
        add(r, f, K_XMM, i, 16, "vec128", "xmm%u", i);
    add(r, f, K_MXCSR, 0, 4, "i386_mxcsr", "mxcsr");
    end(f);
    if (!bits32) {
        begin(f, "org.gnu.gdb.i386.segments");
        add(r, f, K_BASE, SEG_FS, 8, "int64", "fs_base");
        add(r, f, K_BASE, SEG_GS, 8, "int64", "gs_base");
        end(f);
    }
    if (!r->ymm)
        return;
    begin(f, "org.gnu.gdb.i386.avx");
    for (unsigned i = 0; i < n; i++)
        add(r, f, K_YMMH, i, 16, "uint128", "ymm%uh", i);
    end(f);
    if (!r->opmask || !r->zmm || !r->hi16 || bits32)
        return;
    begin(f, "org.gnu.gdb.i386.avx512");
    fputs("<vector id=\"v2ui128\" type=\"uint128\" count=\"2\"/>\n", f);
    vector_type(f);
    for (unsigned i = 0; i < 8; i++)
        add(r, f, K_OPMASK, i, 8, "uint64", "k%u", i);
    for (unsigned i = 0; i < 16; i++)
        add(r, f, K_ZMMH, i, 32, "v2ui128", "zmm%uh", i);
    for (unsigned i = 0; i < 16; i++)
        add(r, f, K_HI_XMM, i, 16, "vec128", "xmm%u", i + 16);
    for (unsigned i = 0; i < 16; i++)
        add(r, f, K_HI_YMMH, i, 16, "uint128", "ymm%uh", i + 16);
    for (unsigned i = 0; i < 16; i++)
        add(r, f, K_HI_ZMMH, i, 32, "v2ui128", "zmm%uh", i + 16);
    end(f);
}

static void system_registers(struct gdb_regs *r, FILE *f)
{
    if (r->pkru) {
        begin(f, "org.gnu.gdb.i386.pkeys");
        add(r, f, K_PKRU, 0, 4, "uint32", "pkru");
        end(f);
    }
    begin(f, "org.doppel.x86.system");
    flags_type(f, "x86_cr0", 8, cr0, ARRAY_SIZE(cr0));
    flags_type(f, "x86_cr4", 8, cr4, ARRAY_SIZE(cr4));
    flags_type(f, "x86_efer", 8, efer, ARRAY_SIZE(efer));
    add(r, f, K_SYSTEM, SYS_CR0, 8, "x86_cr0", "cr0");
    add(r, f, K_SYSTEM, SYS_CR2, 8, "uint64", "cr2");
    add(r, f, K_SYSTEM, SYS_CR3, 8, "uint64", "cr3");
    add(r, f, K_SYSTEM, SYS_CR4, 8, "x86_cr4", "cr4");
    add(r, f, K_SYSTEM, SYS_CR8, 8, "uint64", "cr8");
    add(r, f, K_SYSTEM, SYS_EFER, 8, "x86_efer", "efer");
    end(f);
}

int gdb_regs_init(struct gdb_regs *r, const struct vm_debug *d, bool bits32)
{
    *r = (struct gdb_regs){
        .ymm = vm_debug_component(d, 2), .opmask = vm_debug_component(d, 5), .zmm = vm_debug_component(d, 6),
        .hi16 = vm_debug_component(d, 7), .pkru = vm_debug_component(d, 9),
    };
    FILE *f = open_memstream(&r->xml, &r->xml_len);
    if (!f)
        return err(-ENOMEM, "--gdb: no memory");
    fprintf(f, "<?xml version=\"1.0\"?>\n<!DOCTYPE target SYSTEM \"gdb-target.dtd\">\n<target>\n<architecture>%s"
               "</architecture>\n", bits32 ? "i386" : "i386:x86-64");
    core(r, f, bits32);
    vectors(r, f, bits32);
    system_registers(r, f);
    fputs("</target>\n", f);
    if (fclose(f) == 0)
        return 0;
    gdb_regs_free(r);
    return err(-ENOMEM, "--gdb: no memory");
}

void gdb_regs_free(struct gdb_regs *r)
{
    free(r->xml);
    r->xml = NULL;
}

/* ---- extended state ---- */

static u64 load(const u8 *p, unsigned n)
{
    u64 v = 0;
    memcpy(&v, p, n);
    return v;
}

static bool named(const struct x86 *x, u64 component)
{
    return load(x->xsave + XS_BV, 8) & component;
}

/* Where a register of the XSAVE area lies and to which component it belongs. */
static u8 *place(const struct gdb_regs *r, const struct gdb_reg *g, struct x86 *x, u64 *component)
{
    switch (g->kind) {
    case K_ST: *component = XSTATE_X87; return x->xsave + 32 + 16 * g->n;
    case K_XMM: *component = XSTATE_SSE; return x->xsave + 160 + 16 * g->n;
    case K_YMMH: *component = XSTATE_AVX; return x->xsave + r->ymm + 16 * g->n;
    case K_OPMASK: *component = BIT(5); return x->xsave + r->opmask + 8 * g->n;
    case K_ZMMH: *component = BIT(6); return x->xsave + r->zmm + 32 * g->n;
    case K_HI_XMM: *component = BIT(7); return x->xsave + r->hi16 + 64 * g->n;
    case K_HI_YMMH: *component = BIT(7); return x->xsave + r->hi16 + 64 * g->n + 16;
    case K_HI_ZMMH: *component = BIT(7); return x->xsave + r->hi16 + 64 * g->n + 32;
    case K_PKRU: *component = XSTATE_PKRU; return x->xsave + r->pkru;
    }
    return NULL;
}

/* A component in its initial state, before a part of it is written. */
static void name_component(const struct gdb_regs *r, struct x86 *x, u64 component)
{
    u64 bv = load(x->xsave + XS_BV, 8);
    if (bv & component)
        return;
    switch (component) {
    case XSTATE_X87:
        memset(x->xsave, 0, 24);
        x->xsave[0] = 0x7f;                                        /* FCW 0x37f */
        x->xsave[1] = 0x03;
        memset(x->xsave + 32, 0, 128);
        break;
    case XSTATE_SSE: memset(x->xsave + 160, 0, 256); break;
    case XSTATE_AVX: memset(x->xsave + r->ymm, 0, 256); break;
    case BIT(5): memset(x->xsave + r->opmask, 0, 64); break;
    case BIT(6): memset(x->xsave + r->zmm, 0, 512); break;
    case BIT(7): memset(x->xsave + r->hi16, 0, 1024); break;
    default: memset(x->xsave + r->pkru, 0, 8); break;
    }
    bv |= component;
    memcpy(x->xsave + XS_BV, &bv, 8);
}

/* The x87's tag word of 16 bits from the one of 8 and the registers' contents (SDM vol. 1 10.5.1, table 10-3). */
static u16 full_tags(const struct x86 *x)
{
    unsigned top = load(x->xsave + 2, 2) >> 11 & 7;
    u16 tags = 0;
    for (unsigned i = 0; i < 8; i++) {
        const u8 *st = x->xsave + 32 + 16 * ((i - top) & 7);
        u64 mantissa = load(st, 8), exponent = load(st + 8, 2) & 0x7fff;
        unsigned tag = 0;
        if (!(x->xsave[4] >> i & 1))
            tag = 3;
        else if (!exponent && !mantissa)
            tag = 1;
        else if (exponent == 0 || exponent == 0x7fff || !(mantissa >> 63))
            tag = 2;
        tags |= (u16)(tag << 2 * i);
    }
    return tags;
}

static u32 x87_get(const struct x86 *x, unsigned n)
{
    bool initial = !named(x, XSTATE_X87);
    if (initial)
        return n == X87_CTRL ? 0x37f : n == X87_TAG ? 0xffff : 0;
    switch (n) {
    case X87_CTRL: return (u32)load(x->xsave, 2);
    case X87_STAT: return (u32)load(x->xsave + 2, 2);
    case X87_TAG: return full_tags(x);
    case X87_ISEG: return (u32)load(x->xsave + 12, 2);
    case X87_IOFF: return (u32)load(x->xsave + 8, 4);
    case X87_OSEG: return (u32)load(x->xsave + 20, 2);
    case X87_OOFF: return (u32)load(x->xsave + 16, 4);
    default: return (u32)load(x->xsave + 6, 2);
    }
}

static void x87_set(const struct gdb_regs *r, struct x86 *x, unsigned n, u32 val)
{
    static const u8 at[] = {0, 2, 4, 12, 8, 20, 16, 6}, bytes[] = {2, 2, 1, 2, 4, 2, 4, 2};
    name_component(r, x, XSTATE_X87);
    if (n == X87_TAG) {
        u32 tags = val;
        val = 0;
        for (unsigned i = 0; i < 8; i++)
            val |= (u32)((tags >> 2 * i & 3) != 3) << i;
    }
    if (n == X87_OP)
        val &= 0x7ff;
    memcpy(x->xsave + at[n], &val, bytes[n]);
}

/* ---- one register ---- */

static u64 system_get(const struct x86 *x, unsigned n, u8 cr8)
{
    switch (n) {
    case SYS_CR0: return x->cr0;
    case SYS_CR2: return x->cr2;
    case SYS_CR3: return x->cr3;
    case SYS_CR4: return x->cr4;
    case SYS_CR8: return cr8;
    default: return x->efer;
    }
}

void gdb_reg_get(const struct gdb_regs *r, unsigned i, const struct x86 *x, u8 cr8, u8 *out)
{
    const struct gdb_reg *g = &r->reg[i];
    u64 val = 0, component = 0;
    const u8 *p;
    switch (g->kind) {
    case K_GPR: val = x->gpr[g->n]; break;
    case K_RIP: val = x->rip; break;
    case K_FLAGS: val = x->rflags; break;
    case K_SELECTOR: val = x->seg[g->n].sel; break;
    case K_X87: val = x87_get(x, g->n); break;
    case K_MXCSR: val = load(x->xsave + 24, 4); break;
    case K_BASE: val = x->seg[g->n].base; break;
    case K_SYSTEM: val = system_get(x, g->n, cr8); break;
    default:
        p = place(r, g, (struct x86 *)x, &component);
        if (named(x, component))
            memcpy(out, p, g->bytes);
        else
            memset(out, 0, g->bytes);
        return;
    }
    memcpy(out, &val, MIN(g->bytes, sizeof(val)));
}

static bool canonical(u64 la)
{
    return (u64)((s64)(la << 16) >> 16) == la;
}

static int system_set(struct x86 *x, unsigned n, u64 val)
{
    if (n != SYS_CR2)
        return -EPERM;
    x->cr2 = val;
    return 0;
}

int gdb_reg_set(const struct gdb_regs *r, unsigned i, struct x86 *x, const u8 *in)
{
    const struct gdb_reg *g = &r->reg[i];
    u64 val = load(in, MIN(g->bytes, sizeof(val))), component = 0;
    u8 *p;
    switch (g->kind) {
    case K_GPR:
        x->gpr[g->n] = val;
        return 0;
    case K_RIP:
        if (!canonical(val))
            return -EINVAL;
        x->rip = val;
        return 0;
    case K_FLAGS:
        x->rflags = (x->rflags & ~(u64)FLAGS_FREE) | (val & FLAGS_FREE);
        return 0;
    case K_SELECTOR:
        return x->seg[g->n].sel == val ? 0 : -EPERM;
    case K_X87:
        x87_set(r, x, g->n, (u32)val);
        return 0;
    case K_MXCSR:
        if (val & ~0xffffull)
            return -EINVAL;
        memcpy(x->xsave + 24, &val, 4);
        return 0;
    case K_BASE:
        if (!canonical(val))
            return -EINVAL;
        x->seg[g->n].base = val;
        return 0;
    case K_SYSTEM:
        return system_set(x, g->n, val);
    }
    p = place(r, g, x, &component);
    name_component(r, x, component);
    memcpy(p, in, g->bytes);
    return 0;
}
