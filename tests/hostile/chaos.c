/*
 * A guest that means harm: a kernel for PVH (32-bit, flat, no paging) that writes random values to every port, to every place where a device may
 * be in memory, and into virtqueues, for ever. The monitor must neither fall over nor hang; what becomes of the guest is all one.
 *
 * The command line chooses: "ports", "mmio", "virtq" or "all", and may hold "seed=N". It says "chaos: WHAT" on COM1 first.
 */
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

__asm__(".pushsection .note.Xen, \"a\", @note\n"
        ".long 4, 4, 18\n"                                          /* XEN_ELFNOTE_PHYS32_ENTRY */
        ".asciz \"Xen\"\n"
        ".long _start\n"
        ".popsection\n"
        ".globl _start\n"
        "_start: mov $stack_top, %esp\n"
        "push %ebx\n"
        "call chaos\n"
        "1: hlt; jmp 1b\n"
        ".pushsection .bss\n .align 16\n .skip 16384\n stack_top: .popsection\n");

static u64 state;

static u32 rnd(void)
{
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return (u32)(state >> 16);
}
/* Often a value that means something: 0, 1, all ones, a power of two, a small number. */
static u32 value(void)
{
    switch (rnd() % 8) {
    case 0: return 0;
    case 1: return 0xffffffff;
    case 2: return 1u << (rnd() % 32);
    case 3: return rnd() % 64;
    default: return rnd();
    }
}

static void outb(u16 p, u8 v) { __asm__ volatile("outb %0, %1" : : "a"(v), "Nd"(p)); }
static void outw(u16 p, u16 v) { __asm__ volatile("outw %0, %1" : : "a"(v), "Nd"(p)); }
static void outl(u16 p, u32 v) { __asm__ volatile("outl %0, %1" : : "a"(v), "Nd"(p)); }
static u8 inb(u16 p) { u8 v; __asm__ volatile("inb %1, %0" : "=a"(v) : "Nd"(p)); return v; }
static u16 inw(u16 p) { u16 v; __asm__ volatile("inw %1, %0" : "=a"(v) : "Nd"(p)); return v; }
static u32 inl(u16 p) { u32 v; __asm__ volatile("inl %1, %0" : "=a"(v) : "Nd"(p)); return v; }

static void say(const char *s)
{
    for (; *s; s++) {
        for (int i = 0; i < 100000 && !(inb(0x3fd) & 0x20); i++)
            ;
        outb(0x3f8, (u8)*s);
    }
}

static u32 config_read(u32 bdf, u32 off)
{
    outl(0xcf8, 0x80000000u | bdf << 8 | (off & 0xfc));
    return inl(0xcfc) >> (off & 3) * 8;
}
static void config_write(u32 bdf, u32 off, u32 v)
{
    outl(0xcf8, 0x80000000u | bdf << 8 | (off & 0xfc));
    outl(0xcfc, v);
}

/* ---- ports ---- */

static void one_port(u16 p)
{
    switch (rnd() % 6) {
    case 0: outb(p, (u8)value()); break;
    case 1: outw(p, (u16)value()); break;
    case 2: outl(p, value()); break;
    case 3: inb(p); break;
    case 4: inw(p); break;
    case 5: inl(p); break;
    }
}
/* Does this access switch the machine off or reset it? Mostly left out, or nothing else would be seen. */
static int ends_machine(u32 p)
{
    return (p >= 0x600 && p < 0x608) || p == 0x64 || p == 0x60 || p == 0x92 || (p >= 0xcf6 && p <= 0xcf9) || p == 0x505 || (p >= 0x502 && p <= 0x508);
}
static void ports(void)
{
    static const u16 known[] = { 0x20, 0x21, 0xa0, 0xa1, 0x4d0, 0x4d1, 0x40, 0x41, 0x42, 0x43, 0x60, 0x61, 0x64, 0x70, 0x71, 0x80, 0x92, 0x2f8, 0x2f9, 0x2fa,
                                 0x2fb, 0x2fc, 0x3f9, 0x3fa, 0x3fb, 0x3fc, 0x3c0, 0x3d4, 0x3d5, 0x505, 0x600, 0x602, 0x604, 0x608, 0x620, 0x628, 0xcf8,
                                 0xcf9, 0xcfc, 0xcfd, 0xcfe, 0xcff };

    for (u32 p = 0; p < 0x10000; p++)
        if (!ends_machine(p))
            one_port((u16)p);
    for (int i = 0; i < 20000; i++) {
        u16 p = known[rnd() % (sizeof known / sizeof *known)];

        if (!ends_machine(p) || rnd() % 5000 == 0)
            one_port(p);
    }
}

