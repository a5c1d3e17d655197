# The cases of the soak tests. One shell script for guest and host; in both it runs in the Debian root of tests/soak/root,
# with this folder's programs in /soak.
#
#   cases.sh list                   NAME KIND: "same": its output must be the host's; "self": it checks itself, in a guest only
#   cases.sh run NAME               the case; status 0, or 77: it cannot run, and the last line of its output says why
#
# SOAK_LONG, if it is not empty, makes them longer; SOAK_GUEST is not empty in a guest. Output of a "same" case holds nothing that depends on time.
export LC_ALL=C PATH=/usr/sbin:/usr/bin:/sbin:/bin:/usr/games HOME=/tmp
long=${SOAK_LONG:-}
pick() { if [ -n "$long" ]; then echo "$2"; else echo "$1"; fi; }      # short, long
cannot() { echo "$*"; exit 77; }
stress() { stress-ng --verify --no-rand-seed --temp-path /tmp -t "$(pick 1 30)" "$@" >/tmp/stress.log 2>&1 ||
    { grep -v 'info:' /tmp/stress.log | tail -n 5; return 1; }; }
T=/sys/kernel/tracing

# ---- stress-ng: every stressor verifies what it did ----
CASES="cpu:self vm:self fork:self signal:self futex:self timer:self mmap:self icache:self"
case_cpu() { stress --cpu 2 --cpu-method all; }
case_vm() { stress --vm 2 --vm-bytes "$(pick 16M 128M)" --vm-method all; }
case_fork() { stress --fork 2 && stress --vfork 1 --clone 1; }
case_signal() { stress --sigq 1 --sigsegv 1 --sigfpe 1 && stress --signest 1 --sigsuspend 1 --sigpending 1; }
case_futex() { stress --futex 2; }
case_timer() { stress --timer 1 --timer-freq "$(pick 1000 5000)" --itimer 1 --itimer-freq 1000 --timerfd 1; }
case_mmap() { stress --mmap 2 --mmap-bytes 8M --mprotect 1 --mremap 1; }
case_icache() { stress --icache 2; }
# How late a sleeping program wakes: figures, and no sleep that ends early or never.
CASES="$CASES cyclictest:self"
case_cyclictest()
{
    cyclictest -q -m -t 2 -i 1000 -d 500 -l "$(pick 1000 60000)" >/tmp/log 2>&1 || { tail -n 5 /tmp/log; return 1; }
    sed -n 's/^T: *\([0-9]*\).*Min: *\(-*[0-9]*\).*Avg: *\([0-9]*\) Max: *\([0-9]*\).*/thread \1: microseconds late: least \2, mean \3, most \4/p' /tmp/log | tee /tmp/late
    [ "$(grep -c 'least [0-9]' /tmp/late)" = 2 ]
}
if [ -n "$long" ]; then
    CASES="$CASES strings:self kernel:self threads:self memory:self vectors:self"
    case_strings() { stress --str 1 --wcs 1 --zlib 1 --hash 1 --bsearch 1 --qsort 1 --tree 1; }
    # Not --procfs: it reads /proc/kmsg, and then waits for good where the kernel says nothing more.
    case_kernel() { stress --context 1 --switch 1 --pipe 1 --poll 1 --sem 1 --shm 1 --msg 1 --get 1; }
    case_threads() { stress --pthread 1 --membarrier 1 --tlb-shootdown 2 --clone 1; }
    case_memory() { stress --memcpy 1 --memfd 1 --bigheap 1 --bigheap-growth 1M --brk 1 --stack 1 --madvise 1; }
    case_vectors() { stress --vecmath 1 --matrix 1 --fp 1 --nop 1 --jit 1 2>/dev/null || stress --vecmath 1 --matrix 1 --nop 1; }
fi

# ---- programs whose output is known, from the host ----
CASES="$CASES openssl:same openssl-isa:same openssl-speed:self 7z:self sqlite:same perl:same python:same node:same gcc:same i386:same gdb:same jit:same"

