/*
 * One virtual machine: its life cycle. Everything of a guest hangs off struct vm; one process may hold many.
 *
 * Threads: the caller owns the loop and runs it; every function here is called on the loop's thread (or before the loop
 * runs), except vm_post_*. vCPUs have a thread each. Devices are built and freed here (by board.c), in the order of the
 * board's table.
 *
 *          vm_new            vm_start              vm_pause
 *   (none) ------> VM_BUILT ---------> VM_RUNNING <=========> VM_PAUSED
 *                                        |   ^     vm_resume
 *                     guest or user ends |   | vm_reset, guest reset
 *                                        v   |
 *                                      VM_ENDED  -- config.ended() is called once, then vm_free
 */
#pragma once

#include "back/net_user.h"
#include "base/clock.h"
#include "base/err.h"
#include "base/loop.h"
#include "back/block.h"
#include "base/trace.h"
#include "cpu/engine.h"

struct chardev;
struct vsock_host;
struct vport_ops;
struct vport;

struct vm_disk {
    struct block_config block;
    bool nvme;                                                     /* an NVMe controller of its own; else virtio */
    const char *serial;                                            /* 1 to VM_DISK_SERIAL_MAX characters; NULL: "disk" and its number */
    bool full_is_error;                                            /* no room on the host is an I/O error; else the machine is paused */
};

/* A folder of the host, shared with the guest. */
struct vm_share {
    const char *path;
    const char *tag;                                               /* by which the guest mounts it: 1 to VM_SHARE_TAG_MAX bytes */
    bool readonly;
    bool owners;                                                   /* 9p.h; 9p only */
    bool virtiofs;                                                 /* by virtio-fs, else by 9p */
};

enum vm_net_kind { VM_NET_USER, VM_NET_TAP, VM_NET_FD, VM_NET_PASST };

/* A network card and where it is connected. */
struct vm_net {
    enum vm_net_kind kind;
    const char *name;                                              /* of the tap device; path of passt's socket */
    int fd[NET_QUEUES_MAX];                                        /* of a tap device; they stay the caller's */
    unsigned fds;
    bool restricted;                                               /* user: nothing but what is published */
    bool plain;                                                    /* a card without offloads */
    bool has_mac;
    u8 mac[NET_MAC];                                               /* without has_mac: one is made (vm/nic.c) */
    u16 mtu;                                                       /* 0: nothing is said to the guest */
    unsigned queues;                                               /* pairs; 0: one for each vCPU */
};

/* A named port of the virtio console (dev/virtio_console.h says what the callbacks may do). */
struct vm_port {
    const char *name;
    const struct vport_ops *ops;
    void *arg;
};

enum vm_end {
    VM_END_POWEROFF,      /* the guest powered off (ACPI S5) */
    VM_END_RESET,         /* the guest reset itself and config.no_reboot is set */
    VM_END_RESET_LOOP,    /* it did so again and again, each time soon after its start */
    VM_END_PANIC,         /* pvpanic */
    VM_END_TRIPLE_FAULT,  /* the CPU's state is in vm_result.x86 */
    VM_END_DEBUG_EXIT,    /* the guest wrote to the debug exit port; vm_result.value says what */
    VM_END_QUIT,          /* vm_quit() */
    VM_END_HOST_ERROR,    /* vm_result.message says what */
};

struct vm_result {
    enum vm_end end;
    unsigned vcpu;                 /* which one shut down, for VM_END_TRIPLE_FAULT */
    const struct x86 *x86;         /* its state, else NULL */
    const char *message;           /* for VM_END_HOST_ERROR, else "" */
    u32 value;                     /* for VM_END_DEBUG_EXIT */
};

