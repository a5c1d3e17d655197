/* A connection with the agent in a VM's guest (agent/protocol.h), for doppel exec and cp. The descriptor blocks. The guest is not trusted. */
#pragma once

#include "../../agent/protocol.h"
#include "ctl/instance.h"

/*
 * Waits for the agent for so long: a guest that boots has none yet. A descriptor, behind the agent's HELLO; or a negative errno with err().
 */
int agent_connect(const struct instance *i, unsigned wait_ms);
/* One attempt. -EAGAIN, without err(): nobody answers (yet). */
int agent_try(const struct instance *i);

bool agent_send(int fd, u32 type, const void *payload, u32 len);
/* A message's head and up to size bytes of its payload; false: the connection broke, or the message is longer. */
bool agent_receive(int fd, struct msg_head *head, void *payload, u32 size);
