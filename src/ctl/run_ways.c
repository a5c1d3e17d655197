/*
 * Ways into a VM that runs, for other processes: its name, its control socket, its vsock (instance.h, control.h, back/vsock_host.h).
 *
 * doppel runs VMs also where a user has no directory of his own to be found in (a container without /tmp): then there are no ways in.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <limits.h>
#include <string.h>
#include <sys/un.h>
#include <unistd.h>

#include "back/vsock_host.h"
#include "ctl/control.h"
#include "ctl/run_state.h"

static bool named(const struct run *run)
{
    return run->instance.base[0];
}

int run_ways_claim(struct run *run)
{
    const struct run_options *o = &run->options;
    if (named(run))
        return 0;
    int r = instance_claim(&run->instance, o->name);
    if (r == 0 || o->name || o->detach)
        return r;
    message(&run->messages, LOG_WARN, "%s; so the VM has no name, and no control socket", err_last());
    return 0;
}

/* A path in the VM's directory: through its descriptor where it would be too long for a socket's address. */
static char *path_in(const struct instance *i, const char *name)
{
    char *path;
    int n = asprintf(&path, "%s/%s", i->dir, name);
    if (n < 0)
        return NULL;
    if ((size_t)n + sizeof("_4294967295") <= sizeof(((struct sockaddr_un *)0)->sun_path))
        return path;
    free(path);
    return asprintf(&path, "/proc/self/fd/%d/%s", i->dir_fd, name) < 0 ? NULL : path;
}

static int open_control(struct run *run, bool (*line)(void *arg, char *line, FILE *out))
{
    run->control_path = path_in(&run->instance, "control");
    struct control_config config = {.path = run->control_path, .loop = run->loop, .log = &run->log, .line = line, .arg = run};
    return run->control_path ? control_new(&config, &run->control) : err(-ENOMEM, "no memory");
}

/* --vsock PATH, and its socket of messages, are known by the VM's name, too. */
static int link_vsock(struct run *run)
{
    static const char *const names[] = {VSOCK_SOCKET_NAME, VSOCK_SOCKET_NAME VSOCK_SEQ_SUFFIX};
    char path[PATH_MAX + sizeof(VSOCK_SEQ_SUFFIX)];
    if (!realpath(run->vsock_path, path))
        return err(-errno, "--vsock %s: %s", run->vsock_path, strerror(errno));
    for (unsigned i = 0; i < ARRAY_SIZE(names); i++) {
        if (i)
            strcat(path, VSOCK_SEQ_SUFFIX);
        unlinkat(run->instance.dir_fd, names[i], 0);
        if (symlinkat(path, run->instance.dir_fd, names[i]) < 0)
            return err(-errno, "%s: cannot make a link: %s", run->instance.dir, strerror(errno));
    }
    return 0;
}

static int open_vsock(struct run *run)
{
    const struct run_options *o = &run->options;
    run->vsock_path = o->vsock ? strdup(o->vsock) : path_in(&run->instance, VSOCK_SOCKET_NAME);
    if (!run->vsock_path || (named(run) && asprintf(&run->peers_path, "/proc/self/fd/%d", run->instance.base_fd) < 0))
        return err(-ENOMEM, "no memory");
    struct vsock_host_config config = {
        .path = run->vsock_path, .peers = run->peers_path, .cid = named(run) ? run->instance.cid : VSOCK_CID_FIRST, .log = &run->log,
    };
    int r = vsock_host_new(run->loop, &config, &run->vsock);
    return r < 0 || !o->vsock || !named(run) ? r : link_vsock(run);
}

int run_ways_open(struct run *run, bool (*line)(void *arg, char *line, FILE *out))
{
    int r = named(run) ? open_control(run, line) : 0;
    return r < 0 || (!named(run) && !run->options.vsock) ? r : open_vsock(run);
}

/* "8080:80,5353:53/udp": what --publish said. */
static void print_ports(const struct run_options *o, FILE *out)
{
    for (unsigned n = 0; n < o->net.publishes; n++) {
        const struct net_publish *p = &o->net.publish[n];
        fprintf(out, "%s%u:%u%s", n ? "," : "ports=", p->host, p->guest, p->udp ? "/udp" : "");
    }
    if (o->net.publishes)
        fputc('\n', out);
}

void run_ways_status(void *arg, FILE *out)
{
    const struct run *run = arg;
    u64 ran = run_now_ns() - run->running_ns;
    fprintf(out, "name=%s\npid=%d\nengine=%s\ncpus=%u\nmemory=%llu\nuptime=%llu\n", run->instance.name, (int)getpid(),
            vm_machine(run->vm)->engine->name, run->options.cpus, (unsigned long long)run->options.memory_bytes,
            (unsigned long long)(run->running_ns ? ran / 1000000000 : 0));
    if (run->vsock)
        fprintf(out, "cid=%u\nvsock=%s\n", vsock_host_cid(run->vsock), run->vsock_path);
    print_ports(&run->options, out);
}

void run_ways_close(struct run *run)
{
    control_free(run->control);
    vsock_host_free(run->vsock);
    instance_release(&run->instance);
    free(run->control_path);
    free(run->vsock_path);
    free(run->peers_path);
}
