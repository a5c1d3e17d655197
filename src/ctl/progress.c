/* Bars and lines of progress (progress.h). */
#include "ctl/progress.h"

#include <string.h>
#include <time.h>
#include <unistd.h>

#include "ctl/message.h"
#include "ctl/terminal.h"

#define BAR 24

static s64 now_ms(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (s64)t.tv_sec * 1000 + t.tv_nsec / 1000000;
}

static void erase(struct progress *p)
{
    if (p->bar && p->shown >= 0)
        fprintf(stderr, "\r\033[K");
    p->shown = -1;
}

static void draw(struct progress *p)
{
    int permille = p->of ? (int)(MIN(p->done, p->of) * 1000 / p->of) : 0;
    unsigned full = (unsigned)permille * BAR / 1000;
    char bar[BAR + 1];
    if (!p->bar || !p->phase[0] || permille == p->shown)
        return;
    for (unsigned i = 0; i < BAR; i++)
        bar[i] = i < full ? '#' : '.';
    bar[BAR] = '\0';
    if (p->of)
        fprintf(stderr, "\r\033[K[%s] %3d %% %.40s", bar, permille / 10, p->phase);
    else
        fprintf(stderr, "\r\033[K[%s]       %.40s", bar, p->phase);
    fflush(stderr);
    p->shown = permille;
}

static void end_phase(struct progress *p)
{
    erase(p);
    if (p->phase[0] && p->bar)
        message_error("%s: %.1f s", p->phase, (double)(now_ms() - p->began_ms) / 1000);
}

void progress_begin(struct progress *p)
{
    u16 columns, rows;
    *p = (struct progress){.shown = -1, .bar = isatty(STDERR_FILENO) && terminal_size(STDERR_FILENO, &columns, &rows) && columns >= 80};
}

void progress_phase(struct progress *p, const char *phase)
{
    end_phase(p);
    snprintf(p->phase, sizeof(p->phase), "%s", phase);
    p->done = p->of = 0;
    p->began_ms = now_ms();
    if (p->bar)
        draw(p);
    else
        message_error("%s", p->phase);
}

void progress_part(struct progress *p, u64 done, u64 of)
{
    p->done = done;
    p->of = of;
    draw(p);
}

void progress_text(struct progress *p, const char *line)
{
    erase(p);
    message_error("%s", line);
    draw(p);
}

void progress_end(struct progress *p)
{
    end_phase(p);
    p->phase[0] = '\0';
}
