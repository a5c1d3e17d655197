/* From words to a command (cli.h). */
#include "ctl/cli.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/err.h"
#include "cpu/cpuid.h"
#include "ctl/doctor.h"
#include "ctl/exec.h"
#include "ctl/help.h"
#include "ctl/image.h"
#include "ctl/message.h"
#include "ctl/options.h"
#include "ctl/run.h"
#include "ctl/run_options.h"
#include "ctl/vms.h"

/* Output that could not be written is an error, as for every filter. */
static int flushed(int status)
{
    if (fflush(stdout) == 0 && !ferror(stdout))
        return status;
    message_error("standard output: cannot write: %s", strerror(errno));
    return EXIT_HOST_ERROR;
}

static int help_main(int argc, char **argv);

static const char *const run_text[] = {
    "Boots a guest and connects it to this terminal. Without --kernel that is the default guest: a Debian kernel with "
    "a small system, which gives a shell; \"poweroff\" there, or Ctrl-A X, ends it.",
    "With the name of an IMAGE (doppel help image) that boots: a whole Debian, say, up to the login at its console. Its disk is the guest's first; what is "
    "written there is forgotten when the run ends, or kept (--keep). Several VMs can run from one image.",
    "With a COMMAND the guest runs it instead of a shell. Standard input, output and error are doppel's own, separate "
    "and unchanged; the command has a terminal if doppel's input and output are one. doppel exits with the command's "
    "status (128+N after signal N) when the guest has shut down and its disks are flushed.",
    "With both, the COMMAND runs in the image, as its root user, as soon as its disk is mounted and the network is there: without the image's own services, which begin only with its own "
    "init (doppel run IMAGE --detach, then doppel exec).",
    "SIGTERM presses the guest's power button; a second one ends at once. The end of standard input does not end the "
    "guest.",
    NULL,
};
static const char *const exec_text[] = {
    "Runs COMMAND in a VM that runs, by the agent in its guest (the default guest has one). Standard input, output and error are doppel's own, "
    "separate and unchanged; signals are passed on, and the exit status is the command's, as with doppel run. The fourth SIGINT or SIGTERM ends "
    "doppel itself; the command gets SIGHUP then.",
    NULL,
};
static const char *const cp_text[] = {
    "Copies a file between this host and the guest of a VM that runs: SRC to NAME:DST, or NAME:SRC to DST. Into DST if that is a folder, else under "
    "that name, in place of what has it. Modes and links are kept, owners and times are not; zeroes become holes. A file appears when it is whole.",
    NULL,
};
static const char *const ps_text[] = {
    "Lists your VMs that run: name, process, engine, processors, memory, state, how long they have run, vsock address, ports. \"no-room\" is a VM that is "
    "paused as the host has no room for what its guest writes (doppel help resume). A \"?\" stands for what a VM did not tell in time. What VMs left behind that were killed is removed.",
    NULL,
};
static const char *const resume_text[] = {
    "Lets a VM go on that is paused: by \"pause\" at its monitor prompt, or because the host had no room for what its guest wrote to a disk (\"no-room\" in doppel ps). "
    "What waited is written then; if there still is no room, it is paused again.",
    NULL,
};
static const char *const kill_text[] = {
    "Presses the power button of the VM, as often as it takes for its guest to hear it, and waits until it has shut down; an error if that takes "
    "longer than a minute. It goes on trying.",
    NULL,
};
static const char *const rm_text[] = {
    "Ends the VM at once if it runs, as doppel kill --force does, and removes what it left in the directory of running VMs.", NULL,
};
static const char *const image_text[] = {
    "build debian[:SUITE] [NAME]: makes a bootable Debian of its packages, as an ordinary user, with mmdebstrap and fakechroot: systemd, network by DHCP, a login at the serial "
    "console (root, without password), the agent for doppel exec. NAME is debian if it is left out, SUITE that of this host.",
    "import FILE [NAME]: copies FILE, a raw disk: one with a boot sector, which firmware boots (the package seabios), or a bare file system with Linux on it, "
    "which the default guest's kernel boots.",
    "A Debian that is built boots the kernel that was put beside it (--kernel), not one that is installed in it; an imported disk with a boot sector boots its own. doppel run IMAGE --kernel FILE "
    "--initrd FILE boots another one.",
    "list; info NAME: what there is. rm NAME: removes the image, or, as NAME:KEPT, the disk that doppel run NAME --keep KEPT kept.",
    "Images are in $XDG_DATA_HOME/doppel/images, or ~/.local/share/doppel/images, or where DOPPEL_IMAGES says. One that was not finished leaves nothing.",
    NULL,
};
static const char *const doctor_text[] = {
    "Shows what this host offers to doppel, which engine --engine auto takes and why, what is missing, and how to get "
    "it. It changes nothing, and always exits with 0.",
    NULL,
};
static const char *const help_text[] = {"Explains a command and its options; without one, lists the commands.", NULL};

