#!/bin/sh
# Runs kernels on the emulator under the address sanitizer (with the undefined behaviour sanitizer) and the thread
# sanitizer: scripts/sanitize.sh [address|thread|all] [filter of tests/kernels]. First proves that they find planted
# bugs. Each has a target folder of its own. Needs g++ with its sanitizers, and setarch: they need fixed addresses.
set -eu
cd "$(dirname "$0")/.."
which=${1:-all}
filter=${2:-}

suppressions=$(mktemp)
trap 'rm -f "$suppressions"' EXIT
# Rust is not instrumented, so its locks are not seen. No thread of a kernel has a function of Rust on its stack.
printf 'race:_RN\nrace:_RI\nrace:.rs$\n' > "$suppressions"
export ASAN_OPTIONS=detect_leaks=0:detect_stack_use_after_return=0:abort_on_error=0
export TSAN_OPTIONS="suppressions=$suppressions halt_on_error=1 report_signal_unsafe=0"
export CARGO_PROFILE_DEV_OPT_LEVEL="${CARGO_PROFILE_DEV_OPT_LEVEL:-1}"

# planted <kernel> <words>: a test that must fail with these words.
planted() {
    if output=$(PLANTED=$1 cargo test -q --test emulator planted_for_a_sanitizer -- --ignored --nocapture 2>&1) ||
        ! printf '%s' "$output" | grep -q "$2"; then
        printf '%s\n' "$output" | tail -n 40
        echo "$1: the $SPLEEN_EMULATOR_SANITIZER sanitizer does not find the bug ($2)" >&2
        exit 1
    fi
    echo "$1: found ($2)"
}

run() {
    export SPLEEN_EMULATOR_SANITIZER=$1 CARGO_TARGET_DIR="target/sanitize-$1"
    library=$(g++ -print-file-name="$2")
    export CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUNNER="setarch -R env LD_PRELOAD=$library"
    cargo test --no-run --test emulator --test kernels --test device_engine
    case $1 in
        address)
            planted planted_short_shared 'AddressSanitizer: use-after-poison'
            planted planted_local 'insufficient space for an object'
            ;;
        thread)
            planted planted_sync 'ThreadSanitizer: data race'
            planted planted_double_buffer 'ThreadSanitizer: data race'
            planted planted_copy_wait 'ThreadSanitizer: data race'
            ;;
    esac
    cargo test --test emulator
    cargo test --test kernels "$filter"
    # The engine: two training steps, one of them recorded.
    cargo test --test device_engine a_loss_that_is_not_a_number_ends_training
}

case $which in
    address) run address libasan.so ;;
    thread) run thread libtsan.so ;;
    all)
        run address libasan.so
        run thread libtsan.so
        ;;
    *) echo "usage: $0 [address|thread|all] [filter]" >&2 && exit 2 ;;
esac
