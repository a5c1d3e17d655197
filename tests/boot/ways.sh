#!/bin/bash
# Ways into a guest, as an ordinary user: names and the directory of running VMs, ps, kill, rm, detached runs; exec with statuses, streams, signals and a
# terminal; cp; vsock from host to guest, back, and between guests. SOAK_LONG makes the streams longer.
. "$(dirname "$0")/../lib/tap.sh"
guest=${DOPPEL_GUEST:-${BUILD:-$top/build}/guest}
stream=${BUILD:-$top/build}/boot/stream
MiB=${SOAK_LONG:+256}; MiB=${MiB:-16}
memory=${SOAK_LONG:+1G}; memory=${memory:-256M}           # cp puts so much into the guest's, twice

# All in a place where an ordinary user can be: the build may be in a home that others cannot enter.
user=()
chmod 755 "$tmp"
mkdir -m 700 "$tmp/rt" "$tmp/home"
cp "$DOPPEL" "$tmp/doppel"; cp "$stream" "${stream%stream}kexec" "$tmp/"; cp -r "$guest" "$tmp/guest"; chmod -R a+rX "$tmp/guest"
export DOPPEL_GUEST=$tmp/guest XDG_RUNTIME_DIR=$tmp/rt HOME=$tmp/home
if [ "$(id -u)" = 0 ]; then
    chown 65534:65534 "$tmp/rt" "$tmp/home"
    user=(setpriv --reuid 65534 --regid 65534 --clear-groups)
    "${user[@]}" test -x "$tmp/doppel" || { skip "ways in" "an ordinary user cannot reach $tmp"; done_testing; }
fi
D=$tmp/doppel R=$tmp/rt/doppel
d() { timeout -k 10 "$BOOT_SECONDS" "${user[@]}" "$D" "$@"; }
# The same, leaving $status, $out, $err.
run() { d "$@" >"$tmp/out" 2>"$tmp/err"; status=$?; out=$(cat "$tmp/out"); err=$(cat "$tmp/err"); }
until_true()                                        # command...
{
    local i
    for i in $(seq $((BOOT_SECONDS * 5))); do "$@" && return; sleep 0.2; done
    return 1
}
start() { d run --engine "$ENGINE" --quiet --detach="$BOOT_SECONDS" --memory $memory "$@" </dev/null; }
trap 'for n in a b c; do timeout 20 "${user[@]}" "$D" rm $n; done >/dev/null 2>&1; rm -rf "$tmp"' EXIT

# --- names ---
port=$((20000 + $$ % 12000))
is "detach: tells the name" "$(start --name a --publish $port:80 2>&1)" a
is "the directory is private" "$(stat -c %a "$R" "$R/a" | paste -sd ' ')" "700 700"
is "sockets are private" "$(stat -c '%a %F' "$R/a/control" "$R/a/vsock" | sort -u)" "600 socket"
run run --quiet --detach --name a; is "a name in use: status" "$status" 1
like "a name in use: told" "$err" 'a VM of that name runs already'
for n in "" a/b .x -x "a
b" "a b" "$(printf 'n%.0s' {1..64})" ../x; do
    run run --quiet "--name=$n"; is "bad name $(printf %q "$n"): status" "$status" 64
done
run ps; is "ps: status" "$status" 0
like "ps: the VM" "$out" $'\na +[0-9]+ (bt|kvm|interp) +1 +'$memory' running +[0-9]:[0-9]+:[0-9]+ +3 +[0-9]+:80'
is "control socket: a line, and its answer" "$(printf 'status\n' | "${user[@]}" timeout 20 "$tmp/stream" unix "$R/a/control" | grep -E '^(name|state)=')" $'name=a\nstate=running'
d exec a -- true; is "exec: status 0" $? 0
pid=$(awk '$1=="a"{print $2}' "$tmp/out")
kill -STOP "$pid"; run ps; like "ps: one that does not answer" "$out" $'\na +[0-9]+ \\? '
kill -CONT "$pid"

