# The sys tests: bare-metal programs tests/sys/NAME{16,32,64}.c, each linked with the library of its mode into a flat image, and the program that runs them.
SYS      := tests/sys
SYS_B    := $(B)/sys
SYS_PROG := $(basename $(notdir $(wildcard $(SYS)/*16.c $(SYS)/*32.c $(SYS)/*64.c)))
SYS_BIN  := $(SYS_PROG:%=$(SYS_B)/%.bin)
SYS_CC   ?= gcc# the programs use the GNU assembler's dialect in all three modes
SYS_CFLAGS := -std=gnu17 -O1 -g0 -Wall -Wextra -Werror -ffreestanding -fno-pic -fno-pie -fno-stack-protector -fno-omit-frame-pointer \
	-fno-asynchronous-unwind-tables -fcf-protection=none -fno-strict-aliasing -fno-builtin -mgeneral-regs-only -I$(SYS)/lib
SYS_16   := -m16 -DREAL_MODE
SYS_32   := -m32
SYS_64   := -m64 -mno-red-zone
SYS_LD_16 := -m elf_i386
SYS_LD_32 := -m elf_i386
SYS_LD_64 := -m elf_x86_64

# $(1): 16, 32, 64
define sys_mode
$(SYS_B)/$(1)/%.o: $(SYS)/lib/%.c
	@mkdir -p $$(@D)
	$$(Q)$$(SYS_CC) $$(SYS_CFLAGS) $$(SYS_$(1)) -MMD -MP -c -o $$@ $$<
$(SYS_B)/$(1)/%.o: $(SYS)/lib/%.S
	@mkdir -p $$(@D)
	$$(Q)$$(SYS_CC) $$(SYS_CFLAGS) $$(SYS_$(1)) -MMD -MP -c -o $$@ $$<
$(SYS_B)/%$(1).o: $(SYS)/%$(1).c
	@mkdir -p $$(@D)
	$$(Q)$$(SYS_CC) $$(SYS_CFLAGS) $$(SYS_$(1)) -MMD -MP -c -o $$@ $$<
$(SYS_B)/%$(1).elf: $(SYS_B)/%$(1).o $(SYS_B)/$(1)/start.o $(SYS_B)/$(1)/lib.o $(SYS_B)/$(1)/cpu$(1).o $(SYS_B)/$(1)/trap$(1).o $(SYS)/lib/flat.ld
	$$(Q)ld --no-warn-rwx-segments $$(SYS_LD_$(1)) -T $(SYS)/lib/flat.ld --build-id=none -z noexecstack -o $$@ $$(filter %.o,$$^)
$(SYS_B)/%$(1).bin: $(SYS_B)/%$(1).elf
	@echo "  SYS  $$(notdir $$*)$(1)"
	$$(Q)objcopy -O binary $$< $$@
endef
$(foreach m,16 32 64,$(eval $(call sys_mode,$(m))))

sys: $(SYS_BIN) $(SYS_B)/reset.rom $(SYS_B)/sys_runner
# QEMU's way in: a ROM whose reset vector jumps to 0:8000h
$(SYS_B)/reset.rom:
	@mkdir -p $(@D)
	$(Q)printf '\352\000\200\000\000' | dd of=$@ bs=1 seek=65520 conv=notrunc status=none && truncate -s 65536 $@

.PHONY: sys
.PRECIOUS: $(SYS_B)/%.elf $(SYS_B)/%.o
-include $(wildcard $(SYS_B)/*.d $(SYS_B)/*/*.d)

# The runner is a host program like any test: linked with the whole library.
$(SYS_B)/sys_runner: $(SYS)/sys_runner.c $(B)/libdoppel.a
	@mkdir -p $(@D)
	@echo "  LINK $@"
	$(Q)$(CC) $(CFLAGS) $(LDFLAGS) -MMD -MP -o $@ $(filter %.c %.a,$^) $(LDLIBS)
