/*
 * No interrupt is lost while processors are busy: timer interrupts that each set the next deadline, interprocessor interrupts that each send the next one, and both
 * at once, while each processor computes, calls by pointer, changes address spaces, leaves for the monitor, or halts. One that is lost ends a chain, so what is asked for
 * is equality; what merges in the IRR (SDM vol. 3A 11.8.4) has its bounds. Timer interrupts never come before their time (11.5.4.1).
 */
#include "smp.h"

#define CPUS 2
#define DEADLINES 40
#define VOLLEYS 60
#define MSR_TSC_DEADLINE 0x6e0
enum { V_DEADLINE = 0x60, V_BALL = 0x64, V_BURST = 0x68, V_PERIODIC = 0x6c, V_BEGIN = 0x70 }; /* + number of the processor */
enum { LOAD_COMPUTE, LOAD_CALLS, LOAD_SPACES, LOAD_EXITS, LOAD_HALT, LOADS };
static const char *const load_name[LOADS] = {"compute", "call by pointer", "change address spaces", "leave for the monitor", "halt"};

struct frame {
    ulong ip, cs, flags, sp, ss;
};
#define ISR __attribute__((interrupt)) static void

static volatile u32 stop, ap_load, ap_runs;
static volatile u64 turns[CPUS]; /* of the load's loop */
static u64 spaces[2];

/* What processor n does while interrupts come. */
static ulong twice(ulong v) { return v * 2 + 1; }
static ulong mixed(ulong v) { return (v ^ v >> 7) * 0x9e3779b97f4a7c15; }

/* One turn of the load: some ten microseconds, or to the next interrupt. */
static void turn(int n, u32 what)
{
    ulong (*volatile fn[2])(ulong) = {twice, mixed};
    ulong v = turns[n]++;
    switch (what) {
    case LOAD_COMPUTE:
        for (int i = 0; i < 10000; i++)
            asm volatile("imulq $31, %0, %0; incq %0; rorq $3, %0" : "+r"(v));
        break;
    case LOAD_CALLS:
        for (int i = 0; i < 1000; i++)
            v = fn[v & 1](v);
        break;
    case LOAD_SPACES:
        for (int i = 0; i < 20; i++)
            write_cr3(spaces[i & 1]);
        break;
    case LOAD_EXITS:
        for (int i = 0; i < 10; i++)
            cpuid(0, 0);
        break;
    case LOAD_HALT:
        asm volatile("cli");
        if (!stop)
            asm volatile("sti; hlt");
        asm volatile("sti");
    }
    asm volatile("" ::"r"(v));
}

void ap_main(void)
{
    map(APIC_BASE, APIC_BASE, PTE_P | PTE_W | PTE_PCD | PTE_PWT);
    apic_enable();
    apic_write(APIC_LVT_TIMER, (V_DEADLINE + 1) | 2 << 17);
    ap_state = 1;
    for (;;) {
        while (!ap_runs)
            pause();
        asm volatile("sti");
        while (!stop)
            turn(1, ap_load);
        asm volatile("cli");
        ap_runs = 0;
    }
}

static u64 rdtsc(void)
{
    u32 a, d;
    asm volatile("lfence; rdtsc; lfence" : "=a"(a), "=d"(d));
    return (u64)d << 32 | a;
}

/* ---- deadlines ---- */
static volatile u32 deadlines[CPUS], early[CPUS], wanted;
static volatile u64 deadline[CPUS];
static u64 seed[CPUS];

static void next_deadline(int n)
{
    seed[n] = seed[n] * 6364136223846793005 + 1442695040888963407;
    deadline[n] = rdtsc() + 20000 + (seed[n] >> 40 & 0x3ffff);
    wrmsr(MSR_TSC_DEADLINE, deadline[n]);
}

static void deadline_taken(int n)
{
    if (rdtsc() < deadline[n])
        early[n]++;
    if (++deadlines[n] < wanted)
        next_deadline(n);
    apic_write(APIC_EOI, 0);
}
ISR deadline_0(struct frame *f) { (void)f; deadline_taken(0); }
ISR deadline_1(struct frame *f) { (void)f; deadline_taken(1); }
ISR deadline_begin(struct frame *f)
{
    (void)f;
    next_deadline(1);
    apic_write(APIC_EOI, 0);
}

/* ---- a ball between the two ---- */
static volatile u32 volleys[CPUS], volleys_wanted;

static void send(u32 dest, u32 vector)
{
    apic_write(APIC_ICR_HIGH, dest << 24);
    apic_write(APIC_ICR, vector | ICR_ASSERT);
}

/* Processor 1 answers each, processor 0 all but the last. */
static void ball_taken(int n)
{
    volleys[n]++;
    if (n || volleys[0] < volleys_wanted)
        send(!n, V_BALL + !n);
    apic_write(APIC_EOI, 0);
}
ISR ball_0(struct frame *f) { (void)f; ball_taken(0); }
ISR ball_1(struct frame *f) { (void)f; ball_taken(1); }

/* ---- a burst: what is sent while one is pending merges with it, and the handler of the last one sees all that came before ---- */
static volatile u32 letters, seen, bursts;
ISR burst_1(struct frame *f)
{
    (void)f;
    bursts++;
    apic_write(APIC_EOI, 0); /* before the look: what comes now is another interrupt */
    seen = letters;
}

static volatile u32 periods;
ISR periodic_0(struct frame *f) { (void)f; periods++; apic_write(APIC_EOI, 0); }

