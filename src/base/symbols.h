/*
 * Names of addresses: of functions, from ELF files and lists like System.map, or added one by one.
 *
 * Not for several threads at once. What is read is not trusted: a file that makes no sense gives no symbols.
 */
#pragma once

#include "base/types.h"

struct symbols {
    struct symbol {
        u64 addr;
        u32 name;                                                  /* offset in text */
    } *symbol;
    size_t n, room;
    char *text;
    size_t text_len, text_room;
    bool sorted;
};

void symbols_free(struct symbols *s);                              /* *s zeroed before first use, and afterwards */
int symbols_add(struct symbols *s, u64 addr, const char *name);    /* 0 or -ENOMEM */
/* The functions of an ELF file (.symtab, else .dynsym), each at its address plus bias. How many, or a negative errno. */
long symbols_elf(struct symbols *s, const char *path, u64 bias);
/* Lines "ADDRESS TYPE NAME": System.map, nm, /proc/kallsyms. Functions only. How many, or a negative errno. */
long symbols_map(struct symbols *s, const char *path);
/* This process's program and libraries. What lies between functions that are known has the file's name in brackets. */
void symbols_self(struct symbols *s);
/* The name whose address is the last one not above addr, and how far addr is behind it; NULL: none, or an empty one. */
const char *symbols_find(struct symbols *s, u64 addr, u64 *offset);
