/*
 * One block of guest code to host code. Register conventions and the ways in: bt.h; emitters: tr.h; encodings: Intel SDM vol. 2.
 *
 * A translation is [entry: is r15 this address? | page: is the page still mapped here? | code: (are the bytes still the same?) instructions | cold parts].
 * The table of marks says for each host address of which guest instruction it is.
 */
#include <string.h>

#include "cpu/bt/tr.h"
#include "cpu/interp/ops.h"
#include "cpu/interp/sys.h"

/* ---- what an instruction is ---- */
static enum kind plain_or_not(const struct decoded *d, const struct op *op)
{
    for (unsigned i = 0; i < d->insn.operand_count; i++) {
        const ZydisDecodedOperand *o = &d->opnd[i];
        bool hidden = o->visibility == ZYDIS_OPERAND_VISIBILITY_HIDDEN;
        if (o->type == ZYDIS_OPERAND_TYPE_MEMORY) {
            unsigned n = o->size / 8;
            if (hidden || !(op->flags & OPF_MEM) || (n != 1 && n != 2 && n != 4 && n != 8))
                return K_HELPER;
        }
        if (o->type == ZYDIS_OPERAND_TYPE_REGISTER) {
            ZydisRegisterClass c = ZydisRegisterGetClass(o->reg.value);
            bool gpr = c == ZYDIS_REGCLASS_GPR8 || c == ZYDIS_REGCLASS_GPR16 || c == ZYDIS_REGCLASS_GPR32 || c == ZYDIS_REGCLASS_GPR64;
            bool encoded = o->encoding == ZYDIS_OPERAND_ENCODING_MODRM_REG || o->encoding == ZYDIS_OPERAND_ENCODING_MODRM_RM ||
                           o->encoding == ZYDIS_OPERAND_ENCODING_OPCODE;
            if (!gpr && c != ZYDIS_REGCLASS_FLAGS)
                return K_HELPER;
            if (gpr && !encoded && tr_gpr(o) > 2 && !tr_is_high(o))
                return K_HELPER;
        }
        if (o->type == ZYDIS_OPERAND_TYPE_POINTER)
            return K_HELPER;
    }
    return K_PLAIN;
}

