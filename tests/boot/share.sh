#!/bin/bash
# Shared folders, by 9p (Debian's standard kernel) and virtio-fs (the default guest), as an ordinary user: the same script on the host and in the guest,
# data both ways, what lies outside, read-only ones, many files, a folder that vanishes, a virtiofsd that is killed or not there; and --root.
# SOAK_LONG: 256 MiB and 100,000 files.
. "$(dirname "$0")/../lib/tap.sh"
build=${BUILD:-$top/build}
cloud=${DOPPEL_GUEST:-$build/guest}
standard=$build/guest-standard
mib=16 files=5000; [ -z "${SOAK_LONG-}" ] || mib=256 files=100000
shared=$tmp/shared program=$DOPPEL
mkdir "$shared" "$tmp/twin" "$tmp/outside"

# Root shares as nobody does, if nobody may come here; with as many descriptors as other hosts give to everybody, and in a group, as who logs in is.
if [ "$(id -u)" = 0 ]; then
    ulimit -n 524288 2>/dev/null
    nobody="setpriv --reuid 65534 --regid 65534 --groups 65534"
    chmod 711 "$tmp"
    if $nobody test -x "$DOPPEL" -a -r "$cloud/vmlinuz" -a -r "$standard/vmlinuz" 2>/dev/null; then
        chown 65534:65534 "$tmp" "$shared" "$tmp/twin" "$tmp/outside"
        printf '#!/bin/sh\nexec %s env HOME=/nonexistent "%s" "$@"\n' "$nobody" "$DOPPEL" >"$tmp/doppel"
        chmod 755 "$tmp/doppel"
        DOPPEL=$tmp/doppel
        as() { $nobody "$@"; }
    else
        echo "# as root: nobody cannot read $DOPPEL"
    fi
fi
declare -F as >/dev/null || as() { "$@"; }
guest() { export DOPPEL_GUEST=$1; }
mount_9p='mount -t 9p -o trans=virtio,version=9p2000.L,msize=262144 work /mnt &&'
mount_virtiofs='mount -t virtiofs work /mnt &&'

# What is the same on a host and in a guest; only what every shell and busybox say alike is printed.
cat >"$tmp/matrix" <<'MATRIX'
cd "$1" || exit 9
umask 022
t() { n=$1; shift; if r=$("$@" 2>/dev/null); then echo "$n: ok $r"; else echo "$n: failed $r"; fi; }
st() { stat -c '%a %h %s %F' "$1"; }
t mkdir mkdir d; t again mkdir d; t nested mkdir -p d/e/f; t notempty rmdir d
echo hello >f; t cat cat f; echo more >>f; t append cat f; : >f; t trunc st f
echo 0123456789 >f; t size st f; t excl sh -c 'set -C; echo x >f'
t link ln f f2; t nlink st f; t linkdir ln d d2
t rename mv f g; t gone cat f; t renamed cat g; cp g h; t over mv h g; t dirover mv d/e/f d/e2; t intoself mv d d/e/x
t symlink ln -s g s; t readlink readlink s; t follow cat s; t dangling ln -s nowhere n; t dcat cat n; t dstat st n
chmod 640 g; t mode st g; chmod 4755 g; t suid st g; chmod 000 g; t nomode st g; chmod 644 g
t longname sh -c "echo x >$(printf '%0255d' 7)"; t toolong sh -c "echo x >$(printf '%0256d' 7)"
nl="a
b"; echo x >"$nl"; t newline cat "$nl"; echo y >'sp ace * ?'; t odd cat 'sp ace * ?'
t sparse dd if=/dev/zero of=big bs=1 count=1 seek=5000000000 2>&1; t bigsize st big; rm big
touch -d @1000000000 g; t time stat -c %Y g
t fifo mkfifo p; t fifostat st p; (echo through >p &); t through cat p
exec 3>u; rm u; echo unlinked >&3; t unlinked st u; exec 3>&-
exec 3<>w; mv w w2; echo moved >&3; exec 3>&-; t moved cat w2
cp -a d dd; t copy sh -c 'cd dd && find . | sort'
tar cf t.tar d g s && mkdir x && tar xf t.tar -C x; t tar sh -c 'cd x && find . | sort | grep -v tar'
t rmfile rm g; t rmdir rmdir d; t rmall rm -r d dd x; t isfile sh -c 'cat s/x'; t eisdir sh -c 'mkdir y; echo >y'
t list sh -c 'find . | sort | cut -c1-9'
MATRIX
as sh "$tmp/matrix" "$tmp/twin" >"$tmp/wanted" 2>/dev/null