# --- exec ---
run exec a -- sh -c 'echo out; echo err >&2; exit 3' </dev/null
is "exec: status" "$status" 3; is "exec: standard output" "$out" out; is "exec: standard error" "$err" err
run exec a -- sh -c 'kill -9 $$' </dev/null; is "exec: 128 + signal" "$status" 137
run exec a -- /no/such/program </dev/null; is "exec: not found" "$status" 127
run exec a -- /etc/passwd </dev/null; is "exec: cannot be run" "$status" 126
run exec a -u nosuch -- true </dev/null; is "exec: no such user" "$status" 126
d exec a -- sh -c 'echo u:x:1234:1234::/tmp:/bin/sh >>/etc/passwd; echo g:x:77:u >>/etc/group' </dev/null
run exec a -u u -- sh -c 'id -u; id -G; pwd; echo $HOME $USER' </dev/null
is "exec: as a user" "$out" $'1234\n1234 77\n/tmp\n/tmp u'
run exec a; is "exec: no command" "$status" 64
run exec nosuch -- true; is "exec: no such VM" "$status" 1
is "exec: words as they are" "$(d exec a -- printf '%s|' 'a b' '' '*' $'x\ny' </dev/null)" "a b||*|"$'x\ny|'
is "exec: end of input" "$( (echo one; sleep 1; echo two) | d exec a -- sh -c 'cat; echo end')" $'one\ntwo\nend'
is "exec: no input at all" "$(d exec a -- sh -c 'cat; echo end' <&-)" end
d exec a -- yes 2>"$tmp/err" </dev/null | head -c 100000 | wc -c >"$tmp/out"
is "exec: the reader leaves: the command gets SIGPIPE" "${PIPESTATUS[0]} $(cat "$tmp/out" "$tmp/err")" "141 100000"
is "exec: a command that does not read its input" "$(head -c 8000000 /dev/zero | d exec a -- sh -c 'exec <&-; sleep 1; echo done')" "done"
is "exec: what it leaves in the background is not waited for" "$(d exec a -- sh -c 'sleep 1000 & echo here' </dev/null)" here
head -c $((MiB << 20)) /dev/urandom >"$tmp/data"; sum=$(sha256sum <"$tmp/data")
is "exec: $MiB MiB in" "$(d exec a -- sha256sum <"$tmp/data")" "$sum"
is "exec: $MiB MiB in and out" "$(d exec a -- cat <"$tmp/data" | sha256sum)" "$sum"

timeout --foreground "$BOOT_SECONDS" "${user[@]}" "$D" exec a -- sh -c 'trap "echo got; exit 9" TERM; echo ready; while :; do sleep 0.1; done' </dev/null >"$tmp/sig" 2>&1 &
job=$!
until_true grep -q ready "$tmp/sig"
kill -TERM $job; wait $job; is "exec: SIGTERM is passed on" "$? $(grep got "$tmp/sig")" "9 got"
"${user[@]}" "$D" exec a -- sh -c 'echo $$ >/tmp/pid; echo ready; exec sleep 1000' </dev/null >"$tmp/sig" 2>&1 &
job=$!
until_true grep -q ready "$tmp/sig"
kill -KILL $job; wait $job 2>/dev/null
gone() { ! d exec a -- sh -c 'kill -0 $(cat /tmp/pid)' </dev/null 2>/dev/null; }
until_true gone; is "exec: killed itself, its command goes, too" $? 0

if command -v script >/dev/null; then
    tty() { timeout -k 10 "$BOOT_SECONDS" script -qefc "$1" /dev/null; }
    got=$(TERM=vt220 tty "stty rows 33 cols 99; ${user[*]} $D exec a -t -- sh -c 'stty size; tty; echo \$TERM; exit 4'; echo status \$?; stty -a | grep -o -- '-*icanon'" </dev/null | tr -d '\r')
    like "exec -t: size, terminal, kind, status" "$got" '33 99.*/dev/pts/[0-9]+.*vt220.*status 4'
    like "exec -t: our terminal is as it was" "$got" $'\nicanon'
    # The script that types: the interrupt character goes to the guest's terminal.
    mkfifo "$tmp/keys"
    tty "${user[*]} $D exec a -t -- sh -c 'trap \"echo int; exit 6\" INT; echo ready; while :; do sleep 0.1; done'; echo status \$?" <"$tmp/keys" >"$tmp/typed" &
    job=$!
    exec 7>"$tmp/keys"
    until_true grep -q ready "$tmp/typed"
    printf '\003' >&7
    wait $job; exec 7>&-
    like "exec -t: Ctrl-C" "$(tr -d '\r' <"$tmp/typed")" $'int\nstatus 6'
    # The size changes on the outside while a command runs inside.
    mkfifo "$tmp/keys2"
    tty "tty >$tmp/outer; stty rows 20 cols 50; exec ${user[*]} $D exec a -t -- sh -c 'echo ready; until stty size | grep -q 51; do sleep 0.1; done; stty size'" \
        <"$tmp/keys2" >"$tmp/typed2" 2>&1 &
    job=$!
    exec 7>"$tmp/keys2"
    until_true grep -q ready "$tmp/typed2"
    stty rows 21 cols 51 <"$(cat "$tmp/outer")"
    wait $job; exec 7>&-
    like "exec -t: the window's size, when it changes" "$(tr -d '\r' <"$tmp/typed2")" '21 51'
