/* The sensitive instructions in 32-bit code: lib/sensitive.h. */
#include "sensitive.h"