static enum kind kind_of(const struct decoded *d, const struct op *op)
{
    const ZydisDecodedInstruction *z = &d->insn;
    if (op->fn == op_ud)
        return K_HELPER;
    if (z->encoding != ZYDIS_INSTRUCTION_ENCODING_LEGACY || z->address_width != 64)
        return K_VECTOR;
    switch (z->mnemonic) {
    case ZYDIS_MNEMONIC_BT: case ZYDIS_MNEMONIC_BTS: case ZYDIS_MNEMONIC_BTR: case ZYDIS_MNEMONIC_BTC:
        if (op->flags & OPF_MEM && d->opnd[1].type == ZYDIS_OPERAND_TYPE_REGISTER)
            return K_STRING;                                       /* a bit string: the address depends on the register */
        return plain_or_not(d, op);
    case ZYDIS_MNEMONIC_MOV:
        if (z->opcode_map == ZYDIS_OPCODE_MAP_DEFAULT && z->opcode >= 0xa0 && z->opcode <= 0xa3)
            return K_HELPER;
        return sys_form(d) ? K_SYSTEM : plain_or_not(d, op);
    case ZYDIS_MNEMONIC_MOVZX: case ZYDIS_MNEMONIC_MOVSX: case ZYDIS_MNEMONIC_MOVSXD:
    case ZYDIS_MNEMONIC_ADD: case ZYDIS_MNEMONIC_OR: case ZYDIS_MNEMONIC_ADC: case ZYDIS_MNEMONIC_SBB: case ZYDIS_MNEMONIC_AND: case ZYDIS_MNEMONIC_SUB:
    case ZYDIS_MNEMONIC_XOR: case ZYDIS_MNEMONIC_CMP: case ZYDIS_MNEMONIC_TEST: case ZYDIS_MNEMONIC_INC: case ZYDIS_MNEMONIC_DEC: case ZYDIS_MNEMONIC_NEG:
    case ZYDIS_MNEMONIC_NOT: case ZYDIS_MNEMONIC_ROL: case ZYDIS_MNEMONIC_ROR: case ZYDIS_MNEMONIC_RCL: case ZYDIS_MNEMONIC_RCR: case ZYDIS_MNEMONIC_SHL:
    case ZYDIS_MNEMONIC_SHR: case ZYDIS_MNEMONIC_SAR: case ZYDIS_MNEMONIC_SHLD: case ZYDIS_MNEMONIC_SHRD: case ZYDIS_MNEMONIC_MUL: case ZYDIS_MNEMONIC_IMUL:
    case ZYDIS_MNEMONIC_DIV: case ZYDIS_MNEMONIC_IDIV:
    case ZYDIS_MNEMONIC_BSWAP: case ZYDIS_MNEMONIC_BSF: case ZYDIS_MNEMONIC_BSR: case ZYDIS_MNEMONIC_TZCNT: case ZYDIS_MNEMONIC_LZCNT:
    case ZYDIS_MNEMONIC_POPCNT: case ZYDIS_MNEMONIC_CBW: case ZYDIS_MNEMONIC_CWDE: case ZYDIS_MNEMONIC_CDQE: case ZYDIS_MNEMONIC_CWD:
    case ZYDIS_MNEMONIC_CDQ: case ZYDIS_MNEMONIC_CQO: case ZYDIS_MNEMONIC_XADD: case ZYDIS_MNEMONIC_CMPXCHG: case ZYDIS_MNEMONIC_XCHG:
    case ZYDIS_MNEMONIC_CMOVO: case ZYDIS_MNEMONIC_CMOVNO: case ZYDIS_MNEMONIC_CMOVB: case ZYDIS_MNEMONIC_CMOVNB: case ZYDIS_MNEMONIC_CMOVZ:
    case ZYDIS_MNEMONIC_CMOVNZ: case ZYDIS_MNEMONIC_CMOVBE: case ZYDIS_MNEMONIC_CMOVNBE: case ZYDIS_MNEMONIC_CMOVS: case ZYDIS_MNEMONIC_CMOVNS:
    case ZYDIS_MNEMONIC_CMOVP: case ZYDIS_MNEMONIC_CMOVNP: case ZYDIS_MNEMONIC_CMOVL: case ZYDIS_MNEMONIC_CMOVNL: case ZYDIS_MNEMONIC_CMOVLE:
    case ZYDIS_MNEMONIC_CMOVNLE: case ZYDIS_MNEMONIC_SETO: case ZYDIS_MNEMONIC_SETNO: case ZYDIS_MNEMONIC_SETB: case ZYDIS_MNEMONIC_SETNB:
    case ZYDIS_MNEMONIC_SETZ: case ZYDIS_MNEMONIC_SETNZ: case ZYDIS_MNEMONIC_SETBE: case ZYDIS_MNEMONIC_SETNBE: case ZYDIS_MNEMONIC_SETS:
    case ZYDIS_MNEMONIC_SETNS: case ZYDIS_MNEMONIC_SETP: case ZYDIS_MNEMONIC_SETNP: case ZYDIS_MNEMONIC_SETL: case ZYDIS_MNEMONIC_SETNL:
    case ZYDIS_MNEMONIC_SETLE: case ZYDIS_MNEMONIC_SETNLE: case ZYDIS_MNEMONIC_CLC: case ZYDIS_MNEMONIC_STC: case ZYDIS_MNEMONIC_CMC:
    case ZYDIS_MNEMONIC_LAHF: case ZYDIS_MNEMONIC_SAHF:
        return plain_or_not(d, op);
    case ZYDIS_MNEMONIC_NOP: case ZYDIS_MNEMONIC_ENDBR64: case ZYDIS_MNEMONIC_ENDBR32:
        return K_NOTHING;
    case ZYDIS_MNEMONIC_LEA:
        return K_LEA;
    case ZYDIS_MNEMONIC_JO: case ZYDIS_MNEMONIC_JNO: case ZYDIS_MNEMONIC_JB: case ZYDIS_MNEMONIC_JNB: case ZYDIS_MNEMONIC_JZ: case ZYDIS_MNEMONIC_JNZ:
    case ZYDIS_MNEMONIC_JBE: case ZYDIS_MNEMONIC_JNBE: case ZYDIS_MNEMONIC_JS: case ZYDIS_MNEMONIC_JNS: case ZYDIS_MNEMONIC_JP: case ZYDIS_MNEMONIC_JNP:
    case ZYDIS_MNEMONIC_JL: case ZYDIS_MNEMONIC_JNL: case ZYDIS_MNEMONIC_JLE: case ZYDIS_MNEMONIC_JNLE:
        return K_BRANCH;
    case ZYDIS_MNEMONIC_JMP: case ZYDIS_MNEMONIC_CALL: case ZYDIS_MNEMONIC_RET:
        return sys_form(d) ? K_SYSTEM : K_BRANCH;
    case ZYDIS_MNEMONIC_PUSH: case ZYDIS_MNEMONIC_POP:
        return sys_form(d) ? K_SYSTEM : K_STACK;
    case ZYDIS_MNEMONIC_LEAVE:
        return K_STACK;
    case ZYDIS_MNEMONIC_CLI: case ZYDIS_MNEMONIC_STI: case ZYDIS_MNEMONIC_PUSHFQ: case ZYDIS_MNEMONIC_POPFQ: case ZYDIS_MNEMONIC_STAC: case ZYDIS_MNEMONIC_CLAC:
    case ZYDIS_MNEMONIC_SYSCALL: case ZYDIS_MNEMONIC_SYSRET: case ZYDIS_MNEMONIC_SWAPGS: case ZYDIS_MNEMONIC_RDFSBASE:
    case ZYDIS_MNEMONIC_RDGSBASE: case ZYDIS_MNEMONIC_WRFSBASE: case ZYDIS_MNEMONIC_WRGSBASE: case ZYDIS_MNEMONIC_RDTSC:
    case ZYDIS_MNEMONIC_RDTSCP: case ZYDIS_MNEMONIC_RDPID: case ZYDIS_MNEMONIC_RDMSR: case ZYDIS_MNEMONIC_WRMSR:
        return K_SYSTEM;
    case ZYDIS_MNEMONIC_MOVSB: case ZYDIS_MNEMONIC_MOVSW: case ZYDIS_MNEMONIC_MOVSQ: case ZYDIS_MNEMONIC_STOSB: case ZYDIS_MNEMONIC_STOSW:
    case ZYDIS_MNEMONIC_STOSD: case ZYDIS_MNEMONIC_STOSQ: case ZYDIS_MNEMONIC_LODSB: case ZYDIS_MNEMONIC_LODSW: case ZYDIS_MNEMONIC_LODSD:
    case ZYDIS_MNEMONIC_LODSQ: case ZYDIS_MNEMONIC_SCASB: case ZYDIS_MNEMONIC_SCASW: case ZYDIS_MNEMONIC_SCASD: case ZYDIS_MNEMONIC_SCASQ:
    case ZYDIS_MNEMONIC_CMPSB: case ZYDIS_MNEMONIC_CMPSW: case ZYDIS_MNEMONIC_CMPSQ:
        return K_STRING;
    default:
        return K_VECTOR;
    }
}

static void analyse(struct tr *t)
{
    struct block *b = t->b;
    for (unsigned i = 0; i < b->n; i++) {
        struct item *it = &t->item[i];
        it->d.bytes = b->bytes + b->op[i].off;
        it->d.mode = IMODE_LONG64;
        if (ZYAN_FAILED(ZydisDecoderDecodeFull(&t->c->code->decoder[IMODE_LONG64], it->d.bytes, b->op[i].len, &it->d.insn, it->d.opnd)) ||
            it->d.insn.length != b->op[i].len)
            it->kind = K_HELPER;
        else
            it->kind = (u8)kind_of(&it->d, &b->op[i]);
    }
}

