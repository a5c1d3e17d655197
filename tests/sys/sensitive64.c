/* The sensitive instructions in 64-bit code: lib/sensitive.h. */
#include "sensitive.h"
