/*
 * How far something is that takes long, on standard error: a bar on a terminal, a line for each phase elsewhere. One thread.
 */
#pragma once

#include "base/types.h"

struct progress {
    char phase[80];                                                /* "": none yet */
    u64 done, of;                                                  /* of 0: not known */
    s64 began_ms;
    bool bar;                                                      /* standard error is a terminal */
    unsigned columns;
    int shown;                                                     /* permille, as drawn; -1: nothing is drawn */
};

void progress_begin(struct progress *p);
void progress_phase(struct progress *p, const char *phase);        /* ends the one before */
void progress_part(struct progress *p, u64 done, u64 of);
void progress_text(struct progress *p, const char *line);          /* a message of somebody else's, above */
void progress_end(struct progress *p);
