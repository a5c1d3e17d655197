#!/bin/bash
# Images, as an ordinary user: a Debian built from its packages, booted to a running system; address, packages from a repository on this host, ssh through a
# published port, --cloud-init, exec, poweroff; the image is untouched by all that. Imports, kept disks, and what can go wrong with names, files, room, tools
# and builds that are killed. The built image is kept in the cache, for the same inputs.
. "$(dirname "$0")/../lib/tap.sh"
guest=${DOPPEL_GUEST:-${BUILD:-$top/build}/guest}
cache=${XDG_CACHE_HOME:-$HOME/.cache}/doppel
WANTED=openssh-server,sudo

# All in a place where an ordinary user can be, the tree too: the build may be in a home that others cannot enter.
user=()
chmod 755 "$tmp"
mkdir -p "$tmp/tree/build" "$tmp/home/.cache/doppel/packages" "$tmp/store" "$tmp/rt"; chmod 700 "$tmp/rt"
cp -r "$top/image" "$top/guest" "$top/agent" "$top/src" "$tmp/tree/"
cp "$DOPPEL" "$tmp/tree/build/doppel"; cp -r "$guest" "$tmp/tree/build/guest"
cp "$cache"/packages/{cloud,busybox}.deb "$tmp/home/.cache/doppel/packages/" 2>/dev/null
chmod -R a+rX "$tmp/tree"
unset DOPPEL_GUEST XDG_CACHE_HOME XDG_DATA_HOME TMPDIR
export XDG_RUNTIME_DIR=$tmp/rt HOME=$tmp/home DOPPEL_IMAGES=$tmp/store
own() { :; }
if [ "$(id -u)" = 0 ]; then
    user=(setpriv --reuid 65534 --regid 65534 --clear-groups)
    own() { chown -R 65534:65534 "$@"; }
    own "$tmp/home" "$tmp/store" "$tmp/rt"
    "${user[@]}" test -x "$tmp/tree/build/doppel" || { skip "images" "an ordinary user cannot reach $tmp"; done_testing; }
fi
D=$tmp/tree/build/doppel
in=()
d() { timeout -k 10 900 "${user[@]}" "${in[@]}" "$D" "$@"; }
# The same, leaving $status, $out, $err.
# The same where nobody may have a user namespace: image/build needs none.
without=(unshare -Uc --keep-caps sh -c 'echo 0 >/proc/sys/user/max_user_namespaces && exec setpriv --ambient-caps=-all --inh-caps=-all "$@"' sh)
"${user[@]}" "${without[@]}" true 2>/dev/null || without=()
run() { d "$@" >"$tmp/out" 2>"$tmp/err" </dev/null; status=$?; out=$(cat "$tmp/out"); err=$(cat "$tmp/err"); }
in_vm() { timeout -k 10 300 "${user[@]}" "$D" exec vm --wait 300 -- "$@" 2>&1 </dev/null; }
left() { find "$tmp/store" -mindepth 1 -maxdepth 1 -name '.*' | wc -l; }
listed() { d ps 2>/dev/null | grep -q '^vm '; }
until_true() { local i; for i in $(seq 1500); do "$@" && return; sleep 0.2; done; return 1; }
trap 'timeout 20 "${user[@]}" "$D" rm vm >/dev/null 2>&1; [ -z "${server-}" ] || kill $server; chmod -R u+rwX "$tmp"; rm -rf "$tmp"' EXIT

# --- words and names ---
for n in "" a/b .x -x ../x "a
b" "a b" "$(printf 'n%.0s' {1..64})"; do
    run image rm "--" "$n"; is "bad name $(printf %q "$n"): status" "$status" 64
    run image info "${n#-}"; is "info, bad name $(printf %q "$n"): no status 0" "$((status != 0))" 1
done
run image rm nobody; is "rm of what is not there: status" "$status" 1
like "rm of what is not there: told" "$err" 'no image "nobody"'
run run nobody; is "run of what is not there: status" "$status" 1
like "run of what is not there: told" "$err" 'no image "nobody"'
run image build fedora; is "another system: status" "$status" 64
run image build debian:../x y; is "a suite that is none: status" "$status" 64
run image build debian --packages 'a b' x; is "packages that are none: status" "$status" 64
run image build debian --size 1M x; is "too small: status" "$status" 64
run image list --json; is "options of other verbs: status" "$status" 64
is "an empty store: nothing in it" "$(find "$tmp/store" -mindepth 1 | wc -l)" 0

