/* doppel image (image.h): its words and options, and what it tells. */
#define _GNU_SOURCE
#include "ctl/image.h"

#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <jansson.h>

#include "base/err.h"
#include "ctl/message.h"
#include "ctl/run.h"

#define SIZE_MIN (256 * MiB)
#define SIZE_MAX_ (16 * 1024 * GiB)                                /* ext4's, with blocks of 4 KiB */

static int set_packages(void *target, const char *value)
{
    if (value[strspn(value, "abcdefghijklmnopqrstuvwxyz0123456789+-.:,")])
        return err(-EINVAL, "--packages %.200s: not names of packages with commas between them; give for example --packages vim,openssh-server", value);
    ((struct image_options *)target)->packages = value;
    return 0;
}

static int set_size(void *target, const char *value)
{
    u64 n;
    if (parse_size(value, &n) < 0)
        return err(-EINVAL, "--size %.100s: not a size; give a number with M, G or T, for example 8G", value);
    if (n < SIZE_MIN || n > SIZE_MAX_ || n % MiB)
        return err(-EINVAL, "--size %.100s: not a number of MiB from 256M to 16T", value);
    ((struct image_options *)target)->size = n;
    return 0;
}

static int set_mirror(void *target, const char *value)
{
    if (!strstr(value, ":/") || strpbrk(value, " \t\r\n'\"\\"))
        return err(-EINVAL, "--mirror %.200s: not the address of a mirror; give for example http://HOST/debian", value);
    ((struct image_options *)target)->mirror = value;
    return 0;
}

static int set_kernel(void *target, const char *value)
{
    if (strcmp(value, "cloud") && strcmp(value, "standard"))
        return err(-EINVAL, "--kernel %.100s: choose cloud or standard", value);
    ((struct image_options *)target)->kernel = value;
    return 0;
}

static int set_check(void *target, const char *value UNUSED)
{
    ((struct image_options *)target)->check = true;
    return 0;
}

static int set_json(void *target, const char *value UNUSED)
{
    ((struct image_options *)target)->json = true;
    return 0;
}

const struct option image_option_table[] = {
    {"packages", "LIST", "build: packages that the image gets beside its base, with commas between them.", false, set_packages},
    {"size", "SIZE", "build: of the disk, with M or G behind the number. The host's room is taken as the guest fills it. Default: 4G.", false, set_size},
    {"mirror", "URL", "build: where Debian's packages come from. Default: where this host's apt gets them.", false, set_mirror},
    {"kernel", "cloud|standard", "build: Debian's kernel for clouds (the default), or its standard one, which has more drivers.", false, set_kernel},
    {"check", NULL, "info: reads the whole disk, and compares its digest.", false, set_check},
    {"json", NULL, "info: prints what is known as JSON.", false, set_json},
};
const unsigned image_option_rows = ARRAY_SIZE(image_option_table);

/* --- list, info --- */

static u64 bytes_used(const struct image *i, const char *name)
{
    struct stat st;
    return fstatat(i->fd, name, &st, AT_SYMLINK_NOFOLLOW) == 0 ? (u64)st.st_blocks * 512 : 0;
}

static void print_mib(u64 bytes)
{
    if (bytes >= GiB)
        printf("%.1f GiB", (double)bytes / (double)GiB);
    else
        printf("%llu MiB", (unsigned long long)((bytes + MiB - 1) / MiB));
}

static const char *origin(const struct image_info *n)
{
    return *n->suite ? n->suite : *n->from ? n->from : "?";
}

static int list_images(void)
{
    char **names;
    struct image i;
    int r = image_list(&names);
    if (r < 0)
        return r;
    if (*names)
        printf("%-20s %-12s %9s %9s  %s\n", "NAME", "SUITE", "SIZE MiB", "USED MiB", "CREATED");
    for (char **n = names; *n; n++) {
        r = image_open(&i, *n);
        if (r == -EBADMSG)
            printf("%-20s %s\n", *n, "(damaged)");
        if (r == 0)
            printf("%-20s %-12.12s %9llu %9llu  %s\n", *n, origin(&i.info), (unsigned long long)(i.info.size / MiB),
                   (unsigned long long)((bytes_used(&i, "root.img") + MiB - 1) / MiB), i.info.created);
        image_close(&i);
    }
    image_list_free(names);
    return 0;
}

static void print_kept(const struct image *i)
{
    char **names, path[128];
    if (image_kept_list(i, &names) < 0)
        return;
    for (char **n = names; *n; n++) {
        snprintf(path, sizeof(path), "kept/%s", *n);
        printf("kept       %s (", *n);
        print_mib(bytes_used(i, path));
        printf(")\n");
    }
    image_list_free(names);
}

static void print_info(const struct image *i)
{
    const struct image_info *n = &i->info;
    printf("name       %s\n", i->name);
    if (*n->suite)
        printf("suite      %s\npackages   %llu\n", n->suite, (unsigned long long)n->packages);
    if (*n->wanted)
        printf("wanted     %s\n", n->wanted);
    if (*n->from)
        printf("from       %s\n", n->from);
    printf("boots by   %s%s%s\n", n->firmware ? "firmware" : "kernel", *n->kernel ? " " : "", n->kernel);
    printf("size       ");
    print_mib(n->size);
    printf("\nused       ");
    print_mib(bytes_used(i, "root.img"));
    printf("\ncreated    %s\ndigest     %s\nfolder     %s\n", n->created, n->digest, i->dir);
    print_kept(i);
}

