/* Commands for VMs that run: doppel ps, resume, kill, rm. Each is given the words behind its name and returns the exit status. */
#pragma once

#include "ctl/instance.h"
#include "ctl/options.h"

extern const struct option kill_option_table[];
extern const unsigned kill_option_rows;

int ps_main(int argc, char **argv);
int resume_main(int argc, char **argv);
int kill_main(int argc, char **argv);
int rm_main(int argc, char **argv);

/*
 * Sends a line to the control socket of a VM and reads the answer (cut at size - 1, ended with NUL), all within so many milliseconds. *pid, if
 * not NULL: its process, also after -ETIMEDOUT. 0, or a negative errno without err().
 */
int vms_ask(const struct instance *i, const char *line, char *answer, size_t size, int timeout_ms, int *pid);