as dd if=/dev/urandom of="$shared/data" bs=1M count=$mib 2>/dev/null
as sh -c "echo secret >'$tmp/outside/secret'; ln -s '$tmp/outside/secret' '$shared/out'; ln -s ../outside '$shared/up'; mkdir '$shared/m' '$shared/many'"
as sh -c "cd '$shared/many' && seq $files | xargs touch"
sum=$(md5sum <"$shared/data")
# What a host's folder may hold: names with any byte, a FIFO with something in it, a socket, and (as root, where that is allowed) a device.
mkdir "$shared/odd"
printf 1 >"$shared/odd/"$'new\nline'; printf 2 >"$shared/odd/"$'\377\376'; printf 3 >"$shared/odd/ -x"; mkfifo "$shared/odd/fifo"
perl -MIO::Socket::UNIX -e 'IO::Socket::UNIX->new(Local => $ARGV[0], Listen => 1) or die' "$shared/odd/socket"
device=$(mknod "$shared/odd/device" c 1 5 2>/dev/null && echo "character special file")
exec 8<>"$shared/odd/fifo"; echo leak >&8
[ "$(id -u)" != 0 ] || chown -R 65534:65534 "$shared/odd"

# One guest for all that works: mount command, name, share attributes.
inside='
    sh /mnt/script /mnt/m >/mnt/result 2>/dev/null
    echo "sum $(md5sum </mnt/data)"; cp /mnt/data /mnt/copy && sync
    echo "out $(cat /mnt/out 2>&1 | grep -c secret) $(ls /mnt/up 2>/dev/null | grep -c secret)"
    (echo x >/mnt/out) 2>/dev/null
    echo "many $(ls /mnt/many 2>/dev/null | wc -l) $(ls /mnt/many 2>/dev/null | sort -n | uniq | tail -n 1)"
    echo "odd $(cat "/mnt/odd/new
line" "/mnt/odd/$(printf "\377\376")" "/mnt/odd/ -x" 2>&1) $(find /mnt/odd -print0 | tr -cd "\0" | wc -c)"
    echo "fifo $(stat -c %F /mnt/odd/fifo) $(sh -c "timeout 1 cat /mnt/odd/fifo; echo \$?" 2>/dev/null)"
    echo "socket $(stat -c %F /mnt/odd/socket) $(cat /mnt/odd/socket 2>/dev/null; echo $?)"
    echo "device $(stat -c %F /mnt/odd/device 2>/dev/null)"
    echo "dots $(cat /mnt/odd/../../../../../../etc/hostname) $(cat /mnt/../../outside/secret 2>/dev/null)"
    mknod /mnt/null c 1 3 2>/dev/null; echo "null $?"
    echo "uid $(stat -c %u /mnt/data)"'
try()                                               # name, guest, attributes
{
    local name=$1
    guest "$2"
    as cp "$tmp/matrix" "$shared/script"
    as rm -f "$shared/ready"
    local mount=mount_$name
    doppel run --quiet --share "$shared:work$3" -- sh -c "${!mount} { $inside
    }"
    if [[ $name == virtiofs && $status != 0 ]] && ! as unshare -Urpmf --mount-proc true 2>/dev/null; then
        like "$name: a host without namespaces is told of" "$err" "virtiofsd (needs|does not start)"
        skip "virtio-fs: everything" "this host permits no user namespace: $err"
        return 1
    fi
    is "$name: status" "$status $err" "0 "
    is "$name: operations as on the host" "$(diff "$tmp/wanted" "$shared/result" 2>&1)" ""
    is "$name: $mib MiB out of the host" "$(grep ^sum <<<"$out")" "sum $sum"
    is "$name: $mib MiB into the host" "$(md5sum <"$shared/copy" 2>/dev/null)" "$sum"
    is "$name: links lead nowhere outside" "$(grep ^out <<<"$out") $(cat "$tmp/outside/secret")" "out 0 0 secret"
    is "$name: $files files in a folder" "$(grep ^many <<<"$out")" "many $files $files"
    is "$name: names with any byte" "$(grep ^odd <<<"$out")" "odd 123 $([ -n "$device" ] && echo 7 || echo 6)"
    is "$name: a FIFO of the host's is a name" "$(grep ^fifo <<<"$out")" "fifo fifo 143"
    is "$name: a socket of the host's is a name" "$(grep ^socket <<<"$out")" "socket socket 1"
    is "$name: so is a device" "$(grep ^device <<<"$out")" "device $device"
    is "$name: .. ends at the guest's own root" "$(grep ^dots <<<"$out")" "dots doppel "
    is "$name: no device nodes" "$(grep -c '^null 0' <<<"$out") $(ls "$shared/null" 2>/dev/null)" "0 "
    is "$name: own files are root's" "$(grep ^uid <<<"$out")" "uid 0"
    as sh -c "rm -rf '$shared'/m '$shared'/copy '$shared'/result; mkdir '$shared/m'"
    doppel run --quiet --share "$shared:work$3,ro" -- sh -c "${!mount} { cat /mnt/script | wc -l; echo x >/mnt/new; rm -f /mnt/script; mkdir /mnt/m/x; mv /mnt/data /mnt/m
        chmod 777 /mnt/data; echo x >>/mnt/data; ln /mnt/data /mnt/m/l; } 2>/dev/null; true"
    is "$name: read-only" "$out $(ls "$shared" | tr '\n' ' ')$(ls "$shared/m")$(md5sum <"$shared/data")" "$(wc -l <"$tmp/matrix") data m many odd out script up $sum"
}