bool tr_rsp_used(const struct tr *t)
{
    for (unsigned i = t->i + 1; i < t->b->n; i++) {
        const struct item *it = &t->item[i];
        const struct op *op = &t->b->op[i];
        if (it->kind == K_STACK && it->d.insn.mnemonic != ZYDIS_MNEMONIC_LEAVE)
            return true;
        if (it->kind == K_BRANCH)
            return it->d.insn.mnemonic == ZYDIS_MNEMONIC_CALL || it->d.insn.mnemonic == ZYDIS_MNEMONIC_RET;
        if (it->kind == K_PLAIN && op->flags & OPF_MEM && op->base == RSP && op->index == REG_ZERO && op->seg < SEG_FS && op->disp >= 0 && op->disp < 65536)
            return true;
        if (it->kind != K_PLAIN && it->kind != K_NOTHING && it->kind != K_LEA)
            return false;
    }
    return false;
}

/* ---- marks and cold parts ---- */
void tr_mark(struct tr *t, unsigned op, unsigned flags)
{
    bug_on(t->marks == ARRAY_SIZE(t->mark));
    if (!(flags & MARK_COLD) && t->kept != NO_REG)
        flags |= (t->kept + 1) << MARK_KEPT;
    t->mark[t->marks++] = (struct tb_mark){ (u16)(t->e.p - t->tb->start), (u8)op, (u8)flags };
}

struct cold *tr_cold(struct tr *t, u8 *from, int what)
{
    bug_on(t->colds == ARRAY_SIZE(t->cold));
    struct cold *k = &t->cold[t->colds++];
    *k = (struct cold){ .from = from, .op = (u8)t->i, .what = what };
    return k;
}

static void put_handler_call(struct tr *t, unsigned op, u32 routine, const u8 *resume)
{
    struct emit *e = &t->e;
    PUT(e, 0x4c, 0x8d, 0x35);                                      /* lea r14, [rip + resume] */
    u8 *place = e->p;
    put32(e, 0);
    mov_imm64(e, S1, (u32)(t->tb - t->t->tb) << 8 | op);
    tr_reloc(t, e->p - 4, RELOC_SITE);
    jump_to(e, t->t->rw + routine);
    tr_reloc(t, e->p - 4, RELOC_JUMP);
    if (!e->overflow)
        aim(place, resume ? resume : e->p);
    tr_reloc(t, place, RELOC_JUMP);
}

void tr_handler(struct tr *t, const struct op *op)
{
    (void)op;
    t->gates = 0;
    t->tb->handled |= (u32)BIT(t->i);
    put_handler_call(t, t->i, t->t->op, NULL);
}

void tr_call_light(struct tr *t, int (*fn)(struct icpu *c, const struct op *op))
{
    struct emit *e = &t->e;
    t->gates = 0;
    mov_imm64(e, S1, (u64)(uintptr_t)fn);
    op_gs(e, true, X_STORE, S1, OFF(bt.tmp[5]));
    put_handler_call(t, t->i, t->t->light, NULL);
}

static u32 link_new(struct tr *t, u64 target, u8 *place)
{
    struct bt *bt = t->t;
    u32 n = bt->links++;
    bt->link[n] = (struct link){ .target = target, .place = place, .from = (u32)(t->tb - bt->tb), .key = (u8)tr_key(t) };
    return n;
}

void tr_return(struct tr *t, u64 next)
{
    struct emit *e = &t->e;
    unsigned key = t->tb->key;
    if (!t->t->bmi2)
        return;
    PUT(e, 0x4c, 0x8d, 0x35);                                      /* lea r14, [rip + entry] */
    u8 *place = e->p;
    put32(e, 0);
    op_gs(e, true, X_STORE, S0, OFF(bt.ret[0][0]) + key * sizeof t->c->bt.ret[0] + (next & RETURN_MASK) * sizeof t->c->bt.ret[0][0]);
    if (e->overflow)
        return;
    u32 n = link_new(t, next, place);
    struct link *l = &t->t->link[n];
    l->stub = t->t->rw + t->t->lookup[key];
    l->ret = true;
    aim(place, l->stub);
    tb_return(t->t, n);
}

/* n instructions of this block have been completed where it is left here. Uses S0. */
static void put_count(struct tr *t, unsigned n)
{
    if (!t->c->bt.count)
        return;
    op_gs(&t->e, true, X_LOAD, S0, OFF(bt.insns));
    lea(&t->e, S0, S0, (s32)n);
    op_gs(&t->e, true, X_STORE, S0, OFF(bt.insns));
}

void tr_count(struct tr *t)
{
    put_count(t, t->i + 1);
}

/* By a branch, or behind the last op. */
static unsigned last_completed(const struct tr *t)
{
    return t->ended ? t->i : t->i + 1u;
}

void tr_exit(struct tr *t, u64 target)
{
    put_count(t, last_completed(t));
    u8 *place = jump(&t->e);
    struct cold *k = tr_cold(t, place, COLD_LINK);
    k->link = link_new(t, target, place);
}

void tr_exit_if(struct tr *t, unsigned cc, u64 target)
{
    u8 *place;
    if (t->c->bt.count) {                                          /* counted where it is taken */
        u8 *skip = jump_if(&t->e, cc ^ 1);
        tr_exit(t, target);
        aim(skip, t->e.p);
        return;
    }
    place = jump_if(&t->e, cc);
    struct cold *k = tr_cold(t, place, COLD_LINK);
    k->link = link_new(t, target, place);
}

void tr_exit_boundary(struct tr *t, u64 target)
{
    put_count(t, t->i + 1);
    tr_linear(t, S1, target);
    jump_to(&t->e, t->t->rw + t->t->leave_rip);
    tr_reloc(t, t->e.p - 4, RELOC_JUMP);
}

