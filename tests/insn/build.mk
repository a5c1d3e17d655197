# insn_test has several sources; this rule replaces the general one for tests.
INSN_SRC := $(filter-out %_test.c,$(wildcard tests/insn/*.c))
$(B)/tests/insn/insn_test: tests/insn/insn_test.c $(INSN_SRC) tests/insn/insn.h $(B)/libdoppel.a
	@mkdir -p $(@D)
	@echo "  TEST $@"
	$(Q)$(CC) $(CFLAGS) $(LDFLAGS) -Itests/insn -o $@ $(filter %.c,$^) $(B)/libdoppel.a $(LDLIBS)
