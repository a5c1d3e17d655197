#!/bin/bash
# The test runner itself: every way for a test to fail is counted as failure, and named.
. "$(dirname "$0")/../lib/tap.sh"
programs=$tmp/build/asan/tests/unit
mkdir -p "$programs"
fake() { printf '#!/bin/bash\n%s\n' "$2" >"$programs/fake_$1_test"; chmod +x "$programs/fake_$1_test"; }
run() { out=$("$top/tests/run" --build "$tmp/build" "unit/fake_$1*" 2>&1); status=$?; last=$(tail -n 1 <<<"$out"); }

fake good 'echo 1..2; echo "ok 1 - a"; echo "ok 2 - b # SKIP no such device"
echo "# skip: no such tool"; echo "not ok 3 # SKIP c"; echo 1..1'
run good
is "passed and skipped" "$last" "1 passed, 0 failed, 2 skipped"
is "passed and skipped: exit status" "$status" 0
like "skipped by name with the reason" "$out" "unit/fake_good_test: b: no such device"
like "a skip of cmocka's, with the comment before it" "$out" "unit/fake_good_test: c: no such tool"
fake bad_skip 'echo "not ok 1 - a # SKIP b"; exit 1'
run bad_skip
is "a failed test is none that was skipped" "$last" "0 passed, 1 failed, 0 skipped"
fake bad_line 'echo "ok 1 - a"; echo "not ok 2 - b"; echo "# because"; exit 1'
run bad_line
is "a failed test" "$last" "1 passed, 1 failed, 0 skipped"
is "a failed test: exit status" "$status" 1
like "a failed test is named at the end" "$out" $'\n'"  unit/fake_bad_line_test: b"
fake bad_exit 'echo "ok 1 - a"; exit 3'
run bad_exit
like "another exit status fails" "$out" "exit status 3"
is "another exit status is counted" "$last" "1 passed, 1 failed, 0 skipped"
fake crash 'echo "ok 1 - a"; kill -SEGV $$'
run crash
is "a crash fails" "$last" "1 passed, 1 failed, 0 skipped"
fake plan 'echo 1..3; echo "ok 1 - a"; echo "ok 2 - b"'
run plan
like "a broken plan fails" "$out" "planned 3 tests and ran 2"
fake silent 'exit 0'
run silent
is "a test that says nothing fails" "$last" "0 passed, 1 failed, 0 skipped"
fake unsteady "echo x >>'$tmp/runs'; [ \$(wc -l <'$tmp/runs') -gt 1 ] && echo 'ok 1 - a' || { echo 'not ok 1 - a'; exit 1; }"
run unsteady
is "failed once, passes alone" "$last" "1 passed, 0 failed, 0 skipped"
like "failed once, passes alone: it is named" "$out" "Unsteady"$'[^\n]*\n'"  unit/fake_unsteady_test: a"
run nonesuch
is "nothing to run is an error" "$status" 64
done_testing