# --- imports: a file system with busybox, which the default guest's kernel boots ---
mkdir -p "$tmp/small"/{bin,sbin,dev,proc,sys,run,lib/modules,tmp}
(cd "$tmp/small" && cpio -id --quiet bin/busybox <"$guest/initrd")
cat >"$tmp/small/sbin/init" <<'INIT'
#!/bin/busybox sh
PATH=/bin; for a in ls cat uname mount sync poweroff sleep echo; do [ -e /bin/$a ] || busybox ln -s busybox /bin/$a; done
echo "small: modules $(ls /lib/modules), before: $(cat /count 2>/dev/null)"
echo "$(cat /count 2>/dev/null)+" >/count; sync; mount -o remount,ro /
poweroff -f
INIT
chmod 755 "$tmp/small/sbin/init"
mkdir "$tmp/small/etc" "$tmp/small/root"; echo small-host >"$tmp/small/etc/hostname"
for a in sh hostname cat mount grep ls echo uname; do ln -s busybox "$tmp/small/bin/$a"; done
PATH=$PATH:/usr/sbin:/sbin
mke2fs -q -F -t ext4 -d "$tmp/small" "$tmp/small.img" 16M >/dev/null
chmod a+r "$tmp/small.img"
run image import "$tmp/small.img"; is "import: status" "$status" 0
like "import: told without a terminal" "$err" 'copying the disk'
run image import "$tmp/small.img"; is "import of a name that is there: status" "$status" 1
like "import of a name that is there: told" "$err" 'there is an image "small"'
run image list; like "list: it is there" "$out" 'small +small.img +16 +'
release=$(sed -n 's/^kernel=//p' "$guest/manifest")
run run small --engine "$ENGINE" --quiet --net none; is "import: it boots and ends" "$status" 0
like "import: modules of its kernel are lent" "$out" "small: modules $release, before: *"
run run small --engine "$ENGINE" --quiet --net none; like "what a run writes is forgotten" "$out" $'before: *\r?(\n|$)'
for i in 1 2; do run run small --engine "$ENGINE" --quiet --net none --keep work; done
like "--keep: the next run goes on" "$out" 'before: \+'
run image info small; like "info: what is kept" "$out" 'kept +work '
run image rm small:work; is "rm of what is kept: status" "$status" 0
run image rm small:work; is "rm of what is not kept: status" "$status" 1
run image info small --check; is "info --check: untouched by all runs" "$status $out" "0 small: the disk is as it was"

# --- commands in images ---
run run small --engine "$ENGINE" --quiet -- sh -c 'hostname; pwd; mount | grep -c "^/dev/vda on / type ext4 (rw"; ls /lib/modules; cat; echo told >&2; exit 7' <<<""
is "a command in an image: its status, and standard error" "$status $err" "7 told"
is "a command in an image: where it runs" "$out" $'small-host\n/root\n1\n'"$release"
is "a command in an image: standard input" "$(echo in and out | d run small --engine "$ENGINE" --quiet --net none -- cat 2>&1)" "in and out"
for i in 1 2; do run run small --engine "$ENGINE" --quiet --net none --keep work -- sh -c 'echo line >>/lines; cat /lines'; done
is "a command in an image, --keep: the next goes on" "$status $out" $'0 line\nline'
run run small --engine "$ENGINE" --quiet --net none -- sh -c 'cat /lines'; is "a command in an image: without --keep nothing stays" "$status $out" "1 "
run run small --engine "$ENGINE" --quiet --net none -- nothere; is "a command that the image does not have: status" "$status" 127
like "a command that the image does not have: told" "$err" 'nothere: cannot be run in the guest: No such file'
run run small --engine "$ENGINE" --quiet --net none --kernel "$tmp/tree/build/guest/vmlinuz" --initrd "$tmp/tree/build/guest/initrd" -- uname -r
is "a kernel of one's own for an image" "$status $out" "0 $release"
run run small --initrd "$tmp/tree/build/guest/initrd"; is "an initrd without a kernel: status" "$status" 64
run run small --detach -- true; is "--detach with a command: status" "$status" 64
run image rm small:work

