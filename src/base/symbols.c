/* Names of addresses (symbols.h). Formats: ELF-64 object file format; nm(1). */
#define _GNU_SOURCE
#include "base/symbols.h"

#include <elf.h>
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

void symbols_free(struct symbols *s)
{
    free(s->symbol);
    free(s->text);
    *s = (struct symbols){ 0 };
}

static int grow(void **p, size_t *room, size_t want, size_t each)
{
    if (want <= *room)
        return 0;
    size_t n = MAX(want, 2 * *room + 1024);
    void *q = realloc(*p, n * each);
    if (!q)
        return -ENOMEM;
    *p = q;
    *room = n;
    return 0;
}

int symbols_add(struct symbols *s, u64 addr, const char *name)
{
    size_t len = strlen(name) + 1;
    if (s->text_len + len > UINT32_MAX || grow((void **)&s->symbol, &s->room, s->n + 1, sizeof *s->symbol) ||
        grow((void **)&s->text, &s->text_room, s->text_len + len, 1))
        return -ENOMEM;
    s->symbol[s->n++] = (struct symbol){ addr, (u32)s->text_len };
    memcpy(s->text + s->text_len, name, len);
    s->text_len += len;
    s->sorted = false;
    return 0;
}

/* ---- ELF ---- */
struct file {
    const u8 *p;
    size_t n;
};

static const void *at(const struct file *f, u64 off, u64 n)
{
    return off <= f->n && n <= f->n - off ? f->p + off : NULL;
}

static int map_file(const char *path, struct file *f)
{
    struct stat st;
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return -errno;
    if (fstat(fd, &st) || !S_ISREG(st.st_mode) || st.st_size < (off_t)sizeof(Elf64_Ehdr)) {
        close(fd);
        return -EINVAL;
    }
    void *p = mmap(NULL, (size_t)st.st_size, PROT_READ, MAP_PRIVATE, fd, 0);
    close(fd);
    if (p == MAP_FAILED)
        return -ENOMEM;
    *f = (struct file){ p, (size_t)st.st_size };
    return 0;
}

static const Elf64_Ehdr *elf_header(const struct file *f)
{
    const Elf64_Ehdr *h = at(f, 0, sizeof *h);
    return h && !memcmp(h->e_ident, ELFMAG, SELFMAG) && h->e_ident[EI_CLASS] == ELFCLASS64 && h->e_shentsize == sizeof(Elf64_Shdr) && !(h->e_shoff & 7) &&
           !(h->e_phoff & 7) ? h : NULL;
}

/* A symbol table with its strings; NULL: none. */
static const Elf64_Shdr *table_of(const struct file *f, const Elf64_Ehdr *h, u32 type)
{
    const Elf64_Shdr *s = at(f, h->e_shoff, (u64)h->e_shnum * sizeof *s);
    for (unsigned i = 0; s && i < h->e_shnum; i++)
        if (s[i].sh_type == type && s[i].sh_link < h->e_shnum && s[i].sh_size && !(s[i].sh_offset & 7))
            return &s[i];
    return NULL;
}

/* rest: the name of what is behind a function; NULL: nothing is known to be. */
static long add_table(struct symbols *s, const struct file *f, const Elf64_Ehdr *h, const Elf64_Shdr *table, u64 bias, const char *rest)
{
    const Elf64_Shdr *all = at(f, h->e_shoff, (u64)h->e_shnum * sizeof *all), *strings = &all[table->sh_link];
    const Elf64_Sym *sym = at(f, table->sh_offset, table->sh_size);
    const char *text = at(f, strings->sh_offset, strings->sh_size);
    long n = 0;
    if (!sym || !text || !strings->sh_size || text[strings->sh_size - 1])
        return -EINVAL;
    for (u64 i = 0; i < table->sh_size / sizeof *sym; i++) {
        unsigned type = ELF64_ST_TYPE(sym[i].st_info);
        if ((type != STT_FUNC && type != STT_GNU_IFUNC && type != STT_NOTYPE) || sym[i].st_shndx == SHN_UNDEF || sym[i].st_name >= strings->sh_size ||
            !text[sym[i].st_name])
            continue;
        if (symbols_add(s, sym[i].st_value + bias, text + sym[i].st_name) ||
            (rest && sym[i].st_size && symbols_add(s, sym[i].st_value + sym[i].st_size + bias, rest)))
            return -ENOMEM;
        n++;
    }
    return n;
}