struct vm_config {
    const struct engine *engine;
    /* the guest's processor is one that this engine can carry, too; may be NULL */
    const struct engine *also;
    unsigned vcpus;                                                /* 1..VM_VCPUS_MAX */
    const char *cpuid;                                             /* for cpuid_change(), or NULL */
    u64 memory_bytes;                                              /* VM_MEMORY_MIN.., multiple of 1 MiB */
    const char *firmware;                                          /* NULL: doppel loads the kernel itself */
    const char *kernel, *initrd, *cmdline;                         /* initrd and cmdline may be NULL */
    const struct vm_disk *disk;
    unsigned disks;                                                /* up to VM_DISKS_MAX */
    const struct vm_share *share;
    unsigned shares;                                               /* up to VM_SHARES_MAX */
    const struct vm_net *net;
    unsigned nets;                                                 /* up to VM_NETS_MAX */
    const struct net_publish *publish;                             /* ports of the first user network */
    unsigned publishes;
    const char *capture;                                           /* file for what the cards send and receive, or NULL */
    struct chardev *serial;                                        /* COM1; borrowed; NULL: nothing is attached */
    const struct vm_port *port;
    /* of the virtio console; 0: the board has no virtio console */
    unsigned ports;
    struct vsock_host *vsock;                                      /* the board has a virtio vsock; borrowed; NULL: it has none */
    bool virtio_modern;                                            /* without the legacy registers and identity */
    bool virtio_split;                                             /* without packed rings */
    bool no_reboot;
    bool start_paused;                                             /* vm_start() leaves it VM_PAUSED */
    /* the board has a debug exit port and a debug console */
    bool debug_exit;
    struct machine_tools tools;
    bool sample;                                                   /* statistics tell where time goes */
    struct trace trace;                                            /* clock is filled in by vm_new; mask may be 0 */
    const struct log *log;
    struct loop *loop;
    /* loop's thread; all vCPUs stand still, disks are flushed */
    void (*ended)(void *arg, const struct vm_result *r);
    void *ended_arg;
    void (*resumed)(void *arg);                                    /* loop's thread, after vm_resume(); with ended_arg */
};

#define VM_VCPUS_MAX 64
#define VM_DISKS_MAX 16
#define VM_DISK_SERIAL_MAX 20
#define VM_NETS_MAX 8
#define VM_SHARES_MAX 4
#define VM_SHARE_TAG_MAX 36
#define VM_MEMORY_MIN (4 * MiB)
#define VM_MEMORY_MAX (1024 * GiB)

enum vm_state { VM_BUILT, VM_RUNNING, VM_PAUSED, VM_ENDED };
struct vm;

/* Builds RAM, devices and vCPUs and loads the boot image. 0, or a negative errno with err(): every bad kernel,
    disk or size ends here. Copies *config
 * (but borrows the strings, chardevs and ports until vm_free). */
int vm_new(const struct vm_config *config, struct vm **out);
void vm_free(struct vm *vm);                                       /* stops the vCPUs first if need be; NULL is fine */

int vm_start(struct vm *vm);
void vm_pause(struct vm *vm);                                      /* vCPUs stand still, guest time stands still */
void vm_resume(struct vm *vm);
/* as the reset button: devices, vCPUs, boot image again */
int vm_reset(struct vm *vm);
int vm_resize_disk(struct vm *vm, unsigned n, u64 size);           /* size 0: as large as the host has it; err() */
void vm_power_button(struct vm *vm);
void vm_quit(struct vm *vm);                                       /* ends with VM_END_QUIT */

/*
 * Goes on with the same guest on another engine: config.also, or back on config.engine. Paused or running it stays so.
 * After an error, with err(), the guest is where it was.
 */
int vm_switch_engine(struct vm *vm, const struct engine *engine);

enum vm_state vm_state(const struct vm *vm);
const char *vm_state_name(enum vm_state s);
bool vm_waits_for_room(const struct vm *vm);                       /* paused, as the host had no room for what the guest wrote */
struct trace *vm_trace(struct vm *vm);                             /* the monitor prompt changes its mask and file */
struct vport *vm_port(struct vm *vm, unsigned n);                  /* config.port[n]'s device end */
struct clock *vm_clock(struct vm *vm);
struct machine *vm_machine(struct vm *vm);                         /* for vm/debug.c */
/* for the monitor prompt: state, memory, devices, vCPUs with registers */
void vm_info(struct vm *vm, FILE *f);
void vm_info_disks(struct vm *vm, FILE *f);                        /* the lines on disks alone */
/* instructions retired by all vCPUs (engines that count them) */
u64 vm_insns(const struct vm *vm);
/* The name of what is handled for the guest, and how often it was, by all vCPUs. NULL: what is none. */
const char *vm_count(const struct vm *vm, unsigned what, u64 *n);
u64 vm_counted(const struct vm *vm, enum vcpu_counted what);        /* by all vCPUs */
/* With machine_tools.profile, when the VM has ended: what was sampled, with names (vm/profile.h). 0 or a negative errno with err(). */
int vm_profile(struct vm *vm, const char *map, FILE *f);
/* Card n's link, as if the cable were pulled or put back; -ENOENT with err(). */
int vm_set_link(struct vm *vm, unsigned n, bool up);
/* All statistics, as text or JSON. */
void vm_stats(struct vm *vm, FILE *f, bool json);

/* From any thread, device locks held or not: the vCPUs are told to stand still at once, the loop's thread does the
   rest. */
void vm_post_end(struct vm *vm, enum vm_end end);
void vm_post_reset(struct vm *vm);
void vm_post_host_error(struct vm *vm, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
