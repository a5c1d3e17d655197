# doppel: `make run` and `make test` are all that a newcomer needs; `make help` lists the rest.
PREFIX  ?= /usr/local
DESTDIR ?=
B       ?= build
V       ?= 0
Q       := $(if $(filter 0,$(V)),@)
VERSION := 0.1.0
ifeq ($(origin CC),default)
CC      := gcc
endif

CFLAGS  ?= -O2 -g
override CFLAGS += -std=gnu17 -Wall -Wextra -Werror -fno-strict-aliasing -fno-common -pthread -Isrc \
	-DDOPPEL_VERSION='"$(VERSION)"' $(SANITIZE)
LDLIBS  := -lZydis -lZycore -lslirp -luring -ljansson -lyaml -lpthread
SETUP   := scripts/setup
# In parallel unless the user says how (-j on the command line wins).
ifeq ($(MAKELEVEL),0)
MAKEFLAGS += -j$(shell nproc)
endif

SRC  := $(wildcard src/*/*.c src/*/*/*.c)
OBJ  := $(SRC:%.c=$(B)/obj/%.o)

# Light code runs while the guest's vectors are in the processor's registers (cpu/bt/fpstate.h): compiled without such instructions, and what it calls
# outside goes through heavy.c's gates (tests/light looks at the objects).
NOT_LIGHT := src/cpu/bt/heavy.c src/cpu/bt/signal.c src/cpu/bt/check%.c src/cpu/interp/fp%.c src/cpu/interp/xsave.c src/cpu/interp/decode.c
LIGHT := $(filter-out $(NOT_LIGHT),$(wildcard src/cpu/bt/*.c src/cpu/interp/*.c)) src/mem/mmu.c src/mem/ram.c src/cpu/trap.c \
	src/cpu/cpuid.c
OBJCOPY ?= objcopy

all: $(B)/doppel $(B)/doppel.1 guest

help:
	@echo 'make          build/doppel, its man page and the default guest; installs the packages that takes'
	@echo 'make run      boots the default guest to a shell in this terminal (poweroff, or Ctrl-A X, ends it)'
	@echo 'make test     all tests; T="boot dev/*" chooses some'
	@echo 'make bench    measurements beside native, QEMU and UML; BENCH="--quick", or --rows, --systems, --repeat'
	@echo 'make fuzz     fuzz targets for SECONDS each (default 600); F=NAME chooses one'
	@echo 'make soak     all tests in their long forms, hours of them; T chooses, SOAK=N: N times; the last result: $(B)/soak-result.txt'
	@echo 'make install  PREFIX=$(PREFIX) DESTDIR=$(DESTDIR)'
	@echo 'make clean    removes $(B)/'
	@echo 'Variables: CC, CFLAGS, B (build folder), SANITIZE, V=1 (show commands)'

# ---- what is needed, and what changed ----
# Stamps: packages are looked at when scripts/setup changed or $(B) is new; objects are made anew when compiler or flags
# changed, the library when the list of sources did.
$(B)/setup-%: $(SETUP)
	@mkdir -p $(@D)
	$(Q)$(SETUP) $* && touch $@

BUILT_WITH := $(CC) $(CFLAGS) $(LDFLAGS) $(NOT_LIGHT)
ifneq ($(BUILT_WITH),$(file <$(B)/flags))
$(shell mkdir -p $(B))
$(file >$(B)/flags,$(BUILT_WITH))
endif
ifneq ($(SRC),$(file <$(B)/sources))
$(shell mkdir -p $(B))
$(file >$(B)/sources,$(SRC))
endif
$(B)/flags $(B)/sources:

# ---- the program ----
$(B)/doppel: $(B)/obj/src/main.o $(B)/libdoppel.a
	@echo "  LINK $@"
	$(Q)$(CC) $(CFLAGS) $(LDFLAGS) -o $@ $^ $(LDLIBS)

$(B)/libdoppel.a: $(OBJ) $(B)/sources
	@echo "  AR   $@"
	$(Q)rm -f $@ && $(AR) rcs $@ $(OBJ)

$(B)/obj/%.o: %.c $(B)/flags | $(B)/setup-build
	@mkdir -p $(@D)
	@echo "  CC   $<"
	$(Q)$(CC) $(CFLAGS) $(ONLY) -MMD -MP -c -o $@ $<

$(LIGHT:%.c=$(B)/obj/%.o): ONLY := -mgeneral-regs-only
$(LIGHT:%.c=$(B)/obj/%.o): $(B)/obj/%.o: %.c $(B)/flags $(B)/heavy.syms | $(B)/setup-build
	@mkdir -p $(@D)
	@echo "  CC   $<"
	$(Q)$(CC) $(CFLAGS) $(ONLY) -MMD -MP -c -o $@ $<
	$(Q)$(OBJCOPY) --redefine-syms=$(B)/heavy.syms $@
light-objects:
	@echo $(LIGHT:%.c=$(B)/obj/%.o)
$(B)/heavy.syms: src/cpu/bt/heavy.def
	$(Q)sed -nE 's/^(HEAVY|LIGHT)\((\w+)\).*/\2 \L\1_\E\2/p' $< >$@

$(B)/doppel.1: $(B)/doppel
	$(Q)$(B)/doppel --man >$@.tmp && mv $@.tmp $@

-include $(OBJ:.o=.d) $(B)/obj/src/main.d

# ---- the guest ----
# The script knows itself whether there is something to do.
guest: | $(B)/setup-build
	$(Q)guest/build $(B)/guest
guest-standard: | $(B)/setup-build
	$(Q)guest/build --kernel standard $(B)/guest-standard

# Process 1 of the guest and the agent, compiled: an installed doppel makes guests without a compiler.
$(B)/init: guest/build guest/init.c guest/init.h guest/command.c guest/root.c guest/root.h guest/protocol.h | $(B)/setup-build
	$(Q)guest/build --compile-init $@
$(B)/agent: guest/build agent/agent.c agent/protocol.h guest/protocol.h src/back/tree.c src/back/tree.h | $(B)/setup-build
	$(Q)guest/build --compile-agent $@

run: $(B)/doppel guest
	$(Q)$(B)/doppel run

# ---- tests ----
# unit and dev tests run under ASan and UBSan, in a build folder of their own; fuzz targets are clang's, in a third one.
# gcc itself says that these warnings are unreliable in sanitized code; the plain build has them.
ASAN_WARN := $(if $(findstring clang,$(CC)),,-Wno-array-bounds -Wno-maybe-uninitialized -Wno-stringop-overflow \
	-Wno-stringop-overread -Wno-stringop-truncation)
ASAN := -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer
PROGRAMS = $(patsubst tests/%.c,$(B)/tests/%,$(wildcard $(1)))
ASAN_TESTS := $(call PROGRAMS,tests/unit/*_test.c tests/dev/*_test.c tests/hostile/*_test.c)
INSN_TESTS := $(call PROGRAMS,tests/insn/*_test.c tests/diff/*_test.c tests/latency/*_test.c)
FUZZERS := $(patsubst tests/fuzz/%.c,$(B)/bin/%,$(wildcard tests/fuzz/*_fuzz.c))

$(B)/tests/%: tests/%.c $(B)/libdoppel.a
	@mkdir -p $(@D)
	@echo "  LINK $@"
	$(Q)$(CC) $(CFLAGS) $(LDFLAGS) -Itests -MMD -MP -MF $@.d -o $@ $< $(B)/libdoppel.a -lcmocka $(LDLIBS)
$(B)/bin/%: tests/fuzz/%.c $(B)/libdoppel.a
	@mkdir -p $(@D)
	@echo "  LINK $@"
	$(Q)$(CC) $(CFLAGS) $(LDFLAGS) -Itests -fsanitize=fuzzer -MMD -MP -MF $@.d -o $@ $< $(B)/libdoppel.a $(LDLIBS)
-include $(wildcard $(B)/tests/*/*.d $(B)/bin/*.d)

asan-programs: $(B)/doppel $(ASAN_TESTS) $(B)/sys/sys_runner
fuzz-programs: $(FUZZERS)
include $(wildcard tests/*/build.mk) bench/build.mk

# One after the other: each of them keeps all processors busy.
test-programs: $(B)/doppel guest $(INSN_TESTS) $(if $(wildcard tests/sys/build.mk),sys) $(B)/kvm/switch $(B)/kvm/engine_test $(B)/kvm/hold | $(B)/setup-test
	$(Q)$(MAKE) --no-print-directory B=$(B)/asan SANITIZE='$(ASAN) $(ASAN_WARN)' asan-programs
	$(Q)$(MAKE) --no-print-directory B=$(B)/fuzz CC=clang SANITIZE='-fsanitize=fuzzer-no-link $(ASAN)' fuzz-programs

# Packages first, then everything in parallel, then the tests.
test: $(B)/setup-test
	$(Q)$(MAKE) --no-print-directory test-programs guest-standard
	$(Q)tests/run --build $(B) $(T)

SECONDS ?= 600
fuzz: $(B)/setup-test
	$(Q)$(MAKE) --no-print-directory B=$(B)/fuzz CC=clang SANITIZE='-fsanitize=fuzzer-no-link $(ASAN)' fuzz-programs
	$(Q)tests/run --build $(B) --fuzz-seconds $(SECONDS) $(if $(F),fuzz/$(F),'fuzz/*')

# What several threads do to the same words. (gcc warns of fences, which its sanitizer does not know: none is needed where this looks.)
TSAN := -fsanitize=thread $(if $(findstring clang,$(CC)),,-Wno-tsan)
TSAN_TESTS := $(addprefix tests/unit/,block_test bus_test chardev_test clock_test codepage_test direct_test loop_test net_passt_test net_user_test \
	overlay_test p9_test spin_test vhost_user_test) $(addprefix tests/dev/,nvme_test virtio_9p_test virtio_blk_test virtio_console_test virtio_legacy_test \
	virtio_net_test virtio_pci_test virtio_vsock_messages_test virtio_vsock_state_test virtio_vsock_test)
SOAK ?= 1
soak: $(B)/setup-test
	$(Q)$(MAKE) --no-print-directory test-programs guest-standard
	$(Q)$(MAKE) --no-print-directory B=$(B)/tsan SANITIZE='$(TSAN)' $(TSAN_TESTS:%=$(B)/tsan/%)
	$(Q)for i in $$(seq $(SOAK)); do \
		echo "soak: round $$i of $(SOAK)"; \
		SOAK_LONG=1 tests/run --build $(B) --fuzz-seconds $(SECONDS) --result $(B)/soak-result.txt $(T) || exit 1; \
	done

bench-programs: $(B)/doppel $(B)/bench/rows $(B)/tests/latency/latency_test $(B)/boot/netpeer $(B)/boot/disk_work $(B)/boot/stream guest
bench: $(B)/setup-bench
	$(Q)$(MAKE) --no-print-directory bench-programs
	$(Q)bench/run $(BENCH) $(B)/doppel
	$(if $(filter-out --quick,$(BENCH)),,$(Q)bench/net $(BENCH) $(B)/doppel)
	$(if $(filter-out --quick,$(BENCH)),,$(Q)bench/disk $(BENCH) $(B)/doppel)
	$(if $(filter-out --quick,$(BENCH)),,$(Q)bench/vsock $(BENCH) $(B)/doppel)
	$(if $(filter-out --quick,$(BENCH)),,$(Q)bench/share $(BENCH) $(B)/doppel)

# ---- installation ----
SHARE := $(DESTDIR)$(PREFIX)/share
install: all $(B)/init $(B)/agent
	install -d '$(DESTDIR)$(PREFIX)/bin' '$(SHARE)/doppel' '$(SHARE)/man/man1'
	install -m 755 $(B)/doppel '$(DESTDIR)$(PREFIX)/bin/doppel'
	install -m 644 $(B)/doppel.1 '$(SHARE)/man/man1/doppel.1'
	install -m 644 $(addprefix $(B)/guest/,vmlinuz initrd cmdline manifest) '$(SHARE)/doppel'
	install -m 755 guest/build '$(SHARE)/doppel/guest-build'
	install -m 755 $(B)/init '$(SHARE)/doppel/init'
	install -m 755 $(B)/agent '$(SHARE)/doppel/agent'
	install -m 755 image/build '$(SHARE)/doppel/image-build'
	install -m 755 image/doppel-seed '$(SHARE)/doppel/doppel-seed'
	install -m 644 agent/doppel-agent.service image/doppel-ssh-keys.service image/doppel-seed.service '$(SHARE)/doppel'

clean:
	rm -rf $(B)

.PHONY: all help light-objects guest guest-standard run asan-programs fuzz-programs test-programs test fuzz soak bench-programs bench install clean
.DELETE_ON_ERROR:
