/* What `doppel run` was asked to do: the table of its options, and what they set. */
#pragma once

#include "ctl/net_options.h"
#include "ctl/options.h"
#include "vm/vm.h"

enum console_kind { CONSOLE_DEFAULT, CONSOLE_STDIO, CONSOLE_NONE, CONSOLE_FILE, CONSOLE_UNIX };

struct run_options {
    const char *engine;                                            /* "auto" or an engine's name */
    unsigned cpus;
    enum machine_mmu mmu;
    const char *cpuid;                                             /* NULL: all features */
    u64 memory_bytes;
    const char *image;                                             /* the name of one that is booted; NULL: none */
    const char *keep, *seed;                                       /* of that image; NULL: not given */
    const char *firmware, *kernel, *initrd, *append;               /* NULL: not given */
    struct vm_disk disk[VM_DISKS_MAX];
    unsigned disks;
    struct vm_share share[VM_SHARES_MAX];
    unsigned shares;
    const char *root;                                              /* folder for the shell or the command; NULL: the default guest's own */
    struct net_options net;
    const char *capture;                                           /* NULL: none */
    enum console_kind console;
    const char *console_path;                                      /* of CONSOLE_FILE and CONSOLE_UNIX */
    bool no_reboot, virtio_modern, virtio_split, debug_exit, quiet, verbose;
    const char *name, *vsock;                                      /* NULL: not given */
    bool detach;
    unsigned detach_seconds;                                       /* how long exec is waited for; 0: not at all */
    u16 gdb_port;                                                  /* 0 with gdb_path, and without --gdb */
    const char *gdb_path;
    bool gdb_wait, gdb_i386;
    u32 trace_mask;
    const char *trace_file;                                        /* NULL: standard error */
    bool check, stats, stats_json;
    const char *profile_file, *profile_symbols;                    /* NULL: no profile; symbols from the guest's memory */
    const char *stats_file;                                        /* NULL: standard error */
    const char *status_file;
    /* NULL-terminated words behind "--"; NULL: a shell */
    char **command;
};

extern const struct option run_option_table[];
extern const unsigned run_option_rows;

/*
 * Fills *o from the words behind `doppel run`, which are borrowed and may be cut up. After an error, what had been
 * parsed by then is set, and --status-file wherever it stands.
 */
int run_options_parse(struct run_options *o, int argc, char **argv);
