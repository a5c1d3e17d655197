/*
 * The options of `doppel run`, in the order of the help text. Every limit that a user can meet is checked here or where
 * the file is opened.
 */
#include "ctl/run_options.h"

#include <errno.h>
#include <limits.h>
#include <string.h>
#include <unistd.h>

#include "base/err.h"
#include "cpu/cpuid.h"
#include "cpu/engine.h"
#include "ctl/instance.h"

#define DETACH_SECONDS 120

static int set_engine(void *target, const char *value)
{
    struct run_options *o = target;
    if (strcmp(value, "auto") && !engine_find(value))
        return err(-EINVAL, "--engine %.100s: no such engine; choose auto or one of: %s", value, engine_names());
    o->engine = value;
    return 0;
}

static int set_cpus(void *target, const char *value)
{
    struct run_options *o = target;
    u64 n;
    if (parse_unsigned(value, &n) < 0)
        return err(-EINVAL, "--cpus %.100s: not a number; give 1 to %d", value, VM_VCPUS_MAX);
    if (n < 1 || n > VM_VCPUS_MAX)
        return err(-EINVAL, "--cpus %.100s: a guest has 1 to %d processors; give a number in that range", value,
                   VM_VCPUS_MAX);
    o->cpus = (unsigned)n;
    return 0;
}

static int set_cpuid(void *target, const char *value)
{
    char why[256];
    if (cpuid_change(NULL, value) < 0) {
        snprintf(why, sizeof(why), "%s", err_last());
        return err(-EINVAL, "--cpuid %s", why);
    }
    ((struct run_options *)target)->cpuid = value;
    return 0;
}

static int set_mmu(void *target, const char *value)
{
    static const char *const name[] = {[MACHINE_MMU_AUTO] = "auto", [MACHINE_MMU_SHADOW] = "shadow", [MACHINE_MMU_SOFTTLB] = "softtlb"};
    for (unsigned i = 0; i < ARRAY_SIZE(name); i++)
        if (!strcmp(value, name[i])) {
            ((struct run_options *)target)->mmu = (enum machine_mmu)i;
            return 0;
        }
    return err(-EINVAL, "--mmu %.100s: unknown; give auto, shadow or softtlb", value);
}

static u64 host_memory(void)
{
    long pages = sysconf(_SC_PHYS_PAGES), size = sysconf(_SC_PAGESIZE);
    return pages > 0 && size > 0 ? (u64)pages * (u64)size : 0;
}

static int set_memory(void *target, const char *value)
{
    struct run_options *o = target;
    u64 n, host = host_memory();
    if (parse_size(value, &n) < 0)
        return err(-EINVAL, "--memory %.100s: not a size; give a number with K, M or G, for example 512M", value);
    if (n < VM_MEMORY_MIN)
        return err(-EINVAL, "--memory %.100s: too small; the least is %lluM (did you leave out K, M or G?)", value,
                   VM_MEMORY_MIN / MiB);
    if (n > VM_MEMORY_MAX || (host && n > host))
        return err(-EINVAL, "--memory %.100s: too much; this host has %llu MiB, and no guest gets more than %lluG",
                   value,
                   (unsigned long long)(host / MiB), VM_MEMORY_MAX / GiB);
    if (n % MiB)
        return err(-EINVAL, "--memory %.100s: not a whole number of MiB; give for example %lluM", value,
                   (unsigned long long)(n / MiB + 1));
    o->memory_bytes = n;
    return 0;
}

static int set_kernel(void *target, const char *value)
{
    ((struct run_options *)target)->kernel = value;
    return 0;
}

static int set_firmware(void *target, const char *value)
{
    ((struct run_options *)target)->firmware = value;
    return 0;
}

static int set_initrd(void *target, const char *value)
{
    ((struct run_options *)target)->initrd = value;
    return 0;
}

static int set_append(void *target, const char *value)
{
    ((struct run_options *)target)->append = value;
    return 0;
}