static void handler(u32 vector, void *isr) { idt_set(vector, KCS, isr, D_P | TYPE_INT, 0); }

/* The AP begins with its load, interrupts on. */
static void begin(u32 what)
{
    stop = 0;
    turns[0] = turns[1] = 0;
    ap_load = what;
    ap_runs = 1;
    while (!turns[1])
        pause();
}

static void end(void)
{
    stop = 1;
    ipi(AP, (V_BURST + 1) | ICR_ASSERT); /* it may be halted */
    must("the other processor comes back", wait_for(&ap_runs, 0));
}

/*
 * Works until both counters are where they are to be, or nothing has moved for some ten seconds. This processor halts only while it has something to wait for itself, as
 * *a tells: between the look and HLT interrupts are off.
 */
static bool work(u32 what, volatile u32 *a, volatile u32 *b, u32 wanted)
{
    u64 moved = rdtsc();
    u32 was = *a + *b;
    while ((*a < wanted || *b < wanted) && rdtsc() - moved < BIT(35)) {
        if (*a + *b != was) {
            was = *a + *b;
            moved = rdtsc();
        }
        if (what != LOAD_HALT) {
            asm volatile("sti");
            turn(0, what);
            asm volatile("cli");
        } else if (*a < wanted) {
            asm volatile("sti; hlt; cli");
        } else {
            pause();
        }
    }
    return *a >= wanted && *b >= wanted;
}

static void timers(u32 here, u32 there)
{
    test("load: deadlines, while one processor is to %s and the other to %s", load_name[here], load_name[there]);
    if (!(cpuid(1, 0).c & BIT(24))) {
        skip("no TSC deadline");
        return;
    }
    wanted = DEADLINES;
    deadlines[0] = deadlines[1] = early[0] = early[1] = 0;
    seed[0] = here + 1, seed[1] = there + 77;
    begin(there);
    /* Each processor's timer is its own to set: the other one's chain begins with an IPI. */
    next_deadline(0);
    ipi(AP, V_BEGIN | ICR_ASSERT);
    must("all come", work(here, &deadlines[0], &deadlines[1], wanted));
    end();
    eq("here", deadlines[0], wanted);
    eq("there", deadlines[1], wanted);
    eq("early here", early[0], 0);
    eq("early there", early[1], 0);
}

static void balls(u32 here, u32 there)
{
    test("load: IPIs there and back, and deadlines, while one processor is to %s and the other to %s", load_name[here], load_name[there]);
    volleys_wanted = VOLLEYS;
    volleys[0] = volleys[1] = deadlines[0] = deadlines[1] = 0;
    wanted = cpuid(1, 0).c & BIT(24) ? DEADLINES : 0;
    begin(there);
    if (wanted)
        next_deadline(0);
    send(AP, V_BALL + 1);
    must("none is lost", work(here, &volleys[0], &volleys[1], VOLLEYS));
    must("nor a deadline", work(LOAD_COMPUTE, &deadlines[0], &deadlines[0], wanted));
    end();
    eq("here", volleys[0], VOLLEYS);
    eq("there", volleys[1], VOLLEYS);
}

static void burst(u32 there)
{
    test("load: a burst of IPIs merges, and its last one is not lost, while the other processor is to %s", load_name[there]);
    letters = seen = bursts = 0;
    begin(there);
    for (u32 i = 1; i <= 2000; i++) {
        letters = i;
        send(AP, V_BURST + 1);
    }
    must("the last one", wait_for(&seen, 2000));
    u32 n = bursts;
    must("no more than were sent", n <= 2000 + 1); /* and the one that ended the load before */
    end();
}

/* It goes on, whatever merged, and ends. */
static void periodic(u32 here)
{
    test("load: the periodic timer, while the processor is to %s", load_name[here]);
    begin(LOAD_CALLS);
    periods = 0;
    apic_write(APIC_TIMER_DIV, 0xb);
    apic_write(APIC_LVT_TIMER, V_PERIODIC | 1 << 17);
    apic_write(APIC_TIMER_INIT, 2000000); /* of an unknown clock: 2 ms of 1 GHz */
    must("it goes on", work(here, &periods, &periods, 30));
    apic_write(APIC_LVT_TIMER, 1 << 16);
    apic_write(APIC_TIMER_INIT, 0);
    end();
    u32 after = periods;
    for (int i = 0; i < 1000; i++) {
        asm volatile("sti; nop; cli");
        pause();
    }
    must("none when it is masked, but for one that was pending", periods - after <= 1);
}

int main(void)
{
    apic_map();
    apic_enable();
    /* Two sets of tables, the same but for the root. */
    spaces[0] = read_cr3();
    spaces[1] = page_new();
    memcpy((void *)spaces[1], (void *)(spaces[0] & PTE_ADDR), 4096);
    handler(V_DEADLINE, deadline_0);
    handler(V_DEADLINE + 1, deadline_1);
    handler(V_BEGIN, deadline_begin);
    handler(V_BALL, ball_0);
    handler(V_BALL + 1, ball_1);
    handler(V_BURST + 1, burst_1);
    handler(V_PERIODIC, periodic_0);
    test("load: the second processor starts");
    must("started", start_ap());
    apic_write(APIC_LVT_TIMER, V_DEADLINE | 2 << 17);
    for (u32 i = 0; i < LOADS; i++) {
        timers(i, (i + 2) % LOADS);
        balls(i, (i + 3) % LOADS);
        burst(i);
    }
    for (u32 i = 0; i < LOADS; i++)
        periodic(i);
    done();
}
