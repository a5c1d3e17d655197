/* Commands of the monitor prompt (monitor.h). */
#include "ctl/monitor.h"

#include <string.h>

#include "base/err.h"
#include "ctl/message.h"
#include "ctl/options.h"

static bool cmd_help(struct monitor *m UNUSED, char *args UNUSED, FILE *out)
{
    for (unsigned i = 0; i < monitor_command_count; i++) {
        const struct monitor_command *c = &monitor_commands[i];
        char usage[64];
        snprintf(usage, sizeof(usage), "%s%s%s", c->name, *c->args ? " " : "", c->args);
        fprintf(out, "  %-26s %s\n", usage, c->text);
    }
    fprintf(out, "An empty line, Ctrl-D or Ctrl-A C goes back to the guest.\n");
    return true;
}

static bool cmd_info(struct monitor *m, char *args UNUSED, FILE *out)
{
    vm_info(m->vm, out);
    return true;
}

static bool cmd_stats(struct monitor *m, char *args, FILE *out)
{
    if (*args && strcmp(args, "json"))
        fprintf(out, "stats %s: no such form; say stats or stats json\n", args);
    else
        vm_stats(m->vm, out, *args);
    return true;
}

static bool cmd_pause(struct monitor *m, char *args UNUSED, FILE *out)
{
    vm_pause(m->vm);
    fprintf(out, "%s\n", vm_state_name(vm_state(m->vm)));
    return true;
}

static bool cmd_resume(struct monitor *m, char *args UNUSED, FILE *out)
{
    vm_resume(m->vm);
    fprintf(out, "%s\n", vm_state_name(vm_state(m->vm)));
    return true;
}

static bool cmd_reset(struct monitor *m, char *args UNUSED, FILE *out)
{
    if (vm_reset(m->vm) < 0)
        fprintf(out, "reset failed: %s\n", err_last());
    else
        fprintf(out, "reset; %s\n", vm_state_name(vm_state(m->vm)));
    return true;
}

static bool cmd_power(struct monitor *m, char *args UNUSED, FILE *out)
{
    vm_power_button(m->vm);
    fprintf(out, "the power button was pressed%s\n",
            vm_state(m->vm) == VM_PAUSED ? "; the guest is paused and sees it after \"resume\"" : "");
    return true;
}

static bool cmd_link(struct monitor *m, char *args, FILE *out)
{
    size_t len = strcspn(args, " ");
    char *state = args + len + strspn(args + len, " ");
    bool up = !strcmp(state, "up");
    u64 n;
    args[len] = '\0';
    if (parse_unsigned(args, &n) < 0 || n > UINT32_MAX || (!up && strcmp(state, "down")))
        fprintf(out, "say link N up or link N down; \"info\" lists the cards\n");
    else if (vm_set_link(m->vm, (unsigned)n, up) < 0)
        fprintf(out, "%s\n", err_last());
    return true;
}

static bool cmd_resize(struct monitor *m, char *args, FILE *out)
{
    char *size = args + strcspn(args, " ");
    u64 n, bytes = 0;
    if (*size)
        *size++ = '\0';
    size += strspn(size, " ");
    if (parse_unsigned(args, &n) < 0 || n >= VM_DISKS_MAX || (*size && (parse_size(size, &bytes) < 0 || !bytes)))
        fprintf(out, "say resize DISK [SIZE], for example resize 0 2G; disks are counted from 0\n");
    else if (vm_resize_disk(m->vm, (unsigned)n, bytes) < 0)
        fprintf(out, "%s\n", err_last());
    else
        vm_info_disks(m->vm, out);
    return true;
}

/* Lines are written by vCPU threads: file and mask change while they stand still. */
static void set_trace(struct monitor *m, u32 mask, FILE *file)
{
    struct trace *t = vm_trace(m->vm);
    bool running = vm_state(m->vm) == VM_RUNNING;
    if (running)
        vm_pause(m->vm);
    t->mask = mask;
    if (file) {
        if (m->trace_file)
            fclose(m->trace_file);
        m->trace_file = t->file = file;
    } else if (t->file) {
        fflush(t->file);
    }
    if (running)
        vm_resume(m->vm);
}

