# Programs that tests of tests/boot run in the guest, which has no C library.
$(B)/boot/%: tests/boot/%.c tests/boot/build.mk
	@mkdir -p $(@D)
	@echo "  LINK $@"
	$(Q)$(CC) -std=gnu17 -O2 -g -Wall -Wextra -Werror -static -pthread -o $@ $<
test-programs: $(B)/boot/dma_code $(B)/boot/stream $(B)/boot/netpeer $(B)/boot/disk_work $(B)/boot/kexec