# Runs a guest in the background; when it has made the file "ready", does what is given, and waits for its end.
meanwhile()                                         # command, doppel's arguments...
{
    local what=$1 i
    shift
    rm -f "$shared/ready"
    timeout -k 10 "$BOOT_SECONDS" "$DOPPEL" "$@" >"$tmp/out" 2>"$tmp/err" &
    local pid=$!
    for ((i = 0; i < BOOT_SECONDS * 10; i++)); do
        [ -e "$shared/ready" ] && break
        kill -0 $pid 2>/dev/null || break
        sleep 0.1
    done
    $what
    wait $pid
    status=$? out=$(<"$tmp/out") err=$(<"$tmp/err")
}
vanish() { rm -rf "$tmp/other"; }
# Processes below ours that are virtiofsd.
own_servers()
{
    local all=" $$ " p ppid again=1
    while [ $again = 1 ]; do
        again=0
        for p in /proc/[0-9]*; do
            ppid=$(sed -n 's/^PPid:\t//p' "$p/status" 2>/dev/null) || continue
            [[ -n $ppid && $all == *" $ppid "* && $all != *" ${p##*/} "* ]] && { all+="${p##*/} "; again=1; }
        done
    done
    for p in $all; do [ "$(cat /proc/$p/comm 2>/dev/null)" = virtiofsd ] && echo "$p"; done
}
kill_server() { kill -9 $(own_servers) 2>/dev/null; }

try 9p "$standard" ""
as mkdir "$tmp/other"; as touch "$tmp/other/f"
meanwhile vanish run --quiet --share "$shared:work" --share "$tmp/other:other" -- sh -c "$mount_9p mkdir /o && mount -t 9p -o trans=virtio,version=9p2000.L other /o &&
    { touch /mnt/ready; while [ -e /o/f ]; do sleep 0.1; done; touch /o/new 2>/dev/null || echo refused; cat /mnt/data | wc -c; }"
is "9p: a folder that vanishes" "$status $out" "0 refused
$((mib << 20))"
guest "$standard"
doppel run --quiet --share "$shared:work,owner=host" -- sh -c "$mount_9p stat -c %u /mnt/data"
is "9p: owner=host" "$status $out" "0 $(stat -c %u "$shared/data")"

as mkdir "$tmp/"$'a:b,c\nd'; as touch "$tmp/"$'a:b,c\nd/there'
doppel run --quiet --share "$tmp/"$'a:b,c\nd:work,ro' -- sh -c "$mount_9p ls /mnt"
is "9p: a folder whose name has a colon, a comma and a newline" "$status $out" "0 there"

guest "$cloud"
refused()                                           # name, pattern, arguments...
{
    local name=$1 pattern=$2
    shift 2
    doppel run --quiet "$@" -- true
    like "refused: $name" "$status $err" "^(1|64) .*$pattern"
}
refused "no tag" "not a folder and a tag" --share "$shared"
refused "an empty tag" "1 to 36 characters" --share "$shared:"
refused "one tag twice" "two folders have the tag" --share "$shared:a" --share "$tmp:a"
refused "an unknown attribute" "no attribute of shares" --share "$shared:a,rw"
refused "no such folder" "no such folder" --share "$tmp/none:a"
refused "a file" "Not a directory" --share "$tmp/matrix:a"
refused "five" "up to 4" --share "$shared:a" --share "$shared:b" --share "$shared:c" --share "$shared:d" --share "$shared:e"
refused "--root without a folder" "root $tmp/none: No such file" --root "$tmp/none"
refused "--root of a file" "root $tmp/matrix: it is no folder" --root "$tmp/matrix"
refused "owner=host by virtio-fs" "owner=host is for 9p" --share "$shared:a,fs=virtiofs,owner=host"
export DOPPEL_VIRTIOFSD=/nonexistent
refused "no virtiofsd" "virtiofsd is not installed; install it .Debian: qemu-system-common." --share "$shared:a,fs=virtiofs"
export DOPPEL_VIRTIOFSD=/bin/false
refused "a virtiofsd that ends at once" "virtiofsd (does not start|needs)" --share "$shared:a,fs=virtiofs"
unset DOPPEL_VIRTIOFSD

