/*
 * Writes ACPI Machine Language (ACPI specification 6.4, chapter 20) and resource descriptors (6.4 of it) into a buffer.
 *
 * Blocks nest: aml_device() ... aml_end(). A block's length always takes three bytes, so that it can be filled in at
 * the end. When the buffer is full the writer remembers it and writes no more; the caller asks once, at the end.
 */
#pragma once

#include "base/types.h"

#define AML_DEPTH 8

struct aml {
    u8 *buf;
    u32 size, pos;
    bool full;
    u32 open[AML_DEPTH];                                           /* where the lengths of open blocks stand */
    unsigned depth;
};

void aml_init(struct aml *a, void *buf, u32 size);
void aml_bytes(struct aml *a, const void *p, u32 n);
void aml_u8(struct aml *a, u8 v);
void aml_u16(struct aml *a, u16 v);
void aml_u32(struct aml *a, u32 v);
void aml_u64(struct aml *a, u64 v);

/* Names of up to 4 characters, padded with '_'; a leading backslash is the root. */
void aml_scope(struct aml *a, const char *name);
void aml_device(struct aml *a, const char *name);
void aml_method(struct aml *a, const char *name, unsigned args);
void aml_if(struct aml *a, const char *name);                      /* a variable that is not zero */
void aml_package(struct aml *a, u8 elements);
void aml_end(struct aml *a);

void aml_name(struct aml *a, const char *name);                    /* the value follows */
void aml_ref(struct aml *a, const char *name);                     /* a use of a name */
void aml_int(struct aml *a, u64 v);
void aml_string(struct aml *a, const char *s);
void aml_eisaid(struct aml *a, const char *id);                    /* "PNP0A03" as an integer */
void aml_store_arg0(struct aml *a, const char *name);
void aml_return(struct aml *a, const char *name);

void aml_resources(struct aml *a);                                 /* ResourceTemplate { ... aml_resources_end() */
void aml_resources_end(struct aml *a);
void aml_res_io(struct aml *a, u16 port, u8 len);
void aml_res_irq(struct aml *a, u8 irq);
void aml_res_memory(struct aml *a, u32 base, u32 len);             /* a fixed range */
void aml_res_bus(struct aml *a, u16 first, u16 last);              /* windows that a bridge passes on */
void aml_res_io_window(struct aml *a, u16 base, u32 len);
void aml_res_mem32_window(struct aml *a, u32 base, u32 len);
void aml_res_mem64_window(struct aml *a, u64 base, u64 len);
