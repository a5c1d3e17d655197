/* doppel exec and doppel cp: commands and files in VMs that run. Each is given the words behind its name and returns the exit status. */
#pragma once

#include "ctl/options.h"

extern const struct option exec_option_table[], cp_option_table[];
extern const unsigned exec_option_rows, cp_option_rows;

int exec_main(int argc, char **argv);
int cp_main(int argc, char **argv);
