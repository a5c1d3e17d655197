/*
 * The translator's code arena and its common routines: in, out, handler calls. Register conventions: bt.h.
 */
#include <errno.h>

#include "base/codemem.h"
#include "base/err.h"
#include "cpu/bt/tr.h"

static const u8 held[] = { RAX, RCX, RDX, RBX, RBP, RSI, RDI, 8, 9, 10, 11, 12, 13 };

/* The guest's registers to icpu; RSP becomes the host's. RAX, RFLAGS are lost. */
static void spill(struct emit *e)
{
    for (unsigned i = 0; i < sizeof held; i++)
        op_gs(e, true, X_STORE, held[i], OFF_R(held[i]));
    PUT(e, 0x9f, 0x0f, 0x90, 0xc0, 0x0f, 0xb7, 0xc0);              /* lahf; seto al; movzx eax, ax */
    op_gs(e, false, X_STORE, RAX, OFF(fl));
    lea(e, RAX, RSP, 0);
    op_gs(e, true, X_ADD, RAX, OFF(bt.nbias));
    op_gs(e, true, X_STORE, RAX, OFF_R(RSP));
    op_gs(e, true, X_LOAD, RSP, OFF(bt.host_rsp));
}

static void fill(struct emit *e)
{
    op_gs(e, true, X_LOAD, RSP, OFF_R(RSP));
    op_gs(e, true, X_ADD, RSP, OFF(bt.bias));
    op_gs(e, false, X_LOAD, RAX, OFF(fl));
    PUT(e, 0x04, 0x7f, 0x9e);                                      /* add al, 0x7f (overflows if bit 0 is set); sahf */
    for (unsigned i = 0; i < sizeof held; i++)
        op_gs(e, true, X_LOAD, held[i], OFF_R(held[i]));
    op_gs(e, true, X_LOAD, S0, OFF(bt.kept));
}

/* Where it begins. From there on, until the code is entered, all is in icpu, and fault.c may go back. */
static u8 *put_stop_check(struct emit *e)
{
    u8 *begin = e->p;
    op_gs(e, false, 0x83, 7, OFF(bt.stop));                        /* cmp dword [stop], 0 */
    put8(e, 0);
    return begin;
}

/* The way back to C, with EAX as result. */
static void put_return(struct emit *e)
{
    PUT(e, 0x48, 0x83, 0xc4, 8, 0x41, 0x5f, 0x41, 0x5e, 0x41, 0x5d, 0x41, 0x5c, 0x5d, 0x5b, 0xc3); /* add rsp, 8; pop r15..r12, rbp, rbx; ret */
}

/* Callee-saved registers of the System V ABI; the stack is aligned in between. */
static void put_enter(struct emit *e, struct bt *t)
{
    PUT(e, 0x53, 0x55, 0x41, 0x54, 0x41, 0x55, 0x41, 0x56, 0x41, 0x57, 0x48, 0x83, 0xec, 8); /* push rbx rbp r12..r15; sub rsp, 8 */
    op_gs(e, true, X_STORE, RSP, OFF(bt.host_rsp));
    mov_rr(e, S1, RDI);
    mov_imm64(e, RAX, BT_EXIT_STOP);
    t->restart[0].from = (u32)(put_stop_check(e) - t->rw);
    u8 *stop = jump_if(e, CC_NZ);
    fill(e);
    PUT(e, 0x41, 0xff, 0xe7);                                      /* jmp r15 */
    t->restart[0].to = (u32)(e->p - t->rw);
    aim(stop, e->p);
    put_return(e);
}

/* Jumped to with the site in S1 and the place to go on in S0; a light call has its function in icpu.bt.tmp[5]. */
static void put_op(struct emit *e, struct bt *t, uintptr_t function, bool light)
{
    op_gs(e, true, X_STORE, S0, OFF(bt.resume));
    spill(e);
    op_gs(e, true, X_LOAD, RDI, OFF(bt.self));
    op_rr(e, false, X_STORE, S1, RSI);
    if (light)
        op_gs(e, true, X_LOAD, RDX, OFF(bt.tmp[5]));
    mov_imm64(e, RAX, function);
    PUT(e, 0xff, 0xd0, 0x85, 0xc0);                                /* call rax; test eax, eax */
    u8 *leave = jump_if(e, CC_NZ);
    mov_imm64(e, RAX, BT_EXIT_STOP);
    t->restart[1 + light].from = (u32)(put_stop_check(e) - t->rw);
    u8 *stop = jump_if(e, CC_NZ);
    fill(e);
    op_gs(e, true, X_LOAD, S1, OFF(rip));                          /* where it is an entry */
    op_gs(e, false, 0xff, 4, OFF(bt.resume));                      /* jmp [resume] */
    t->restart[1 + light].to = (u32)(e->p - t->rw);
    aim(leave, e->p);
    aim(stop, e->p);
    put_return(e);
}