else
    skip "exec -t" "script is not installed (package bsdutils)"
fi

# --- cp ---
d cp "$tmp/data" a:/tmp/; is "cp in: status" $? 0
is "cp in: $MiB MiB" "$(d exec a -- sha256sum /tmp/data </dev/null)" "${sum% *} /tmp/data"
run cp a:/tmp/data "$tmp/home/back"; is "cp out: status" "$status" 0
is "cp out: $MiB MiB" "$(sha256sum <"$tmp/home/back")" "$sum"
truncate -s 1G "$tmp/holes"; echo end >>"$tmp/holes"           # more than the guest has memory
run cp "$tmp/holes" a:/tmp/; is "cp in: a file with holes" "$status $err $(d exec a -- sh -c 'stat -c %s /tmp/holes; tail -c 4 /tmp/holes' </dev/null | paste -sd ' ')" "0  1073741828 end"
run cp a:/tmp/holes "$tmp/home/holes"; is "cp out: a file with holes" "$status $err $(stat -c %s "$tmp/home/holes") $(($(stat -c %b "$tmp/home/holes") < 1000))" "0  1073741828 1"
rm -f "$tmp/holes" "$tmp/home/holes"; d exec a -- rm /tmp/holes </dev/null
mkdir -p "$tmp/tree/sub/empty"; echo x >"$tmp/tree/sub/file"; chmod 754 "$tmp/tree/sub/file"; chmod 2755 "$tmp/tree/sub"; ln -s ../../nowhere "$tmp/tree/link"
: >"$tmp/tree/none"; chmod 444 "$tmp/tree/none"; touch "$tmp/tree/$(printf 'a\nb')"
list() { (cd "$1" && find . -printf '%p %m %l\n' | sort | sed 's/ 2755/ 755/'); }
d cp -r "$tmp/tree" a:/tmp; is "cp -r in: status" $? 0
run cp -r a:/tmp/tree "$tmp/home"; is "cp -r out: status" "$status" 0
is "cp -r: names, modes, links" "$(list "$tmp/home/tree")" "$(list "$tmp/tree")"
run cp "$tmp/tree" a:/tmp/x; is "cp: a folder without -r" "$status" 1; like "cp: says so" "$err" 'give -r'
run cp a:/no/such "$tmp/home"; is "cp: what is not there" "$status" 1
run cp "$tmp/tree/none" a:/no/such/folder/x; is "cp: into what is not there" "$status" 1
run cp a:/tmp/data "$tmp/none/x"; is "cp: out to where nothing can be" "$status" 1
run cp a:/x a:/y; is "cp: from guest to guest" "$status" 64
d exec a -- mkfifo /tmp/tree/fifo </dev/null
run cp -r a:/tmp/tree "$tmp/home/with"; is "cp -r: a FIFO is left out" "$status" 1; like "cp -r: says so" "$err" 'fifo: neither'
is "cp -r: the rest is there" "$(cat "$tmp/home/with/sub/file")" x
# A guest with no room, and a copy that breaks: no part passes for the whole.
d exec a -- sh -c 'mkdir /tmp/small; mount -t tmpfs -o size=1m none /tmp/small' </dev/null
run cp "$tmp/data" a:/tmp/small; is "cp: no space in the guest" "$status" 1; like "cp: says so" "$err" 'No space left'
is "cp: nothing is left of it" "$(d exec a -- ls -A /tmp/small </dev/null)" ""
"${user[@]}" "$D" cp -r "$tmp/guest" a:/tmp/cut & job=$!
sleep 0.02; kill -KILL $job 2>/dev/null; wait $job 2>/dev/null
whole=$(stat -c %s "$tmp/guest/vmlinuz")
got=$(d exec a -- sh -c 'stat -c %s /tmp/cut/vmlinuz 2>/dev/null || echo none' </dev/null)
is "cp: killed in the middle: whole or not there" "$([ "$got" = none ] || [ "$got" = "$whole" ] && echo good)" good

