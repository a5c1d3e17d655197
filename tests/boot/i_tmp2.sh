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
in_vm systemctl poweroff >/dev/null
wait $vm; is "poweroff: status" "$?" 0
run image info sid --check; is "the image is as it was" "$status $out" "0 sid: the disk is as it was"
run image rm sid; is "rm: status, and nothing is left" "$status $(ls -A "$tmp/store")" "0 "
done_testing
