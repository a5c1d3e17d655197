# Random programs: the parts of tests/insn, and their own.
DIFF_SRC := tests/diff/prog.c $(filter-out %_test.c,$(wildcard tests/insn/*.c))
DIFF_TESTS := $(patsubst tests/%.c,$(B)/tests/%,$(wildcard tests/diff/*_test.c))
$(DIFF_TESTS): $(B)/tests/diff/%: tests/diff/%.c $(DIFF_SRC) tests/insn/insn.h tests/diff/prog.h $(B)/libdoppel.a
	@mkdir -p $(@D)
	@echo "  TEST $@"
	$(Q)$(CC) $(CFLAGS) $(LDFLAGS) -Itests/insn -o $@ $(filter %.c,$^) $(B)/libdoppel.a $(LDLIBS)
