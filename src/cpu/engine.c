/* The list of engines. */
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