/* ---- memory-mapped registers ---- */

static void one_mmio(u32 a)
{
    switch (rnd() % 6) {
    case 0: *(volatile u8 *)a = (u8)value(); break;
    case 1: *(volatile u16 *)a = (u16)value(); break;
    case 2: *(volatile u32 *)a = value(); break;
    case 3: (void)*(volatile u8 *)a; break;
    case 4: (void)*(volatile u16 *)a; break;
    case 5: (void)*(volatile u32 *)a; break;
    }
}
static void mmio(void)
{
    for (int i = 0; i < 20000; i++) {
        static const u32 area[][2] = { { 0xa0000, 0x20000 }, { 0xc0000000, 0x20000 }, { 0xe0000000, 0x20000 }, { 0xfec00000, 0x100 },
                                       { 0xfee00000, 0x1000 }, { 0xc0000000, 0x40000000 } };
        const u32 *a = area[rnd() % 6];

        one_mmio(a[0] + rnd() % a[1]);
    }
    /* The I/O APIC by its index register, and MSIs. */
    for (int i = 0; i < 1000; i++) {
        *(volatile u32 *)0xfec00000 = value() % 80;
        *(volatile u32 *)0xfec00010 = value();
        *(volatile u32 *)(0xfee00000 + (rnd() & 0xfffff0)) = value() % 256;
    }
}

/* ---- virtio ---- */

#define ARENA 0x2000000u
#define ARENA_SIZE 0x20000u
#define ALIGN(x) ((x) & ~15ull)

struct where { u32 common, notify, multiplier, device; };

static int find(u32 bdf, struct where *w)
{
    u32 cap = config_read(bdf, 0x34) & 0xff;
    int found = 0;

    for (int guard = 0; cap && guard < 48; guard++, cap = config_read(bdf, cap + 1) & 0xff) {
        u32 bar, base;

        if ((config_read(bdf, cap) & 0xff) != 9)
            continue;
        bar = config_read(bdf, cap + 4) & 7;
        base = (config_read(bdf, 0x10 + bar * 4) & ~15u) + config_read(bdf, cap + 8);
        switch (config_read(bdf, cap + 3) & 0xff) {
        case 1: w->common = base; found = 1; break;
        case 2: w->notify = base; w->multiplier = config_read(bdf, cap + 16); break;
        case 4: w->device = base; break;
        }
    }
    return found;
}

static u64 some_address(void)
{
    switch (rnd() % 8) {
    case 0: return (u64)rnd() << 32 | rnd();
    case 1: return ~0ull - rnd() % 4096;
    case 2: return 0x1ffff000 + rnd() % 8192;                       /* around the end of 512 MiB */
    case 3: return 0xa0000 + rnd() % 0x40000;
    default: return ARENA + rnd() % ARENA_SIZE;
    }
}

