#!/bin/bash
# The gdb stub with the real gdb: source-level debugging of a bare-metal program, a Debian kernel with symbols (made from
# its own kallsyms), attaching to a guest that runs, and clients that misbehave.
. "$(dirname "$0")/../lib/tap.sh"
. "$(dirname "$0")/../lib/symbols.sh"
here=$(cd "$(dirname "$0")" && pwd)
ENGINE=${GDB_ENGINE:-interp}
sock=$tmp/gdb

# Starts doppel in the background; $pid. Its output is in $tmp/out and $tmp/err.
start()
{
    rm -f "$sock"
    timeout -k 10 "$BOOT_SECONDS" "$DOPPEL" run --engine "$ENGINE" "$@" >"$tmp/out" 2>"$tmp/err" </dev/null &
    pid=$!
    for _ in $(seq 100); do [ -S "$sock" ] && return; sleep 0.1; done
    echo "# doppel does not listen: $(cat "$tmp/err")"
}
finish() { wait "$pid"; status=$?; out=$(tr -d '\0' <"$tmp/out"); }
# Commands on standard input; $said.
debug()
{
    { printf 'set pagination off\nset confirm off\nset width 0\nset style enabled off\n'; cat; } >"$tmp/commands"
    said=$(timeout -k 5 "$BOOT_SECONDS" gdb -q -nx -batch -x "$tmp/commands" "$@" 2>&1)
}
# gdb has no answer of its own to "what does $1 say?": pattern over several lines.
says() { if [[ $said =~ $2 ]]; then ok "$1"; else not_ok "$1" "gdb said:" "$said" "wanted: $2"; fi; }

# --- a bare-metal program, at source level ---
gcc -m32 -march=i686 -g -O0 -ffreestanding -fno-pic -no-pie -fno-stack-protector -fcf-protection=none -nostdlib -static \
    -Wl,--build-id=none -Wl,-Ttext-segment=0x100000 -Wl,-z,noseparate-code -Wl,-e,start -o "$tmp/bare.elf" "$here/gdb/bare.c"
bare=(--kernel "$tmp/bare.elf" --debug-exit --console none --gdb "unix:$sock,wait,i386")
start "${bare[@]}"
is "the socket is private" "$(stat -c %a "$sock")" 600
debug "$tmp/bare.elf" <<END
target remote $sock
break work
continue
info args
next
next
step
bt
finish
watch watched
continue
continue
delete
hbreak spin
continue
delete
rwatch increment
continue
delete
stepi
echo registers:\n
p \$cr0
set \$xmm3.uint128 = 0x1234567890abcdef
p/x \$xmm3.uint128
echo memory:\n
monitor phys on
x/2xw 0x100000
monitor phys off
dump binary memory $tmp/memory 0x100000 0x104000
x/1xb 0xfffffff0
END
says "a breakpoint, with arguments" 'Breakpoint 1, work \(rounds=5\).*rounds = 5'
says "steps by line, into a function" 'add \(a=0, b=0\) at '
says "a backtrace" '#1 .* work \(rounds=5\).*#2 .* kernel_main'
says "the end of a function, and its value" 'Value returned is \$1 = 0'
says "a watchpoint stops behind each change" 'Old value = 0.New value = 10.*Old value = 10.New value = 11'
says "a hardware breakpoint" 'Breakpoint 3, spin'
says "a read watchpoint" 'Hardware read watchpoint 4: increment..Value = 1'
says "a control register, by its flags" 'registers:.\$[0-9]+ = \[ PE ET NE \]'
says "a vector register can be written" '= 0x1234567890abcdef'
says "memory by physical address" '0x100000:.0x464c457f'
says "no memory is an error" 'Cannot access memory at address 0xfffffff0'
kill -QUIT "$pid"; finish
is "gdb goes, and doppel obeys signals as before" "$status" 131

start "${bare[@]}"
debug "$tmp/bare.elf" <<END
target remote $sock
break spin
continue
set var increment = 3
continue
END
finish
says "gdb sees the guest's end" 'Remote target\) exited with code 033'
is "a variable that gdb changed" "$status" 27

# --- a triple fault is seen before it is the end ---
start "${bare[@]}"
debug "$tmp/bare.elf" <<END
target remote $sock
break spin
continue
set \$esp = 0x90000000
set \$eip = 0x90000000
continue
info registers eip
continue
END
finish
says "a processor that shuts down stops" 'SIGSEGV'
says "and shows where" 'eip +0x90000000'
is "then it is the end" "$status" 71

