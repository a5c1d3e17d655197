/* `doppel doctor`: what this host offers. Looks only; exits with 0 whatever it finds, and never waits. */
#pragma once

int doctor_main(int argc, char **argv);
