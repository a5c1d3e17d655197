#!/bin/bash
# The command line with a real guest: streams and statuses of commands, ends of the guest, the console in all its forms. What does not need a
# guest that boots is in tests/unit/run_test.c.
. "$(dirname "$0")/../lib/tap.sh"
run=(run --engine "$ENGINE" --quiet)

# --- commands ---
doppel "${run[@]}" --status-file "$tmp/status" -- sh -c 'echo out; echo err >&2; exit 3' </dev/null
is "command: exit status" "$status" 3
is "command: standard output" "$out" out
is "command: standard error" "$err" err
like "command: status file" "$(cat "$tmp/status")" $'^status=3\nend=exited\nfailed=command\nreason='

doppel run -- uname -r </dev/null
is "auto: one line of output" "$(wc -l <"$tmp/out")" 1
like "auto: the engine comes first on standard error" "$(head -n 1 "$tmp/err")" '^engine: [a-z]+ \(.+\)$'

doppel "${run[@]}" -- sh -c 'kill -9 $$' </dev/null
is "command: 128 + signal" "$status" 137
doppel "${run[@]}" -- /no/such/program </dev/null
is "command: not found" "$status" 127
like "command: not found, and told so" "$err" '/no/such/program'

timeout -k 10 "$BOOT_SECONDS" "$DOPPEL" "${run[@]}" -- yes 2>"$tmp/err" | head -c 100000 >"$tmp/out"
is "command: the reader of its output leaves" "${PIPESTATUS[0]}" 141
is "command: and has what it wanted" "$(wc -c <"$tmp/out")" 100000
is "command: nothing is said about it" "$(cat "$tmp/err")" ""

(echo one; sleep 1; echo two) | timeout -k 10 "$BOOT_SECONDS" "$DOPPEL" "${run[@]}" -- sh -c 'cat; echo end' >"$tmp/out" 2>"$tmp/err"
is "command: end of file is passed on" "$(cat "$tmp/out")" $'one\ntwo\nend'

doppel "${run[@]}" --verbose --disk /dev/null -- true </dev/null 2>/dev/null
is "quiet and verbose contradict each other" "$status" 64

# --- a terminal ---
if command -v script >/dev/null; then
    on_terminal() { timeout -k 10 "$BOOT_SECONDS" script -qec "$1" /dev/null </dev/null | tr -d '\r'; }
    got=$(TERM=vt220 on_terminal "stty rows 33 cols 99; $DOPPEL ${run[*]} -- sh -c 'stty size; tty; echo \$TERM; exit 4'; echo status \$?; stty -a | grep -o -- '-*icanon'")
    like "terminal: size, kind and status" "$got" $'33 99\n/dev/pts/[0-9]+\nvt220\nstatus 4'
    like "terminal: restored" "$got" $'\nicanon'
else
    skip "terminal: size, kind and status" "script is not installed (package bsdutils)"
fi

# --- the guest's ends ---
doppel "${run[@]}" --status-file "$tmp/status" -- sh -c 'echo c >/proc/sysrq-trigger' </dev/null
is "panic: exit status" "$status" 70
like "panic: the kernel's last words are shown" "$err" 'Kernel panic'
like "panic: status file" "$(cat "$tmp/status")" $'end=panic\nfailed=guest'

doppel "${run[@]}" --append reboot=t -- reboot -f </dev/null
is "triple fault: exit status" "$status" 71
like "triple fault: the processor's state is shown" "$err" $'\nrip [0-9a-f]{16}'

printf 'echo shell; reboot\n' | timeout -k 10 "$BOOT_SECONDS" "$DOPPEL" "${run[@]}" --no-reboot --stats=json,file="$tmp/once" >"$tmp/out" 2>"$tmp/err"
is "reset with --no-reboot: exit status" $? 0
like "shell: runs what is piped into it" "$(tr -d '\r' <"$tmp/out")" $'\nshell\n'

# What is typed before a reset is lost with the guest's memory: the second line has to wait for the second shell.
(echo reboot; for _ in $(seq "$BOOT_SECONDS"); do [ "$(grep -c '^BusyBox' "$tmp/out")" = 2 ] && break; sleep 1; done; echo poweroff) |
    timeout -k 10 "$BOOT_SECONDS" "$DOPPEL" "${run[@]}" --stats=json,file="$tmp/twice" >"$tmp/out" 2>"$tmp/err"
is "reset: boots again, and then powers off" $? 0
is "reset: two boots" "$(grep -c '^BusyBox' "$tmp/out")" 2
cached() { sed -n -E 's/.*"cache":\{[^}]*"kib":([0-9]+).*/\1/p' "$1"; }    # KiB of translations, if the engine makes any
if [ -n "$(cached "$tmp/once")" ]; then
    is "reset: translations of the first boot are gone ($(cached "$tmp/once") and $(cached "$tmp/twice") KiB)" \
        "$(($(cached "$tmp/twice") * 10 < $(cached "$tmp/once") * 17))" 1
else
    skip "reset: translations of the first boot are gone" "the engine makes none"
fi

# --- signals ---
timeout -k 10 "$BOOT_SECONDS" "$DOPPEL" "${run[@]}" --console "$tmp/console" </dev/null 2>"$tmp/err" &
job=$!
for _ in $(seq "$BOOT_SECONDS"); do grep -q '# ' "$tmp/console" 2>/dev/null && break; sleep 1; done
kill -TERM $job
wait $job
is "SIGTERM: the power button ends the guest in order" $? 0
like "SIGTERM: the guest powered itself off" "$(cat "$tmp/console")" 'Power down'