/* The hot mark of op + 1 tells where a handler's call goes on; NULL: nowhere, op ends the block. */
static const u8 *after(const struct tr *t, unsigned op)
{
    for (unsigned i = 0; i < t->marks; i++)
        if (t->mark[i].op == op + 1 && !(t->mark[i].flags & MARK_COLD) && (t->mark[i].flags & MARK_RUN) != MARK_RUN)
            return t->tb->start + t->mark[i].off;
    return NULL;
}

static void put_cold(struct tr *t, const struct cold *k)
{
    struct emit *e = &t->e;
    if (e->overflow)
        return;
    aim(k->from, e->p);
    if (k->what != COLD_LINK)
        tr_reloc(t, k->from, RELOC_JUMP);
    if (k->rcx_saved)
        op_gs(e, true, X_LOAD, RCX, OFF(bt.tmp[0]));
    if (k->swapped)
        put_swap_rcx(e, k->reg);
    switch (k->what) {
    case COLD_LINK:
        t->t->link[k->link].stub = e->p;
        mov_imm64(e, S1, k->link);
        tr_reloc(t, e->p - 4, RELOC_LINK);
        jump_to(e, t->t->rw + t->t->leave_link);
        tr_reloc(t, e->p - 4, RELOC_JUMP);
        break;
    case COLD_HANDLER:
        if (k->arg) {                                              /* emit_mem.c, without BMI2 */
            op_gs(e, true, X_LOAD, RAX, OFF(bt.tmp[1]));
            PUT(e, 0x04, 0x7f, 0x9e);
            op_gs(e, true, X_LOAD, RAX, OFF(bt.tmp[0]));
        }
        put_handler_call(t, k->op, t->t->op, after(t, k->op));
        break;
    default:
        k->put(t, k);
        break;
    }
}

/* ---- the prologue ---- */
static u64 secret_of(const struct tr *t)
{
    return t->t->page[t->tb->page].secret;
}

/* S1 is the target less this block's address and its page's secret; the guest's RCX is in S0. */
static void cold_wrong_entry(struct tr *t, const struct cold *k)
{
    struct emit *e = &t->e;
    (void)k;
    mov_rr(e, RCX, S0);
    mov_imm64(e, S0, t->tb->la + secret_of(t));
    op_mem(e, true, X_LEA, S1, S1, S0, 0, 0);
    mov_imm64(e, S0, 0 - t->tb->la);
    op_mem(e, true, X_LEA, S0, S0, S1, 0, 0);
    u8 *other = jump_unless_zero(e, S0);                           /* the right target: then it is the page */
    jump_to(e, t->t->rw + t->t->miss);
    if (!e->overflow)
        aim(other, e->p);
    put_swap_rcx(e, S0);
    jump_to(e, t->t->rw + t->t->lookup[t->tb->key]);
}

static void cold_wrong_page(struct tr *t, const struct cold *k)
{
    (void)k;
    mov_rr(&t->e, RCX, S0);
    mov_imm64(&t->e, S1, t->tb->la);
    jump_to(&t->e, t->t->rw + t->t->miss);
}

static void cold_stale(struct tr *t, const struct cold *k)
{
    struct emit *e = &t->e;
    (void)k;
    PUT(e, 0x04, 0x7f, 0x9e);                                      /* add al, 0x7f; sahf */
    op_gs(e, true, X_LOAD, RAX, OFF(bt.tmp[0]));
    op_gs(e, false, 0xc7, 0, OFF(bt.exit_stale));                  /* mov dword [], imm */
    put32(e, (u32)(t->tb - t->t->tb));
    mov_imm64(e, S1, t->tb->la);
    jump_to(e, t->t->rw + t->t->leave_rip);
}

static void way_begin(struct tr *t, struct way_steps *steps)
{
    *steps = (struct way_steps){ .known = 0 };
    t->steps = steps;
    t->way = t->e.p;
}

static u8 way_offset(const struct tr *t)
{
    return (u8)(t->e.p - t->way);
}

/* Goes on if S1 and what stands in the itlb for this address are 0 together; S0 is the guest's RCX where it does not. */
static void put_itlb_check(struct tr *t, u64 la, void (*put)(struct tr *t, const struct cold *k))
{
    struct emit *e = &t->e;
    u32 slot = la >> PAGE_SHIFT & (BT_ITLB_SIZE - 1);
    mov_rr(e, S0, RCX);
    if (!t->steps->saved)
        t->steps->saved = way_offset(t);
    if (t->view == VIEW_USER) {
        op_gs(e, true, X_LOAD, RCX, OFF(bt.itlb_user));
        op_mem(e, true, X_LOAD, RCX, RCX, NO_REG, 0, (s32)(8 * slot));
    } else {
        op_gs(e, true, X_LOAD, RCX, OFF(bt.itlb[0]) + 8 * slot);
    }
    op_mem(e, true, X_LEA, RCX, RCX, S1, 0, 0);
    PUT(e, 0xe3, 5);                                               /* jrcxz, over the next one */
    tr_cold(t, jump(e), COLD_OTHER)->put = put;
    mov_rr(e, RCX, S0);
}

static void put_page_check(struct tr *t, u64 la, u32 id)
{
    mov_imm64(&t->e, S1, 0 - t->t->page[id].secret);
    put_itlb_check(t, la, cold_wrong_page);
}

/* Compares the guest's bytes with what they were: where nobody tells when they are written. */
static void put_compare(struct tr *t, const u8 *host, const u8 *bytes, unsigned len)
{
    struct emit *e = &t->e;
    PUT(e, 0x49, 0xbf);
    put64(e, (u64)(uintptr_t)host);
    for (unsigned i = 0; i < len;) {
        unsigned n = len - i >= 8 ? 8 : len - i >= 4 ? 4 : len - i >= 2 ? 2 : 1;
        if (n == 8) {
            u64 v;
            memcpy(&v, bytes + i, 8);
            mov_imm64(e, S0, v);
            op_mem(e, true, X_CMP, S0, S1, NO_REG, 0, (s32)i);
        } else {
            if (n == 2)
                put8(e, 0x66);
            op_mem(e, false, n == 1 ? 0x80 : 0x81, 7, S1, NO_REG, 0, (s32)i);
            put_bytes(e, bytes + i, n);
        }
        struct cold *k = tr_cold(t, jump_if(e, CC_NZ), COLD_OTHER);
        k->put = cold_stale;
        i += n;
    }
}

