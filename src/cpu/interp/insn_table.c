/* The one table of instructions: mnemonic to binder, from the lists of the three families. Mnemonics without a row go to fp_bind() (decode.c). */
#include "cpu/interp/code.h"
#include "cpu/interp/fp.h"
#include "cpu/interp/ops.h"
#include "cpu/interp/sys.h"

#define INSN(mnemonic, binder, argument) [ZYDIS_MNEMONIC_##mnemonic] = { binder, argument },
static const struct insn table[ZYDIS_MNEMONIC_MAX_VALUE + 1] = {
#include "cpu/interp/insn_int.def"
#include "cpu/interp/insn_sys.def"
#include "cpu/interp/insn_fp.def"
};
#undef INSN

const struct insn *insn_row(ZydisMnemonic m)
{
    return &table[m];
}
