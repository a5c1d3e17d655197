/*
 * Exceptions: names, error codes and the double-fault table (SDM vol. 3A 6.3.1, 6.15). No state.
 */
#include "cpu/trap.h"

#define ROW(r)                                                                                                         \
    "vector 0x" #r "0", "vector 0x" #r "1", "vector 0x" #r "2", "vector 0x" #r "3", "vector 0x" #r "4",                \
        "vector 0x" #r "5", "vector 0x" #r "6", "vector 0x" #r "7", "vector 0x" #r "8", "vector 0x" #r "9",            \
        "vector 0x" #r "a", "vector 0x" #r "b", "vector 0x" #r "c", "vector 0x" #r "d", "vector 0x" #r "e",            \
        "vector 0x" #r "f"

const char *trap_name(unsigned vector)
{
    static const char *const named[] = {
        [VEC_DE] = "#DE", [VEC_DB] = "#DB", [VEC_NMI] = "NMI", [VEC_BP] = "#BP",   [VEC_OF] = "#OF", [VEC_BR] = "#BR",
        [VEC_UD] = "#UD", [VEC_NM] = "#NM", [VEC_DF] = "#DF",  [VEC_CSO] = "#CSO", [VEC_TS] = "#TS", [VEC_NP] = "#NP",
        [VEC_SS] = "#SS", [VEC_GP] = "#GP", [VEC_PF] = "#PF",  [VEC_MF] = "#MF",   [VEC_AC] = "#AC", [VEC_MC] = "#MC",
        [VEC_XM] = "#XM", [VEC_VE] = "#VE", [VEC_CP] = "#CP",
    };
    static const char *const numbered[] = {
        ROW(0), ROW(1), ROW(2), ROW(3), ROW(4), ROW(5), ROW(6), ROW(7),
        ROW(8), ROW(9), ROW(a), ROW(b), ROW(c), ROW(d), ROW(e), ROW(f),
    };
    if (vector < ARRAY_SIZE(named) && named[vector])
        return named[vector];
    return vector < ARRAY_SIZE(numbered) ? numbered[vector] : "no vector";
}

bool trap_has_error(unsigned vector)
{
    const u32 with = 1u << VEC_DF | 1u << VEC_TS | 1u << VEC_NP | 1u << VEC_SS | 1u << VEC_GP | 1u << VEC_PF |
                     1u << VEC_AC | 1u << VEC_CP;
    return vector < 32 && with >> vector & 1;
}

static bool contributory(unsigned vector)
{
    const u32 set = 1u << VEC_DE | 1u << VEC_TS | 1u << VEC_NP | 1u << VEC_SS | 1u << VEC_GP | 1u << VEC_CP;
    return vector < 32 && set >> vector & 1;
}

static bool page_fault(unsigned vector)
{
    return vector == VEC_PF || vector == VEC_VE;
}

enum trap_pair trap_combine(unsigned first, unsigned second)
{
    bool bad = contributory(second) || page_fault(second);
    if (first == VEC_DF)
        return bad ? TRAP_TRIPLE : TRAP_SERIAL;
    if (page_fault(first))
        return bad ? TRAP_DOUBLE : TRAP_SERIAL;
    if (contributory(first))
        return contributory(second) ? TRAP_DOUBLE : TRAP_SERIAL;
    return TRAP_SERIAL;
}