static void put_compares(struct tr *t)
{
    struct emit *e = &t->e;
    const struct block *b = t->b;
    const struct ram *ram = t->c->v->m->ram;
    op_gs(e, true, X_STORE, RAX, OFF(bt.tmp[0]));
    PUT(e, 0x9f, 0x0f, 0x90, 0xc0);                                /* lahf; seto al */
    put_compare(t, ram_hva(ram, b->gpa), b->bytes, b->first);
    if (b->gpa2 != BLOCK_DEAD)
        put_compare(t, ram_hva(ram, b->gpa2), b->bytes + b->first, b->len - b->first);
    PUT(e, 0x04, 0x7f, 0x9e);                                      /* add al, 0x7f; sahf */
    op_gs(e, true, X_LOAD, RAX, OFF(bt.tmp[0]));
}

static void put_entry_check(struct tr *t)
{
    struct emit *e = &t->e;
    struct tb *tb = t->tb;
    mov_imm64(e, S0, 0 - (tb->la + secret_of(t)));
    op_mem(e, true, X_LEA, S1, S1, S0, 0, 0);
    t->steps->changed = way_offset(t);
    put_itlb_check(t, tb->la, cold_wrong_entry);
    t->steps->known = way_offset(t);
    if (tb->page2)                                                 /* never entered behind this */
        put_page_check(t, tb->la + PAGE_SIZE, tb->page2);
}

static void put_prologue(struct tr *t, bool compare, bool indirect)
{
    struct tb *tb = t->tb;
    tr_mark(t, 0, MARK_COLD);
    if (indirect) {
        tb->entry = tb->start;
        way_begin(t, &tb->steps);
        put_entry_check(t);
    }
    tb->code_off = (u32)(t->e.p - tb->start);
    if (compare)
        put_compares(t);
}

static void cold_begin(struct tr *t)
{
    t->e = (struct emit){ t->t->rw + t->t->cold, t->t->rw + MIN(t->t->cold + BT_BLOCK_BYTES, BT_ARENA_BYTES), false };
}

static void put_colds(struct tr *t, unsigned from, unsigned to)
{
    for (unsigned i = from; i < to; i++)
        put_cold(t, &t->cold[i]);
}

static void cold_end(struct tr *t)
{
    bug_on(t->e.overflow);
    t->t->cold = ALIGN_UP((u64)(t->e.p - t->t->rw), 16);
}

static bool cold_room(const struct bt *t)
{
    return BT_ARENA_BYTES - t->cold >= BT_BLOCK_BYTES;
}

/* A way in that was not made with the translation. */
static struct tr *later(struct icpu *c, struct bt *bt, struct tb *tb)
{
    struct tr *t = bt->tr;
    t->c = c;
    t->t = bt;
    t->tb = tb;
    t->b = tb->b;
    t->view = tb->key & 3;
    t->colds = t->i = 0;
    t->relocate = false;
    cold_begin(t);
    way_begin(t, &bt->way[MIN(bt->ways, BT_WAYS - 1)].steps);
    return t;
}

static void later_end(struct tr *t)
{
    struct bt *bt = t->t;
    if (bt->ways < BT_WAYS - 1) {                                  /* the last one is nobody's */
        struct way *w = &bt->way[bt->ways++];
        w->at = (u32)(t->way - bt->rw);
        w->len = (u32)(t->e.p - t->way);
        w->tb = (u32)(t->tb - bt->tb);
    }
    jump_to(&t->e, t->tb->start + t->tb->code_off);
    put_colds(t, 0, t->colds);
    cold_end(t);
}

void bt_entry(struct icpu *c, struct bt *bt, struct tb *tb)
{
    if (tb->entry || !cold_room(bt))
        return;
    struct tr *t = later(c, bt, tb);
    tb->entry = t->e.p;
    put_entry_check(t);
    later_end(t);
}

void bt_page_entry(struct icpu *c, struct bt *bt, struct tb *tb)
{
    if (tb->page_entry || !cold_room(bt))
        return;
    struct tr *t = later(c, bt, tb);
    tb->page_entry = t->e.p;
    put_page_check(t, tb->la, tb->page);
    if (tb->page2)
        put_page_check(t, tb->la + PAGE_SIZE, tb->page2);
    later_end(t);
}

/* ---- the block ---- */
static bool emit_lea(struct tr *t, const struct op *op)
{
    const struct decoded *d = &tr_item(t)->d;
    unsigned g = op->reg, size = d->insn.operand_width / 8;
    struct ea m;
    if (!tr_ea(t, op, &m) || size == 2)
        return false;
    m.seg = SEG_DS;
    if (m.base != REG_RIP && m.base != RSP && tr_resident(g) && (m.base == REG_ZERO || tr_resident(m.base)) && (m.index == REG_ZERO || tr_resident(m.index))) {
        op_mem(&t->e, size == 8, X_LEA, g, m.base == REG_ZERO ? NO_REG : m.base, m.index == REG_ZERO ? NO_REG : m.index, m.scale, (s32)m.disp);
        return true;
    }
    if (m.base == RSP && g == RSP && m.index == REG_ZERO && size == 8 && m.disp >= -32768 && m.disp <= 32768 && (!t->shadow || tr_rsp_used(t))) {
        tr_rsp_move(t, (s32)m.disp);
        return true;
    }
    tr_address(t, &m, S1, false);
    if (size == 4)
        op_rr(&t->e, false, X_STORE, S1, S1);                      /* zero-extended */
    if (tr_resident(g))
        mov_rr(&t->e, g, S1);
    else
        tr_write(t, g, S1);
    return true;
}