# Pressed when nobody listens yet: it is pressed again. (No -k: it would count from the first signal.) --foreground: timeout's own second signal
# cannot be what ends it.
timeout --foreground "$BOOT_SECONDS" "$DOPPEL" "${run[@]}" -- sleep 1000 </dev/null >"$tmp/out" 2>"$tmp/err" &
job=$!
sleep 1.5
kill -TERM $job                                     # which timeout passes on
wait $job
is "SIGTERM while the guest boots: it is not lost" $? 143

# Another guest does not tell when it listens: the button is pressed until it does.
guest=${DOPPEL_GUEST:-${BUILD:-$top/build}/guest}
mkdir "$tmp/rd"
cat >"$tmp/rd/late" <<'I'
#!/bin/busybox sh
export PATH=/bin:/sbin
busybox mount -t devtmpfs none /dev
while read -r m; do insmod "$m"; done </etc/modules
sleep 2
for e in /dev/input/event*; do { head -c 1 "$e" >/dev/null; poweroff -f; } & done
wait
I
chmod 755 "$tmp/rd/late"
(cd "$tmp/rd" && echo late | cpio --quiet -o -H newc) >"$tmp/more.cpio"
cat "$guest/initrd" "$tmp/more.cpio" >"$tmp/initrd"
# timeout hands the signal on to its process only: in the background its group would get it as well, and a second one ends doppel at once.
timeout --foreground "$BOOT_SECONDS" "$DOPPEL" "${run[@]}" --console none --kernel "$guest/vmlinuz" --initrd "$tmp/initrd" \
    --append "console=ttyS0 quiet panic=-1 cryptomgr.notests=1 rdinit=/late" </dev/null >"$tmp/out" 2>"$tmp/err" &
job=$!
sleep 1
kill -TERM $job
for _ in $(seq "$BOOT_SECONDS"); do kill -0 $job 2>/dev/null || break; sleep 1; done
kill -KILL $job 2>/dev/null
wait $job
is "SIGTERM while another guest boots: it is not lost" $? 0

# --- console on a socket, and the monitor ---
if command -v socat >/dev/null; then
    timeout -k 10 "$BOOT_SECONDS" "$DOPPEL" "${run[@]}" --console "unix:$tmp/socket" </dev/null >"$tmp/out" 2>"$tmp/err" &
    job=$!
    for _ in 1 2 3 4 5 6 7 8 9 10; do [ -S "$tmp/socket" ] && break; sleep 0.5; done
    is "console socket: private" "$(stat -c %a "$tmp/socket")" 600
    echo 'echo first client' | timeout "$BOOT_SECONDS" socat -t 1 - "UNIX-CONNECT:$tmp/socket" >"$tmp/first"
    (sleep 8; echo 'echo second client'; sleep 2; echo poweroff; sleep 20) | timeout "$BOOT_SECONDS" socat - "UNIX-CONNECT:$tmp/socket" >"$tmp/second"
    wait $job
    is "console socket: exit status" $? 0
    like "console socket: a client may leave and another come" "$(cat "$tmp/second")" 'second client'
    is "console socket: removed at the end" "$([ -e "$tmp/socket" ] && echo there)" ""
else
    skip "console socket" "socat is not installed"
fi

(sleep 2; printf '\1cinfo\npause\nresume\n\n\1x') | timeout -k 10 "$BOOT_SECONDS" "$DOPPEL" "${run[@]}" >"$tmp/out" 2>"$tmp/err"
is "monitor: Ctrl-A X ends" $? 0
like "monitor: info shows the processor" "$(tr -d '\r' <"$tmp/out")" $'state: running.*\nrip [0-9a-f]{16}'

# The terminal is raw from the guest's start to its end, whatever faults the engine takes: a key arrives without a newline, and is not echoed by the host.
for engine in interp bt; do
    : >"$tmp/typed"; mkfifo "$tmp/keys-$engine"; exec 9<>"$tmp/keys-$engine"
    timeout -k 10 "$BOOT_SECONDS" script -qec "stty rows 30 cols 100; '$DOPPEL' run --quiet --net none --engine $engine -- sh -c 'stty raw -echo; echo go; head -c 1 | od -An -tx1; echo end'; stty -a" \
        /dev/null <"$tmp/keys-$engine" >"$tmp/typed" 2>&1 &
    job=$!
    for ((i = 0; i < BOOT_SECONDS * 5; i++)); do grep -q '^go' "$tmp/typed" && break; sleep 0.2; done
    printf '~' >&9
    for ((i = 0; i < 300; i++)); do grep -q '^ *7e' "$tmp/typed" && break; sleep 0.2; done
    exec 9>&-
    wait $job
    typed=$(tr -d '\r' <"$tmp/typed")
    like "terminal, $engine: a key arrives as it is typed" "$typed" $'go\n+ *7e'
    is "terminal, $engine: the host does not echo it" "$(grep -c '~' "$tmp/typed")" 0
    like "terminal, $engine: it is given back as it was" "$typed" $'[^-]icanon.*[^-]echo '
done

# A guest that stood still has the right time afterwards.
(for _ in $(seq "$BOOT_SECONDS"); do grep -q '~# ' "$tmp/paused" && break; sleep 1; done
    printf '\1cpause\n'; sleep 8; printf 'resume\n\n'; sleep 3; date +%s >"$tmp/sent"; printf 'echo at $(date +%%s)\npoweroff\n') 2>/dev/null |
    timeout -k 10 "$BOOT_SECONDS" "$DOPPEL" "${run[@]}" >"$tmp/paused" 2>"$tmp/err"
at=$(tr -d '\r' <"$tmp/paused" | sed -n 's/^at //p')
is "pause: the guest's clock is right after it" "$((${at:-0} >= $(cat "$tmp/sent") - 2))" 1

done_testing
