/* Ctrl-A and what follows it (escape.h). No state but the caller's. */
#include "ctl/escape.h"

const char escape_help[] = "Ctrl-A then: X quit, C monitor prompt, A (or Ctrl-A) sends Ctrl-A, H this help";

enum escape_action escape_byte(struct escape *e, u8 byte, u8 guest[2], unsigned *n)
{
    *n = 0;
    if (!e->pending) {
        e->pending = byte == ESCAPE_KEY;
        if (!e->pending)
            guest[(*n)++] = byte;
        return ESCAPE_NONE;
    }
    e->pending = false;
    switch (byte) {
    case 'x': case 'X': case 'X' & 0x1f:
        return ESCAPE_QUIT;
    case 'c': case 'C': case 'C' & 0x1f:
        return ESCAPE_MONITOR;
    case 'h': case 'H': case 'H' & 0x1f: case '?':
        return ESCAPE_HELP;
    case 'a': case 'A': case ESCAPE_KEY:
        guest[(*n)++] = ESCAPE_KEY;
        return ESCAPE_NONE;
    default:
        guest[(*n)++] = ESCAPE_KEY;
        guest[(*n)++] = byte;
        return ESCAPE_NONE;
    }
}
