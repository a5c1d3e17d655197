/* Faults of generated code, which arrive as signals: fp_signal.c. */
#pragma once

#include "base/types.h"

/*
 * One open for each arena. The process's handlers are installed when a thread first runs one, not earlier: handlers that the program has installed until then,
 * for crashes, get what is not ours.
 */
void fp_signal_open(void);
void fp_signal_close(const u8 *start);

/*
 * This thread runs code in [start, end): a #XM, #UD or #GP there resumes at start with the vector in RAX. The code must have pushed nothing; start must return
 * to its caller with a clean floating-point environment.
 */
void fp_signal_here(const u8 *start, const u8 *end);
