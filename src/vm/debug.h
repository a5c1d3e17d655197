/*
 * A virtual machine under a debugger: the VM's side of it, whatever protocol the debugger speaks (ctl/gdb_stub.c).
 *
 * All of it on the loop's thread. The guest is stopped as a whole (all processors, and guest time with them) and goes
 * on as a whole, but single processors may stay behind or take a step. State, memory, breakpoints and watchpoints may
 * only be touched while it stands still; vm_debug_pause() makes that so.
 *
 *   closed --open--> watching --attach--> attached: stops are reported --detach--> watching
 */
#pragma once

#include "base/loop.h"
#include "cpu/debug.h"
#include "cpu/x86.h"
#include "vm/vm.h"

struct vm_debug;

/* stopped: the guest has stopped by itself, and stands still: ask vm_debug_next_stop(). */
int vm_debug_open(struct vm *vm, struct loop *loop, void (*stopped)(void *arg), void *arg, struct vm_debug **out);
void vm_debug_close(struct vm_debug *d);                           /* NULL is fine; before vm_free() */

void vm_debug_attach(struct vm_debug *d);                          /* the guest stands still afterwards */
void vm_debug_detach(struct vm_debug *d);                          /* nothing of the debugger's is left; the guest goes on */

bool vm_debug_running(const struct vm_debug *d);
void vm_debug_pause(struct vm_debug *d);

enum vm_debug_action { VM_DEBUG_STAY, VM_DEBUG_GO, VM_DEBUG_STEP };
/* What a processor is to do next; a step repeats itself while RIP is in [start, end). */
void vm_debug_set_action(struct vm_debug *d, unsigned cpu, enum vm_debug_action a, u64 start, u64 end);
int vm_debug_go(struct vm_debug *d);                               /* 0, or -EOPNOTSUPP: this engine takes no steps */

struct vm_debug_stop {
    unsigned cpu;
    enum debug_stop why;
    u64 la;                                                        /* DEBUG_WATCHED: of the watchpoint */
    u8 access;                                                     /* and what it watches for */
};
/* Takes the next processor's stop that was not taken yet; false: there is none. */
bool vm_debug_next_stop(struct vm_debug *d, struct vm_debug_stop *stop);

unsigned vm_debug_cpus(const struct vm_debug *d);
/* Where component n of the extended state (SDM vol. 1 13.1) lies in x86.xsave; 0: this guest has none such. */
u32 vm_debug_component(const struct vm_debug *d, unsigned n);
int vm_debug_get(struct vm_debug *d, unsigned cpu, struct x86 *x); /* 0 or a negative errno */
int vm_debug_set(struct vm_debug *d, unsigned cpu, const struct x86 *x);
u8 vm_debug_cr8(struct vm_debug *d, unsigned cpu);

enum vm_debug_space { VM_DEBUG_LINEAR, VM_DEBUG_PHYSICAL };
/* How many of n bytes could be copied; linear addresses are those of the processor's present address space. RAM only: devices are not touched. */
size_t vm_debug_read(struct vm_debug *d, unsigned cpu, enum vm_debug_space space, u64 addr, u8 *buf, size_t n);
size_t vm_debug_write(struct vm_debug *d, unsigned cpu, enum vm_debug_space space, u64 addr, const u8 *buf, size_t n);

/* 0, or -ENOSPC: the engine heeds no more of them; -EOPNOTSUPP: none of that kind. */
int vm_debug_add_point(struct vm_debug *d, u64 la);
void vm_debug_del_point(struct vm_debug *d, u64 la);
int vm_debug_add_watch(struct vm_debug *d, const struct debug_watch *w);
void vm_debug_del_watch(struct vm_debug *d, const struct debug_watch *w);
