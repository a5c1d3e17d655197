/* The list of engines, and what machines of all engines do alike. */
#include "cpu/engine.h"

#include <string.h>

static const struct engine *const engines[] = { &interp_engine, &bt_engine, &kvm_engine };

const struct engine *engine_find(const char *name)
{
    for (size_t i = 0; i < ARRAY_SIZE(engines); i++)
        if (!strcmp(engines[i]->name, name))
            return engines[i];
    return NULL;
}

const char *engine_names(void)
{
    return "interp, bt, kvm";
}

int machine_track(struct machine *m, bool on)
{
    int r = ram_track(m->ram, on);

    for (unsigned i = 0; r == 0 && on && m->engine->dirty && i < m->ram->runs; i++)
        r = m->engine->dirty(m, i);                                /* it begins now; what it knows from earlier is forgotten */
    return r < 0 ? r : on ? ram_track(m->ram, true) : 0;
}

int machine_dirty(struct machine *m, unsigned run, u64 *bits)
{
    int r = m->engine->dirty ? m->engine->dirty(m, run) : 0;

    if (r == 0)
        ram_take_dirty(m->ram, run, bits);
    return r;
}
