/*
 * The seed disk (seed.h): reads FILE, and translates the keys of cloud-config that nearly everybody uses into a script for images without cloud-init:
 * hostname (fqdn), ssh_authorized_keys, users (name, gecos, uid, shell, groups, sudo, passwd, lock_passwd, ssh_authorized_keys), write_files (path,
 * content, permissions, owner), packages, runcmd. A FILE that begins with "#!" is the script.
 *
 * Text of FILE gets into the script only in single quotes.
 */
#define _GNU_SOURCE
#include "ctl/seed.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#include <yaml.h>

#include "base/err.h"

#define FILE_MAX_BYTES (512u << 10)
#define ALIASES "root"                                             /* whose keys those are that stand outside of users */

struct seed {
    const char *path;
    char *text;
    size_t len;
    yaml_document_t doc;
    FILE *out;                                                     /* the script */
    char hostname[65];
    void (*warn)(void *arg, const char *message);
    void *arg;
};

typedef const yaml_node_t node;

/* --- YAML --- */

static node *at(struct seed *s, int index)
{
    return yaml_document_get_node(&s->doc, index);
}

static const char *text_of(node *n)
{
    return n && n->type == YAML_SCALAR_NODE ? (const char *)n->data.scalar.value : NULL;
}

static node *value_of(struct seed *s, node *map, const char *key)
{
    if (map->type != YAML_MAPPING_NODE)
        return NULL;
    for (yaml_node_pair_t *p = map->data.mapping.pairs.start; p < map->data.mapping.pairs.top; p++) {
        const char *name = text_of(at(s, p->key));
        if (name && !strcmp(name, key))
            return at(s, p->value);
    }
    return NULL;
}

static const char *string(struct seed *s, node *map, const char *key)
{
    return text_of(value_of(s, map, key));
}

/* How many items; a text is one. */
static size_t items(node *n)
{
    return !n ? 0 : n->type == YAML_SEQUENCE_NODE ? (size_t)(n->data.sequence.items.top - n->data.sequence.items.start) : n->type == YAML_SCALAR_NODE;
}

static node *item(struct seed *s, node *n, size_t i)
{
    return n->type == YAML_SEQUENCE_NODE ? at(s, n->data.sequence.items.start[i]) : n;
}

/* --- the script --- */

static void quote(struct seed *s, const char *text)
{
    fputc('\'', s->out);
    for (; *text; text++)
        if (*text == '\'')
            fputs("'\\''", s->out);
        else
            fputc(*text, s->out);
    fputc('\'', s->out);
}

/* A line: the words in front as they are, then those of text quoted, NULL ends. */
static void line(struct seed *s, const char *front, const char *const *text, const char *behind)
{
    fputs(front, s->out);
    for (; *text; text++) {
        fputc(' ', s->out);
        quote(s, *text);
    }
    fprintf(s->out, "%s\n", behind);
}
#define LINE(s, front, behind, ...) line(s, front, (const char *const[]){__VA_ARGS__, NULL}, behind)

static int wrong(struct seed *s, const char *key, const char *what)
{
    return err(-EINVAL, "--cloud-init %s: %s: %s", s->path, key, what);
}

