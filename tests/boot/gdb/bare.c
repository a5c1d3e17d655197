/* A guest for gdb.sh: no operating system, 32-bit code entered by PVH, with debug information. */
typedef unsigned u32;

volatile u32 watched, sum;
volatile u32 increment = 1;

static void out(unsigned short port, u32 val)
{
    __asm__ volatile("outl %0, %1" : : "a"(val), "Nd"(port));
}

__attribute__((noinline)) u32 add(u32 a, u32 b)
{
    u32 result = a + b;
    sum = result;
    return result;
}

__attribute__((noinline)) u32 work(u32 rounds)
{
    u32 total = 0;
    for (u32 i = 0; i < rounds; i++)
        total = add(total, i);
    watched = total;
    watched += increment;
    return total;
}

__attribute__((noinline)) void spin(void)
{
    while (increment == 1)
        __asm__ volatile("rep movsb" : : "S"(0x9000), "D"(0xa000), "c"(16) : "memory");
}

__attribute__((used)) void kernel_main(void)
{
    u32 total = work(5);
    spin();
    out(0xf4, total + increment);                                  /* ends doppel with (v << 1) | 1 */
    for (;;)
        __asm__ volatile("cli; hlt");
}

/* XEN_ELFNOTE_PHYS32_ENTRY, 18 */
__asm__(".section .note.pvh, \"a\", @note\n"
        ".long 4, 4, 18\n.asciz \"Xen\"\n.long start\n"
        ".text\n.globl start\nstart:\n"
        "mov $0x200000, %esp\nxor %ebp, %ebp\ncall kernel_main\n");