static void put_leave(struct emit *e, int result)
{
    spill(e);
    mov_imm64(e, RAX, (u64)result);
    put_return(e);
}

/*
 * Jumped to with the target in S1, from an entry of icpu.bt.jump that leads nowhere or to another target: the larger table, whose answer is put into the
 * smaller one. Flags are kept.
 */
static void put_lookup(struct emit *e, unsigned key, const u8 *miss)
{
    put_pext_gs(e, S0, S1, OFF(bt.mask_target));
    op_mem(e, true, X_LEA, S0, S0, S0, 0, 0);
    op_gs(e, true, X_STORE, RCX, OFF(bt.tmp[6]));
    op_gs(e, true, X_LOAD, RCX, OFF(bt.target[0]) + key * sizeof(void *));
    op_mem(e, true, X_LEA, S0, RCX, S0, 3, 0);
    op_mem(e, true, X_LOAD, RCX, S0, NO_REG, 0, offsetof(struct bt_target, la));
    PUT(e, 0x48, 0xf7, 0xd1);                                      /* not rcx */
    op_mem(e, true, X_LEA, RCX, RCX, S1, 0, 1);
    PUT(e, 0xe3, 9 + 5);                                           /* jrcxz, over the next two */
    const u8 *p = e->p;
    op_gs(e, true, X_LOAD, RCX, OFF(bt.tmp[6]));
    jump_to(e, miss);
    bug_on(e->p != p + 9 + 5);
    op_mem(e, true, X_LOAD, RCX, S0, NO_REG, 0, offsetof(struct bt_target, entry));
    put_pext_gs(e, S0, S1, OFF(bt.mask_jump));
    op_gs_index(e, true, X_STORE, RCX, S0, OFF(bt.jump[0][0]) + key * sizeof(((struct icpu *)0)->bt.jump[0]));
    op_gs(e, true, X_LOAD, RCX, OFF(bt.tmp[6]));
    op_gs_index(e, false, 0xff, 4, S0, OFF(bt.jump[0][0]) + key * sizeof(((struct icpu *)0)->bt.jump[0]));
}

static void routines(struct bt *t)
{
    struct emit e = { t->rw, t->rw + 4096, false };
    put_enter(&e, t);
    t->op = (u32)(e.p - t->rw);
    put_op(&e, t, (uintptr_t)bt_run_op, false);
    t->light = (u32)(e.p - t->rw);
    put_op(&e, t, (uintptr_t)bt_run_light, true);
    t->leave_rip = (u32)(e.p - t->rw);
    op_gs(&e, true, X_STORE, S1, OFF(rip));
    put_leave(&e, BT_EXIT_RIP);
    t->miss = (u32)(e.p - t->rw);
    op_gs(&e, true, X_STORE, S1, OFF(rip));
    put_leave(&e, BT_EXIT_MISS);
    for (unsigned key = 0; key < BT_KEYS; key++) {
        t->lookup[key] = (u32)(e.p - t->rw);
        if (t->bmi2)
            put_lookup(&e, key, t->rw + t->miss);
        else
            jump_to(&e, t->rw + t->miss);
    }
    t->leave_link = (u32)(e.p - t->rw);
    op_gs(&e, false, X_STORE, S1, OFF(bt.exit_link));
    put_leave(&e, BT_EXIT_LINK);
    t->leave_signal = (u32)(e.p - t->rw);                          /* everything is in icpu, RSP and EAX are set */
    put_return(&e);
    bug_on(e.overflow);
    t->first = t->used = 4096;
    t->enter = (int (*)(const u8 *))(void *)t->rx;
}

int bt_arena_open(struct icpu *c, struct bt *t)
{
    if (codemem_map("doppel-bt", BT_ARENA_BYTES, &t->rw, &t->rx) < 0)
        return err(-ENOMEM, "vCPU %u: no executable memory for translated code (%llu MiB); check the memory limit, or SELinux's execmem", c->v->id,
                   BT_ARENA_BYTES / MiB);
    routines(t);
    return 0;
}

void bt_arena_close(struct bt *t)
{
    if (!t->rw)
        return;
    codemem_unmap(t->rw, t->rx, BT_ARENA_BYTES);
}
