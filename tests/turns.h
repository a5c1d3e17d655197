/* For tests of what runs on an event loop: lets it do what is posted, what that posts in turn, and see to descriptors. */
#pragma once

#include "base/err.h"
#include "base/loop.h"

static inline void end_of_turn(void *loop)
{
    loop_stop(loop);
}

static inline void turns(struct loop *loop, int n)
{
    while (n--) {
        loop_post(loop, end_of_turn, loop);
        bug_on(loop_run(loop) < 0);
    }
}
