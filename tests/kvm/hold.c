/*
 * Keeps virtual machines of KVM's, which never run, until it is killed: inside QEMU, for lib/nested.sh.
 *
 * KVM has branches in the kernel that it changes with the first VM and the last one (static keys: preempt_notifier_key, which __schedule() reads,
 * kvm_has_noapic_vcpu, apic_sw_disabled). The kernel does that by INT3 while other processors run the code, and QEMU 7.2's TCG goes on with the INT3 now and then
 * after it is gone: then all processors are in it for ever. While a VM of each kind is there, nothing is changed.
 */
#include <err.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <stdio.h>
#include <sys/ioctl.h>
#include <unistd.h>

static void hold(int kvm, int chips)
{
    int vm = ioctl(kvm, KVM_CREATE_VM, 0);

    if (vm < 0 || (chips && ioctl(vm, KVM_CREATE_IRQCHIP) < 0) || ioctl(vm, KVM_CREATE_VCPU, 0) < 0)
        err(1, "hold: /dev/kvm");
}

int main(void)
{
    int kvm = open("/dev/kvm", O_RDWR);

    if (kvm < 0)
        err(1, "hold: /dev/kvm");
    hold(kvm, 1);
    hold(kvm, 0);
    puts("holds");
    fflush(stdout);
    for (;;)
        pause();
}
