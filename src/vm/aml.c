/* The AML writer, see aml.h. Encodings: ACPI specification 6.4, 20.2 (grammar) and 6.4 (resource data types). Not
 * thread-safe: a plain value. */
#include "vm/aml.h"

#include <string.h>

enum {
    NAME_OP = 0x08,
    BYTE_PREFIX = 0x0a,
    WORD_PREFIX = 0x0b,
    DWORD_PREFIX = 0x0c,
    STRING_PREFIX = 0x0d,
    QWORD_PREFIX = 0x0e,
    SCOPE_OP = 0x10,
    BUFFER_OP = 0x11,
    PACKAGE_OP = 0x12,
    METHOD_OP = 0x14,
    EXT_PREFIX = 0x5b,
    ROOT_CHAR = 0x5c,
    ARG0_OP = 0x68,
    STORE_OP = 0x70,
    DEVICE_OP = 0x82,
    IF_OP = 0xa0,
    RETURN_OP = 0xa4,
};
#define LENGTH_BYTES 3u                                  /* lead byte 0x80 | low nibble, then 16 bits: 20 bits in all */

void aml_init(struct aml *a, void *buf, u32 size)
{
    *a = (struct aml){ .buf = buf, .size = size };
}

void aml_bytes(struct aml *a, const void *p, u32 n)
{
    if (a->full || !range_in(a->pos, n, a->size)) {
        a->full = true;
        return;
    }
    memcpy(a->buf + a->pos, p, n);
    a->pos += n;
}

void aml_u8(struct aml *a, u8 v)
{
    aml_bytes(a, &v, 1);
}

void aml_u16(struct aml *a, u16 v)
{
    aml_bytes(a, &v, 2);
}

void aml_u32(struct aml *a, u32 v)
{
    aml_bytes(a, &v, 4);
}

void aml_u64(struct aml *a, u64 v)
{
    aml_bytes(a, &v, 8);
}

/* ---- blocks ---- */

static void begin(struct aml *a, u8 op)
{
    static const u8 none[LENGTH_BYTES];

    aml_u8(a, op);
    bug_on(a->depth == AML_DEPTH);
    a->open[a->depth++] = a->pos;
    aml_bytes(a, none, sizeof none);
}

void aml_end(struct aml *a)
{
    bug_on(!a->depth);
    u32 at = a->open[--a->depth], len = a->pos - at;

    if (a->full)
        return;
    bug_on(len >= 1u << 20);
    a->buf[at] = 0x80 | (len & 15);
    a->buf[at + 1] = (u8)(len >> 4);
    a->buf[at + 2] = (u8)(len >> 12);
}

void aml_ref(struct aml *a, const char *name)
{
    if (*name == '\\') {
        aml_u8(a, ROOT_CHAR);
        name++;
    }
    size_t len = strlen(name);
    bug_on(!len || len > 4);
    for (size_t i = 0; i < 4; i++)
        aml_u8(a, i < len ? (u8)name[i] : '_');
}

void aml_scope(struct aml *a, const char *name)
{
    begin(a, SCOPE_OP);
    aml_ref(a, name);
}

void aml_device(struct aml *a, const char *name)
{
    aml_u8(a, EXT_PREFIX);
    begin(a, DEVICE_OP);
    aml_ref(a, name);
}

void aml_method(struct aml *a, const char *name, unsigned args)
{
    begin(a, METHOD_OP);
    aml_ref(a, name);
    aml_u8(a, (u8)(args & 7));
}

void aml_if(struct aml *a, const char *name)
{
    begin(a, IF_OP);
    aml_ref(a, name);
}

void aml_package(struct aml *a, u8 elements)
{
    begin(a, PACKAGE_OP);
    aml_u8(a, elements);
}

/* ---- values ---- */

void aml_name(struct aml *a, const char *name)
{
    aml_u8(a, NAME_OP);
    aml_ref(a, name);
}

void aml_int(struct aml *a, u64 v)
{
    if (v <= 1) {
        aml_u8(a, (u8)v);                                          /* ZeroOp, OneOp */
    } else if (v <= UINT8_MAX) {
        aml_u8(a, BYTE_PREFIX);
        aml_u8(a, (u8)v);
    } else if (v <= UINT16_MAX) {
        aml_u8(a, WORD_PREFIX);
        aml_u16(a, (u16)v);
    } else if (v <= UINT32_MAX) {
        aml_u8(a, DWORD_PREFIX);
        aml_u32(a, (u32)v);
    } else {
        aml_u8(a, QWORD_PREFIX);
        aml_u64(a, v);
    }
}