const struct command_row cli_commands[] = {
    {"run", "[IMAGE] [options] [-- COMMAND [ARG...]]", "boot an image to its login, or a small guest to a shell or to run COMMAND", run_text,
     run_option_table, &run_option_rows, run_main},
    {"exec", "NAME [options] -- COMMAND [ARG...]", "run a command in a VM that runs", exec_text, exec_option_table, &exec_option_rows,
     exec_main},
    {"cp", "[-r] SRC DST", "copy files to NAME:PATH in a VM, or from there", cp_text, cp_option_table, &cp_option_rows, cp_main},
    {"ps", "", "list the VMs that run", ps_text, NULL, NULL, ps_main},
    {"resume", "NAME", "let a VM go on that is paused, or has waited for room on the host's disk", resume_text, NULL, NULL, resume_main},
    {"kill", "[--force] NAME", "shut a VM down", kill_text, kill_option_table, &kill_option_rows, kill_main},
    {"rm", "NAME", "end a VM, and remove what it left", rm_text, NULL, NULL, rm_main},
    {"image", "build|import|list|info|rm [options] [WORD...]", "images of disks, for doppel run", image_text,
     image_option_table, &image_option_rows, image_main},
    {"doctor", "", "what this host offers and lacks", doctor_text, NULL, NULL, doctor_main},
    {"help", "[COMMAND]", "explain a command", help_text, NULL, NULL, help_main},
};
const unsigned cli_command_count = ARRAY_SIZE(cli_commands);

static const char *command_name(const void *table, unsigned i)
{
    return ((const struct command_row *)table)[i].name;
}

static const struct command_row *find_command(const char *name)
{
    for (unsigned i = 0; i < cli_command_count; i++)
        if (!strcmp(name, cli_commands[i].name))
            return &cli_commands[i];
    const char *guess = options_guess(name, command_name, cli_commands, cli_command_count);
    if (guess)
        message_error("%.100s: no such command; did you mean %s?", name, guess);
    else
        message_error("%.100s: no such command; \"doppel help\" lists them", name);
    return NULL;
}

static int help_main(int argc, char **argv)
{
    if (argc > 1) {
        message_error("help: more than one word; write doppel help COMMAND");
        return EXIT_USAGE;
    }
    const struct command_row *c = argc ? find_command(argv[0]) : NULL;
    if (argc && !c)
        return EXIT_USAGE;
    if (c)
        help_command(stdout, c);
    else
        help_overview(stdout);
    return flushed(0);
}

static int version_main(void)
{
    printf("doppel %s\n", DOPPEL_VERSION);
    return flushed(0);
}

static int man_main(void)
{
    help_man_page(stdout);
    return flushed(0);
}

static const char *global_name(const void *table, unsigned i)
{
    return ((const char *const *)table)[i];
}

static int global_option(const char *word)
{
    static const char *const names[] = {"--help", "--version", "--man"};
    if (!strcmp(word, names[0]) || !strcmp(word, "-h"))
        return help_main(0, NULL);
    if (!strcmp(word, names[1]))
        return version_main();
    if (!strcmp(word, names[2]))
        return man_main();
    const char *guess = options_guess(word, global_name, names, ARRAY_SIZE(names));
    if (guess)
        message_error("%.100s: no such option; did you mean %s?", word, guess);
    else
        message_error("%.100s: no such option; a command comes first, as in doppel run %.100s", word, word);
    return EXIT_USAGE;
}

/* "doppel run --help": help wherever somebody asks for it, but not among a guest's words. */
static bool asks_for_help(int argc, char **argv)
{
    for (int i = 0; i < argc && strcmp(argv[i], "--"); i++)
        if (!strcmp(argv[i], "--help") || !strcmp(argv[i], "-h"))
            return true;
    return false;
}

int cli_main(int argc, char **argv)
{
    if (argc < 2) {
        message_error("no command; \"doppel run\" boots a guest, \"doppel help\" lists the commands");
        return EXIT_USAGE;
    }
    const char *mask = getenv("DOPPEL_HOST_MASK");
    if (mask && cpuid_host_mask(mask) < 0) {
        message_error("DOPPEL_HOST_MASK: %s", err_last());
        return EXIT_USAGE;
    }
    if (argv[1][0] == '-')
        return global_option(argv[1]);
    const struct command_row *c = find_command(argv[1]);
    if (!c)
        return EXIT_USAGE;
    if (asks_for_help(argc - 2, argv + 2)) {
        help_command(stdout, c);
        return flushed(0);
    }
    return c->main(argc - 2, argv + 2);
}
