/* Which of the guest's instructions translated code leaves to interp's handlers, by mnemonic: for statistics, counted when machine_tools.handlers asks for it. */
#pragma once

#include "cpu/bt/bt.h"

struct stats;
struct handled;

struct handled *handled_open(void);                                /* NULL: no memory, nothing is counted */
void handled_close(struct handled *h);
void handled_count(struct icpu *c, struct handled *h, const struct tb *tb, const struct op *op);
void handled_report(const struct handled *h, struct stats *s);
