# tests/kvm/switch moves a guest between engines; boot/switch.sh and boot/kvm.sh run it.
$(B)/kvm/switch: tests/kvm/switch.c $(B)/libdoppel.a
	@mkdir -p $(@D)
	@echo "  LINK $@"
	$(Q)$(CC) $(CFLAGS) $(LDFLAGS) -MMD -MP -o $@ $(filter %.c %.a,$^) $(LDLIBS)
-include $(wildcard $(B)/kvm/*.d)
