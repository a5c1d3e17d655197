/*
 * doppel cp (exec.h): files into a guest and out of it, by its agent (agent/protocol.h, back/tree.h).
 *
 * What comes out of a guest is written under a name that was said here, with plain permission bits only: the guest is not trusted.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <limits.h>
#include <signal.h>
#include <string.h>
#include <unistd.h>

#include "back/tree.h"
#include "base/err.h"
#include "ctl/agent.h"
#include "ctl/exec.h"
#include "ctl/message.h"
#include "ctl/run.h"
#include "ctl/run_state.h"

#define WAIT_MS 30000

static int set_recursive(void *target, const char *value UNUSED)
{
    *(bool *)target = true;
    return 0;
}

const struct option cp_option_table[] = {
    {"recursive", NULL, "Also -r: folders, with all that is in them. Links are copied as links then, and are followed otherwise.", false, set_recursive},
};
const unsigned cp_option_rows = ARRAY_SIZE(cp_option_table);

/* "NAME:PATH": the length of the name; 0: a path of this host, as is everything with a "/" before the colon. */
static size_t vm_part(const char *word)
{
    size_t len = strcspn(word, ":/");
    return word[len] == ':' ? len : 0;
}

static int open_agent(const char *word, size_t len)
{
    char name[INSTANCE_NAME_MAX + 2];
    struct instance i;
    snprintf(name, sizeof(name), "%.*s", (int)MIN(len, sizeof(name) - 1), word);
    int r = instance_open(&i, name);
    if (r == 0)
        r = agent_connect(&i, WAIT_MS);
    instance_close(&i);
    return r;
}

/* Asks; the agent begins, or says why not. */
static int ask(int fd, u32 type, const void *payload, size_t len)
{
    struct msg_head head;
    char text[512] = "";
    if (len > MSG_MAX || !agent_send(fd, type, payload, (u32)len) || !agent_receive(fd, &head, text, sizeof(text) - 1))
        return err(-ECONNRESET, "the connection to the guest broke");
    text[head.len] = '\0';
    if (head.type == AGENT_OK)
        return 0;
    return err(-EIO, "%s", head.type == AGENT_ERROR ? text : "the guest's agent does not understand");
}

static int outcome(const struct tree_result *a, const char *where_a, const struct tree_result *b, const char *where_b)
{
    const struct tree_result *r = a->failed ? a : b;
    u32 more = a->failed + b->failed - 1;
    if (!r->failed)
        return 0;
    if (!more)
        return err(-EIO, "%s%.*s", r == a ? where_a : where_b, TREE_TEXT_MAX, r->text);
    return err(-EIO, "%s%.*s (and %u more like that)", r == a ? where_a : where_b, TREE_TEXT_MAX, r->text, more);
}

static int copy_in(int fd, const char *src, const char *dst, bool recursive)
{
    struct tree_result own, theirs;
    int r = ask(fd, AGENT_PUT, *dst ? dst : "/root", strlen(*dst ? dst : "/root"));
    if (r < 0)
        return r;
    if (tree_send(fd, src, recursive, &own, &theirs) < 0 && !own.failed)
        return err(-ECONNRESET, "the connection to the guest broke before all was copied");
    return outcome(&own, "", &theirs, "in the guest: ");
}

static int copy_out(int fd, const char *src, const char *dst, bool recursive)
{
    struct tree_result own, theirs = {.failed = 0};
    struct agent_get get = {.recursive = recursive};
    char name[TREE_NAME_MAX + 1], request[sizeof(get) + PATH_MAX];
    size_t len = strlen(src);
    if (!tree_last_name(src, name))
        return err(-EINVAL, "%.200s: name the file or folder in the guest by its own name", src);
    if (len >= PATH_MAX)
        return err(-ENAMETOOLONG, "the path is too long");
    memcpy(request, &get, sizeof(get));
    memcpy(request + sizeof(get), src, len);
    int r = ask(fd, AGENT_GET, request, sizeof(get) + len);
    if (r < 0)
        return r;
    r = tree_receive(fd, dst, name, 0777, &own);
    if (r < 0 && !own.failed)
        return err(-ECONNRESET, "the connection to the guest broke before all was copied");
    for (size_t done = 0; r == 0 && done < sizeof(theirs);) {
        ssize_t n = read(fd, (char *)&theirs + done, sizeof(theirs) - done);
        if (n <= 0 && errno != EINTR)
            return err(-ECONNRESET, "the connection to the guest broke before it had told whether all was copied");
        done += n > 0 ? (size_t)n : 0;
    }
    theirs.text[sizeof(theirs.text) - 1] = '\0';
    return outcome(&own, "", &theirs, "in the guest: ");
}

static int copy(const char *src, const char *dst, bool recursive)
{
    size_t from = vm_part(src), to = vm_part(dst);
    if (!from == !to)
        return err(-EINVAL, from ? "both are in guests; copy by way of this host" : "neither is in a guest; write one as NAME:PATH");
    int fd = open_agent(from ? src : dst, from ? from : to);
    if (fd < 0)
        return fd;
    int r = from ? copy_out(fd, src + from + 1, dst, recursive) : copy_in(fd, src, dst + to + 1, recursive);
    close(fd);
    return r;
}

int cp_main(int argc, char **argv)
{
    bool recursive = false;
    char **rest;
    run_reserve_streams();
    int words, r = options_parse_words(cp_option_table, cp_option_rows, &recursive, argc, argv, &words, &rest);
    if (r == 0 && (words != 2 || rest))
        r = err(-EINVAL, "write SRC NAME:DST, or NAME:SRC DST");
    if (r < 0) {
        message_error("cp: %s; \"doppel help cp\" explains", err_last());
        return EXIT_USAGE;
    }
    signal(SIGPIPE, SIG_IGN);
    signal(SIGXFSZ, SIG_IGN);
    r = copy(argv[0], argv[1], recursive);
    if (r < 0)
        message_error("%s", err_last());
    return r == -EINVAL ? EXIT_USAGE : r < 0 ? EXIT_HOST_ERROR : 0;
}
