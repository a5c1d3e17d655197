# The bench's program: static, with the same flags everywhere, so that its code is the same wherever it runs.
ROWS_SRC := $(wildcard bench/*.c)
$(B)/bench/rows: $(ROWS_SRC) bench/rows.h bench/build.mk | $(B)/setup-build
	@mkdir -p $(@D)
	@echo "  LINK $@"
	$(Q)$(CC) -std=gnu17 -O2 -fno-tree-vectorize -fno-math-errno -Wall -Wextra -Werror -static -s -o $@ $(ROWS_SRC)
test-programs: $(B)/bench/rows