void aml_string(struct aml *a, const char *s)
{
    aml_u8(a, STRING_PREFIX);
    aml_bytes(a, s, (u32)strlen(s) + 1);
}

/* Three letters of five bits and four hexadecimal digits, big-endian (6.1.5 _HID). */
void aml_eisaid(struct aml *a, const char *id)
{
    u32 letters = (u32)(id[0] - '@') << 26 | (u32)(id[1] - '@') << 21 | (u32)(id[2] - '@') << 16;
    u32 v = letters | (u32)strtoul(id + 3, NULL, 16);

    aml_u8(a, DWORD_PREFIX);
    aml_u32(a, __builtin_bswap32(v));
}

void aml_store_arg0(struct aml *a, const char *name)
{
    aml_u8(a, STORE_OP);
    aml_u8(a, ARG0_OP);
    aml_ref(a, name);
}

void aml_return(struct aml *a, const char *name)
{
    aml_u8(a, RETURN_OP);
    aml_ref(a, name);
}

/* ---- resources ---- */

/* A buffer whose size stands before its bytes as a word, filled in at the end. */
void aml_resources(struct aml *a)
{
    begin(a, BUFFER_OP);
    aml_u8(a, WORD_PREFIX);
    aml_u16(a, 0);
}

void aml_resources_end(struct aml *a)
{
    u32 at = a->open[a->depth - 1] + LENGTH_BYTES + 1;

    aml_u8(a, 0x79);                                               /* end tag; checksum 0: not used */
    aml_u8(a, 0);
    if (!a->full) {
        u16 size = (u16)(a->pos - at - 2);
        memcpy(a->buf + at, &size, sizeof size);
    }
    aml_end(a);
}

void aml_res_io(struct aml *a, u16 port, u8 len)
{
    aml_u8(a, 0x47);
    aml_u8(a, 1);                                                  /* decodes 16 bits */
    aml_u16(a, port);
    aml_u16(a, port);
    aml_u8(a, 1);                                                  /* alignment */
    aml_u8(a, len);
}

void aml_res_irq(struct aml *a, u8 irq)
{
    aml_u8(a, 0x22);                                               /* edge, active high, exclusive */
    aml_u16(a, (u16)(1u << irq));
}

void aml_res_memory(struct aml *a, u32 base, u32 len)
{
    aml_u8(a, 0x86);
    aml_u16(a, 9);
    aml_u8(a, 1);                                                  /* writable */
    aml_u32(a, base);
    aml_u32(a, len);
}

enum { TYPE_MEMORY, TYPE_IO, TYPE_BUS };
#define FIXED 0x0c                       /* minimum and maximum are fixed; decodes positively; produced by the bridge */

static void window_head(struct aml *a, u8 tag, u16 len, u8 type, u8 type_flags)
{
    aml_u8(a, tag);
    aml_u16(a, len);
    aml_u8(a, type);
    aml_u8(a, FIXED);
    aml_u8(a, type_flags);
}

static void word_window(struct aml *a, u8 type, u8 type_flags, u32 base, u32 len)
{
    window_head(a, 0x88, 13, type, type_flags);
    aml_u16(a, 0);                                                 /* granularity */
    aml_u16(a, (u16)base);
    aml_u16(a, (u16)(base + len - 1));
    aml_u16(a, 0);                                                 /* translation */
    aml_u16(a, (u16)len);
}

void aml_res_bus(struct aml *a, u16 first, u16 last)
{
    word_window(a, TYPE_BUS, 0, first, last - first + 1u);
}

void aml_res_io_window(struct aml *a, u16 base, u32 len)
{
    word_window(a, TYPE_IO, 3, base, len);                         /* ISA and non-ISA ranges */
}

void aml_res_mem32_window(struct aml *a, u32 base, u32 len)
{
    window_head(a, 0x87, 23, TYPE_MEMORY, 1);                      /* writable, not cacheable */
    aml_u32(a, 0);
    aml_u32(a, base);
    aml_u32(a, base + len - 1);
    aml_u32(a, 0);
    aml_u32(a, len);
}

void aml_res_mem64_window(struct aml *a, u64 base, u64 len)
{
    window_head(a, 0x8a, 43, TYPE_MEMORY, 1);
    aml_u64(a, 0);
    aml_u64(a, base);
    aml_u64(a, base + len - 1);
    aml_u64(a, 0);
    aml_u64(a, len);
}
