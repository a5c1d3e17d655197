/*
 * Line editing (line_edit.h). Bytes above 0x7f are taken as they come; a character of several bytes takes as many
 * backspaces on the screen.
 */
#include "ctl/line_edit.h"

#include <string.h>

#define CTRL(c) ((c) & 0x1f)

static void show(char *echo, unsigned *n, const char *s)
{
    size_t len = strlen(s);
    memcpy(echo + *n, s, len);
    *n += (unsigned)len;
}

static void take_back(struct line_edit *e, unsigned count, char *echo, unsigned *n)
{
    unsigned before = e->len;
    e->len -= MIN(count, before);
    e->text[e->len] = '\0';
    for (unsigned i = e->len; i < before; i++)
        show(echo, n, "\b \b");
}

static unsigned last_word(const struct line_edit *e)
{
    unsigned i = e->len;
    while (i && e->text[i - 1] == ' ')
        i--;
    while (i && e->text[i - 1] != ' ')
        i--;
    return e->len - i;
}

/* CSI sequences end with a byte from 0x40 on (ECMA-48 5.4); others have one byte after ESC. */
static bool skip_key(struct line_edit *e, u8 byte)
{
    switch (e->key) {
    case KEY_PLAIN:
        if (byte == 0x1b)
            e->key = KEY_ESC;
        return byte == 0x1b;
    case KEY_ESC:
        e->key = byte == '[' || byte == 'O' ? KEY_SEQUENCE : KEY_PLAIN;
        return true;
    case KEY_SEQUENCE:
        if (byte >= 0x40)
            e->key = KEY_PLAIN;
        return true;
    }
    return false;
}

enum line_event line_edit_byte(struct line_edit *e, u8 byte, char *echo, unsigned *n)
{
    *n = 0;
    if (e->done) {
        e->done = false;
        e->len = 0;
        e->text[0] = '\0';
    }
    if (skip_key(e, byte))
        return LINE_MORE;
    switch (byte) {
    case '\r': case '\n':
        e->done = true;
        show(echo, n, "\r\n");
        return LINE_DONE;
    case CTRL('D'):
        return e->len ? LINE_MORE : LINE_END;
    case '\b': case 0x7f:
        take_back(e, 1, echo, n);
        return LINE_MORE;
    case CTRL('U'): case CTRL('C'):
        take_back(e, e->len, echo, n);
        return LINE_MORE;
    case CTRL('W'):
        take_back(e, last_word(e), echo, n);
        return LINE_MORE;
    }
    if (byte >= 0x20 && e->len + 1 < sizeof(e->text)) {
        e->text[e->len++] = (char)byte;
        e->text[e->len] = '\0';
        echo[(*n)++] = (char)byte;
    }
    return LINE_MORE;
}