/* The name of an attribute whose value is none of its kind: what it may be. */
static const char *disk_values(const char *word)
{
    static const struct { const char *name, *values; } kind[] = {
        {"bus=", "virtio or nvme"}, {"on-full=", "pause or error"}, {"io=", "uring or threads"},
        {"cache=", "writeback, writethrough or none"}, {"overlay=", "a file"},
        {"serial=", "1 to 20 letters, digits, \"_\", \".\" or \"-\""},
    };
    for (unsigned i = 0; i < ARRAY_SIZE(kind); i++)
        if (!strncmp(word, kind[i].name, strlen(kind[i].name)))
            return kind[i].values;
    return NULL;
}

/*
 * A comma may be part of a file's name; what stands behind it is an attribute of a misspelt kind if only the name
 * before it exists.
 */
static int check_attribute(const char *value)
{
    char path[PATH_MAX];
    const char *comma = strrchr(value, ','), *values;
    if (!comma || access(value, F_OK) == 0 || (size_t)(comma - value) >= sizeof(path))
        return 0;
    snprintf(path, sizeof(path), "%.*s", (int)(comma - value), value);
    if (access(path, F_OK) < 0)
        return 0;
    values = disk_values(comma + 1);
    if (values)
        return err(-EINVAL, "--disk %.200s: \"%.50s\": behind \"=\" stands %s", value, comma + 1, values);
    return err(-EINVAL, "--disk %.200s: \"%.50s\" is no attribute of disks; \"doppel help run\" lists them", value,
               comma + 1);
}