# --- vsock ---
d cp "$tmp/stream" a:/bin/
d exec a -- sh -c 'stream listen 5000 echo </dev/null >/dev/null 2>&1 &' </dev/null
host() { timeout -k 10 "$BOOT_SECONDS" "${user[@]}" "$tmp/stream" "$@"; }
connects() { host unix "$R/a/vsock" 5000 ping 1 1 >/dev/null 2>&1; }
until_true connects; is "vsock: the host calls the guest" $? 0
is "vsock: $MiB MiB there and back" "$(host unix "$R/a/vsock" 5000 <"$tmp/data" | sha256sum)" "$sum"
for i in 1 2 3 4 5 6 7 8; do host unix "$R/a/vsock" 5000 </dev/null & done; wait
(for i in 1 2 3; do host unix "$R/a/vsock" 5000 ping 20 100 & done; wait) >"$tmp/out" 2>&1
is "vsock: where nobody listens" "$(host unix "$R/a/vsock" 4999 ping 1 1 2>&1 | grep -c refused)" 1
host unix-listen "$R/a/vsock_77" >"$tmp/out" </dev/null & job=$!
listens() { [ -S "$R/a/vsock_77" ]; }
until_true listens
d exec a -- stream call 2 77 <"$tmp/data"; wait $job
is "vsock: the guest calls the host, $MiB MiB" "$(sha256sum <"$tmp/out")" "$sum"
like "vsock: the guest calls where nobody is" "$(d exec a -- stream call 2 78 </dev/null 2>&1)" 'reset|refused'

is "a second VM, its vsock elsewhere" "$(start --name b --vsock "$tmp/rt/elsewhere" 2>&1)" b
d cp "$tmp/stream" b:/bin/
is "between guests: $MiB MiB there and back" "$(d exec b -- stream call 3 5000 <"$tmp/data" | sha256sum)" "$sum"
d exec b -- sh -c 'stream listen 6000 echo </dev/null >/dev/null 2>&1 &' </dev/null
back() { [ "$(echo hello | d exec a -- stream call 4 6000 2>/dev/null)" = hello ]; }
until_true back; is "between guests: the other way, by --vsock PATH" $? 0
# Messages: each comes as it was sent, from one byte to 60,000, in all directions. (In the guest a port is a stream's or a message socket's.)
d exec a -- sh -c 'stream seq-listen 5010 echo </dev/null >/dev/null 2>&1 &' </dev/null
seq_connects() { host seq-unix "$R/a/vsock.seq" 5010 messages 1 1 >/dev/null 2>&1; }
until_true seq_connects; is "messages: the host calls the guest" "$(host seq-unix "$R/a/vsock.seq" 5010 messages $((MiB * 40)) 60000)" $((MiB * 40))
host seq-unix-listen "$R/a/vsock_79" echo </dev/null & job=$!
listens() { [ -S "$R/a/vsock_79" ]; }
until_true listens
is "messages: with MSG_EOR to a guest, by marks" "$(host marked-unix "$R/a/vsock.seq" 5010 messages 100 10000 eor)" 100
is "messages: the guest calls the host" "$(d exec a -- stream seq-call 2 79 messages $((MiB * 40)) 60000 </dev/null)" $((MiB * 40))
host seq-unix-listen "$R/a/vsock_80.marked" echo </dev/null & marked_job=$!
listens() { [ -S "$R/a/vsock_80.marked" ]; }
until_true listens
is "messages: with MSG_EOR from a guest, by marks" "$(d exec a -- stream seq-call 2 80 messages 100 10000 eor </dev/null)" 100
like "messages: without marks MSG_EOR is lost" "$(d exec a -- stream seq-call 2 79 messages 100 10000 eor </dev/null)" 'message 2 of .* MSG_EOR 0'
kill $marked_job; wait $marked_job 2>/dev/null
like "messages: not to a stream's port" "$(d exec a -- stream call 2 79 ping 1 1 </dev/null 2>&1)" 'reset|refused'
like "messages: not to a stream's port of the guest's" "$(host seq-unix "$R/a/vsock.seq" 5000 messages 1 1 2>&1)" refused
kill $job; wait $job 2>/dev/null
is "messages: between guests" "$(d exec b -- stream seq-call 3 5010 messages $((MiB * 40)) 60000 eor </dev/null)" $((MiB * 40))
d exec b -- sh -c 'stream seq-listen 6010 echo </dev/null >/dev/null 2>&1 &' </dev/null
seq_back() { [ "$(d exec a -- stream seq-call 4 6010 messages 10 1000 </dev/null 2>/dev/null)" = 10 ]; }
until_true seq_back; is "messages: between guests, the other way, by --vsock PATH" $? 0
like "between guests: nobody may use another guest's agent" "$(d exec b -- stream call 3 1019 </dev/null 2>&1 | head -c 3 | wc -c)" '^0$'

