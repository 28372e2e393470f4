#!/usr/bin/env bash
# Builds every fuzz target: build.sh DIRECTORY. The core's objects are compiled once, one file per processor in parallel.
# KERNELS: more flags for kernels. With -DONE_BODY=1 they take a fifth of the time to compile, and run at a quarter of the
# speed.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
core=$(cd "$here/../../../qins_ext" && pwd)
out=$1
mkdir -p "$out"
out=$(cd "$out" && pwd)
cd "$here" # the compiler cache keys on it
compile() { # FILE OBJECT
    # Kernels get no coverage, and only the scalar ones UBSan: with all three, one file takes ten minutes to compile.
    local how=(-O1 -fsanitize=fuzzer-no-link,address,undefined)
    case "$1" in
    */isa_scalar.c) how=(-O0 -fsanitize=address,undefined) ;;
    */isa_*) how=(-O1 -fsanitize=address ${KERNELS:-}) ;;
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
