#!/usr/bin/env bash
# Builds every fuzz target: build.sh DIRECTORY. The core's objects are compiled once, one file per processor in parallel.
# SHORT=1: kernels that take a fifth of the time to compile, and run at a quarter of the speed.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
core=$(cd "$here/../../../qins_ext" && pwd)
out=$1
mkdir -p "$out"
out=$(cd "$out" && pwd)
cd "$here" # the compiler cache keys on it
compile() { # FILE OBJECT
    # Counters alone guide the fuzzer: values of comparisons as well made it two to ten times slower. Kernels get no
    # coverage, and only the scalar ones UBSan: with all three, one file takes ten minutes to compile.
    local how=(-O1 -fsanitize=address,undefined -fsanitize-coverage=inline-8bit-counters,pc-table)
    case "$1" in
    */isa_scalar.c) how=(-O1 -fsanitize=address,undefined -fsanitize-trap=undefined) ;;
    */isa_*) how=(-O1 -fsanitize=address) ;;
    esac
    case "${SHORT:-}$1" in
    1*/isa_scalar.c) how=(-O0 -fsanitize=address,undefined) ;;
    1*/isa_*) how+=(-DONE_BODY=1) ;;
    esac
    clang -std=c11 -D_GNU_SOURCE -g1 -ffp-contract=off -Wall -Wextra -Werror -I"$core" \
        "${how[@]}" -fno-sanitize-recover=undefined -c "$1" -o "$2"
}
export -f compile
export core out
# the largest first, so that no processor waits for one at the end
ls -S "$core"/isa_*.c >"$out/files"
find "$core" "$here" -maxdepth 1 -name '*.c' ! -name 'isa_*' ! -name 'module*.c' ! -name args.c | sort >>"$out/files"
xargs -a "$out/files" -P "${JOBS:-$(nproc)}" -I{} bash -c 'compile "$1" "$out/$(basename "$(dirname "$1")")-$(basename "$1" .c).o"' \
    compile {}
for target in "$here"/*.c; do
    name=$(basename "$target" .c)
    clang -fsanitize=fuzzer,address,undefined "$out/fuzz-$name.o" "$out"/qins_ext-*.o -o "$out/$name" -pthread -lm
done
