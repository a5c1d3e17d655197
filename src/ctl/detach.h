/* doppel run --detach: the VM in a process of its own, and the wait for it. */
#pragma once

#include "ctl/run_state.h"

/*
 * Makes the process. In it: returns -1, and what it says goes to whoever waits, for as long as somebody does. In the one that was called: waits,
 * tells the VM's name on standard output, and returns the exit status. The VM's name is claimed already.
 */
int detach(struct run *run);