head -c 100000 "$tmp/small.img" >"$tmp/short.img"; printf 'QFI\373' >"$tmp/q.img"; head -c 8192 /dev/zero >>"$tmp/q.img"
head -c 65536 /dev/zero >"$tmp/zero.img"; : >"$tmp/empty.img"; mkfifo "$tmp/fifo.img"; chmod a+r "$tmp"/*.img
for f in short:'cut off' q:'qcow2' zero:'neither' empty:'too small' fifo:'neither a file' gone:'No such file'; do
    run image import "$tmp/${f%%:*}.img"; is "import of ${f%%:*}: no status 0" "$((status != 0))" 1
    like "import of ${f%%:*}: told" "$err" "${f#*:}"
done
run image import "$tmp/small.img" a/b; is "import under a bad name: status" "$status" 64
(ulimit -f 2000; run image import "$tmp/small.img" full; is x "$status" 1 >"$tmp/full") ; like "import without room: status" "$(cat "$tmp/full")" '^ok'
is "failed imports leave nothing" "$(ls -A "$tmp/store")" small

# An XFS file system, whose driver is a module; and ext4 where that is one, too: on Debian's standard kernel.
if command -v mkfs.xfs >/dev/null; then
    truncate -s 320M "$tmp/xfs.img"
    printf '/\n0 0\nd--755 0 0\nbin d--755 0 0\nbusybox ---755 0 0 %s\nsh l--777 0 0 busybox\n$\n$\n' "$tmp/small/bin/busybox" >"$tmp/proto"
    mkfs.xfs -q -p "$tmp/proto" "$tmp/xfs.img" && chmod a+r "$tmp/xfs.img"
    run image import "$tmp/xfs.img"; is "import of an XFS file system: status" "$status $err" "0 $err"
    run run xfs --engine "$ENGINE" --quiet --net none -- busybox sh -c 'busybox grep -c "^/dev/vda / xfs rw" /proc/mounts'; is "a command in it" "$status $out" "0 1"
    run image rm xfs; rm "$tmp/xfs.img"
else
    skip "an XFS file system" "xfsprogs is not installed"
fi
standard=${BUILD:-$top/build}/guest-standard
if [ -r "$standard/vmlinuz" ]; then
    cp -r "$standard" "$tmp/standard"; chmod -R a+rX "$tmp/standard"
    DOPPEL_GUEST=$tmp/standard run image import "$tmp/small.img" standard; is "import with the standard kernel: status" "$status" 0
    run run standard --engine "$ENGINE" --quiet --net none; like "import with the standard kernel: it boots and ends" "$status $out" "^0 .*small: modules $(sed -n 's/^kernel=//p' "$standard/manifest"),"
    is "a command in it" "$(d run standard --engine "$ENGINE" --quiet --net none -- uname -r 2>&1)" "$(sed -n 's/^kernel=//p' "$standard/manifest")"
    run image rm standard
else
    skip "the standard kernel" "its guest is not built (make guest-standard)"
fi

# A disk with a boot sector, which firmware boots: it greets at COM1 and goes to the debug exit port.
if [ -r /usr/share/seabios/bios-256k.bin ]; then
    truncate -s 1M "$tmp/sector.img"
    #        xor ax,ax  mov ds,ax  mov si,7c16   lodsb  test al,al  jz  mov dx,3f8  out dx,al  jmp  mov al,5  out f4,al  hlt
    printf '\x31\xc0\x8e\xd8\xbe\x17\x7c\xac\x84\xc0\x74\x06\xba\xf8\x03\xee\xeb\xf5\xb0\x05\xe6\xf4\xf4the boot sector runs\n\0' | dd of="$tmp/sector.img" conv=notrunc status=none
    printf '\x55\xaa' | dd of="$tmp/sector.img" bs=1 seek=510 conv=notrunc status=none
    chmod a+r "$tmp/sector.img"
    run image import "$tmp/sector.img" sector; is "import of a disk with a boot sector: status" "$status" 0
    run image info sector; like "import of a disk with a boot sector: info" "$out" 'boots by   firmware'
    run run sector --engine "$ENGINE" --quiet --net none --debug-exit; is "a boot sector that was imported runs: status" "$status" 11
    like "a boot sector that was imported runs: output" "$out" 'the boot sector runs'
    run run sector -- true; is "a command in what firmware boots: status" "$status" 1
    like "a command in what firmware boots: told" "$err" 'boots by firmware, and its own system starts programs'
    run image rm sector
else
    skip "a disk with a boot sector" "the package seabios is not installed"
fi

# Progress, at a terminal of 100 columns, and at a narrow one.
at_terminal() { timeout -k 10 300 script -qec "stty rows 30 cols $1; $(printf '%q ' "${user[@]}" "$D" image import "$tmp/small.img" "bar$1")" /dev/null </dev/null; }
like "a bar at a terminal" "$(at_terminal 100)" $'\r\033\\[K\\[#*\\.*\\] .*copying the disk.*copying the disk: [0-9.]+ s'
narrow=$(at_terminal 60); like "lines at a narrow one" "$narrow" 'doppel: copying the disk'
is "no bar there" "$(grep -c $'\033' <<<"$narrow")" 0
run image rm bar100; run image rm bar60

# No room on the store's disk, in a name space where that is a small one.
if "${user[@]}" unshare -Urm true 2>/dev/null; then
    "${user[@]}" unshare -Urm sh -c 'mount -t tmpfs -o size=8m none "$1/store" && shift && "$@"; echo "$?"; ls -A "$DOPPEL_IMAGES"' sh "$tmp" \
        "$D" image import "$tmp/small.img" crowded >"$tmp/out" 2>"$tmp/err"
    is "import with the disk full: status, nothing is left" "$(cat "$tmp/out")" 1
    like "import with the disk full: told" "$(cat "$tmp/err")" 'No space left on device'
    "${user[@]}" unshare -Urm sh -c 'mount -t tmpfs -o size=24m none "$1/store" && shift && "$@"; echo "$?"; ls -A "$DOPPEL_IMAGES"' sh "$tmp" \
        "$D" image build debian crowded >"$tmp/out" 2>"$tmp/err"
    is "build with the disk full: status, nothing is left" "$(cat "$tmp/out")" 1
    like "build with the disk full: told" "$(cat "$tmp/err")" 'No space left|no space|not enough|could not'
else
    skip "a full disk" "this host permits no user namespace"
fi

# What is known of an image, damaged in each way: a clear word, and it can be removed.
damage()                                            # name, command in the image's folder, told
{
    local at=$tmp/store/hurt
    cp -a "$tmp/store/small" "$at"; chmod -R u+w "$at"; chmod u+w "$at/image.json"
    (cd "$at" && eval "$2")
    own "$at"
    for verb in "image info hurt" "run hurt --quiet --net none"; do
        # shellcheck disable=SC2086
        run $verb; is "$1: ${verb%% hurt*}: status" "$status" 1
        like "$1: ${verb%% hurt*}: told" "$err" "image hurt: .*$3"
    done
    run image list; like "$1: listed so" "$status $out" '^0 .*hurt +\(damaged\)'
    run image rm hurt; is "$1: rm" "$status $(ls -A "$tmp/store")" "0 small"
}
damage "no image.json" 'rm image.json' 'image.json'
damage "an empty image.json" ': >image.json' 'image.json'
damage "an image.json of other types" 'echo "{\"version\": \"x\", \"size\": [], \"digest\": 7}" >image.json' ''
damage "an image.json that is a list" 'echo "[1]" >image.json' 'image.json'
damage "a huge image.json" 'truncate -s 3G image.json' 'image.json'
damage "an image.json that is a FIFO" 'rm image.json; mkfifo image.json' 'image.json'
damage "a version to come" 'sed -i "s/\"version\": 1/\"version\": 9/" image.json' ''
damage "no disk" 'rm root.img' 'root.img is missing'
damage "a disk that is a link" 'mv root.img r; ln -s r root.img' 'root.img is missing'
damage "a disk that is a FIFO" 'rm root.img; mkfifo root.img' 'root.img is missing'
cp -a "$tmp/store/small" "$tmp/store/hurt"; chmod u+w "$tmp/store/hurt" "$tmp/store/hurt/cmdline"; printf 'a\0b' >"$tmp/store/hurt/cmdline"
run run hurt --quiet; is "a damaged cmdline: status" "$status" 1
rm -f "$tmp/store/hurt/vmlinuz"; run image rm hurt; is "a damaged cmdline: rm" "$status" 0
ln -s "$tmp/store/small" "$tmp/store/linked"; run image info linked; is "an image that is a link: status" "$status" 1
rm "$tmp/store/linked"

chmod u+w "$tmp/store/small/root.img"; run image info small; is "only the mode changed: fine" "$status" 0
cp -p "$tmp/store/small/root.img" "$tmp/saved.img"
truncate -s 1M "$tmp/store/small/root.img"; run run small --quiet; is "a truncated disk: status" "$status" 1
like "a truncated disk: told" "$err" 'has 1048576 bytes instead of 16777216'
cp "$tmp/saved.img" "$tmp/store/small/root.img"; run run small --quiet; like "a disk that was changed: told" "$err" 'changed by another program'
printf x | dd of="$tmp/store/small/root.img" bs=1 seek=5000000 conv=notrunc status=none; touch -r "$tmp/saved.img" "$tmp/store/small/root.img"
run image info small --check; is "a disk with another byte: --check finds it" "$status" 1
echo '{' >"$tmp/store/small/broken"; mv "$tmp/store/small/broken" "$tmp/store/small/image.json"
run run small --quiet; is "a damaged image.json: status" "$status" 1
run image list; like "a damaged image: listed so" "$out" 'small +\(damaged\)'
run image rm small; is "a damaged image can be removed" "$status $(ls -A "$tmp/store")" "0 "

# --- builds that fail: with an mmdebstrap of our own that is quick to do so ---
mkdir "$tmp/fake" "$tmp/none"
printf '#!/bin/sh\nmkdir -p "%s/r"; echo "I: working"; ls /proc/$$/fd >"%s/fds"; echo $$ >"%s/pid"; exec sleep 600\n' "$tmp/home" "$tmp/home" "$tmp/home" >"$tmp/fake/mmdebstrap"
chmod 755 "$tmp/fake/mmdebstrap"
for tool in bash readlink dirname realpath cat tr sed mkdir grep; do ln -s "$(command -v $tool)" "$tmp/none/$tool"; done
"${user[@]}" env PATH="$tmp/none" "$D" image build debian x >"$tmp/out" 2>"$tmp/err"; is "no mmdebstrap: status" "$?" 1
like "no mmdebstrap: told, with the package" "$(cat "$tmp/err")" 'mmdebstrap is missing: install the package mmdebstrap'
is "no mmdebstrap: nothing is left" "$(ls -A "$tmp/store")" ""
slow() { timeout -k 10 300 "${user[@]}" env PATH="$tmp/fake:$PATH" "$D" image build debian:bookworm --mirror http://127.0.0.1:9/debian slow >"$tmp/slow" 2>&1 7</dev/null 8</dev/null; }
builder()                                           # the doppel that builds: its process
{
    local p
    for p in /proc/[0-9]*; do
        [ "$(tr '\0' ' ' 2>/dev/null <"$p/cmdline")" = "$D image build debian:bookworm --mirror http://127.0.0.1:9/debian slow " ] && echo "${p#/proc/}"
    done 2>/dev/null | head -n 1
}
fake_ends() { ! kill -0 "$(cat "$tmp/home/pid")" 2>/dev/null; }
slow & started=$!
until_true test -s "$tmp/home/pid"
is "a build's programs get no descriptors but its streams and a high one" "$(grep -c '^[3-9]$' "$tmp/home/fds")" 0 # dash, for apt: "cat >&11" is an error
run image build debian slow; is "two builds of one name: the second is refused" "$status" 1
like "two builds of one name: told" "$err" 'another doppel makes it just now'
run image list; is "a build under way is no image, and stays" "$out $(left)" " 1"
kill -TERM "$(builder)"; wait $started; is "a build that is told to end: status" "$?" 143
is "a build that is told to end leaves nothing" "$(ls -A "$tmp/store")" ""
until_true fake_ends && ok "and no process" || not_ok "and no process"
rm "$tmp/home/pid"; slow & started=$!
until_true test -s "$tmp/home/pid"
kill -KILL "$(builder)"; wait $started
until_true fake_ends && ok "a build that is killed: its processes end" || not_ok "a build that is killed: its processes end"
gone() { d image list >/dev/null 2>&1; [ "$(left)" = 0 ]; }
until_true gone && ok "a build that was killed leaves nothing behind the next command" || not_ok "a build that was killed leaves nothing" "$(ls -lA "$tmp/store")"
(ulimit -f 8000; run image build debian full; echo "$status" >"$tmp/full"); is "no room for a build: status" "$(cat "$tmp/full")" 1
is "no room for a build: nothing is left" "$(ls -A "$tmp/store")" ""

# --- make install: what it puts in place runs, builds guests and comes as far as mmdebstrap, without the tree ---
mkdir "$tmp/b"; cp -r "$guest" "$tmp/b/guest"; cp "$DOPPEL" "$tmp/b/doppel"; "$DOPPEL" --man >"$tmp/b/doppel.1"
"$top/guest/build" --compile-init "$tmp/b/init" && "$top/guest/build" --compile-agent "$tmp/b/agent"
env -u MAKEFLAGS make -s -C "$top" B="$tmp/b" -o all -o "$tmp/b/init" -o "$tmp/b/agent" PREFIX=/usr DESTDIR="$tmp/inst" install >"$tmp/out" 2>&1
is "make install: status" "$? $(find "$tmp/inst" -name image-build -perm 755 | wc -l)" "0 1"
I=$tmp/inst/usr/bin/doppel
is "make install: the default guest" "$(timeout 300 "${user[@]}" "$I" run --engine "$ENGINE" --quiet --net none -- echo installed 2>&1)" installed
printf '#!/bin/sh\nfor root; do case $root in */work/root) ls "${root%%/*}"; cmp "${root%%/*}/agent" "%s/inst/usr/share/doppel/agent" && echo same agent;; esac; done; exit 9\n' "$tmp" >"$tmp/fake/mmdebstrap"
timeout 300 "${user[@]}" env PATH="$tmp/fake:$PATH" "$I" image build debian:bookworm --mirror http://127.0.0.1:9/debian installed >"$tmp/out" 2>&1
like "make install: image build has its script, kernel and agent" "$? $(cat "$tmp/out")" '^1 .*preparing the kernel.*installing Debian bookworm.*same agent.*mmdebstrap could not install'
guests() { find "$tmp/home/.cache/doppel" -name "guest$1" | wc -l; }
mv "$tmp/inst/usr/share/doppel/vmlinuz" "$tmp/vmlinuz.away"
is "make install: a guest is built where there is none" "$(timeout 300 "${user[@]}" "$I" run --engine "$ENGINE" --quiet --net none -- echo built 2>&1) $(guests '')" "built 1"

