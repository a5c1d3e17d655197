# The hostile guest: a PVH kernel of 32-bit code.
$(B)/hostile/chaos: tests/hostile/chaos.c tests/hostile/build.mk
	@mkdir -p $(@D)
	@echo "  LINK $@"
	$(Q)$(CC) -std=gnu17 -O1 -Wall -Wextra -Werror -m32 -ffreestanding -nostdlib -static -no-pie -fno-pic -fno-stack-protector -fno-builtin \
		-mgeneral-regs-only -fno-asynchronous-unwind-tables -fcf-protection=none -Wl,-Ttext-segment=0x100000,--build-id=none -o $@ $<
test-programs: $(B)/hostile/chaos

# Put before the C library, it lets KVM's ioctls fail.
$(B)/hostile/kvm_refuse.so: tests/hostile/kvm_refuse.c tests/hostile/build.mk
	@mkdir -p $(@D)
	@echo "  LINK $@"
	$(Q)$(CC) $(filter-out -fPIE -pie,$(CFLAGS)) -fPIC -shared -o $@ $< -ldl
test-programs: $(B)/hostile/kvm_refuse.so

$(B)/hostile/once.elf: tests/hostile/once.s tests/hostile/build.mk
	@mkdir -p $(@D)
	@echo "  LINK $@"
	$(Q)as --32 -o $(@:.elf=.o) $< && ld -m elf_i386 -e start -Ttext 0x100000 -N --no-warn-rwx-segments -o $@ $(@:.elf=.o)
test-programs: $(B)/hostile/once.elf
