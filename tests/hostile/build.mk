# The hostile guest: a PVH kernel of 32-bit code.
$(B)/hostile/chaos: tests/hostile/chaos.c tests/hostile/build.mk
	@mkdir -p $(@D)
	@echo "  LINK $@"
	$(Q)$(CC) -std=gnu17 -O1 -Wall -Wextra -Werror -m32 -ffreestanding -nostdlib -static -no-pie -fno-pic -fno-stack-protector -fno-builtin \
		-mgeneral-regs-only -fno-asynchronous-unwind-tables -fcf-protection=none -Wl,-Ttext-segment=0x100000,--build-id=none -o $@ $<
test-programs: $(B)/hostile/chaos