static bool plain_name(const char *name)
{
    return *name && strlen(name) <= 32 && !strchr("-.0123456789", *name) &&
           !name[strspn(name, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.-")];
}

static void add_keys(struct seed *s, node *keys, const char *user)
{
    for (size_t i = 0; i < items(keys); i++) {
        const char *key = text_of(item(s, keys, i));
        if (key)
            LINE(s, "add_key", "", user, key);
    }
}

/* "a, b" or a list of them, joined with commas. */
static void join_groups(struct seed *s, node *groups, char *out, size_t size)
{
    size_t n = 0;
    out[0] = '\0';
    for (size_t i = 0; i < items(groups); i++)
        for (const char *p = text_of(item(s, groups, i)); p && *p; p++)
            if (n + 2 < size && *p != ' ') {
                n += n && p == text_of(item(s, groups, i)) ? (size_t)(out[n] = ',', 1) : 0;
                out[n++] = *p;
                out[n] = '\0';
            }
}

static bool is_false(const char *s)
{
    return s && (!strcasecmp(s, "false") || !strcasecmp(s, "no") || !strcasecmp(s, "off"));
}

static int add_user(struct seed *s, node *user)
{
    char groups[512];
    const char *name = text_of(user);
    if (name && !strcmp(name, "default"))
        return 0;                                                  /* there is root */
    name = name ? name : string(s, user, "name");
    if (!name || !plain_name(name))
        return wrong(s, "users", "a user's name is missing, or none that Debian takes");
    const char *shell = string(s, user, "shell"), *gecos = string(s, user, "gecos"), *uid = string(s, user, "uid");
    const char *hash = string(s, user, "passwd");
    join_groups(s, value_of(s, user, "groups"), groups, sizeof(groups));
    LINE(s, "add_user", "", name, shell ? shell : "/bin/bash", gecos ? gecos : "", uid ? uid : "", groups);
    if (hash)
        LINE(s, "set_password", "", name, hash, is_false(string(s, user, "lock_passwd")) ? "" : "!");
    node *sudo = value_of(s, user, "sudo");
    for (size_t i = 0; i < items(sudo); i++) {
        const char *rule = text_of(item(s, sudo, i));
        if (rule && !is_false(rule))
            LINE(s, "add_sudo", "", name, rule);
    }
    add_keys(s, value_of(s, user, "ssh_authorized_keys"), name);
    return 0;
}

static int add_users(struct seed *s, node *users)
{
    int r = 0;
    for (size_t i = 0; i < items(users) && r == 0; i++)
        r = add_user(s, item(s, users, i));
    return r;
}

static int add_files(struct seed *s, node *files)
{
    for (size_t i = 0; i < items(files); i++) {
        node *f = item(s, files, i);
        const char *path = string(s, f, "path"), *content = string(s, f, "content"), *mode = string(s, f, "permissions");
        const char *owner = string(s, f, "owner");
        if (!path || *path != '/')
            return wrong(s, "write_files", "an absolute path is missing");
        if (string(s, f, "encoding"))
            return wrong(s, "write_files", "encodings are known to cloud-init only; write the content as text");
        LINE(s, "write_file", "", path, content ? content : "", mode ? mode : "0644", owner ? owner : "root:root");
    }
    return 0;
}

/* A text is for the shell; a list is a program and its arguments. */
static int add_command(struct seed *s, node *command)
{
    const char *text = text_of(command);
    if (text) {
        LINE(s, "run sh -c", "", text);
        return 0;
    }
    if (command->type != YAML_SEQUENCE_NODE || !items(command))
        return wrong(s, "runcmd", "neither texts nor lists of words");
    fputs("run", s->out);
    for (size_t i = 0; i < items(command); i++) {
        const char *word = text_of(item(s, command, i));
        if (!word)
            return wrong(s, "runcmd", "neither texts nor lists of words");
        fputc(' ', s->out);
        quote(s, word);
    }
    fputc('\n', s->out);
    return 0;
}

static const char prologue[] =
    "#!/bin/sh\n"
    "# Made by doppel of user-data, for systems without cloud-init.\n"
    "set -u\n"
    "failed=0\n"
    "run() { \"$@\" || failed=1; }\n"
    "add_key() {\n"
    "    home=$(getent passwd \"$1\" | cut -d: -f6) || return\n"
    "    mkdir -p \"$home/.ssh\" && printf '%s\\n' \"$2\" >>\"$home/.ssh/authorized_keys\" && chmod 700 \"$home/.ssh\" &&\n"
    "        chmod 600 \"$home/.ssh/authorized_keys\" && chown -R \"$1:\" \"$home/.ssh\" || failed=1\n"
    "}\n"
    "add_user() {\n"
    "    getent passwd \"$1\" >/dev/null || useradd -m -s \"$2\" -c \"$3\" ${4:+-u \"$4\"} \"$1\" || { failed=1; return; }\n"
    "    for g in $(printf %s \"$5\" | tr , ' '); do\n"
    "        getent group \"$g\" >/dev/null || groupadd \"$g\" || failed=1\n"
    "        usermod -a -G \"$g\" \"$1\" || failed=1\n"
    "    done\n"
    "}\n"
    "set_password() { usermod -p \"$3$2\" \"$1\" || failed=1; }\n"
    "add_sudo() {\n"
    "    mkdir -p /etc/sudoers.d && printf '%s %s\\n' \"$1\" \"$2\" >>/etc/sudoers.d/90-doppel && chmod 440 /etc/sudoers.d/90-doppel || failed=1\n"
    "}\n"
    "write_file() {\n"
    "    mkdir -p \"$(dirname \"$1\")\" && printf '%s' \"$2\" >\"$1\" && chmod \"$3\" \"$1\" && chown \"$4\" \"$1\" || failed=1\n"
    "}\n"
    "online() { [ ! -x /lib/systemd/systemd-networkd-wait-online ] || /lib/systemd/systemd-networkd-wait-online --any --timeout=30 || true; }\n";

static int add_packages_and_commands(struct seed *s, node *root)
{
    node *packages = value_of(s, root, "packages"), *commands = value_of(s, root, "runcmd");
    int r = 0;
    if (items(packages) || items(commands))
        fputs("online\n", s->out);
    if (items(packages)) {
        fputs("apt-get -qq update\nrun env DEBIAN_FRONTEND=noninteractive apt-get -qq -y install --", s->out);
        for (size_t i = 0; i < items(packages); i++)
            if (text_of(item(s, packages, i))) {
                fputc(' ', s->out);
                quote(s, text_of(item(s, packages, i)));
            }
        fputc('\n', s->out);
    }
    for (size_t i = 0; i < items(commands) && r == 0; i++)
        r = add_command(s, item(s, commands, i));
    return r;
}

static void warn_of_others(struct seed *s, node *root)
{
    static const char *const known[] = {"hostname", "fqdn", "ssh_authorized_keys", "users", "write_files", "packages", "runcmd", "package_update"};
    char message[256];
    for (yaml_node_pair_t *p = root->data.mapping.pairs.start; p < root->data.mapping.pairs.top; p++) {
        const char *key = text_of(at(s, p->key));
        bool found = false;
        for (unsigned i = 0; key && i < ARRAY_SIZE(known); i++)
            found |= !strcmp(key, known[i]);
        if (found)
            continue;
        snprintf(message, sizeof(message), "--cloud-init: %.80s: only cloud-init itself does this; does the image have it?", key ? key : "?");
        s->warn(s->arg, message);
    }
}

static int set_hostname(struct seed *s, node *root)
{
    const char *name = string(s, root, "hostname");
    name = name ? name : string(s, root, "fqdn");
    if (!name)
        return 0;
    if (!*name || strlen(name) > 64 || name[strspn(name, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.-")])
        return wrong(s, "hostname", "not a host's name");
    snprintf(s->hostname, sizeof(s->hostname), "%s", name);
    return 0;
}

static int translate(struct seed *s)
{
    node *root = yaml_document_get_root_node(&s->doc);
    if (!root || root->type != YAML_MAPPING_NODE)
        return wrong(s, "cloud-config", "no keys with values");
    int r = set_hostname(s, root);
    fputs(prologue, s->out);
    LINE(s, "printf '%s\\n'", " >/etc/hostname; hostname -F /etc/hostname", s->hostname);
    LINE(s, "printf '127.0.1.1\\t%s\\n'", " >>/etc/hosts", s->hostname);
    if (r == 0)
        r = add_users(s, value_of(s, root, "users"));
    add_keys(s, value_of(s, root, "ssh_authorized_keys"), ALIASES);
    if (r == 0)
        r = add_files(s, value_of(s, root, "write_files"));
    if (r == 0)
        r = add_packages_and_commands(s, root);
    fputs("exit $failed\n", s->out);
    if (r == 0)
        warn_of_others(s, root);
    return r;
}

/* --- files --- */

static int read_file(struct seed *s)
{
    struct stat st;
    int fd = open(s->path, O_RDONLY | O_NONBLOCK | O_CLOEXEC);
    if (fd < 0)
        return err(-errno, "--cloud-init %s: cannot be opened: %s", s->path, strerror(errno));
    bool plain = fstat(fd, &st) == 0 && S_ISREG(st.st_mode) && st.st_size <= (off_t)FILE_MAX_BYTES;
    s->text = plain ? malloc((size_t)st.st_size + 1) : NULL;
    ssize_t n = s->text ? read(fd, s->text, (size_t)st.st_size) : -1;
    close(fd);
    if (n < 0)
        return err(-EINVAL, "--cloud-init %s: not a plain file of up to %u KiB, or it cannot be read", s->path, FILE_MAX_BYTES >> 10);
    s->len = (size_t)n;
    s->text[n] = '\0';
    return 0;
}

static int parse(struct seed *s)
{
    yaml_parser_t parser;
    int r = 0;
    if (!yaml_parser_initialize(&parser))
        return err(-ENOMEM, "no memory");
    yaml_parser_set_input_string(&parser, (const unsigned char *)s->text, s->len);
    if (yaml_parser_load(&parser, &s->doc)) {
        r = translate(s);
        yaml_document_delete(&s->doc);
    } else {
        r = err(-EINVAL, "--cloud-init %s: line %zu: no YAML: %s", s->path, parser.problem_mark.line + 1, parser.problem ? parser.problem : "?");
    }
    yaml_parser_delete(&parser);
    return r;
}

static int make_script(struct seed *s, char **script, size_t *len)
{
    static const char header[] = "#cloud-config";
    int r = 0;
    s->out = open_memstream(script, len);
    if (!s->out)
        return err(-ENOMEM, "no memory");
    if (!strncmp(s->text, "#!", 2))
        fwrite(s->text, 1, s->len, s->out);
    else if (!strncmp(s->text, header, strlen(header)) && strchr("\r\n \t", s->text[strlen(header)]))
        r = parse(s);
    else
        r = err(-EINVAL, "--cloud-init %s: begins neither with #cloud-config nor with #!", s->path);
    if (fclose(s->out) != 0 && r == 0)
        r = err(-ENOMEM, "no memory");
    return r;
}

/* FNV-1a: the identity changes with what is to be done. */
static u64 sum(const char *p, size_t len)
{
    u64 h = 0xcbf29ce484222325ull;
    while (len--)
        h = (h ^ (u8)*p++) * 0x100000001b3ull;
    return h;
}

static int write_disk(const struct seed *s, const char *script, size_t len)
{
    char meta[256];
    int n = snprintf(meta, sizeof(meta), "instance-id: doppel-%016llx\nlocal-hostname: %s\n",
                     (unsigned long long)(sum(s->text, s->len) ^ sum(s->hostname, strlen(s->hostname))), s->hostname);
    const struct seed_file file[] = {
        {"DOPPEL.SH;1", "doppel.sh", script, len}, {"METADATA.;1", "meta-data", meta, (size_t)n}, {"USERDATA.;1", "user-data", s->text, s->len},
    };
    int fd = memfd_create("doppel-seed", MFD_CLOEXEC), r = fd < 0 ? -errno : seed_iso_write(fd, file, ARRAY_SIZE(file));
    if (r == 0)
        return fd;
    if (fd >= 0)
        close(fd);
    return err(r, "--cloud-init: cannot make its disk: %s", strerror(-r));
}

int seed_open(const char *path, const char *name, void (*warn)(void *arg, const char *message), void *arg)
{
    struct seed s = {.path = path, .warn = warn, .arg = arg};
    char *script = NULL;
    size_t len = 0;
    snprintf(s.hostname, sizeof(s.hostname), "%.63s", name);
    int r = read_file(&s);
    if (r == 0)
        r = make_script(&s, &script, &len);
    if (r == 0)
        r = write_disk(&s, script, len);
    free(script);
    free(s.text);
    return r;
}