# Digests, ciphers there and back, keys and signatures that verify.
case_openssl()
{
    head -c "$(pick 200000 5000000)" /usr/bin/openssl >/tmp/in
    for d in md5 sha1 sha256 sha512 sha3-256 blake2b512 sm3 shake256; do openssl dgst -$d /tmp/in || return 1; done
    for c in aes-128-cbc aes-256-ctr aes-256-ofb chacha20 camellia-128-cbc aria-128-cbc sm4-cbc des-ede3-cbc; do
        k=$(openssl dgst -sha256 -r /usr/bin/perl | cut -c1-32)
        case $c in
            *256* | chacha20) k=$k$k ;;
            des-ede3*) k=$k${k%????????????????} ;;
        esac
        iv=0123456789abcdef0123456789abcdef
        case $c in des-ede3*) iv=0123456789abcdef ;; esac
        openssl enc -$c -K "$k" -iv $iv -in /tmp/in -out /tmp/out || return 1
        echo "$c $(sha256sum </tmp/out)"
        openssl enc -d -$c -K "$k" -iv $iv -in /tmp/out | cmp - /tmp/in || return 1
    done
    for a in "RSA -pkeyopt rsa_keygen_bits:$(pick 1024 3072)" "EC -pkeyopt ec_paramgen_curve:P-256" \
        "EC -pkeyopt ec_paramgen_curve:P-384" ED25519 ED448; do
        # shellcheck disable=SC2086
        openssl genpkey -algorithm $a -out /tmp/key 2>/dev/null && openssl pkey -in /tmp/key -pubout -out /tmp/pub || return 1
        head -c 60 /tmp/in >/tmp/short
        openssl pkeyutl -sign -rawin -inkey /tmp/key -in /tmp/short -out /tmp/sig &&
            openssl pkeyutl -verify -rawin -pubin -inkey /tmp/pub -in /tmp/short -sigfile /tmp/sig || return 1
    done
    openssl prime -generate -bits 256 | { read -r p; openssl prime "$p" | grep -o 'is prime'; }
}
# The same digests by each set of instructions that the library knows: masks of CPUID leaves 1 and 7.
case_openssl_isa()
{
    head -c 100000 /usr/bin/openssl >/tmp/in
    for mask in '' '~0x200000200000000' ':~0xffffffff' '~0x1000000000000000:~0xffffffff' '~0x1a00020000000000:~0xffffffff' ':0'; do
        echo "mask $mask"
        for d in sha1 sha256 sha512; do OPENSSL_ia32cap=$mask openssl dgst -$d /tmp/in || return 1; done
        for c in aes-128-ctr chacha20; do
            k=00112233445566778899aabbccddeeff
            [ $c = chacha20 ] && k=$k$k
            OPENSSL_ia32cap=$mask openssl enc -$c -K $k -iv 0123456789abcdef0123456789abcdef -in /tmp/in | sha256sum
        done
    done
}
case_openssl_speed()
{
    openssl speed -mr -seconds 1 -bytes 8192 -evp aes-128-gcm >/tmp/log 2>&1 && grep '^+F' /tmp/log || { tail -n 5 /tmp/log; return 1; }
    [ -z "$long" ] || { openssl speed -mr -seconds 1 sha256 rsa2048 ecdsap256 ecdhx25519 ed25519 >/tmp/log 2>&1 && grep '^+F' /tmp/log; }
}
case_7z()
{
    7z a -bd -mx5 -md1m -mmt2 /tmp/x.7z /usr/lib/x86_64-linux-gnu/libssl.so.3 /usr/bin/openssl >/tmp/log &&
        7z t /tmp/x.7z >>/tmp/log && cd /tmp && 7z e -bd x.7z >>/tmp/log && cmp openssl /usr/bin/openssl &&
        cmp libssl.so.3 /usr/lib/x86_64-linux-gnu/libssl.so.3 || { tail -n 5 /tmp/log; return 1; }
    [ -z "$long" ] || { 7z b 1 -mmt2 -md20 >/tmp/log 2>&1 && grep -E '^(Avr|Tot)' /tmp/log || { tail -n 5 /tmp/log; return 1; }; }
}
case_sqlite()
{
    sqlite3 /tmp/db <<SQL
create table t(a integer primary key, b text, c real);
with recursive n(i) as (select 1 union all select i + 1 from n where i < $(pick 4000 200000))
    insert into t select i, printf('%x-%d', i * 2654435761 % 1000003, i % 97), i / 7.0 from n;
create index tb on t(b); create index tc on t(c desc);
update t set c = c * 2 where a % 3 = 0; delete from t where a % 11 = 5;
select count(*), sum(a), round(sum(c), 4), min(b), max(b) from t;
select substr(b, 1, 2) as k, count(*), round(avg(c), 3) from t group by k having count(*) > 20 order by 2 desc, 1 limit 5;
select count(*) from t x join t y on x.b = y.b and x.a < y.a;
pragma integrity_check; vacuum; pragma integrity_check;
SQL
}
case_perl()
{
    perl -e 'use Digest::SHA "sha256_hex"; use Digest::MD5 "md5_hex"; my $n = shift; my (%h, $s); $s = 1;
        for (1 .. $n) { $s = ($s * 1103515245 + 12345) & 0x7fffffff; my $k = substr(md5_hex($s), 0, 4); $h{$k}++; $h{reverse $k} .= "x" if $k =~ /^(\d)\D+\1?/ }
        my @k = sort { length $h{$a} <=> length $h{$b} || $a cmp $b } keys %h;
        print scalar(@k), " ", sha256_hex(join ",", map { "$_=$h{$_}" } @k), "\n";
        my $t = join " ", @k; my $c = 0; $c++ while $t =~ /\b([0-9a-f])(?:[0-9]|\1){2}[a-f]\b/g; print "$c\n";
        printf "%.15g %.15g\n", sqrt(2) ** 7.5, atan2(1, 3) * exp(2); print join(",", map { $_ ** 3 % 17 } 1 .. 30), "\n"' "$(pick 5000 400000)"
}
case_python()
{
    PYTHONHASHSEED=0 python3 - "$(pick 1 40)" <<'PY'
import sys, zlib, hashlib, json, decimal, random, re, math, struct, bisect, collections, itertools
n = int(sys.argv[1])
random.seed(7)
d = {str(random.getrandbits(40)): [random.random() for _ in range(5)] for _ in range(300 * n)}
t = json.dumps(d, sort_keys=True)
assert json.loads(t) == d
z = zlib.compress(t.encode(), 6)
assert zlib.decompress(z) == t.encode()
print(len(z), hashlib.sha256(z).hexdigest(), zlib.crc32(t.encode()))
decimal.getcontext().prec = 200
print(decimal.Decimal(2).sqrt(), pow(3, 10 ** 4 * n, 10 ** 9 + 7), math.factorial(200 * n) % (2 ** 61 - 1))
print(sum(math.sin(i) * math.exp(-i / 1000) for i in range(3000 * n)).hex())
print(len(re.findall(r'(\d)\1+[^1-5]?', t)), collections.Counter(t).most_common(5))
class A:
    def __init__(self, v): self.v = v
    def __lt__(self, o): return self.v < o.v
l = []
for i in range(1000 * n): bisect.insort(l, A(random.getrandbits(30)))
print(hashlib.md5(struct.pack('%dI' % len(l), *(a.v for a in l))).hexdigest())
def g(k):
    try:
        yield from (i * k for i in range(k))
    finally:
        out.append(k)
out = []
print(sum(itertools.chain.from_iterable(g(k) for k in range(60))), len(out))
def deep(k): return 0 if k == 0 else 1 + deep(k - 1)
print(deep(800))
PY
}
# Hot functions that are compiled, given up when types change, and compiled again; typed arrays; WebAssembly; threads;
# enough garbage for the collector to move code and objects.
case_node()
{
    cat >/tmp/soak.js <<'JS'
const n = +process.argv[2], { Worker, isMainThread, workerData, parentPort } = require('worker_threads');
const crypto = require('crypto');
function mix(h, v) { h = Math.imul(h ^ v, 0x9e3779b1); return (h << 13 | h >>> 19) >>> 0; }
function poly(a, b) { return a + b; }
function work(k, seed) {
    let h = seed;
    for (let i = 0; i < k; i++) h = mix(h, poly(i, i & 3));
    for (let i = 0; i < k / 100; i++) h = mix(h, poly('a' + i, i).length);
    for (let i = 0; i < k / 100; i++) h = mix(h, Math.floor(poly(i * 0.5, 1.25) * 1000));
    return h;
}
if (!isMainThread) {
    parentPort.postMessage(work(workerData.k, workerData.seed));
} else {
    console.log(work(20000 * n, 1));
    class P { constructor(x, y) { this.x = x; this.y = y; } get sum() { return this.x + this.y; } }
    class Q extends P { get sum() { return super.sum * 2; } }
    let s = 0, keep = [];
    for (let i = 0; i < 20000 * n; i++) { const o = i % 3 ? new P(i, 1) : new Q(i, 2); s += o.sum; if (i % 50 === 0) keep.push({ o, t: 'x'.repeat(i % 100) }); if (keep.length > 2000) keep = keep.slice(1000); }
    console.log(s, keep.length);
    const f = new Float64Array(4096), u = new Uint8Array(f.buffer);
    for (let r = 0; r < n; r++) for (let i = 0; i < f.length; i++) f[i] = Math.sqrt(f[i] * 1.0001 + i + r);
    console.log(crypto.createHash('sha256').update(u).digest('hex'));
    let fns = [];
    for (let i = 0; i < 200; i++) fns.push(new Function('a', 'let s = 0; for (let i = 0; i < 50; i++) s = (s * ' + (i + 3) + ' + a + i) | 0; return s;'));
    let t = 0;
    for (let r = 0; r < 10 * n; r++) for (const g of fns) t = mix(t, g(r));
    console.log(t);
    // (func (export "f") (param i32) (result i32): a loop that multiplies and adds
    const i32 = v => { const b = []; for (;;) { const x = v & 127; v >>= 7; if ((v === 0 && !(x & 64)) || (v === -1 && x & 64)) return [...b, x]; b.push(x | 128); } };
    const body = [1, 1, 127, 3, 64, 32, 1, 65, ...i32(-1640531535), 108, 32, 0, 106, 33, 1, 32, 0, 65, 1, 107, 34, 0, 65, 0, 74, 13, 0, 11, 32, 1, 11];
    const wasm = new Uint8Array([0, 97, 115, 109, 1, 0, 0, 0, 1, 6, 1, 96, 1, 127, 1, 127, 3, 2, 1, 0, 7, 5, 1, 1, 102, 0, 0, 10, body.length + 2, 1, body.length, ...body]);
    console.log(new WebAssembly.Instance(new WebAssembly.Module(wasm)).exports.f(10000 * n));
    try { null.x; } catch (e) { console.log(e.constructor.name); }
    console.log((2n ** 521n - 1n) % 1000000007n, JSON.stringify({ a: [1, { b: 'c' }] }), /(\w+)\s\1/.exec('hello hello')[1]);
    let left = 2, got = [];
    for (let w = 0; w < 2; w++) new Worker(__filename, { workerData: { k: 5000 * n, seed: w + 5 } }).on('message', m => { got[w] = m; if (!--left) console.log(got.join()); });
}
JS
    node /tmp/soak.js "$(pick 1 40)"
}
# doppel's own sources; objects must be the same to the byte.
case_gcc()
{
    cd /soak/source || return 1
    for f in $(pick "src/base/loop.c src/io/virtq.c" "$(echo src/base/*.c src/mem/*.c src/io/*.c src/dev/*.c)"); do
        gcc $(pick -O1 '-O2 -g') -std=gnu17 -pthread -Isrc "-DDOPPEL_VERSION=\"soak\"" -c -o /tmp/o.o "$f" || return 1
        echo "$f $(sha256sum </tmp/o.o)"
    done
}
case_i386()
{
    /soak/i386 || return 1
    head -c "$(pick 300000 5000000)" /usr/bin/openssl >/tmp/in
    for a in md5sum sha1sum sha256sum sha512sum sha3sum; do busybox-i386 $a </tmp/in || return 1; done
    busybox-i386 gzip -c </tmp/in >/tmp/in.gz && busybox-i386 gunzip -c </tmp/in.gz | cmp - /tmp/in && sha256sum </tmp/in.gz
    busybox-i386 awk 'BEGIN { for (i = 1; i < 3000; i++) s += sqrt(i) * log(i); printf "%.9f\n", s; for (i = 0; i < 2000; i++) a[i * 7919 % 1009] += i; for (k in a) t += a[k] * k; print t }'
    busybox-i386 sh -c 'i=0; while [ $i -lt 500 ]; do i=$((i + 1)); done; echo $i'
}
# Every step of a program in a debugger: registers after each, a watchpoint, a breakpoint with a condition.
case_gdb()
{
    cat >/tmp/gdb <<'GDB'
set pagination off
set confirm off
define steps
python
for i in range(STEPS):
    gdb.execute("stepi", to_string=True)
    print(" ".join("%x" % (int(gdb.parse_and_eval("$" + r)) % 2 ** 64) for r in ("rax", "rcx", "rdx", "rsi", "rdi", "eflags & 0xcd5")),
        "%x" % int(gdb.parse_and_eval("(unsigned long)$rip")))
end
end
break work
run
steps
watch watched
continue
delete
break leaf if b == 0x9e3779b97f4a7c15 * 9
continue
delete
tbreak strings
continue
steps
info registers rax rbx rbp rsp r12 r15
continue
GDB
    sed -i "s/STEPS/$(pick 150 200)/" /tmp/gdb
    env -i LC_ALL=C PATH="$PATH" HOME=/tmp setarch -R gdb -nx -batch -x /tmp/gdb /soak/step >/tmp/log 2>&1
    grep -vE 'process [0-9]+|warning: |debuginfod|step.c|^$' /tmp/log >/tmp/steps
    cat /tmp/steps
    [ "$(grep -cE '^[0-9a-f]+( [0-9a-f]+){6}$' /tmp/steps)" = "$(pick 300 400)" ] || tail -n 5 /tmp/log
}
case_jit() { /soak/jit "$(pick 500 100000)"; }
# Memory, vector registers and addresses, each word of them known: what these find stands at their beginnings.
CASES="$CASES pages:same registers:same places:same vanish:same starts:same"
case_pages() { /soak/pages "$(pick 10 1000)"; }
case_registers() { /soak/registers "$(pick 30 1000)"; }
case_places() { /soak/places "$(pick 7 1)"; }
# While a guest's kernel swaps, merges equal pages, makes huge ones, and moves pages about. That it swapped and moved is asked for; a kernel need not merge.
case_vanish()
{
    vm() { awk -v n="$1" '$1 ~ n { s += $2 } END { print s + 0 }' /proc/vmstat; }
    if [ -n "${SOAK_GUEST:-}" ]; then
        chroot /proc/1/root mkswap /dev/vdc >/dev/null && chroot /proc/1/root swapon /dev/vdc || return 1
        out=$(vm '^pswpout$') merged=$(vm '^cow_ksm$') moved=$(vm '^pgmigrate_success$')
        { echo 1 >/sys/kernel/mm/ksm/run; echo 1 >/sys/kernel/mm/ksm/sleep_millisecs; echo 1000 >/sys/kernel/mm/ksm/pages_to_scan; } 2>/dev/null
        while :; do echo 1 >/proc/sys/vm/compact_memory; sleep 0.05; done & mover=$!
    fi
    /soak/vanish "$(pick 15 500)" || return 1
    [ -n "${SOAK_GUEST:-}" ] || return 0
    kill $mover
    echo 0 >/sys/kernel/mm/ksm/run
    chroot /proc/1/root swapoff /dev/vdc || return 1
    out=$(($(vm '^pswpout$') - out)) merged=$(($(vm '^cow_ksm$') - merged)) moved=$(($(vm '^pgmigrate_success$') - moved))
    [ "$out" -gt 100 ] && [ "$moved" -gt 0 ] || { echo "pages swapped out: $out, merged and written again: $merged, moved: $moved"; return 1; }
}
# Small programs that start over and over beside one another, while their files leave the cache and come again: each says the same each time. What an access by a wrong base, an entry
# of an earlier owner's, or a lost register does, shows here first: a locale or a path that is not found, once in some hundred starts.
case_starts()
{
    head -c 300000 /usr/bin/gdb >/tmp/in
    one()
    {
        case $1 in
            awk) awk 'BEGIN { for (i = 0; i < 20000; i++) a[i] = i * 1.5; print length(a), a[77] }' ;;
            sha) sha1sum /tmp/in ;;
            perl) perl -e 'my %h; $h{$_} = $_ x 3 for 1 .. 9000; print scalar(keys %h), "\n"' ;;
            python) python3 -c 'import sys, os; print("h\u00e9llo", sys.argv, sys.path)' "arg ä" ;;
            ls) ls /usr/bin | sha1sum ;;
            code) cp /bin/sed /tmp/sed.$2; echo abc | /tmp/sed.$2 s/b/x/; rm /tmp/sed.$2 ;;
        esac 2>&1 || echo "$1: status $?"
    }
    worker()
    {
        k=$1 i=0
        shift
        while [ $i -lt "$(pick 2 60)" ]; do
            i=$((i + 1))
            for p; do echo "$p: $(one "$p" "$k")"; done
            [ -z "${SOAK_GUEST:-}" ] || [ "$k$((i % 4))" != 10 ] || echo 1 >/proc/sys/vm/drop_caches
        done >/tmp/said.$k
    }
    worker 1 awk sha ls code & worker 2 perl sha awk code & worker 3 python ls code &
    wait
    for k in 1 2 3; do sort /tmp/said.$k | uniq -c; done
}

