/* The program: everything is in the library, so that tests can reach it. */
#include "ctl/cli.h"

int main(int argc, char **argv)
{
    return cli_main(argc, argv);
}
