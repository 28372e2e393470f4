#!/usr/bin/env bash
# Builds the core's test program, with JOBS files (one per processor) in parallel: build.sh OUTPUT COMPILER [FLAGS...]
# QINS_OBJECTS: where setup.py has left the extension's object files, to be tested instead of building the core.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
out=$1 compiler=$2
shift 2
core=$here/../../qins_ext
# by what it says, since a program of another name may call it
case $("$compiler" --version) in *clang*) is_clang=1 ;; *) is_clang=0 ;; esac
objects=$(mktemp -d)
trap 'rm -rf "$objects"' EXIT
compile() { # FILE FLAGS...
    local file=$1
    shift
    # as in setup.py; and gcc spends most of the whole time in taking apart the scalar kernels' arrays
    case "$is_clang $file" in
    1*) ;;
    *isa_scalar.c) set -- "$@" -fno-tree-sra ;;
    *isa_*) set -- "$@" -fno-gcse ;;
    esac
    case "$file $*" in
    # a sanitizer makes the compiler take ten times as long for kernels of which each case is compiled on its own
    *-fsanitize*) set -- "$@" -DSANITIZED=1 -DONE_BODY=1 ;;
    # for emulated x86 processors, which have none of these sets
    *isa_avx512*-ffixed-xmm4* | *isa_amx.c*-ffixed-xmm4*) set -- "$@" -O0 ;;
    esac
    "$compiler" -std=c11 -D_GNU_SOURCE -O2 -ffp-contract=off -Wall -Wextra -Wpedantic -Wshadow -Wconversion \
        -Wno-sign-conversion -Werror "$@" -I"$core" -I"$here" -c "$file" -o "$objects/$(basename "$file" .c).o"
}
export -f compile
export compiler is_clang core here objects
sources=("$core" "$here")
[ -z "${QINS_OBJECTS:-}" ] || sources=("$here")
find "${sources[@]}" -maxdepth 1 -name '*.c' ! -name 'module*.c' ! -name args.c -print0 | sort -z |
    xargs -0 -P "${JOBS:-$(nproc)}" -I{} bash -c 'file=$1; shift; compile "$file" "$@"' compile {} "$@"
if [ -n "${QINS_OBJECTS:-}" ]; then
    find "$QINS_OBJECTS/qins_ext" -name '*.o' ! -name 'module*.o' ! -name args.o -exec ln -s {} "$objects" \;
fi
"$compiler" "$@" "$objects"/*.o -o "$out" -pthread -lm