# ---- the kernel's own changes of its code ----
CASES="$CASES ftrace:self kprobes:self uprobes:self bpf:self modules:self patch:self"
tracing()
{
    [ -d $T/events ] || mount -t tracefs tracefs $T 2>/dev/null || mount -t tracefs tracefs /sys/kernel/tracing || cannot "no tracefs"
    cd $T || return 1
}
load_some() { ls -lR /usr/include/x86_64-linux-gnu/bits | wc -l; for _ in 1 2 3 4 5; do /bin/true; done; } >/dev/null
case_ftrace()
{
    tracing || return 1
    grep -qw function available_tracers || cannot "no function tracer"
    echo 200 >buffer_size_kb
    for i in $(seq "$(pick 1 15)"); do
        for t in function function_graph nop; do
            echo 0 >tracing_on; echo >trace
            # Each tracer changes 40,000 places on the way there and back. Once is enough for the short form.
            [ -n "$long" ] || [ $t != function_graph ] || { echo nop >current_tracer; echo 'vfs_* do_sys_* __x64_sys_*' >set_ftrace_filter; }
            echo $t >current_tracer && echo 1 >tracing_on && load_some; echo 0 >tracing_on
            n=$(head -n 20000 trace | grep -c -E 'vfs_|do_sys|__x64_sys|_raw_spin')
            [ $t != nop ] || echo >set_ftrace_filter
            case $t in nop) [ "$n" = 0 ] ;; *) [ "$n" -gt 20 ] ;; esac || { echo "round $i, $t: $n lines"; return 1; }
        done
        echo 'vfs_read vfs_write ext4_*' >set_ftrace_filter && echo function >current_tracer && echo 1 >tracing_on && load_some; echo 0 >tracing_on
        head -n 5000 trace | grep -v '^#' | grep -vqE 'vfs_read|vfs_write|ext4_' && { echo "round $i: the filter lets others through"; return 1; }
        echo >set_ftrace_filter; echo nop >current_tracer
        echo 1 >events/enable && echo 1 >tracing_on && load_some; echo 0 >tracing_on; echo 0 >events/enable
        grep -qc sched_switch trace || { echo "round $i: no events"; return 1; }
    done
    [ -z "$(dmesg 2>/dev/null | grep -E 'WARNING|BUG|ftrace bug')" ] || { dmesg | grep -A5 -E 'WARNING|BUG|ftrace bug' | head; return 1; }
}
case_kprobes()
{
    tracing || return 1
    [ -f kprobe_events ] || cannot "no kprobe events"
    echo nop >current_tracer; echo >kprobe_events
    echo 'p:soak/open do_sys_openat2' >>kprobe_events && echo 'r:soak/opened do_sys_openat2 $retval' >>kprobe_events || return 1
    # Behind the functions' entries by INT3, or by a jump where it fits: every offset that begins an instruction.
    for f in vfs_read vfs_open; do
        i=1
        while [ $i -lt "$(pick 24 200)" ]; do echo "p:soak/${f}_$i $f+$i" >>kprobe_events; i=$((i + 1)); done
    done 2>/dev/null
    probes=$(wc -l <kprobe_events)
    [ "$probes" -gt 6 ] || { echo "$probes probes only"; return 1; }
    hits() { awk -v n="$1" '$1 ~ n { s += $2 } END { print s + 0 }' kprobe_profile; }
    for i in $(seq "$(pick 2 30)"); do
        n=$(hits '^open$') r=$(hits '^opened$') v=$(hits '^vfs_read_')
        echo 1 >events/soak/enable || return 1
        sleep 0.3                                   # the optimizer's turn: jumps replace INT3
        for k in 1 2 3 4 5 6 7 8 9 10; do read -r line </etc/passwd; done
        echo 0 >events/soak/enable
        n=$(($(hits '^open$') - n)) r=$(($(hits '^opened$') - r)) v=$(($(hits '^vfs_read_') - v))
        [ "$n" -ge 10 ] && [ "$r" -ge 10 ] && [ "$v" -ge 10 ] || { echo "round $i: $n calls, $r returns, $v inside vfs_read"; return 1; }
    done
    echo "$probes probes, $(awk '{ h += $2; m += $3 } END { print h " hits, " m " missed" }' kprobe_profile)"
    echo >kprobe_events
}
# A breakpoint that the kernel writes into a program's page, with single steps out of line.
case_uprobes()
{
    tracing || return 1
    [ -f uprobe_events ] || cannot "no uprobe events"
    place() { printf '/soak/step:0x%x' $((0x$(nm /soak/step | awk -v n="$1" '$3 == n { print $1 }') - 0x400000)); }
    echo >uprobe_events
    echo "p:soaku/leaf $(place leaf)" >>uprobe_events && echo "p:soaku/strings $(place strings)" >>uprobe_events &&
        echo "r:soaku/leaf_returns $(place leaf)" >>uprobe_events || return 1
    /soak/step; want=$?
    echo >trace; echo 1 >events/soaku/enable && echo 1 >tracing_on || return 1
    for i in 1 2 3 4 5; do /soak/step; [ $? = $want ] || { echo "round $i: status $?, not $want"; return 1; }; done
    echo 0 >tracing_on; echo 0 >events/soaku/enable
    n="$(grep -c 'leaf: (' trace) $(grep -c 'strings: (' trace) $(grep -c 'leaf_returns: (' trace)"
    echo >uprobe_events
    echo "$n"
    [ "$n" = "60 5 60" ]
}
case_bpf()
{
    echo 1 >/proc/sys/net/core/bpf_jit_enable
    /soak/bpf "$(pick 60 3000)" 11 && { echo 2 >/proc/sys/net/core/bpf_jit_harden; /soak/bpf "$(pick 20 500)" 12; } 2>&1
}
# The default guest's modules, by its own modprobe.
case_modules()
{
    for i in $(seq "$(pick 3 100)"); do
        for m in virtio_balloon virtio_net; do chroot /proc/1/root modprobe $m || return 1; done
        [ "$(grep -cE '^(virtio_balloon|virtio_net) ' /proc/modules)" = 2 ] || { cat /proc/modules; return 1; }
        for m in virtio_net net_failover failover virtio_balloon; do chroot /proc/1/root rmmod $m || return 1; done
    done
    ! grep -E '^(virtio_net|failover) ' /proc/modules
}
case_patch()
{
    [ -f /soak/module/soak.ko ] || cannot "$(cat /soak/module/why)"
    for i in $(seq "$(pick 1 5)"); do
        insmod /soak/module/soak.ko rounds="$(pick 60 500)" || { dmesg | grep soak: | tail -n 4; return 1; }
        rmmod soak || return 1
    done
    dmesg | grep soak: | tail -n 2
}

case ${1-} in
    list) for c in $CASES; do echo "${c%:*} ${c#*:}"; done ;;
    run) "case_$(echo "$2" | tr - _)" ;;
    *) exit 64 ;;
esac
