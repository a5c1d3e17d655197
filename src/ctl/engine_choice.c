/* The choice of --engine auto (engine_choice.h). KVM and the binary translator will be asked here, best first, once they exist. */
#include "ctl/engine_choice.h"

const struct engine *engine_choose(char *reason, size_t size)
{
    snprintf(reason, size, "the only engine of doppel " DOPPEL_VERSION "; needs nothing from the host");
    return &interp_engine;
}
