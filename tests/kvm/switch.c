/*
 * switch KERNEL INITRD CMDLINE FIRST SECOND VCPUS [STEP-MS [MOVES]]: boots a guest on engine FIRST and moves it to
 * SECOND and back every STEP-MS milliseconds (without: once, in the middle of the boot), MOVES times or until a command
 * typed at its shell has answered. Prints the number of moves, and what went wrong. With FIRST the same as SECOND it is
 * a test of saving and loading.
 *
 * One thread: the loop's. The serial line is a buffer here.
 */
#include <stdlib.h>
#include <string.h>

#include "back/chardev.h"
#include "cpu/engine.h"
#include "vm/vm.h"

#define OUT_MAX 200000
static const char input[] = "echo sum $((6*7)) $(nproc); for i in 1 2 3 4 5 6 7 8; do "
                            "sha256sum /bin/busybox | cut -c1-8; sleep 0.2; done; poweroff\n";

struct test {
    struct chardev line;                                           /* first: chardev.h */
    struct loop *loop;
    struct vm *vm;
    const struct engine *engine[2];
    struct timer timer;
    u64 step_ns;
    unsigned moves, most;
    pthread_mutex_t lock;
    char out[OUT_MAX];
    size_t out_len, typed;
    bool prompt;
    int failed;
};

static void feed(void *arg)
{
    struct test *t = arg;
    size_t n = MIN(chardev_front_room(&t->line), strlen(input) - t->typed);

    chardev_front_receive(&t->line, (const u8 *)input + t->typed, n);
    t->typed += n;
}

static size_t line_write(struct chardev *c, const u8 *buf, size_t len)
{
    struct test *t = (struct test *)c;
    size_t n;

    pthread_mutex_lock(&t->lock);
    n = MIN(len, OUT_MAX - 1 - t->out_len);
    memcpy(t->out + t->out_len, buf, n);
    t->out_len += n;
    if (!t->prompt && strstr(t->out, "# ")) {
        t->prompt = true;
        loop_post(t->loop, feed, t);
    }
    pthread_mutex_unlock(&t->lock);
    return len;
}

static void line_ready(struct chardev *c)
{
    struct test *t = (struct test *)c;

    if (t->prompt && t->typed < strlen(input))
        loop_post(t->loop, feed, t);
}

static const struct chardev_ops line_ops = { .write = line_write, .rx_ready = line_ready };

static void give_up(struct test *t, const char *what)
{
    printf("%s: %s\n", what, err_last());
    t->failed = 1;
    loop_stop(t->loop);
}

static void on_timer(void *arg)
{
    struct test *t = arg;

    if (vm_switch_engine(t->vm, t->engine[(t->moves + 1) % 2]) < 0) {
        give_up(t, "switch");
        return;
    }
    if (++t->moves < t->most)
        timer_arm(&t->timer, clock_ns(vm_clock(t->vm)) + t->step_ns);
}

static void on_ended(void *arg, const struct vm_result *r)
{
    struct test *t = arg;

    if (r->end != VM_END_POWEROFF) {
        printf("the guest ended otherwise: %d %s\n", (int)r->end, r->message);
        t->failed = 1;
    }
    loop_stop(t->loop);
}

static void show_log(void *arg UNUSED, enum log_level level UNUSED, const char *msg)
{
    printf("# %s\n", msg);
}

static int run(struct test *t, char **argv, unsigned vcpus)
{
    static const struct log log = { .sink = show_log };
    struct vm_config c = {
        .engine = t->engine[0], .also = t->engine[1], .vcpus = vcpus, .memory_bytes = 512 * MiB, .kernel = argv[1],
        .initrd = argv[2], .cmdline = argv[3],
        .serial = &t->line, .log = &log, .loop = t->loop, .ended = on_ended, .ended_arg = t,
    };
    int r = vm_new(&c, &t->vm);

    if (r == 0) {
        timer_init(&t->timer, vm_clock(t->vm), on_timer, t);
        timer_arm(&t->timer, t->step_ns);
        r = vm_start(t->vm);
    }
    if (r == 0)
        r = loop_run(t->loop);
    if (r < 0)
        give_up(t, "vm");
    if (t->vm)
        timer_disarm(&t->timer);
    vm_free(t->vm);
    return r;
}

int main(int argc, char **argv)
{
    static struct test t = { .line.ops = &line_ops, .line.opened = true, .lock = PTHREAD_MUTEX_INITIALIZER };
    char want[32];

    if (argc < 7 || argc > 9)
        return 64;
    setvbuf(stdout, NULL, _IOLBF, 0);
    t.engine[0] = engine_find(argv[4]);
    t.engine[1] = engine_find(argv[5]);
    t.step_ns = (argc > 7 ? strtoull(argv[7], NULL, 10) : 1000) * 1000000;
    t.most = argc > 8 ? (unsigned)atoi(argv[8]) : argc > 7 ? 1000000 : 1;
    if (!t.engine[0] || !t.engine[1] || !t.step_ns || loop_new(&t.loop) < 0)
        return 64;
    run(&t, argv, (unsigned)atoi(argv[6]));
    loop_free(t.loop);
    snprintf(want, sizeof want, "sum 42 %s\r\n", argv[6]);
    if (!t.failed && !strstr(t.out, want)) {
        printf("the command's output is not there\n");
        t.failed = 1;
    }
    if (t.failed)
        printf("%s\n", t.out);
    printf("%u moves: %s\n", t.moves, t.failed ? "FAILED" : "ok");
    return t.failed;
}
