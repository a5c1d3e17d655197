# tests/kvm/switch moves a guest between engines; boot/switch.sh and boot/kvm.sh run it. engine_test asks each engine for
# what a debugger needs and for the pages that were written.
$(B)/kvm/%: tests/kvm/%.c $(B)/libdoppel.a
	@mkdir -p $(@D)
	@echo "  LINK $@"
	$(Q)$(CC) $(CFLAGS) $(LDFLAGS) -MMD -MP -o $@ $(filter %.c %.a,$^) $(LDLIBS)
-include $(wildcard $(B)/kvm/*.d)
