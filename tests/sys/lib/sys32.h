/* 32-bit part of the library: included by sys.h. */
#pragma once

#define TRY(insns)                                                                                                  \
    "movl $-1, trap\n\tmovl $0, trap+4\n\tmovl %%esp, trap_sp\n\tmovl $9991f, trap_fix\n\t" insns "\n9991:\tmovl $0, %%cs:trap_fix\n\t"
