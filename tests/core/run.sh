#!/usr/bin/env bash
# Builds and runs the core's test program with several compilers, sanitizers and emulators, JOBS (one per processor) in
# parallel, and prints the ones that this machine lacks. run.sh native: gcc, every instruction set that runs here; run.sh
# others: all other builds; run.sh: both. run.sh races: ThreadSanitizer, which takes minutes and is part of neither.
# QINS_OBJECTS: see build.sh; for gcc's builds without further flags.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export JOBS=${JOBS:-$(nproc)}
extension=${QINS_OBJECTS:-}
unset QINS_OBJECTS
digests=$here/digests.txt
not_run=()
jobs=() # process ids, in the order of their output

have() { command -v "$1" >/dev/null 2>&1; }

# one TITLE COMPILER [FLAGS...] -- [EMULATOR...]: build, then run, under the emulator if there is one
one() {
    local title=$1 compiler=$2 flags=()
    shift 2
    while [ "$1" != -- ]; do flags+=("$1"); shift; done
    shift
    echo "== core: $title"
    local how=() program
    case $compiler:${1:-} in
    musl-gcc:*) how=(--brief) ;; # kernels call nothing of the C library
    *:qemu-x86_64) how=(--best) ;; # the instruction sets run here natively, too
    *:setarch) how=(--brief) ;; # kernels are the same without ThreadSanitizer, and ten times as fast
    *:?*) how=(--no-fork) ;; # qemu-user 7.2 cannot start threads after a fork
    esac
    program=$(mktemp -d "$work/XXXXXX")/test_core
    local began=$SECONDS
    "$here/build.sh" "$program" "$compiler" "${flags[@]}"
    echo "built in $((SECONDS - began)) s"
    began=$SECONDS
    "$@" "$program" "$digests" "${how[@]}" 2>"$program.stderr" || { cat "$program.stderr"; return 1; }
    echo "ran in $((SECONDS - began)) s"
}

# run ...: call `one` in the background, once a processor is free
run() {
    while [ "$(jobs -rp | wc -l)" -ge "$JOBS" ]; do wait -n || true; done
    one "$@" >"$work/${#jobs[@]}.log" 2>&1 &
    jobs+=($!)
}

which=${1:-all}
if [ "$which" = races ]; then
    run "gcc, ThreadSanitizer" gcc -O1 -g1 -fsanitize=thread -- setarch -R # it cannot bear all randomized addresses
elif [ "$which" != others ]; then
    QINS_OBJECTS=$extension run "gcc" gcc --
fi
if [ "$which" != native ] && [ "$which" != races ]; then
    # -O1 and one sanitizer each: together, in one build, they take three times as long to compile
    undefined=(-fsanitize=undefined -fno-sanitize-recover=undefined)
    if have clang; then
        # the minimal runtime names what is undefined, but not where, and takes half the time to compile
        run "clang, UBSan" clang -O1 -g1 "${undefined[@]}" -fsanitize-minimal-runtime --
        run "gcc, ASan" gcc -O1 -g1 -fsanitize=address -fno-var-tracking-assignments --
        run "clang" clang -DONE_BODY=1 -- # which trust-platforms compiles as they ship
    else
        run "gcc, ASan and UBSan" gcc -O1 -g1 -fsanitize=address "${undefined[@]}" -fno-var-tracking-assignments --
        not_run+=("clang (not installed)")
    fi
    if have qemu-x86_64 && [ "$(uname -m)" = x86_64 ]; then
        QINS_OBJECTS=$extension run "an x86-64 processor of 2006 (qemu)" gcc -- qemu-x86_64 -cpu Conroe
        # qemu 7.2 treats a gather's index in xmm4 as no index, so the compiler must not use that register
        run "Haswell (qemu)" gcc -DONE_BODY=1 -ffixed-xmm4 -- qemu-x86_64 -cpu Haswell
    else
        not_run+=("x86-64 processors under qemu-x86_64")
    fi
    if have qemu-aarch64 && have aarch64-linux-gnu-gcc; then
        run "AArch64 (qemu)" aarch64-linux-gnu-gcc -- qemu-aarch64 -L /usr/aarch64-linux-gnu
    else
        not_run+=("AArch64 under qemu-aarch64")
    fi
    if have musl-gcc; then
        run "gcc, musl libc" musl-gcc -O1 -DONE_BODY=1 -static -- # kernels are compiled as for glibc elsewhere
    else
        not_run+=("musl libc (no musl-gcc)")
    fi
    if grep -qs avx512_bf16 /proc/cpuinfo && ! grep -qs amx_tile /proc/cpuinfo; then
        run "gcc, AMX's tiles in software" gcc -include "$here/software_tiles.h" --
    elif ! grep -qs amx_tile /proc/cpuinfo; then
        not_run+=("AMX's tiles in software, which needs AVX512_BF16")
    fi
fi
failed=0
for i in "${!jobs[@]}"; do
    wait "${jobs[$i]}" || failed=1
    cat "$work/$i.log"
done
for what in "${not_run[@]}"; do echo "NOT RUN: core on $what"; done
exit $failed