static long add_elf(struct symbols *s, const char *path, u64 bias, const char *rest)
{
    struct file f;
    long r = map_file(path, &f);
    if (r < 0)
        return r;
    const Elf64_Ehdr *h = elf_header(&f);
    const Elf64_Shdr *table = h ? table_of(&f, h, SHT_SYMTAB) : NULL;
    if (h && !table)
        table = table_of(&f, h, SHT_DYNSYM);
    r = table ? add_table(s, &f, h, table, bias, rest) : -EINVAL;
    munmap((void *)f.p, f.n);
    return r;
}

long symbols_elf(struct symbols *s, const char *path, u64 bias)
{
    return add_elf(s, path, bias, NULL);
}

/* Where a file's segment that begins at this offset was linked to be; ~0: there is none. */
static u64 linked_at(const char *path, u64 offset)
{
    struct file f;
    u64 va = ~0ull;
    if (map_file(path, &f))
        return va;
    const Elf64_Ehdr *h = elf_header(&f);
    const Elf64_Phdr *p = h ? at(&f, h->e_phoff, (u64)h->e_phnum * sizeof *p) : NULL;
    for (unsigned i = 0; p && i < h->e_phnum; i++)
        if (p[i].p_type == PT_LOAD && (p[i].p_offset & PAGE_MASK) == offset)
            va = p[i].p_vaddr & PAGE_MASK;
    munmap((void *)f.p, f.n);
    return va;
}

/* "/usr/lib/libc.so.6" is "[libc.so.6]", "/memfd:NAME (deleted)" "[memfd:NAME]", and "[vdso]" itself. */
static void bracketed(const char *path, char name[64])
{
    const char *base = strrchr(path, '/');
    base = base ? base + 1 : path[0] == '[' ? path + 1 : path;
    snprintf(name, 64, "[%.*s]", (int)MIN(strcspn(base, " ]"), (size_t)60), base);
}

void symbols_self(struct symbols *s)
{
    FILE *f = fopen("/proc/self/maps", "r");
    char line[4352], path[4096], rights[5], name[64];
    unsigned long long start, end, offset;
    while (f && fgets(line, sizeof line, f)) {
        if (sscanf(line, "%llx-%llx %4s %llx %*s %*u %4095[^\n]", &start, &end, rights, &offset, path) != 5 || rights[2] != 'x')
            continue;
        bracketed(path, name);
        symbols_add(s, start, name);
        symbols_add(s, end, "");
        u64 va = path[0] == '/' ? linked_at(path, offset) : ~0ull;
        if (va != ~0ull)
            add_elf(s, path, start - va, name);
    }
    if (f)
        fclose(f);
}

/* ---- lists ---- */
long symbols_map(struct symbols *s, const char *path)
{
    FILE *f = fopen(path, "r");
    char line[1024], name[512], type;
    unsigned long long addr;
    long n = 0;
    if (!f)
        return -errno;
    while (n >= 0 && fgets(line, sizeof line, f))
        if (sscanf(line, "%llx %c %511s", &addr, &type, name) == 3 && strchr("tTwW", type))
            n = symbols_add(s, addr, name) ? -ENOMEM : n + 1;
    fclose(f);
    return n;
}

/* ---- finding ---- */
static bool nameless(const struct symbols *s, const struct symbol *x)
{
    return s->text[x->name] == '[' || !s->text[x->name];
}

static int by_address(const void *a, const void *b)
{
    const struct symbol *x = a, *y = b;
    return x->addr != y->addr ? (x->addr < y->addr ? -1 : 1) : x->name < y->name ? -1 : 1;
}

const char *symbols_find(struct symbols *s, u64 addr, u64 *offset)
{
    size_t lo = 0, hi = s->n;
    if (!s->sorted && s->n)
        qsort(s->symbol, s->n, sizeof *s->symbol, by_address);
    s->sorted = true;
    while (lo < hi) {                                              /* the first one above addr */
        size_t mid = lo + (hi - lo) / 2;
        if (s->symbol[mid].addr <= addr)
            lo = mid + 1;
        else
            hi = mid;
    }
    if (!lo)
        return NULL;
    const struct symbol *found = &s->symbol[--lo];
    while (nameless(s, found) && lo > 0 && s->symbol[lo - 1].addr == found->addr) /* where a function begins nothing else ends */
        found = &s->symbol[--lo];
    *offset = addr - found->addr;
    return s->text[found->name] ? s->text + found->name : NULL;
}