/* What guests and their tools (udev) take as it is. */
static bool serial_ok(const char *s)
{
    size_t len = strlen(s);
    return len && len <= VM_DISK_SERIAL_MAX &&
           strspn(s, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.-") == len;
}

/* True: word is an attribute, and is taken. */
static bool disk_attribute(struct vm_disk *d, const char *word)
{
    if (!strcmp(word, "readonly"))
        d->block.readonly = true;
    else if (!strcmp(word, "bus=nvme"))
        d->nvme = true;
    else if (!strcmp(word, "bus=virtio"))
        d->nvme = false;
    else if (!strcmp(word, "overlay"))
        d->block.overlay = "";
    else if (!strncmp(word, "overlay=", 8) && word[8])
        d->block.overlay = word + 8;
    else if (!strcmp(word, "on-full=error"))
        d->full_is_error = true;
    else if (!strcmp(word, "on-full=pause"))
        d->full_is_error = false;
    else if (!strcmp(word, "io=uring"))
        d->block.io = BLOCK_IO_URING;
    else if (!strcmp(word, "io=threads"))
        d->block.io = BLOCK_IO_THREADS;
    else if (!strcmp(word, "cache=writeback"))
        d->block.cache = BLOCK_CACHE_BACK;
    else if (!strcmp(word, "cache=writethrough"))
        d->block.cache = BLOCK_CACHE_THROUGH;
    else if (!strcmp(word, "cache=none"))
        d->block.cache = BLOCK_CACHE_NONE;
    else if (!strncmp(word, "serial=", 7) && serial_ok(word + 7))
        d->serial = word + 7;
    else
        return false;
    return true;
}

/* From the right, since a comma may be part of the name. */
static int set_disk(void *target, const char *value)
{
    struct run_options *o = target;
    char *comma, *name = (char *)value;                            /* a word of argv: ours to cut */
    if (o->disks == VM_DISKS_MAX)
        return err(-EINVAL, "--disk %.200s: too many; a guest has up to %d disks", value, VM_DISKS_MAX);
    struct vm_disk *d = &o->disk[o->disks];
    *d = (struct vm_disk){.block.path = value};
    while ((comma = strrchr(name, ',')) && disk_attribute(d, comma + 1))
        *comma = '\0';
    if (!*name)
        return err(-EINVAL, "--disk: the file's name is missing; write --disk FILE,readonly");
    for (unsigned i = 0; d->serial && i < o->disks; i++)
        if (o->disk[i].serial && !strcmp(o->disk[i].serial, d->serial))
            return err(-EINVAL, "--disk %.200s: another disk has serial=%s; give each its own", name, d->serial);
    o->disks++;
    return check_attribute(value);
}

/* True: word is an attribute, and is taken. */
static bool share_attribute(struct vm_share *s, const char *word)
{
    if (!strcmp(word, "ro"))
        s->readonly = true;
    else if (!strcmp(word, "owner=host"))
        s->owners = true;
    else if (!strcmp(word, "owner=root"))
        s->owners = false;
    else if (!strcmp(word, "fs=virtiofs"))
        s->virtiofs = true;
    else if (!strcmp(word, "fs=9p"))
        s->virtiofs = false;
    else
        return false;
    return true;
}

static int check_tag(const struct run_options *o, const char *tag)
{
    size_t len = strlen(tag);
    const char *comma = strchr(tag, ',');
    if (comma)
        return err(-EINVAL, "--share: \"%.50s\" is no attribute of shares; \"doppel help run\" lists them", comma + 1);
    if (!len || len > VM_SHARE_TAG_MAX)
        return err(-EINVAL, "--share: a tag, by which the guest mounts the folder, has 1 to %d characters; write --share FOLDER:TAG", VM_SHARE_TAG_MAX);
    for (unsigned i = 0; i < o->shares; i++)
        if (!strcmp(o->share[i].tag, tag))
            return err(-EINVAL, "--share: two folders have the tag %s; give each its own", tag);
    return 0;
}

/* From the right, since colons and commas may be part of the folder's name. */
static int set_share(void *target, const char *value)
{
    struct run_options *o = target;
    char *p, *name = (char *)value;                                /* a word of argv: ours to cut */
    if (o->shares == VM_SHARES_MAX)
        return err(-EINVAL, "--share %.200s: too many; a guest has up to %d shared folders", value, VM_SHARES_MAX);
    struct vm_share *s = &o->share[o->shares];
    *s = (struct vm_share){.path = value};
    while ((p = strrchr(name, ',')) && share_attribute(s, p + 1))
        *p = '\0';
    p = strrchr(name, ':');
    if (!p || p == name)
        return err(-EINVAL, "--share %.200s: not a folder and a tag; write for example --share /home/me/work:work", value);
    *p = '\0';
    s->tag = p + 1;
    int r = check_tag(o, s->tag);
    if (r == 0 && s->virtiofs && s->owners)
        r = err(-EINVAL, "--share %.200s: owner=host is for 9p; leave it or fs=virtiofs out", s->path);
    o->shares += r == 0;
    return r;
}

static int set_root(void *target, const char *value)
{
    ((struct run_options *)target)->root = value;
    return 0;
}

static int set_net(void *target, const char *value)
{
    return net_option(&((struct run_options *)target)->net, (char *)value); /* a word of argv: ours to cut */
}

static int set_publish(void *target, const char *value)
{
    return publish_option(&((struct run_options *)target)->net, (char *)value);
}

static int set_capture(void *target, const char *value)
{
    ((struct run_options *)target)->capture = value;
    return 0;
}

/* Cuts ",NAME" off the end of value. */
static bool cut_attribute(char *value, const char *name)
{
    size_t len = strlen(value), n = strlen(name);
    if (len <= n || value[len - n - 1] != ',' || strcmp(value + len - n, name))
        return false;
    value[len - n - 1] = '\0';
    return true;
}

static int set_virtio(void *target, const char *value)
{
    struct run_options *o = target;
    char *kind = (char *)value;                                    /* a word of argv: ours to cut */
    o->virtio_split = cut_attribute(kind, "split");
    o->virtio_modern = !strcmp(kind, "modern");
    if (!o->virtio_modern && strcmp(kind, "transitional"))
        return err(-EINVAL, "--virtio %.100s: no such kind of device; choose transitional or modern", value);
    return 0;
}

static int set_console(void *target, const char *value)
{
    static const char unix_prefix[] = "unix:";
    struct run_options *o = target;
    if (!strcmp(value, "stdio")) {
        o->console = CONSOLE_STDIO;
    } else if (!strcmp(value, "none")) {
        o->console = CONSOLE_NONE;
    } else if (!strncmp(value, unix_prefix, strlen(unix_prefix))) {
        o->console = CONSOLE_UNIX;
        o->console_path = value + strlen(unix_prefix);
        if (!*o->console_path)
            return err(-EINVAL, "--console unix: the path is missing; write --console unix:PATH");
    } else {
        o->console = CONSOLE_FILE;
        o->console_path = value;
    }
    return 0;
}

static int set_trace(void *target, const char *value)
{
    struct run_options *o = target;
    return parse_trace((char *)value, &o->trace_mask, &o->trace_file);
}

static int set_check(void *target, const char *value UNUSED)
{
    ((struct run_options *)target)->check = true;
    return 0;
}

/* "text", "json", each with ",file=FILE" behind it, or that alone. */
static int set_stats(void *target, const char *value)
{
    static const char key[] = "file=";
    struct run_options *o = target;
    o->stats = true;
    if (!value)
        return 0;
    size_t len = strncmp(value, key, strlen(key)) ? strcspn(value, ",") : 0;
    const char *file = value + len + (value[len] == ',');
    o->stats_json = len == 4 && !memcmp(value, "json", len);
    bool form = !len || o->stats_json || (len == 4 && !memcmp(value, "text", len));
    if (!form || (value[len] && (strncmp(file, key, strlen(key)) || !file[strlen(key)])))
        return err(-EINVAL, "--stats=%.100s: neither text nor json, with ,file=FILE behind it; give for example "
                            "--stats=json,file=stats.json", value);
    o->stats_file = value[len] ? file + strlen(key) : NULL;
    return 0;
}

/* FILE[,symbols=MAP]; from the right, since names may hold commas. */
static int set_profile(void *target, const char *value)
{
    static const char key[] = ",symbols=";
    struct run_options *o = target;
    char *found = NULL;
    for (char *p = (char *)value; (p = strstr(p, key)); p++)       /* a word of argv: ours to cut */
        found = p;
    if (found) {
        o->profile_symbols = found + strlen(key);
        *found = '\0';
    }
    if (!*value || (found && !*o->profile_symbols))
        return err(-EINVAL, "--profile: a file's name is missing; write --profile FILE or --profile FILE,symbols=MAP");
    o->profile_file = value;
    return 0;
}

static int set_status_file(void *target, const char *value)
{
    ((struct run_options *)target)->status_file = value;
    return 0;
}

static int set_no_reboot(void *target, const char *value UNUSED)
{
    ((struct run_options *)target)->no_reboot = true;
    return 0;
}

static int set_debug_exit(void *target, const char *value UNUSED)
{
    ((struct run_options *)target)->debug_exit = true;
    return 0;
}

static int set_gdb(void *target, const char *value)
{
    static const char unix_prefix[] = "unix:";
    struct run_options *o = target;
    u64 port;
    for (;;) {
        if (cut_attribute((char *)value, "wait"))                  /* a word of argv: ours to cut */
            o->gdb_wait = true;
        else if (cut_attribute((char *)value, "i386"))
            o->gdb_i386 = true;
        else
            break;
    }
    if (!strncmp(value, unix_prefix, strlen(unix_prefix))) {
        o->gdb_path = value + strlen(unix_prefix);
        return *o->gdb_path ? 0 : err(-EINVAL, "--gdb unix: the path is missing; write --gdb unix:PATH");
    }
    if (parse_unsigned(value, &port) < 0 || port < 1 || port > 65535)
        return err(-EINVAL, "--gdb %.100s: neither a port from 1 to 65535 nor unix:PATH, with ,wait or ,i386 behind it; "
                            "give for example --gdb 1234,wait", value);
    o->gdb_port = (u16)port;
    return 0;
}

static int set_name(void *target, const char *value)
{
    if (!instance_name_valid(value))
        return err(-EINVAL, "--name %.100s: not a name for a VM; take 1 to %d letters, digits, \"_\", \".\" or \"-\", the first a letter "
                            "or digit", value, INSTANCE_NAME_MAX);
    ((struct run_options *)target)->name = value;
    return 0;
}

static int set_image(struct run_options *o, const char *word)
{
    if (!instance_name_valid(word))
        return err(-EINVAL, "\"%.200s\": not the name of an image, and no option; a command for the guest stands behind \"--\"", word);
    o->image = word;
    return 0;
}

static int set_keep(void *target, const char *value)
{
    if (!instance_name_valid(value))
        return err(-EINVAL, "--keep %.100s: not a name for a disk; take 1 to %d letters, digits, \"_\", \".\" or \"-\", the first a letter "
                            "or digit", value, INSTANCE_NAME_MAX);
    ((struct run_options *)target)->keep = value;
    return 0;
}

static int set_seed(void *target, const char *value)
{
    ((struct run_options *)target)->seed = value;
    return 0;
}

static int set_vsock(void *target, const char *value)
{
    ((struct run_options *)target)->vsock = value;
    return 0;
}

static int set_detach(void *target, const char *value)
{
    struct run_options *o = target;
    u64 n = DETACH_SECONDS;
    if (value && (parse_unsigned(value, &n) < 0 || n > 86400))
        return err(-EINVAL, "--detach=%.100s: not a number of seconds; give 0 (do not wait) to 86400", value);
    o->detach = true;
    o->detach_seconds = (unsigned)n;
    return 0;
}

static int set_quiet(void *target, const char *value UNUSED)
{
    ((struct run_options *)target)->quiet = true;
    return 0;
}

static int set_verbose(void *target, const char *value UNUSED)
{
    ((struct run_options *)target)->verbose = true;
    return 0;
}

const struct option run_option_table[] = {
    {"engine", "auto|interp|bt|kvm",
     "What carries out the guest's instructions. auto (the default) takes the best engine that works on this host, and "
     "says so in the first line on standard error; \"doppel doctor\" explains the choice. interp is the reference: an "
     "interpreter that needs nothing from the host. bt translates 64-bit code and needs nothing either: auto takes it where KVM is not real. kvm uses the "
     "processor's virtualization extensions through /dev/kvm.", false, set_engine},
    {"mmu", "auto|shadow|softtlb",
     "How bt's translated code reaches the guest's memory. shadow: the host's page tables hold the guest's mappings; fast once they do. softtlb: a table "
     "is looked up at each access; better for what maps and unmaps much. auto (the default) decides for each address space while it runs.", false, set_mmu},
    {"cpus", "N", "The number of the guest's processors, 1 to 64. Default: 1.", false, set_cpus},
    {"cpuid", "LIST", "Features that the guest's processors are not to have: -NAME,-NAME, for example -avx2,-pv-ipi. "
     "Names are those of /proc/cpuinfo as far as doppel knows them, and for KVM's paravirtual interface kvmclock, "
     "kvmclock-stable, nop-io-delay, steal-time, pv-eoi, pv-unhalt, pv-tlb-flush, pv-ipi.", false, set_cpuid},
    {"memory", "SIZE", "The guest's memory, with K, M or G behind the number. Default: 512M.", false, set_memory},
    {"kernel", "FILE",
     "Boots this file instead of the default guest's kernel: a Linux bzImage, a multiboot kernel (1 or 2), an ELF "
     "file with a PVH entry, or a boot sector (loaded whole at 0x7c00; there is no BIOS that it could call). Then "
     "there is no initrd but that of --initrd, and the kernel's command line is that of --append alone (without it: "
     "console=ttyS0).", false, set_kernel},
    {"initrd", "FILE",
     "The initial RAM disk (initramfs), which for a multiboot kernel is its module. Default: the default guest's, "
     "with the default guest's kernel.", false, set_initrd},
    {"firmware", "FILE",
     "Boots this firmware image (a PC BIOS such as SeaBIOS, a multiple of 64 KiB), which ends at 4 GiB and is entered "
     "at the reset vector. It finds kernel, initrd and command line, where they are given, by fw_cfg.",
     false, set_firmware},
    {"append", "STRING", "Adds STRING to the kernel's command line.", false, set_append},
    {"disk", "FILE[,ATTRIBUTE...]",
     "A raw disk image, block device or network disk (nbd://HOST/EXPORT, nbds:// with TLS, by the ca-cert.pem in ~/.config/pki/libnbd or ?tls-certificates=FOLDER, nbd+unix:///EXPORT?socket=PATH), which the guest sees as /dev/vda; the next one as /dev/vdb, and so on, up to "
     "16. It is locked against a second writer. Attributes: readonly; bus=nvme|virtio, what the guest sees: with nvme an NVMe "
     "controller with /dev/nvme0n1 and so on, whose driver many kernels have built in; overlay: what the guest "
     "writes goes to a temporary file (in TMPDIR, else /var/tmp) and is gone afterwards, FILE is only read; overlay=FILE2: it goes to FILE2, which is made if it "
     "is not there, and is there the next time; on-full=pause|error, what happens when the host has "
     "no room for what the guest writes: the guest is paused until \"resume\" at the monitor prompt or doppel resume (the default), or "
     "sees an I/O error; io=uring|threads, how the host's file is accessed (the default is io_uring where the host permits it); cache=writeback|writethrough|none, of files and block "
     "devices: the host's page cache is used, and what the guest flushes is brought to the storage (the default); or every write is; or the page cache is not used (O_DIRECT), "
     "which spares the host memory for disks that are large and read once, and costs where it would have had the answer; serial=TEXT, by which the guest "
     "can tell its disks (/dev/disk/by-id; up to 20 characters, else disk0, disk1, ...).", true, set_disk},
    {"share", "FOLDER:TAG[,ATTRIBUTE...]",
     "Shares a folder of this host with the guest, which mounts it by its tag: mount -t 9p -o trans=virtio,version=9p2000.L,msize=262144 TAG /mnt (Debian's "
     "standard kernel has 9p, its cloud kernel has not). Up to 4 times. The guest does there what you may do on this host, and reaches nothing outside: links are its own "
     "affair, and devices, FIFOs and sockets of the host are names only. Attributes: ro, nothing can be changed; owner=root|host, whose your files seem to be: the "
     "guest's root's (the default), or of the numbers that they have here; fs=9p|virtiofs, by which protocol. 9p (the default) is built in. virtiofs is for Debian's "
     "cloud kernel, which the default guest has (mount -t virtiofs TAG /mnt), and takes a virtiofsd (Debian: qemu-system-common) and a host that permits user namespaces.", true, set_share},
    {"root", "FOLDER",
     "The shell or COMMAND runs in this folder of the host as its root, for example / : any program of this host, under the guest's kernel, as the guest's root and in "
     "the directory where doppel was started. Nothing is written to the host: what changes lies in the guest's memory, and is gone with it. "
     "The folder is shared by virtio-fs where virtiofsd can run, else by 9p: then the guest has Debian's standard kernel, and is made at the first time.", false, set_root},
    {"net", "user|tap=NAME|fd=N|passt=SOCKET|none[,...]",
     "A network card and where it is connected; the next one gives the guest another card, up to 8. user (the default without --net): a network of "
     "the guest's own, which reaches what the user of doppel reaches, by doppel's own sockets and without privileges; DHCP gives the guest "
     "10.0.2.15, the host (its loopback) is 10.0.2.2, DNS is at 10.0.2.3, and by IPv6 they are in fec0::/64; the next card has 10.0.3.0/24 and so on. "
     "user,restrict: the guest reaches nothing, and is reached by what is published only. tap=NAME: a tap device of the host, which must be yours (or you may make one); "
     "fd=N[:N...]: open descriptors of one. passt=SOCKET: a passt that listens at this Unix socket (while it is gone the card has no link). none: no card. Behind each but none: ,mac=ADDRESS of the card; ,mtu=N is told to the "
     "guest; ,queues=N pairs of queues (one for each processor, up to 8, if it is not given; tap: with more than 1 it must be a multi_queue device); ,offload=off: a card that does not compute checksums or cut segments. The default guest asks for its address in the background; a COMMAND waits for it "
     "(6 s at most) if --publish, --net user or --net passt is given.", true, set_net},
    {"publish", "HOST:GUEST[/udp]",
     "Connections to port HOST of the host (datagrams with /udp) go to port GUEST of the guest, in its first user network. ADDRESS:HOST:GUEST names an address of the host's, "
     "which else is 127.0.0.1; 0.0.0.0 is all of them; one of IPv6 stands in brackets: [::1]:8080:80.", true, set_publish},
    {"capture", "FILE", "Writes all frames that network cards send and receive to FILE, in pcapng format (Wireshark, tcpdump).", false, set_capture},
    {"virtio", "transitional|modern[,split]",
     "How virtio devices show themselves. transitional (the default): to drivers of version 1.0 and later, and to older "
     "ones as well. modern: not to older ones, which leaves less for a hostile guest to try. split: without packed rings, which drivers take "
     "if they are offered.", false, set_virtio},
    {"console", "stdio|none|FILE|unix:PATH",
     "Where the serial console goes. stdio (the default): this terminal, or standard input and output. FILE: output is "
     "written there, and there is no input. unix:PATH: a socket that takes one client at a time. With a COMMAND the "
     "default is none, and the last lines are shown if the guest fails.", false, set_console},
    {"no-reboot", NULL, "Ends when the guest resets itself, instead of booting it again.", false, set_no_reboot},
    {"debug-exit", NULL,
     "For kernels under test: a write of V to port 0xf4 (1, 2 or 4 bytes) ends doppel with the exit status (V << 1) | "
     "1, of which a process keeps the lowest 8 bits, and bytes written to port 0xe9 go where the serial console goes.",
     false, set_debug_exit},
    {"name", "NAME",
     "The VM's name, by which doppel exec, cp, kill and rm find it while it runs. Default: vm1, or the next number that is free.", false, set_name},
    {"keep", "NAME",
     "With an IMAGE: what the guest changes on its disk is kept under NAME, and the next run with it goes on there. Without it, that is "
     "forgotten when the run ends. \"doppel image rm IMAGE:NAME\" forgets it.", false, set_keep},
    {"cloud-init", "FILE",
     "Gives the guest a further disk, labelled CIDATA, from which cloud-init configures it by FILE: \"#cloud-config\" and YAML, or a script. In images "
     "that doppel built, and that have no cloud-init, the keys hostname, users, ssh_authorized_keys, write_files, packages and runcmd work as well.",
     false, set_seed},
    {"detach", "[=SECONDS]",
     "Runs the VM in the background: prints its name and returns as soon as \"doppel exec\" works in it, or tells why it ended instead. An error "
     "after SECONDS (default: 120), the VM goes on then; 0: does not wait. Its console is that of --console, or none.", false, set_detach},
    {"vsock", "PATH",
     "Where the guest's vsock is on this host: a program connects to the Unix socket PATH and sends \"CONNECT PORT\" to reach the guest's port, "
     "and reads \"OK\" and a number; the guest's connections to CID 2, port PORT, arrive at the Unix socket PATH_PORT. Messages instead of streams (SOCK_SEQPACKET) "
     "come and go by PATH.seq, and by a PATH_PORT of that type; with a byte before each that is 1 for MSG_EOR, otherwise 0, after \"CONNECT PORT MARKED\", and "
     "at PATH_PORT.marked. Default: "
     "the socket \"vsock\" in the VM's directory.", false, set_vsock},
    {"gdb", "PORT|unix:PATH[,wait][,i386]",
     "Takes a gdb, one at a time, at that port of 127.0.0.1 (where every user of this host can connect) or at a Unix "
     "socket (where only you can): \"target remote :PORT\" or \"target remote PATH\". The guest stops while gdb looks "
     "at it and goes on when gdb detaches or goes away. wait: the guest does not begin before gdb has let it. i386: "
     "gdb sees a 32-bit processor, for 32-bit kernels.", false, set_gdb},
    {"trace", "LIST[,file=FILE]",
     "Writes a line for each event of the kinds in LIST: exits, faults, interrupts, msr, pio, mmio, cr3, insn, or all; "
     "with guest time and processor, to FILE or standard error.", false, set_trace},
    {"check", NULL,
     "Runs each block of the guest's code on bt and on interp, and compares what both did: registers, flags, faults, "
     "memory. The first difference is told, with the instruction and both states, and ends the run. Slow; one "
     "processor of the guest runs at a time.", false, set_check},
    {"stats", "[=text|json][,file=FILE]",
     "When the run has ended, writes to FILE or standard error what each processor did: how often what was handled for "
     "the guest, what became of its code, why translated code was left, and where the time went.", false, set_stats},
    {"profile", "FILE[,symbols=MAP]",
     "Looks about 1000 times a second at what each processor does, and when the run has ended writes to FILE which parts "
     "of doppel and which functions of the guest's kernel took how much of the time. Names are found in the guest's "
     "memory if it is Linux, or taken from MAP, a file like System.map or an ELF file like vmlinux.", false, set_profile},
    {"status-file", "FILE",
     "Writes how the run ended to FILE, when it has ended: lines \"status=N\" (the exit status), \"end=\" (exited, "
     "poweroff, reset, quit, panic, triple-fault, debug-exit, host-error, usage), \"failed=\" (none, command, guest, "
     "host, user: which side did) and \"reason=\".", false, set_status_file},
    {"quiet", NULL, "Says nothing but errors on standard error.", false, set_quiet},
    {"verbose", NULL, "Says more: how long booting took, what had to be done for the guest, how often, and, with a "
     "COMMAND, the kernel's messages.", false,
     set_verbose},
};
const unsigned run_option_rows = ARRAY_SIZE(run_option_table);

static int check_image(const struct run_options *o)
{
    if (!o->image)
        return o->keep ? err(-EINVAL, "--keep: for the disk of an image; write doppel run IMAGE --keep NAME") : 0;
    if (o->root)
        return err(-EINVAL, "--root: its system is a folder's, and %.100s's is on its disk; leave one out", o->image);
    if (o->firmware || (o->initrd && !o->kernel))
        return err(-EINVAL, "%.100s: an image brings what boots it; leave %s, or give --disk instead of the image's name", o->image,
                   o->firmware ? "--firmware out" : "--initrd out or give --kernel, too");
    return 0;
}

static int check_together(const struct run_options *o)
{
    int r = check_image(o);
    if (r < 0)
        return r;
    if (o->quiet && o->verbose)
        return err(-EINVAL, "--quiet and --verbose contradict each other; leave one out");
    if (o->check && strcmp(o->engine, "auto") && strcmp(o->engine, "bt"))
        return err(-EINVAL, "--check: compares the engines bt and interp; leave --engine %s out", o->engine);
    if (o->detach && o->command)
        return err(-EINVAL, "--detach: leaves the terminal, and a command is for whoever waits; start the VM, then say doppel exec NAME -- "
                            "COMMAND");
    if (o->detach && o->console == CONSOLE_STDIO)
        return err(-EINVAL, "--detach: leaves the terminal; give --console a file or a socket");
    if (o->command && !*o->command)
        return err(-EINVAL, "--: no command follows; name one, or leave \"--\" out for a shell");
    if (o->command && o->console == CONSOLE_STDIO)
        return err(-EINVAL, "--console stdio: standard input and output belong to the command; leave it out, or name a "
                            "file");
    if (o->command && o->firmware)
        return err(-EINVAL, "--firmware: the command runs in the default guest, which boots without firmware; leave "
                            "one out");
    if (o->command && o->kernel && !o->initrd && !o->image)
        return err(-EINVAL, "--kernel: the default guest's initrd, which runs the command, has no modules for another "
                            "kernel; give --initrd too (guest/build makes one), or leave the command out");
    if (o->root && (o->kernel || o->firmware) && !o->initrd)
        return err(-EINVAL, "--root: the default guest's init mounts it; leave --kernel or --firmware out, or give --initrd too (guest/build makes one)");
    if (o->root && o->shares == VM_SHARES_MAX)
        return err(-EINVAL, "--root: takes the place of a shared folder, of which a guest has up to %d; leave a --share out", VM_SHARES_MAX);
    if (o->capture && !o->net.nets)
        return err(-EINVAL, "--capture: there is no network card with --net none; leave one out");
    return 0;
}

/* Whoever wants a status file is told there also of what is wrong before it on the line. */
static void find_status_file(struct run_options *o, int argc, char **argv)
{
    static const char name[] = "--status-file";
    for (int i = 0; i < argc && !o->status_file && strcmp(argv[i], "--"); i++)
        if (!strncmp(argv[i], name, sizeof(name) - 1) && argv[i][sizeof(name) - 1] == '=')
            o->status_file = argv[i] + sizeof(name);
        else if (!strcmp(argv[i], name) && i + 1 < argc)
            o->status_file = argv[i + 1];
}

int run_options_parse(struct run_options *o, int argc, char **argv)
{
    *o = (struct run_options){.engine = "auto", .cpus = 1, .memory_bytes = 512 * MiB};
    int words, r = options_parse_plain_words(run_option_table, run_option_rows, o, argc, argv, &words, &o->command);
    if (r < 0)
        find_status_file(o, argc, argv);
    if (r == 0 && words > 1)
        r = err(-EINVAL, "\"%.200s\": more than the name of an image; a command for the guest stands behind \"--\"", argv[1]);
    if (r == 0 && words)
        r = set_image(o, argv[0]);
    if (r == 0)
        r = net_options_end(&o->net);
    return r < 0 ? r : check_together(o);
}