static bool put_item(struct tr *t, const struct item *it, const struct op *op, bool *last)
{
    switch (it->kind) {
    case K_PLAIN: return tr_rsp_step(t, op) || tr_plain(t, op);
    case K_NOTHING: return true;
    case K_LEA: return emit_lea(t, op);
    case K_BRANCH: return tr_branch(t, op, last);
    case K_STACK: return tr_stack(t, op);
    case K_VECTOR: return op->flags & OPF_FP ? tr_vector(t, op) : tr_misc(t, op);
    case K_STRING: return tr_string(t, op);
    case K_SYSTEM: return tr_system(t, op, last) || tr_misc(t, op);
    default: return false;
    }
}

/* Does S0 still hold what it did when this op is done? What emitters of other files do with it is not known here. */
static bool keeps(const struct tr *t, const struct item *it)
{
    if (it->kind != K_PLAIN && it->kind != K_NOTHING && it->kind != K_LEA && it->kind != K_STACK && it->kind != K_BRANCH && it->kind != K_VECTOR)
        return false;
    for (unsigned i = 0; i < it->d.insn.operand_count; i++) {
        const ZydisDecodedOperand *o = &it->d.opnd[i];
        bool high;
        if (o->type == ZYDIS_OPERAND_TYPE_REGISTER && o->actions & ZYDIS_OPERAND_ACTION_MASK_WRITE && decode_gpr(o->reg.value, &high) == t->kept)
            return false;
    }
    return true;
}

/* ---- registers with small values ---- */
static unsigned gpr_of(const ZydisDecodedOperand *o)               /* NO_REG: none, or one of AH..BH */
{
    bool high;
    ZydisRegisterClass cls = o->type == ZYDIS_OPERAND_TYPE_REGISTER ? ZydisRegisterGetClass(o->reg.value) : ZYDIS_REGCLASS_INVALID;
    if (cls != ZYDIS_REGCLASS_GPR8 && cls != ZYDIS_REGCLASS_GPR16 && cls != ZYDIS_REGCLASS_GPR32 && cls != ZYDIS_REGCLASS_GPR64)
        return NO_REG;
    unsigned g = decode_gpr(o->reg.value, &high);
    return high ? NO_REG : g;
}

static bool is_small(const struct tr *t, const ZydisDecodedOperand *o)
{
    unsigned g = gpr_of(o);
    if (o->type == ZYDIS_OPERAND_TYPE_IMMEDIATE)
        return o->imm.value.u < 65536 && t->b->op[t->i].imm < 65536;
    return g != NO_REG && t->small & BIT(g);
}

/* Is what this instruction leaves in its first operand, a whole register, small? */
static bool makes_small(const struct tr *t, const struct decoded *d)
{
    const ZydisDecodedOperand *o = d->opnd;
    if (gpr_of(&o[0]) == NO_REG)
        return false;
    switch (d->insn.mnemonic) {
    case ZYDIS_MNEMONIC_SETO: case ZYDIS_MNEMONIC_SETNO: case ZYDIS_MNEMONIC_SETB: case ZYDIS_MNEMONIC_SETNB: case ZYDIS_MNEMONIC_SETZ:
    case ZYDIS_MNEMONIC_SETNZ: case ZYDIS_MNEMONIC_SETBE: case ZYDIS_MNEMONIC_SETNBE: case ZYDIS_MNEMONIC_SETS: case ZYDIS_MNEMONIC_SETNS:
    case ZYDIS_MNEMONIC_SETP: case ZYDIS_MNEMONIC_SETNP: case ZYDIS_MNEMONIC_SETL: case ZYDIS_MNEMONIC_SETNL: case ZYDIS_MNEMONIC_SETLE:
    case ZYDIS_MNEMONIC_SETNLE:
        return is_small(t, &o[0]);                                 /* only its low byte is another */
    default:
        break;
    }
    if (d->insn.operand_width < 32)
        return false;
    switch (d->insn.mnemonic) {
    case ZYDIS_MNEMONIC_MOVZX: return true;
    case ZYDIS_MNEMONIC_MOV: return is_small(t, &o[1]);
    case ZYDIS_MNEMONIC_XOR: return o[1].type == ZYDIS_OPERAND_TYPE_REGISTER && o[1].reg.value == o[0].reg.value;
    case ZYDIS_MNEMONIC_AND: return is_small(t, &o[0]) || is_small(t, &o[1]);
    case ZYDIS_MNEMONIC_SHR: return is_small(t, &o[0]);
    default: return false;
    }
}

static bool writes_gpr(const ZydisDecodedOperand *o, unsigned *g)
{
    bool high;
    ZydisRegisterClass cls = o->type == ZYDIS_OPERAND_TYPE_REGISTER ? ZydisRegisterGetClass(o->reg.value) : ZYDIS_REGCLASS_INVALID;
    if (cls != ZYDIS_REGCLASS_GPR8 && cls != ZYDIS_REGCLASS_GPR16 && cls != ZYDIS_REGCLASS_GPR32 && cls != ZYDIS_REGCLASS_GPR64)
        return false;
    *g = decode_gpr(o->reg.value, &high);
    return o->actions & ZYDIS_OPERAND_ACTION_MASK_WRITE;
}

/* After this op, which has been translated. */
static void small_follow(struct tr *t, const struct item *it)
{
    if (it->kind != K_PLAIN && it->kind != K_NOTHING && it->kind != K_LEA && it->kind != K_STACK && it->kind != K_BRANCH) {
        t->small = 0;
        return;
    }
    bool makes = it->kind == K_PLAIN && makes_small(t, &it->d);
    unsigned g;
    for (unsigned i = 0; i < it->d.insn.operand_count; i++)
        if (writes_gpr(&it->d.opnd[i], &g))
            t->small &= (u16)~BIT(g);
    if (makes)
        t->small |= (u16)BIT(gpr_of(&it->d.opnd[0]));
}