static int print_json(const struct image *i)
{
    char path[PATH_MAX], buf[4096];
    size_t n;
    int r = image_path(i, "image.json", path);
    FILE *f = r < 0 ? NULL : fopen(path, "re");
    if (!f)
        return r < 0 ? r : err(-errno, "%s: %s", path, strerror(errno));
    while ((n = fread(buf, 1, sizeof(buf), f)))
        fwrite(buf, 1, n, stdout);
    fclose(f);
    return 0;
}

static int check_digest(const struct image *i)
{
    char digest[IMAGE_DIGEST_MAX];
    int r = image_digest(i, digest);
    if (r < 0)
        return r;
    if (strcmp(digest, i->info.digest))
        return err(-EIO, "image %s: its disk is damaged: its digest is %s and should be %s", i->name, digest, i->info.digest);
    printf("%s: the disk is as it was\n", i->name);
    return 0;
}

static int show(const char *name, const struct image_options *o)
{
    struct image i;
    int r = image_open(&i, name);
    if (r < 0)
        return r;
    if (o->json)
        r = print_json(&i);
    else if (!o->check)
        print_info(&i);
    if (r == 0 && o->check)
        r = check_digest(&i);
    image_close(&i);
    return r;
}

/* --- the words --- */

/* "debian", "debian:SUITE". NULL with err(). */
static const char *suite_of(const char *word)
{
    static const char system[] = "debian";
    size_t len = strlen(system);
    if (strncmp(word, system, len) || (word[len] && word[len] != ':')) {
        err(-EINVAL, "\"%.100s\": only debian, or debian:SUITE, can be built; take others by doppel image import", word);
        return NULL;
    }
    const char *suite = word[len] ? word + len + 1 : "";
    if ((word[len] && !*suite) || suite[strspn(suite, "abcdefghijklmnopqrstuvwxyz")]) {
        err(-EINVAL, "\"%.100s\": not the name of a suite; write for example debian:bookworm", word);
        return NULL;
    }
    return suite;
}

static int build_words(int words, char **argv, const struct image_options *o)
{
    if (words < 1 || words > 2)
        return err(-EINVAL, "write doppel image build debian[:SUITE] [NAME]");
    const char *suite = suite_of(argv[0]);
    if (!suite)
        return -EINVAL;
    return image_build(words == 2 ? argv[1] : "debian", suite, o);
}

/* NAME, or NAME:KEPT. */
static int remove_word(char *word)
{
    char *colon = strchr(word, ':');
    if (!colon)
        return image_remove(word);
    *colon = '\0';
    return image_remove_kept(word, colon + 1);
}

static int carry_out(const char *verb, int words, char **argv, const struct image_options *o)
{
    bool build = !strcmp(verb, "build"), info = !strcmp(verb, "info");
    if (!build && (o->packages || o->size || o->mirror || o->kernel))
        return err(-EINVAL, "--packages, --size, --mirror and --kernel are for doppel image build");
    if (!info && (o->check || o->json))
        return err(-EINVAL, "--check and --json are for doppel image info");
    if (build)
        return build_words(words, argv, o);
    if (!strcmp(verb, "import"))
        return words < 1 || words > 2 ? err(-EINVAL, "write doppel image import FILE [NAME]") : image_import(argv[0], argv[1]);
    if (!strcmp(verb, "list"))
        return words ? err(-EINVAL, "write just doppel image list") : list_images();
    if (info)
        return words != 1 ? err(-EINVAL, "write doppel image info NAME") : show(argv[0], o);
    if (!strcmp(verb, "rm"))
        return words != 1 ? err(-EINVAL, "write doppel image rm NAME, or NAME:KEPT for a disk that was kept") : remove_word(argv[0]);
    return err(-EINVAL, "\"%.100s\": not known; write build, import, list, info or rm", verb);
}

int image_main(int argc, char **argv)
{
    struct image_options o = {.packages = NULL};
    char **rest;
    int words, r = options_parse_words(image_option_table, image_option_rows, &o, argc, argv, &words, &rest);
    if (r == 0 && (!words || rest))
        r = err(-EINVAL, "what is to be done? build, import, list, info or rm");
    if (r < 0) {
        message_error("image: %s; \"doppel help image\" explains", err_last());
        return EXIT_USAGE;
    }
    signal(SIGPIPE, SIG_IGN);
    signal(SIGXFSZ, SIG_IGN);
    r = carry_out(argv[0], words - 1, argv + 1, &o);
    if (r < 0)
        message_error("image: %s", err_last());
    if (r == 0 && (fflush(stdout) || ferror(stdout))) {
        message_error("standard output: cannot write: %s", strerror(errno));
        return EXIT_HOST_ERROR;
    }
    return r == -EINVAL ? EXIT_USAGE : r < 0 ? EXIT_HOST_ERROR : r > 0 ? 128 + r : 0;
}
