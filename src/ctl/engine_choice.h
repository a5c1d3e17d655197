/* Which engine `--engine auto` takes on this host, and why: for run and doctor. */
#pragma once

#include "cpu/engine.h"
#include "cpu/probe.h"

/* reason: a few words for the user. Never NULL: there is an engine that works everywhere. */
const struct engine *engine_choose(char *reason, size_t size);
/* The same with another measurement than kvm_probe(): for tests. */
const struct engine *engine_choose_by(void (*probe)(struct probe *), char *reason, size_t size);
