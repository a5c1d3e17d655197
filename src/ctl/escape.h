/*
 * Ctrl-A, the key that talks to doppel and not to the guest, as a state machine over the bytes of a terminal.
 *
 * Ctrl-A X quits, C opens or closes the monitor prompt, H (or ?) helps, A or Ctrl-A sends one Ctrl-A to the guest.
 * Capitals, small letters and Ctrl with the letter are alike. Ctrl-A and any other key go to the guest as they are.
 */
#pragma once

#include "base/types.h"

#define ESCAPE_KEY 0x01                                            /* Ctrl-A */

enum escape_action { ESCAPE_NONE, ESCAPE_QUIT, ESCAPE_MONITOR, ESCAPE_HELP };

struct escape {
    bool pending;                                                  /* Ctrl-A was the last byte */
};

/* Takes a byte. guest[0..*n) is what the guest gets, up to two bytes. */
enum escape_action escape_byte(struct escape *e, u8 byte, u8 guest[2], unsigned *n);

extern const char escape_help[];                                   /* one line */