/* What an instruction with a gate has stored may not have been: its handler goes on behind it, too. */
static void rcx_follow(struct tr *t, const struct item *it)
{
    if (it->kind != K_PLAIN && it->kind != K_NOTHING && it->kind != K_LEA && it->kind != K_STACK && it->kind != K_BRANCH && it->kind != K_VECTOR)
        t->rcx_saved = false;
    else if (t->rcx_stored && (it->kind == K_PLAIN || it->kind == K_STACK))
        t->rcx_saved = true;
    unsigned g;
    for (unsigned i = 0; i < it->d.insn.operand_count; i++)
        if (writes_gpr(&it->d.opnd[i], &g) && g == RCX)
            t->rcx_saved = false;
}

bool tr_writes(const struct item *it, unsigned g)
{
    unsigned written;
    for (unsigned i = 0; i < it->d.insn.operand_count; i++)
        if (writes_gpr(&it->d.opnd[i], &written) && written == g)
            return true;
    return false;
}

/* The register whose slot's delta is kept may do that: it stays within the guards, and a fault beyond its window looks again. */
bool tr_small_step(const struct item *it, unsigned g)
{
    const struct decoded *d = &it->d;
    if (it->kind != K_PLAIN || d->insn.operand_width != 64 || gpr_of(&d->opnd[0]) != g)
        return false;
    switch (d->insn.mnemonic) {
    case ZYDIS_MNEMONIC_INC: case ZYDIS_MNEMONIC_DEC: return true;
    case ZYDIS_MNEMONIC_ADD: case ZYDIS_MNEMONIC_SUB:
        return d->opnd[1].type == ZYDIS_OPERAND_TYPE_IMMEDIATE && d->opnd[1].imm.value.s >= -32768 && d->opnd[1].imm.value.s <= 32768;
    default: return false;
    }
}

static bool uses_rsp(const struct decoded *d)
{
    bool high;
    for (unsigned i = 0; i < d->insn.operand_count; i++) {
        const ZydisDecodedOperand *o = &d->opnd[i];
        if (o->type == ZYDIS_OPERAND_TYPE_REGISTER && ZydisRegisterGetLargestEnclosing(ZYDIS_MACHINE_MODE_LONG_64, o->reg.value) == ZYDIS_REGISTER_RSP)
            return true;
        if (o->type == ZYDIS_OPERAND_TYPE_MEMORY && o->mem.base != ZYDIS_REGISTER_NONE && o->mem.base != ZYDIS_REGISTER_RIP && decode_gpr(o->mem.base, &high) == RSP)
            return true;
    }
    return false;
}

/*
 * An op that has met a device, or a page with code that it wrote to: in a function like memcpy() most of its accesses are to neither. So the software TLB
 * decides each time, though the block's other ops go through the windows; RSP, which is biased for those, must have no part in it.
 */
static bool put_slow(struct tr *t, const struct item *it, const struct op *op, bool *last)
{
    if (!t->shadow || (it->kind != K_PLAIN && it->kind != K_VECTOR) || uses_rsp(&it->d))
        return false;
    t->kept = NO_REG;
    t->shadow = false;
    bool done = put_item(t, it, op, last);
    t->shadow = true;
    t->kept = NO_REG;
    return done;
}

static void put_op(struct tr *t, bool *last)
{
    const struct op *op = &t->b->op[t->i];
    u8 *p = t->e.p;
    unsigned colds = t->colds, marks;
    u32 links = t->t->links, relocs = t->t->relocs;
    t->rcx_stored = false;
    tr_mark(t, t->i, t->shadowed && t->i == t->shadowed ? MARK_SHADOW : 0);
    marks = t->marks;
    if (t->loop.on && !t->i)
        loop_begin(t);
    bool slow = t->b->slow & BIT(t->i);
    if (slow ? put_slow(t, &t->item[t->i], op, last) : put_item(t, &t->item[t->i], op, last)) {
        if (t->kept != NO_REG && !keeps(t, &t->item[t->i]) && !tr_small_step(&t->item[t->i], t->kept))
            t->kept = NO_REG;
        small_follow(t, &t->item[t->i]);
        rcx_follow(t, &t->item[t->i]);
        return;
    }
    t->small = 0;
    t->rcx_saved = false;
    t->kept = NO_REG;
    t->e.p = p;
    t->colds = colds;
    t->marks = marks;
    t->t->links = links;
    t->t->relocs = relocs;
    *last = false;
    tr_handler(t, op);
}

/*
 * A run of stack operations (tr_run()): one look-up for all, and behind it no further one. Where they do not lie in one page, or the TLB does not hold it, each is
 * done with a look-up of its own: put_alone(), behind the block. Handlers' calls come back there, never into the run.
 */
static bool put_run(struct tr *t, bool *last)
{
    struct place p;
    struct ea m;
    enum mmu_access access;
    unsigned n = t->item[t->i].kind == K_STACK ? tr_run(t, &m, &access) : 0, scratch;
    struct run *r = &t->run[t->runs];
    if (n && t->item[t->i + n - 1].kind == K_HELPER)               /* RET that is #UD */
        n--;
    if (n < 2 || t->runs == ARRAY_SIZE(t->run))
        return false;
    *r = (struct run){ .first = (u8)t->i, .last = (u8)(t->i + n - 1), .rcx_saved = t->rcx_saved };
    t->runs++;
    t->kept = NO_REG;
    tr_mark(t, t->i, t->shadowed && t->i == t->shadowed ? MARK_SHADOW : 0);
    tr_mem(t, &m, 8 * n, access, TR_SCRATCH, &p, &scratch);
    r->fail = t->cold[--t->colds].from;
    for (;; t->i++) {
        tr_run_op(t, &t->b->op[t->i], last);
        small_follow(t, &t->item[t->i]);
        if (t->i == r->last)
            break;
        tr_mark(t, t->i + 1, MARK_RUN);
    }
    t->rcx_saved = false;
    r->join = *last ? NULL : t->e.p;
    return true;
}