# --- a Debian kernel ---
doppel run --engine "$ENGINE" --append nokaslr -- cat /proc/kallsyms
symbols_make "$tmp/out" "$tmp/vmlinux"

start --cpus 2 --gdb "unix:$sock,wait" --append nokaslr -- sh -c \
    'uname -r; i=0; while [ $i -lt 50 ]; do cat /proc/uptime >/dev/null; i=$((i+1)); done; echo done'
debug "$tmp/vmlinux" <<END
target remote $sock
break start_kernel
continue
bt 2
x/i \$pc
p \$efer
stepi
echo step:\n
x/i \$pc
nexti
delete
hbreak kernel_init
continue
bt 2
delete
watch *(long*)&jiffies_64
continue
delete
break do_sys_openat2
continue
bt 2
finish
delete
info threads
break __x64_sys_newuname
continue
delete
break entry_SYSCALL_64
continue
x/i \$rcx-2
delete
detach
END
finish
says "the kernel stops at start_kernel" 'hit Breakpoint 1, 0x[0-9a-f]+ in start_kernel'
says "a backtrace with symbols" '#0 .* start_kernel \(\).#1 .* secondary_startup_64_no_verify'
says "instructions, in 64-bit mode" '<start_kernel>:.call +0x[0-9a-f]+ <__fentry__>'
says "EFER" '\[ SCE LME LMA NXE \]'
says "a step" 'step:.=> 0x[0-9a-f]+ <__fentry__>'
says "a hardware breakpoint, in another task" '#0 .* kernel_init \(\).#1 .* ret_from_fork'
says "a variable of the kernel's is watched" 'Old value = ([0-9]+).New value = [0-9]+.*(do_timer|tick_do_update_jiffies64)'
says "a system call, from its caller" '#0 .* do_sys_openat2 \(\).#1 .* __(x64|ia32)_sys_open|#1 .* do_sys_open'
says "two processors are two threads" '1 +Thread 1 \(vCPU 0.* 2 +Thread 2 \(vCPU 1, '
says "a breakpoint that a program's system call meets" 'hit Breakpoint [0-9]+, 0x[0-9a-f]+ in __x64_sys_newuname'
says "code of the program that made it" '0x[0-9a-f]+:.syscall'
is "after all that the guest ends as it should" "$status" 0
like "and did its work" "$out" 'done$'

# --- a guest that runs already; a TCP port; clients that misbehave ---
port=$((20000 + RANDOM % 12000))
timeout -k 10 "$BOOT_SECONDS" "$DOPPEL" run --engine "$ENGINE" --gdb "$port" -- \
    sh -c 'echo up; while [ "$(cut -d. -f1 /proc/uptime)" -lt 20 ]; do :; done; echo over' \
    >"$tmp/out" 2>"$tmp/err" </dev/null &
pid=$!
for _ in $(seq 100); do (: <"/dev/tcp/127.0.0.1/$port") 2>/dev/null && break; sleep 0.1; done
rubbish()                                           # what is sent; nothing is read
{
    { exec 3<>"/dev/tcp/127.0.0.1/$port"; } 2>/dev/null && { cat >&3; exec 3>&-; } 2>/dev/null
}
head -c 300000 /dev/urandom | rubbish
printf '$m0,ffffffffffffffff#00$G%0100000d' 0 | rubbish
printf '+$?#3f$Z0,ffffffff81000000,1#00$vCont;c#a8' | rubbish
for n in 1 2; do
    debug <<END
target remote :$port
info registers rip
info threads
detach
END
    says "attach to a guest that runs, after clients that misbehaved, and detach ($n)" 'rip +0x[0-9a-f]+.*Thread 1 \(vCPU 0.*detached'
done
finish
is "it never noticed" "$status $(tail -n 1 "$tmp/out")" "0 over"

# --- what cannot be ---
doppel run --engine "$ENGINE" --gdb 0 -- true
is "a port that is none is a usage error" "$status" 64
doppel run --engine "$ENGINE" --gdb 70000,wait -- true
is "nor is a large number one" "$status" 64
doppel run --engine "$ENGINE" --gdb "unix:$tmp/no/such/place" -- true
like "a path that cannot be" "$status $err" '^1 .*--gdb unix:.*cannot listen'
done_testing
