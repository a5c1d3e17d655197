/* Real-mode part of the library: included by sys.h. One segment of 64 KiB at 0 for everything; the stack is below
 * 7C00h. */
#pragma once

#define USER_OFF 0ul
#define TRY(insns)                                                                                                     \
    "movl $-1, trap\n\tmovl $0, trap+4\n\tmovl %%esp, trap_sp\n\tmovl $9991f, trap_fix\n\t" insns                      \
    "\n9991:\tmovl $0, %%ss:trap_fix\n\tmovl %%ss:trap_sp, %%esp\n\t"
void ivt_set(unsigned vector, const void *handler);
void ivt_default(unsigned vector);