rooted()                                            # name
{
    (cd "$tmp/twin" && doppel run --quiet --root / -- sh -c 'pwd; id -u; cat /etc/debian_version; echo x >new && cat new; [ -c /dev/null ] && ls /proc/self/fd >/dev/null && echo views; exit 7'
        printf '%s\n' "$status" "$out" "$err") >"$tmp/rooted"
    is "$1: --root /, its command, folder and status" "$(<"$tmp/rooted")" "$(printf '%s\n' 7 "$tmp/twin" 0 "$(cat /etc/debian_version)" x views)"
    is "$1: nothing is written to the host" "$(ls "$tmp/twin/new" 2>/dev/null)" ""
}
chmod 755 "$tmp" 2>/dev/null
if try virtiofs "$cloud" ",fs=virtiofs"; then
    meanwhile kill_server run --quiet --share "$shared:work,fs=virtiofs" -- sh -c "$mount_virtiofs { touch /mnt/ready; while cat /mnt/data >/dev/null 2>&1; do sleep 0.1; done
        cat /mnt/data 2>&1 | grep -c 'Input/output error'; echo alive; }"
    is "virtiofs: a server that is killed" "$status $out" "0 1
alive"
    like "virtiofs: is told" "$err" "virtiofsd has ended"
    # A guest goes through more files than virtiofsd may have descriptors, and has them all; but it cannot use more than that at once.
    few() { (ulimit -n 400; doppel run --engine "$ENGINE" --share "$shared:work,fs=virtiofs" -- sh -c "$mount_virtiofs { $1; }"; printf '%s\n' "$status" "$out" "$err"); }
    is "virtiofs: more files than descriptors" "$(few 'find /mnt/many -type f | wc -l; cd /mnt/many; cat [1-4]*[1-4] >/dev/null && ls -l | grep -c ^-rw; md5sum </mnt/data' | head -n 4)" \
        $'0\n'"$files"$'\n'"$files"$'\n'"$sum"
    like "virtiofs: no descriptors left, which is told" "$(few 'tail -f /mnt/many/1[0-7]?? 2>/tmp/told & until [ -s /tmp/told ]; do sleep 0.1; done; kill $!; cat /mnt/data | wc -c')" \
        "^0.*share $shared: the guest uses as many files as virtiofsd may have descriptors; raise the limit"
    rooted virtiofs
fi
guest "$standard"
export DOPPEL_VIRTIOFSD=/nonexistent
rooted 9p
unset DOPPEL_VIRTIOFSD

# Where nobody may have a user namespace: as a user without rights, in a namespace that permits no more of them. --root finds the guest with 9p itself.
denied=(unshare -Uc --keep-caps sh -c 'echo 0 >/proc/sys/user/max_user_namespaces && exec setpriv --ambient-caps=-all --inh-caps=-all "$@"' sh)
if as "${denied[@]}" true 2>/dev/null; then
    plain=$DOPPEL
    mkdir -p "$tmp/cache/doppel"; ln -s "$standard" "$tmp/cache/doppel/guest-standard"; ln -s "$cloud" "$tmp/cache/doppel/guest"
    echo "exec ${nobody-} env HOME=/nonexistent XDG_CACHE_HOME=$tmp/cache $(printf '%q ' "${denied[@]}" "$program") \"\$@\"" >"$tmp/denied"
    sed -i '1i #!/bin/bash' "$tmp/denied"; chmod 755 "$tmp/denied"
    DOPPEL=$tmp/denied
    guest "$cloud"
    refused "virtio-fs without user namespaces" "needs a user namespace, which this host does not permit .*leave fs=virtiofs out" --share "$shared:a,fs=virtiofs"
    refused "--root without user namespaces, of a guest without 9p" "DOPPEL_GUEST names a guest whose kernel has no 9p" --root /
    unset DOPPEL_GUEST
    rooted "9p, without user namespaces"
    DOPPEL=$plain
else
    skip "without user namespaces" "this host has none to begin with"
fi
done_testing
