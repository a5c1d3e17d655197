/*
 * The translator's code arena and its common routines: in, out, handler calls, look-up of jump targets. Register conventions: bt.h.
 *
 * The arena is mapped twice, so that no page is both writable and executable, where the host allows that.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <sys/mman.h>
#include <unistd.h>

#include "base/err.h"
#include "cpu/bt/bt.h"
#include "cpu/bt/emit.h"

#define OFF(field) offsetof(struct icpu, field)
static const u8 held[] = { RAX, RCX, RDX, RBX, RBP, RSI, RDI, 8, 9, 10, 12, 13 };

static void spill(struct emit *e)
{
    for (unsigned i = 0; i < sizeof held; i++)
        op_gs(e, true, X_STORE, held[i], OFF(r) + 8u * held[i]);
    op_gs(e, true, X_STORE, R11, OFF(r) + 8u * RSP);
}

static void fill(struct emit *e)
{
    for (unsigned i = 0; i < sizeof held; i++)
        op_gs(e, true, X_LOAD, held[i], OFF(r) + 8u * held[i]);
    op_gs(e, true, X_LOAD, R11, OFF(r) + 8u * RSP);
}

/* Callee-saved registers of the System V ABI; the stack is aligned in between. */
static void put_enter(struct emit *e)
{
    PUT(e, 0x53, 0x55, 0x41, 0x54, 0x41, 0x55, 0x41, 0x56, 0x41, 0x57, 0x48, 0x83, 0xec, 8); /* push rbx rbp r12..r15; sub rsp, 8 */
    op_rr(e, true, X_STORE, RDI, R15);
    fill(e);
    PUT(e, 0x41, 0xff, 0xe7);                                      /* jmp r15 */
}

static void put_return(struct emit *e)
{
    PUT(e, 0x48, 0x83, 0xc4, 8, 0x41, 0x5f, 0x41, 0x5e, 0x41, 0x5d, 0x41, 0x5c, 0x5d, 0x5b, 0xc3);
}

/* Called with the op in r15 and its block in r14. */
static void put_handler(struct emit *e)
{
    spill(e);
    PUT(e, 0x48, 0x83, 0xec, 8);
    op_gs(e, true, X_LOAD, RDI, OFF(bt.self));
    op_rr(e, true, X_STORE, R15, RSI);
    op_rr(e, true, X_STORE, R14, RDX);
    mov_imm64(e, RAX, (u64)(uintptr_t)bt_run_op);
    PUT(e, 0xff, 0xd0, 0x48, 0x83, 0xc4, 8, 0x85, 0xc0);           /* call rax; add rsp, 8; test eax, eax */
    u8 *leave = jump_if(e, CC_NZ);
    fill(e);
    put8(e, 0xc3);
    aim(leave, e->p);
    PUT(e, 0x48, 0x83, 0xc4, 8);
    put_return(e);
}

static void put_leave(struct emit *e, int result)
{
    spill(e);
    mov_imm64(e, RAX, (u64)result);
    put_return(e);
}

/* Jumped to with the target in r15. */
static void put_find(struct emit *e, const u8 *leave_rip)
{
    op_gs(e, false, 0x83, 7, OFF(bt.stop));                        /* cmp dword [stop], 0 */
    put8(e, 0);
    jump_if_to(e, CC_NZ, leave_rip);
    op_rr(e, true, X_STORE, R15, R14);
    PUT(e, 0x49, 0xc1, 0xee, BT_JUMP_BITS);                        /* shr r14 */
    op_rr(e, true, 0x31, R15, R14);                                /* xor r14, r15 */
    alu_imm(e, false, 4, R14, (1 << BT_JUMP_BITS) - 1);
    PUT(e, 0x49, 0xc1, 0xe6, 5);                                   /* shl r14, 5 */
    op_gs(e, true, X_ADD, R14, OFF(bt.jump));
    op_mem(e, true, X_CMP, R15, R14, NO_REG, 0, offsetof(struct bt_jump, la));
    jump_if_to(e, CC_NZ, leave_rip);
    op_mem(e, true, X_LOAD, R15, R14, NO_REG, 0, offsetof(struct bt_jump, tag));
    op_gs(e, true, X_CMP, R15, OFF(bt.tag));
    op_mem(e, true, X_LOAD, R15, R14, NO_REG, 0, offsetof(struct bt_jump, la));
    jump_if_to(e, CC_NZ, leave_rip);
    alu_imm(e, true, 4, R15, -4096);
    op_gs(e, true, X_STORE, R15, OFF(bt.page));
    PUT(e, 0x41, 0xff, 0x66, offsetof(struct bt_jump, code));      /* jmp [r14 + code] */
}

static void routines(struct bt *t)
{
    struct emit e = { t->rw, t->rw + 4096, false };
    put_enter(&e);
    t->handler = (u32)(e.p - t->rw);
    put_handler(&e);
    t->leave_rip = (u32)(e.p - t->rw);
    op_gs(&e, true, X_STORE, R15, OFF(rip));
    put_leave(&e, BT_EXIT_RIP);
    t->leave_stale = (u32)(e.p - t->rw);
    op_gs(&e, true, X_STORE, R15, OFF(rip));
    put_leave(&e, BT_EXIT_STALE);
    t->leave_direct = (u32)(e.p - t->rw);
    put_leave(&e, BT_EXIT_DIRECT);
    t->find = (u32)(e.p - t->rw);
    put_find(&e, t->rw + t->leave_rip);
    bug_on(e.overflow);
    t->first = t->used = 4096;
    t->enter = (int (*)(const u8 *))(void *)t->rx;
}

int bt_arena_open(struct icpu *c, struct bt *t)
{
    int fd = memfd_create("doppel-bt", MFD_CLOEXEC);
    void *rw = MAP_FAILED, *rx = MAP_FAILED;

    if (fd >= 0 && !ftruncate(fd, BT_ARENA_BYTES)) {
        rw = mmap(NULL, BT_ARENA_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
        rx = mmap(NULL, BT_ARENA_BYTES, PROT_READ | PROT_EXEC, MAP_SHARED, fd, 0);
    }
    if (fd >= 0)
        close(fd);
    if (rw == MAP_FAILED || rx == MAP_FAILED) {                    /* a host that forbids executable memfds: one mapping for both */
        if (rw != MAP_FAILED)
            munmap(rw, BT_ARENA_BYTES);
        if (rx != MAP_FAILED)
            munmap(rx, BT_ARENA_BYTES);
        rw = rx = mmap(NULL, BT_ARENA_BYTES, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    }
    if (rw == MAP_FAILED)
        return err(-ENOMEM, "vCPU %u: no executable memory for translated code (%llu MiB); check the memory limit, or SELinux's execmem", c->v->id,
                   BT_ARENA_BYTES / MiB);
    t->rw = rw;
    t->rx = rx;
    routines(t);
    return 0;
}

void bt_arena_close(struct bt *t)
{
    if (!t->rw)
        return;
    munmap(t->rw, BT_ARENA_BYTES);
    if (t->rx != t->rw)
        munmap(t->rx, BT_ARENA_BYTES);
}