# --- a Debian ---
key=$( (cat "$0" "$top"/image/* "$top"/guest/* "$top"/agent/* "$top"/src/back/tree.c "$guest/manifest"; sed -n 's/^VERSION_CODENAME=//p' /etc/os-release) | sha256sum |
    cut -c1-24)
kept=$cache/test-image/$key
if [ -f "$kept/image.json" ]; then
    cp -a --sparse=always --reflink=auto "$kept" "$tmp/store/sid"
    own "$tmp/store/sid"
    ok "a Debian is built (it was, before)"
else
    in=("${without[@]}")
    [ ${#in[@]} = 0 ] || is "no user namespaces here" "$("${user[@]}" "${in[@]}" unshare -Ur echo one 2>/dev/null)" ""
    run image build debian --packages "$WANTED" --size 2G sid
    in=()
    is "a Debian is built${without:+, without user namespaces}" "$status $err" "0 $err"
    if [ "$status" = 0 ]; then
        rm -rf "$cache/test-image"; mkdir -p "$cache/test-image"
        cp -a --sparse=always --reflink=auto "$tmp/store/sid" "$kept.part" && mv "$kept.part" "$kept"
    else
        done_testing
    fi
fi
run image info sid --json; like "info --json" "$out" '"kernel": "[0-9.]+-'
run image info sid --check; is "the disk has its digest" "$status $out" "0 sid: the disk is as it was"

# A package, and who serves it.
mkdir -p "$tmp/hello/DEBIAN" "$tmp/hello/usr/bin" "$tmp/repo"
printf '#!/bin/sh\necho hello from a package\n' >"$tmp/hello/usr/bin/doppel-hello"; chmod 755 "$tmp/hello/usr/bin/doppel-hello"
printf 'Package: doppel-hello\nVersion: 1.0\nArchitecture: all\nMaintainer: Nobody <nobody@localhost>\nDescription: a test\n' >"$tmp/hello/DEBIAN/control"
dpkg-deb -b --root-owner-group "$tmp/hello" "$tmp/repo/doppel-hello.deb" >/dev/null
{ cat "$tmp/hello/DEBIAN/control"; echo "Filename: ./doppel-hello.deb"; echo "Size: $(stat -c %s "$tmp/repo/doppel-hello.deb")"
  echo "SHA256: $(sha256sum "$tmp/repo/doppel-hello.deb" | cut -d' ' -f1)"; } >"$tmp/repo/Packages"
# shellcheck disable=SC2016
perl -MIO::Socket::INET -e '$| = 1; my $s = IO::Socket::INET->new(Listen => 16, LocalAddr => "127.0.0.1", ReuseAddr => 1) or die; print $s->sockport, "\n";
    $SIG{PIPE} = "IGNORE";
    while (1) { my $c = $s->accept or next; my $get = <$c> // ""; while (my $l = <$c>) { last if $l =~ /^\r?\n$/ }
        my ($name) = $get =~ m#^GET /(?:\./)?([\w.-]+) #; my $f;
        if (defined $name and open $f, "<", "$ARGV[0]/$name") { local $/; my $d = <$f>; print $c "HTTP/1.0 200 OK\r\nContent-Length: ", length $d, "\r\n\r\n", $d }
        else { print $c "HTTP/1.0 404 Not Found\r\nContent-Length: 0\r\n\r\n" } close $c }' "$tmp/repo" >"$tmp/http" &
server=$!
until_true test -s "$tmp/http"

ssh-keygen -q -t ed25519 -N '' -f "$tmp/key"
cat >"$tmp/user-data" <<SEED
#cloud-config
hostname: seeded
ssh_authorized_keys: ["$(cat "$tmp/key.pub")"]
users:
  - default
  - name: ann
    gecos: Ann O'Neill
    shell: /bin/bash
    groups: [adm, sudo]
    sudo: ALL=(ALL) NOPASSWD:ALL
    ssh_authorized_keys:
      - $(cat "$tmp/key.pub")
write_files:
  - {path: /etc/doppel/it's, content: "two\nlines\n", permissions: '0600'}
runcmd:
  - echo "\$((6 * 7))" >/root/ran
  - [touch, "/root/a word"]
SEED
chmod a+r "$tmp/user-data"
for bad in 'none' '#cloud-config' $'#cloud-config\na: [' $'#cloud-config\nhostname: "a b"' $'#cloud-config\nusers: [{name: "x;y"}]' $'#cloud-config\nruncmd: [{a: b}]'; do
    printf '%s\n' "$bad" >"$tmp/bad"; chmod a+r "$tmp/bad"
    run run sid --quiet --cloud-init "$tmp/bad"; is "--cloud-init, $(printf %q "$bad"): status" "$status" 1
done
port=$((20000 + $$ % 12000))
timeout -k 10 900 "${user[@]}" "$D" run sid --engine "$ENGINE" --quiet --name vm --publish $port:22 --cloud-init "$tmp/user-data" --console "$tmp/home/console" \
    </dev/null >"$tmp/vm.out" 2>&1 &
vm=$!
until_true listed || not_ok "doppel ps lists the VM" "$(cat "$tmp/vm.out")"        # what follows may come before it otherwise
is "systemctl is-system-running" "$(in_vm systemctl is-system-running --wait)" running
run image rm sid; is "an image in use is not removed: status" "$status" 1
like "an image in use is not removed: told" "$err" 'a VM uses it'
is "systemctl --failed" "$(in_vm systemctl --failed --quiet --no-legend)" ""
login() { grep -aq 'login:' "$tmp/home/console"; }
until_true login && ok "a login at the serial console" || not_ok "a login at the serial console" "$(tail -n 5 "$tmp/home/console")"
like "an address by DHCP" "$(in_vm ip -4 -brief address)" '10\.0\.2\.15/24'
is "owners and modes: a file of a group's" "$(in_vm stat -c '%U:%G %a' /etc/shadow)" "root:shadow 640"
is "modes: set-user-id" "$(in_vm stat -c '%U %a' /usr/bin/su)" "root 4755"
like "capabilities" "$(in_vm getcap /usr/bin/ping)" 'cap_net_raw'
like "modules of its kernel" "$(in_vm sh -c 'modprobe dummy && grep ^dummy /proc/modules')" '^dummy '
is "seed: the host's name" "$(in_vm hostname)" seeded
is "seed: a file" "$(in_vm sh -c "cat \"/etc/doppel/it's\"; stat -c %a \"/etc/doppel/it's\"")" $'two\nlines\n600'
is "seed: commands" "$(in_vm sh -c 'cat /root/ran; ls "/root/a word"')" $'42\n/root/a word'
is "seed: a user and his groups" "$(in_vm sh -c 'getent passwd ann | cut -d: -f5,7; id -nG ann')" $'Ann O\'Neill:/bin/bash\nann adm sudo'
in_vm sh -c "echo 'deb [trusted=yes] http://10.0.2.2:$(cat "$tmp/http") ./' >/etc/apt/sources.list; apt-get -qq update && apt-get -qq -y install doppel-hello" >"$tmp/apt"
is "apt-get install from this host" "$(in_vm doppel-hello)" "hello from a package"
ssh=(ssh -q -F none -i "$tmp/key" -p $port -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o BatchMode=yes -o ConnectTimeout=60)
is "ssh through a published port" "$(timeout 120 "${ssh[@]}" root@127.0.0.1 'whoami; cat /etc/hostname' </dev/null)" $'root\nseeded'
is "ssh as the seed's user, with sudo" "$(timeout 120 "${ssh[@]}" ann@127.0.0.1 'whoami; sudo whoami' </dev/null)" $'ann\nroot'
MiB=${SOAK_LONG:+256}; MiB=${MiB:-16}
head -c $((MiB << 20)) /dev/urandom >"$tmp/data"; sum=$(sha256sum <"$tmp/data")
is "ssh: $MiB MiB in" "$(timeout 900 "${ssh[@]}" root@127.0.0.1 sha256sum <"$tmp/data")" "$sum"
is "ssh: $MiB MiB in and out" "$(timeout 900 "${ssh[@]}" root@127.0.0.1 cat <"$tmp/data" | sha256sum)" "$sum"
in_vm systemctl poweroff >/dev/null
wait $vm; is "poweroff: status" "$?" 0
run image info sid --check; is "the image is as it was" "$status $out" "0 sid: the disk is as it was"
is "a command in it, without systemd" "$(d run sid --engine "$ENGINE" --quiet -- sh -c 'cat /proc/1/comm; whoami; stat -c %a /usr/bin/su; ls -d "/lib/modules/$(uname -r)/kernel" | wc -l; getent hosts localhost >/dev/null && echo hosts' 2>&1 </dev/null)" \
    $'init\nroot\n4755\n1\nhosts'

# --- long form: the same system, interpreted. Guest time is host time, so that systemd's time-outs may fire: then it says which units they hit. ---
if [ -n "${SOAK_LONG-}" ]; then
    timeout -k 10 3600 "${user[@]}" "$D" run sid --engine interp --quiet --name vm --console "$tmp/home/slow" </dev/null >"$tmp/vm.out" 2>&1 &
    vm=$!
    until_true listed || not_ok "interp: doppel ps lists the VM" "$(cat "$tmp/vm.out")"
    state=$(timeout -k 10 2400 "${user[@]}" "$D" exec vm --wait 1800 -- systemctl is-system-running --wait 2>&1 </dev/null)
    like "interp: systemctl is-system-running" "$state" '^(running|degraded)$'
    [ "$state" = running ] || echo "# interp: $state: $(in_vm systemctl --failed --quiet --no-legend --plain | cut -d' ' -f1 | paste -sd' ')"
    login() { grep -aq 'login:' "$tmp/home/slow"; }
    until_true login && ok "interp: a login at the serial console" || not_ok "interp: a login at the serial console" "$(tail -n 5 "$tmp/home/slow")"
    in_vm systemctl poweroff >/dev/null
    wait $vm; is "interp: poweroff: status" "$?" 0
fi
run image rm sid; is "rm: status, and nothing is left" "$status $(ls -A "$tmp/store")" "0 "

# --- long form: the standard kernel, and cloud-init itself ---
if [ -n "${SOAK_LONG-}" ]; then
    cp "$cache/packages/standard.deb" "$tmp/home/.cache/doppel/packages/" 2>/dev/null
    own "$tmp/home"
    run image build debian --packages cloud-init,openssh-server,sudo --kernel standard --size 3G ci
    is "a Debian with cloud-init and the standard kernel is built" "$status" 0
    { cat "$tmp/user-data"; echo 'locale: C.UTF-8'; } >"$tmp/cloud-data"; chmod a+r "$tmp/cloud-data"   # the image has no other
    mkdir "$tmp/home/shared"; echo shared >"$tmp/home/shared/f"; own "$tmp/home/shared"
    timeout -k 10 1800 "${user[@]}" "$D" run ci --engine "$ENGINE" --quiet --name vm --memory 1G --cloud-init "$tmp/cloud-data" --share "$tmp/home/shared:work" </dev/null >"$tmp/vm.out" 2>&1 &
    vm=$!
    until_true listed
    like "cloud-init is done" "$(timeout -k 10 1500 "${user[@]}" "$D" exec vm --wait 600 -- cloud-init status --wait 2>&1 </dev/null)" 'status: done'
    like "cloud-init: by NoCloud" "$(in_vm cloud-id)" 'nocloud'
    is "cloud-init: the host's name" "$(in_vm hostname)" seeded
    is "cloud-init: commands" "$(in_vm sh -c 'cat /root/ran; ls "/root/a word"')" $'42\n/root/a word'
    is "cloud-init: a file, a user" "$(in_vm sh -c "cat \"/etc/doppel/it's\"; id -nG ann")" $'two\nlines\nann adm sudo'
    is "cloud-init: doppel's own unit keeps out" "$(in_vm systemctl is-active doppel-seed)" inactive
    is "the standard kernel" "$(in_vm uname -r | grep -c cloud)" 0
    is "the standard kernel mounts 9p" "$(in_vm sh -c 'mount -t 9p -o trans=virtio,version=9p2000.L work /mnt && cat /mnt/f')" shared
    in_vm systemctl poweroff >/dev/null
    wait $vm; is "poweroff: status" "$?" 0
    run image rm ci
fi
done_testing