static void fill_arena(void)
{
    /* Descriptors that are mostly plausible: 16 bytes of address, length, flags, next. */
    for (u32 a = ARENA; a < ARENA + ARENA_SIZE; a += 16) {
        *(volatile u64 *)a = some_address();
        *(volatile u32 *)(a + 8) = rnd() % 4 ? rnd() % 8192 : value();
        *(volatile u16 *)(a + 12) = (u16)(rnd() % 4 ? rnd() % 8 : rnd());
        *(volatile u16 *)(a + 14) = (u16)(rnd() % 4 ? rnd() % 256 : rnd());
    }
}

static void device(u32 bdf)
{
    struct where w = { 0, 0, 0, 0 };
    u32 c;

    config_write(bdf, 4, 0x7);
    if (!find(bdf, &w))
        return;
    c = w.common;
    *(volatile u8 *)(c + 0x14) = 0;
    for (int i = 0; i < 1000 && *(volatile u8 *)(c + 0x14); i++)
        ;
    *(volatile u8 *)(c + 0x14) = 3;
    for (u32 word = 0; word < 2; word++) {
        u32 offered;

        *(volatile u32 *)c = word;
        offered = *(volatile u32 *)(c + 4);
        *(volatile u32 *)(c + 8) = word;
        *(volatile u32 *)(c + 12) = word ? (offered & (rnd() | 1)) : offered & rnd();
    }
    *(volatile u8 *)(c + 0x14) = 11;
    fill_arena();
    for (u32 q = 0; q < 8; q++) {
        *(volatile u16 *)(c + 0x16) = (u16)q;
        if (rnd() % 4 == 0)
            *(volatile u16 *)(c + 0x18) = (u16)value();
        *(volatile u64 *)(c + 0x20) = rnd() % 8 ? ALIGN(some_address()) : some_address();
        *(volatile u64 *)(c + 0x28) = rnd() % 8 ? ALIGN(some_address()) : some_address();
        *(volatile u64 *)(c + 0x30) = rnd() % 8 ? ALIGN(some_address()) : some_address();
        *(volatile u16 *)(c + 0x1c) = 1;
    }
    *(volatile u8 *)(c + 0x14) = 15;
    for (int i = 0; i < 200; i++) {
        if (rnd() % 16 == 0)
            fill_arena();
        *(volatile u32 *)(ARENA + (rnd() % ARENA_SIZE & ~3u)) = value();
        *(volatile u16 *)(w.notify + (rnd() % 8) * w.multiplier) = (u16)(rnd() % 8);
        if (rnd() % 32 == 0)
            one_mmio(c + rnd() % 0x40);
        if (rnd() % 32 == 0 && w.device)
            one_mmio(w.device + rnd() % 64);
    }
}

static void virtq(void)
{
    for (u32 d = 1; d < 32; d++)
        if ((config_read(d << 3, 0) & 0xffff) == 0x1af4)
            device(d << 3);
}

static int has(const char *s, const char *word)
{
    for (; *s; s++) {
        int i = 0;

        while (word[i] && s[i] == word[i])
            i++;
        if (!word[i])
            return 1;
    }
    return 0;
}

void chaos(const u8 *start_info);
void chaos(const u8 *start_info)
{
    const char *cmdline = (const char *)*(const u32 *)(start_info + 24);
    u32 lo, hi;

    __asm__ volatile("rdtsc" : "=a"(lo), "=d"(hi));
    state = ((u64)hi << 32 | lo) | 1;
    for (const char *s = cmdline; *s; s++)
        if (s[0] == 's' && s[1] == 'e' && s[2] == 'e' && s[3] == 'd' && s[4] == '=')
            for (state = 88172645463325252ull, s += 5; *s >= '0' && *s <= '9'; s++)
                state = state * 10 + (u32)(*s - '0') + 1;
    say("chaos: ");
    say(cmdline);
    say("\n");
    for (;;) {
        if (has(cmdline, "virtq") || has(cmdline, "all"))
            virtq();
        if (has(cmdline, "ports") || has(cmdline, "all"))
            ports();
        if (has(cmdline, "mmio") || has(cmdline, "all"))
            mmio();
    }
}
