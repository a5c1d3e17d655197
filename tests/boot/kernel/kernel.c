/*
 * What the multiboot kernel of the tests does in long mode: tells on the debug console what it was given, starts the second
 * processor by INIT and SIPI, says a word on COM1, and ends by the debug exit port with 21 (doppel's status 43), or less
 * when something is wrong.
 */
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long u64;

#define LAPIC 0xfee00000ul

static void out8(u16 port, u8 val) { __asm__ volatile("outb %0, %1" : : "a"(val), "Nd"(port)); }
static u8 in8(u16 port) { u8 v; __asm__ volatile("inb %1, %0" : "=a"(v) : "Nd"(port)); return v; }
static u32 peek(u64 a) { return *(volatile u32 *)a; }
static void poke(u64 a, u32 v) { *(volatile u32 *)a = v; }

static void put(char c)
{
    out8(0xe9, (u8)c);
}

static void print(const char *s)
{
    while (*s)
        put(*s++);
}

static void print_serial(const char *s)
{
    for (; *s; s++) {
        while (!(in8(0x3fd) & 0x20))
            ;
        out8(0x3f8, (u8)*s);
    }
}

static void print_hex(u64 v)
{
    print("0x");
    for (int i = 60; i >= 0; i -= 4)
        if (v >> i || !i)
            put("0123456789abcdef"[v >> i & 15]);
}

static void line(const char *name, u64 v)
{
    print(name);
    print(" ");
    print_hex(v);
    print("\n");
}

static void text(const char *name, u64 s)
{
    print(name);
    print(" ");
    print((const char *)s);
    print("\n");
}

static void end(u8 status)
{
    out8(0xf4, status);
    for (;;)
        __asm__ volatile("hlt");
}

static void module(u32 start, u32 stop, u64 name)
{
    text("module", name);
    line("module size", stop - start);
    line("module first word", peek(start));
}

/* How much usable memory, and how often the entry that holds the kernel was there. */
struct memory { u64 usable, entries; };

static void memory_entry(struct memory *m, u64 base, u64 length, u32 type)
{
    m->entries += type == 1 && base <= 0x200000 && base + length > 0x200000;
    m->usable += type == 1 ? length : 0;
}

static void memory_end(const struct memory *m)
{
    line("usable MiB", m->usable >> 20);
    if (m->entries != 1)
        print("memory map: the kernel is not in it\n");
}

static void info1(u64 i)
{
    struct memory m = { 0, 0 };
    u32 flags = peek(i);

    line("flags", flags);
    line("lower", peek(i + 4));
    text("command line", peek(i + 16));
    text("loader", peek(i + 64));
    if (flags & 8)
        for (u32 n = 0, at = peek(i + 24); n < peek(i + 20); n++, at += 16)
            module(peek(at), peek(at + 4), peek(at + 8));
    for (u32 at = peek(i + 48), stop = at + peek(i + 44); at < stop; at += peek(at) + 4)
        memory_entry(&m, *(volatile u64 *)(u64)(at + 4), *(volatile u64 *)(u64)(at + 12), peek(at + 20));
    memory_end(&m);
    if (flags & 0x20)
        line("section headers", peek(i + 28));
}

static void map2(u64 tag)
{
    struct memory m = { 0, 0 };

    for (u64 at = tag + 16; at < tag + peek(tag + 4); at += peek(tag + 8))
        memory_entry(&m, *(volatile u64 *)at, *(volatile u64 *)(at + 8), peek(at + 16));
    memory_end(&m);
}

static void info2(u64 i)
{
    u64 tag = i + 8, stop = i + peek(i);

    for (; tag < stop && peek(tag); tag += (peek(tag + 4) + 7) & ~7u)
        switch (peek(tag)) {
        case 1: text("command line", tag + 8); break;
        case 2: text("loader", tag + 8); break;
        case 3: module(peek(tag + 8), peek(tag + 12), tag + 16); break;
        case 4: line("lower", peek(tag + 8)); break;
        case 6: map2(tag); break;
        case 9: line("section headers", peek(tag + 8)); break;
        case 15: line("ACPI revision", *(u8 *)(tag + 8 + 15)); break;
        case 21: line("load base", peek(tag + 8)); break;
        }
    if (tag + 8 != stop)
        print("tags do not end where they should\n");
}

extern u8 trampoline[], trampoline_end[];
static volatile u32 second_runs;

void second_main(void)
{
    second_runs = 1 + (peek(LAPIC + 0x20) >> 24);
    for (;;)
        __asm__ volatile("cli; hlt");
}

static void send_ipi(u32 command)
{
    poke(LAPIC + 0x310, 1u << 24);
    poke(LAPIC + 0x300, command);
    while (peek(LAPIC + 0x300) & 1u << 12)
        ;
}

static void start_second(void)
{
    for (u64 n = 0; n < (u64)(trampoline_end - trampoline); n++)
        ((volatile u8 *)0x8000)[n] = trampoline[n];
    poke(LAPIC + 0xf0, 0x1ff);
    send_ipi(0x4500);                                              /* INIT */
    for (volatile int i = 0; i < 100000; i++)
        ;
    send_ipi(0x4608);                                              /* SIPI to 0x8000 */
    for (volatile u64 i = 0; !second_runs && i < 20000000; i++)
        __asm__ volatile("pause");
    if (second_runs)
        line("second processor, APIC", second_runs - 1);
    else
        print("second processor: none\n");
}

void kernel_main(u64 magic, u64 info)
{
    line("magic", magic);
    if (magic == 0x2badb002)
        info1(info);
    else if (magic == 0x36d76289)
        info2(info);
    else
        end(0);
    start_second();
    print_serial("serial line\n");
    end(in8(0xe9) == 0xe9 ? 21 : 2);
}
