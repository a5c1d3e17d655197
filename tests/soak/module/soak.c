// SPDX-License-Identifier: GPL-2.0
/*
 * A kernel module that patches itself, in the kernel's ways and in one of its own, and checks after every change that
 * all processors run what is there now. Insertion fails (EILSEQ) when one does not, with the reason in the kernel's log.
 *
 *   static keys         jump labels of this module, switched thousands of times, while a thread per processor runs them
 *   static calls        the same with the target of a call
 *   own                 a function's immediate, rewritten through a second mapping of its page, then called everywhere
 *
 * Parameters: rounds.
 */
#include <linux/cpu.h>
#include <linux/delay.h>
#include <linux/jump_label.h>
#include <linux/kthread.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/smp.h>
#include <linux/static_call.h>
#include <linux/vmalloc.h>
#include <asm/sync_core.h>

static int rounds = 200;
module_param(rounds, int, 0444);

static DEFINE_STATIC_KEY_FALSE(off_key);
static DEFINE_STATIC_KEY_TRUE(on_key);
static atomic_t wrong = ATOMIC_INIT(0), passes = ATOMIC_INIT(0);

static noinline int first(int x) { return x + 1; }
static noinline int second(int x) { return x * 3; }
DEFINE_STATIC_CALL(soak_call, first);

/* ---- keys and calls ---- */

static noinline int keys(void)
{
	int r = 0;

	if (static_branch_unlikely(&off_key))
		r |= 1;
	if (static_branch_likely(&on_key))
		r |= 2;
	return r;
}

/* While they change, any of the values is good, and nothing else. */
static int runs(void *arg)
{
	while (!kthread_should_stop()) {
		int k = keys(), c = static_call(soak_call)(10);

		if (k < 0 || k > 3 || (c != 11 && c != 30))
			atomic_inc(&wrong);
		atomic_inc(&passes);
		if (!(atomic_read(&passes) & 1023))
			cond_resched();
	}
	return 0;
}

struct want {
	int keys, call;
};

static void check_here(void *arg)
{
	const struct want *w = arg;

	if (keys() != w->keys || static_call(soak_call)(10) != w->call)
		atomic_inc(&wrong);
}

static int patch_keys(void)
{
	struct task_struct *thread[8] = { NULL };
	struct want w = { 2, 11 };
	int i, cpu, n = 0;

	for_each_online_cpu(cpu) {
		if (n == ARRAY_SIZE(thread))
			break;
		thread[n] = kthread_create(runs, NULL, "soak/%d", cpu);
		if (IS_ERR(thread[n]))
			break;
		kthread_bind(thread[n], cpu);
		wake_up_process(thread[n++]);
	}
	for (i = 0; i < rounds && !atomic_read(&wrong); i++) {
		switch (i % 4) {
		case 0: static_branch_enable(&off_key); w.keys |= 1; break;
		case 1: static_branch_disable(&on_key); w.keys &= ~2; break;
		case 2: static_branch_disable(&off_key); w.keys &= ~1; break;
		case 3: static_branch_enable(&on_key); w.keys |= 2; break;
		}
		static_call_update(soak_call, i & 1 ? second : first);
		w.call = i & 1 ? 30 : 11;
		on_each_cpu(check_here, &w, 1);
	}
	while (n)
		kthread_stop(thread[--n]);
	pr_info("soak: %d key changes, %d passes, %d wrong\n", i, atomic_read(&passes), atomic_read(&wrong));
	return atomic_read(&wrong) || !atomic_read(&passes) ? -EILSEQ : 0;
}

/* ---- our own text ---- */

int soak_victim(void);
asm(".pushsection .text\n"
    "	.balign 64\n"
    "	.globl soak_victim\n"
    "soak_victim:\n"
    "	endbr64\n"
    "	movl $0x11111111, %eax\n"
    "	ret\n"
    "	int3\n"
    ".popsection\n");

static u32 now;
static void call_here(void *arg)
{
	sync_core();
	if ((u32)soak_victim() != now)
		atomic_inc(&wrong);
}

static int patch_text(void)
{
	u8 *code = (u8 *)soak_victim, *map;
	struct page *page = vmalloc_to_page(code);
	u32 *immediate;
	int i;

	map = page ? vmap(&page, 1, VM_MAP, PAGE_KERNEL) : NULL;
	if (!map)
		return -ENOMEM;
	immediate = (u32 *)(map + offset_in_page(code) + 5);
	now = 0x11111111;
	on_each_cpu(call_here, NULL, 1);
	for (i = 0; i < rounds && !atomic_read(&wrong); i++) {
		now = 0x11111111 + (u32)i * 0x01010101;
		WRITE_ONCE(*immediate, now);
		on_each_cpu(call_here, NULL, 1);
	}
	vunmap(map);
	pr_info("soak: %d text changes, %d wrong\n", i, atomic_read(&wrong));
	return atomic_read(&wrong) ? -EILSEQ : 0;
}

static int __init soak_init(void)
{
	int r = patch_keys();

	return r ? r : patch_text();
}

static void __exit soak_exit(void)
{
}

module_init(soak_init);
module_exit(soak_exit);
MODULE_LICENSE("GPL");
MODULE_DESCRIPTION("doppel's soak test: a module that patches itself");
