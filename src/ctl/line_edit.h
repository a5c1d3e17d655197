/* A line being typed: the simplest editing that does not annoy, as a state machine over the bytes of a terminal. */
#pragma once

#include "base/types.h"

#define LINE_EDIT_MAX 512
#define LINE_EDIT_ECHO (3 * LINE_EDIT_MAX)

enum line_event {
    LINE_MORE,
    /* text holds the line; the next byte begins a new one */
    LINE_DONE,
    LINE_END,                                                      /* Ctrl-D at the beginning of a line */
};

struct line_edit {
    char text[LINE_EDIT_MAX];                                      /* ends with NUL */
    unsigned len;
    bool done;
    /* inside a cursor key's escape sequence, which is skipped */
    enum { KEY_PLAIN, KEY_ESC, KEY_SEQUENCE } key;
};

/*
 * Takes a byte; echo gets what the terminal is to show (*n bytes, at most LINE_EDIT_ECHO). Backspace, Ctrl-W (word),
 * Ctrl-U and Ctrl-C (all) take back.
 */
enum line_event line_edit_byte(struct line_edit *e, u8 byte, char *echo, unsigned *n);