static void put_alone(struct tr *t, const struct run *r)
{
    struct emit *e = &t->e;
    bool last = false;
    t->i = r->first;
    t->rcx_saved = r->rcx_saved;
    t->kept = NO_REG;
    t->small = 0;
    t->ended = false;
    if (!e->overflow)
        aim(r->fail, e->p);
    tr_mark(t, t->i, MARK_COLD);
    op_gs(e, true, X_LOAD, RCX, OFF(bt.tmp[0]));
    for (; t->i <= r->last; t->i++)
        put_op(t, &last);
    if (!r->join)
        return;
    tr_mark(t, t->i, 0);
    jump_to(e, r->join);
}

static bool room(const struct bt *t)
{
    return BT_ARENA_BYTES / 2 - t->used >= BT_BLOCK_BYTES && cold_room(t) && t->tbs < BT_TBS && BT_LINKS - t->links > BLOCK_OPS + 8 &&
           BT_MARKS - t->marks > ARRAY_SIZE(((struct tr *)0)->mark) && BT_RELOCS - t->relocs > 5 * ARRAY_SIZE(((struct tr *)0)->cold);
}

/* What is not set here is set where it is first used. */
static void begin(struct tr *t, struct icpu *c, struct bt *bt, struct block *b)
{
    unsigned key = bt_key(c);
    t->c = c;
    t->t = bt;
    t->b = b;
    t->view = key & 3;
    t->shadow = key & KEY_SHADOW;
    t->kept = NO_REG;
    t->i = t->colds = t->marks = t->runs = t->shadowed = 0;
    t->gates = 0;
    t->small = 0;
    t->rcx_saved = false;
    t->ended = t->loop.on = false;
    t->tb = &bt->tb[bt->tbs++];
    *t->tb = (struct tb){ .la = c->rip, .gpa = b->gpa, .start = bt->rw + bt->used, .key = (u8)key, .n = b->n, .b = b, .slow = b->slow,
                          .link = bt->links, .reloc = bt->relocs };
    t->e = (struct emit){ t->tb->start, t->tb->start + BT_BLOCK_BYTES, false };
}

/* The block as a loop, if it is one. False: it is none after all. */
static bool put_loop(struct tr *t)
{
    struct bt *bt = t->t;
    u32 links = bt->links, relocs = bt->relocs;
    unsigned colds = t->colds, marks = t->marks;
    bool last = false, copies = t->tb->copies;
    u8 *p = t->e.p;
    for (; t->i <= t->loop.branch; t->i++) {
        put_op(t, &last);
        if (t->kept != t->loop.base[0])
            break;
    }
    if (last)
        return true;
    t->e.p = p;
    t->colds = colds;
    t->marks = marks;
    bt->links = links;
    bt->relocs = relocs;
    t->tb->copies = copies;
    t->tb->handled = 0;
    t->tb->second = 0;
    t->i = 0;
    t->gates = 0;
    t->small = 0;
    t->kept = NO_REG;
    t->rcx_saved = t->loop.on = false;
    return false;
}

static void put_ops(struct tr *t, bool compare)
{
    const struct block *b = t->b;
    bool last = false;
    analyse(t);
    loop_plan(t, compare);
    if (t->loop.on && put_loop(t))
        return;
    for (; t->i < b->n && !last && !(compare && t->i && b->op[t->i - 1].flags & OPF_STORES); t->i++)
        if (compare || !put_run(t, &last))
            put_op(t, &last);                                      /* what compares ends where it may have changed itself */
    if (!last) {
        tr_mark(t, t->i, 0);
        t->ended = true;
        tr_exit(t, t->tb->la + b->op[t->i].off);                   /* behind the last one stands an op that leaves */
    }
    for (unsigned i = 0; i < t->runs; i++)
        put_alone(t, &t->run[i]);
}

struct tb *bt_translate(struct icpu *c, struct bt *bt, struct block *b, u32 page, u32 page2, bool compare, bool indirect, bool *full)
{
    struct tr *t = bt->tr;
    *full = !room(bt);
    if (*full)
        return NULL;
    begin(t, c, bt, b);
    struct tb *tb = t->tb;
    tb->page = page;
    tb->page2 = page2;
    const struct tb *from = compare || page2 ? NULL : clone_source(bt, tb);
    t->relocate = false;
    put_prologue(t, compare, indirect);
    unsigned prologue = t->colds;
    t->relocate = tb->copies = !from && !compare && !page2 && clone_possible(tb->key, tb->la);
    if (from)
        clone_code(t, from);
    else
        put_ops(t, compare);
    bug_on(t->e.overflow);
    tb->size = (u32)(t->e.p - tb->start);
    bool relocate = t->relocate;
    cold_begin(t);
    t->relocate = false;
    put_colds(t, 0, prologue);
    t->relocate = relocate;
    tb->cold = t->e.p;
    if (from)
        clone_cold(t, from);
    else
        put_colds(t, prologue, t->colds);
    tb->cold_size = (u32)(t->e.p - tb->cold);
    cold_end(t);
    if (!from) {
        tb->links = (u16)(bt->links - tb->link);
        tb->relocs = (u16)(bt->relocs - tb->reloc);
    }
    tb->mark = bt->marks;
    tb->marks = (u16)t->marks;
    memcpy(&bt->mark[bt->marks], t->mark, t->marks * sizeof t->mark[0]);
    bt->marks += t->marks;
    bt->used = ALIGN_UP(bt->used + tb->size, 16);
    tb_insert(bt, tb);
    vcpu_count(c->v, from ? COUNT_CODE_COPIED : COUNT_CODE_TRANSLATED);
    vcpu_count_add(c->v, COUNT_CODE_BYTES, tb->size);
    return tb;
}
