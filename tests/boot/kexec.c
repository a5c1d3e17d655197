/*
 * kexec KERNEL INITRD WORDS: boots that kernel without the firmware, with this one's command line and WORDS behind it. It takes no leave of anything that runs:
 * devices are left as they are, but for what the kernel itself does about them.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/reboot.h>
#include <sys/syscall.h>
#include <unistd.h>

int main(int argc, char **argv)
{
    char line[4096];

    if (argc != 4) {
        fprintf(stderr, "usage: kexec KERNEL INITRD WORDS\n");
        return 64;
    }
    int kernel = open(argv[1], O_RDONLY), initrd = open(argv[2], O_RDONLY), own = open("/proc/cmdline", O_RDONLY);
    ssize_t n = read(own, line, sizeof line / 2);
    if (kernel < 0 || initrd < 0 || n <= 0) {
        perror("kexec");
        return 1;
    }
    line[n - 1] = 0;                                               /* its newline */
    size_t len = (size_t)snprintf(line + n - 1, sizeof line - (size_t)n, " %.1000s", argv[3]) + (size_t)n;
    if (syscall(SYS_kexec_file_load, kernel, initrd, len, line, 0)) {
        perror("kexec_file_load");
        return 1;
    }
    reboot(RB_KEXEC);
    perror("reboot");
    return 1;
}
