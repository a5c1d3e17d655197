/* Exceptions: vectors, classes and error codes (SDM vol. 3A 6.3, 6.15, table 6-5). Pure facts, shared by the engines. */
#pragma once

#include "base/types.h"

enum vector {
    VEC_DE, VEC_DB, VEC_NMI, VEC_BP, VEC_OF, VEC_BR, VEC_UD, VEC_NM, VEC_DF, VEC_CSO, VEC_TS, VEC_NP, VEC_SS, VEC_GP, VEC_PF,
    VEC_MF = 16, VEC_AC, VEC_MC, VEC_XM, VEC_VE, VEC_CP,
};

const char *trap_name(unsigned vector);                            /* "#PF", or "vector 0x20" kinds: never NULL */
bool trap_has_error(unsigned vector);

/* SDM vol. 3A table 6-5: what comes of a second exception while the first is delivered. */
enum trap_pair { TRAP_SERIAL, TRAP_DOUBLE, TRAP_TRIPLE };
enum trap_pair trap_combine(unsigned first, unsigned second);