# --- the agent, and ends ---
d exec a -- sh -c 'killall doppel-agent' </dev/null 2>/dev/null
d exec a -- true; is "agent killed: it comes again" $? 0
timeout --foreground "$BOOT_SECONDS" "${user[@]}" "$D" exec a -- sh -c 'echo ready; sleep 1000' </dev/null >"$tmp/sig" 2>"$tmp/err" & job=$!
until_true grep -q ready "$tmp/sig"
d exec a -- reboot </dev/null >/dev/null 2>&1
wait $job; is "the guest reboots while exec runs" $? 1
like "the guest reboots: told" "$(cat "$tmp/err")" 'broke before the command had ended'
d exec a --wait "$BOOT_SECONDS" -- true; is "exec works again after it" $? 0
# Another kernel without a reset of the machine: devices are as the old one left them.
for f in "$tmp/kexec" "$tmp/guest/vmlinuz" "$tmp/guest/initrd"; do d cp "$f" a:/tmp/; done
run exec a -- /tmp/kexec /tmp/vmlinuz /tmp/initrd again=1 </dev/null
like "kexec while exec runs: told" "$status $err" '^1 .*broke before the command had ended'
run exec a --wait "$BOOT_SECONDS" -- cat /proc/cmdline
like "kexec: exec works in the new kernel" "$status $out" '^0 .* again=1$'
printf 'pause\n' | "${user[@]}" timeout 20 "$tmp/stream" unix "$R/a/control" >"$tmp/out"
like "pause: ps tells" "$(d ps)" $'\na +.* paused '
run exec a --wait 0 -- true; is "exec in a VM that is paused" "$status" 1; like "exec in a VM that is paused: told" "$err" 'is paused; doppel resume a'
run resume a; is "resume" "$status $err" "0 "
run exec a --wait "$BOOT_SECONDS" -- true; is "resume: it goes on" "$status" 0
run resume a b; is "resume: two words" "$status" 64
run resume nobody; is "resume: what is not there" "$status" 1; like "resume: told" "$err" 'no VM of that name'
run kill a; is "kill: shuts down" "$status" 0
is "kill: nothing is left" "$(ls -A "$R" | paste -sd ' ')" ".cid-4 b"
pid=$(d ps | awk '$1=="b"{print $2}')
timeout --foreground "$BOOT_SECONDS" "${user[@]}" "$D" exec b -- sh -c 'echo ready; sleep 1000' </dev/null >"$tmp/sig" 2>"$tmp/err" & job=$!
until_true grep -q ready "$tmp/sig"
kill -KILL "$pid"; wait $job; is "doppel is killed: exec ends" $? 1
run exec b -- true; is "doppel is killed: no such VM" "$status" 1
run ps; is "ps: cleans up after it" "$(ls -A "$R")" ""
is "a killed VM's name and socket are free" "$(start --name b --vsock "$tmp/rt/elsewhere" 2>&1)" b
kill -STOP "$(d ps | awk '$1=="b"{print $2}')"
run kill b; is "kill: one that does not answer" "$status" 1; like "kill: says so" "$err" 'does not answer'
run kill --force b; is "kill --force: one that does not answer" "$status" 0
is "its name is free" "$(start --name b 2>&1)" b
run rm b; is "rm: ends it" "$status" 0; is "rm: nothing is left" "$(ls -A "$R")" ""
run rm b; is "rm: what is not there" "$status" 1

# --- what is refused ---
run run --quiet --detach --name c -- true; is "--detach with a command" "$status" 64
run run --quiet --detach --name c --kernel "$tmp/data"; is "--detach: a guest that does not start: status" "$status" 1
like "--detach: and why" "$err" 'neither a Linux kernel'
chmod 755 "$R"; run ps; is "a directory that others may enter: refused" "$status" 1; like "and told" "$err" 'others may enter'; chmod 700 "$R"
rmdir "$R"; ln -s "$tmp/home" "$R"; run run --quiet --detach --name c; is "a link in its place: refused" "$status" 1; rm "$R"
if [ ${#user[@]} -gt 0 ]; then
    mkdir -m 777 "$R"; run ps; is "somebody else's directory: refused" "$status" 1; rmdir "$R"
    is "somebody else's directory: nothing in it" "$(ls -A "$tmp/home" | grep -c lock)" 0
fi
tar c -C "$tmp" kexec -C "$tmp/guest" vmlinuz initrd |
    XDG_RUNTIME_DIR=$tmp/home d run --engine "$ENGINE" --quiet -- sh -c 'cd /tmp && tar x && ./kexec vmlinuz initrd again=1' >"$tmp/out" 2>"$tmp/err"
is "kexec by a command: ends the run" "${PIPESTATUS[1]}" 1
like "kexec by a command: told" "$(cat "$tmp/err")" 'started another kernel before the command had ended'
like "a command runs without a name, too" "$(XDG_RUNTIME_DIR=$tmp/home d run --engine "$ENGINE" --quiet -- echo works </dev/null 2>&1)" works
done_testing