static bool cmd_trace(struct monitor *m, char *args, FILE *out)
{
    u32 mask = 0;
    const char *path = NULL;
    FILE *file = NULL;
    if (!*args) {
        fprintf(out, "tracing is %s; say trace LIST[,file=FILE] or trace off\n", vm_trace(m->vm)->mask ? "on" : "off");
        return true;
    }
    if (strcmp(args, "off") && parse_trace(args, &mask, &path) < 0) {
        fprintf(out, "%s\n", err_last());
        return true;
    }
    if (path && !(file = message_open(path, "trace"))) {
        fprintf(out, "%s\n", err_last());
        return true;
    }
    set_trace(m, mask, file);
    return true;
}

static bool cmd_shutdown(struct monitor *m, char *args UNUSED, FILE *out)
{
    m->want_shutdown = true;
    fprintf(out, "the guest is asked to shut down\n");
    return true;
}

static bool cmd_status(struct monitor *m, char *args UNUSED, FILE *out)
{
    if (m->status)
        m->status(m->arg, out);
    fprintf(out, "state=%s\n", vm_state_name(vm_state(m->vm)));
    if (vm_waits_for_room(m->vm))
        fprintf(out, "waits=room\n");
    return true;
}

static bool cmd_quit(struct monitor *m, char *args UNUSED, FILE *out UNUSED)
{
    m->want_quit = true;
    return false;
}

const struct monitor_command monitor_commands[] = {
    {"help", "", "this list", cmd_help},
    {"info", "", "state, devices, and the registers of each processor", cmd_info},
    {"stats", "[json]", "counters of each processor, as --stats", cmd_stats},
    {"pause", "", "the processors and guest time stand still", cmd_pause},
    {"resume", "", "they go on", cmd_resume},
    {"reset", "", "the reset button: the guest boots again", cmd_reset},
    {"power", "", "the power button: the guest is asked to shut down", cmd_power},
    {"shutdown", "", "the same, again and again until the guest has heard it; a paused guest goes on", cmd_shutdown},
    {"link", "N up|down", "network card N's cable is put back or pulled", cmd_link},
    {"resize", "DISK [SIZE]", "makes disk 0, 1, ... larger, or takes the size that it has on the host by now", cmd_resize},
    {"trace", "LIST[,file=FILE]|off", "as --trace: exits, faults, interrupts, msr, pio, mmio, cr3, insn, all",
     cmd_trace},
    {"status", "", "name, engine, size and state, as lines \"key=value\"", cmd_status},
    {"quit", "", "ends at once", cmd_quit},
};
const unsigned monitor_command_count = ARRAY_SIZE(monitor_commands);

static const char *command_name(const void *table, unsigned i)
{
    return ((const struct monitor_command *)table)[i].name;
}

bool monitor_line(struct monitor *m, char *line, FILE *out)
{
    char *word = line + strspn(line, " ");
    size_t len = strcspn(word, " ");
    char *args = word + len + strspn(word + len, " ");
    word[len] = '\0';
    for (char *end = args + strlen(args); end > args && end[-1] == ' ';)
        *--end = '\0';
    if (!*word)
        return true;
    for (unsigned i = 0; i < monitor_command_count; i++)
        if (!strcmp(word, monitor_commands[i].name))
            return monitor_commands[i].run(m, args, out);
    const char *guess = options_guess(word, command_name, monitor_commands, monitor_command_count);
    if (guess)
        fprintf(out, "%s: no such command; did you mean %s?\n", word, guess);
    else
        fprintf(out, "%s: no such command; \"help\" lists them\n", word);
    return true;
}

void monitor_close(struct monitor *m)
{
    if (m->trace_file)
        fclose(m->trace_file);
    m->trace_file = NULL;
}
