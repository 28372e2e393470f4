#!/usr/bin/env bash
# Builds the core's test program: build.sh OUTPUT COMPILER [FLAGS...]
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
out=$1 compiler=$2
shift 2
core=$here/../../qins_ext
sources=$(find "$core" -name '*.c' ! -name module.c | sort)
# shellcheck disable=SC2086
"$compiler" -std=c11 -D_GNU_SOURCE -O2 -ffp-contract=off -Wall -Wextra -Wpedantic -Wshadow -Wconversion -Wno-sign-conversion -Werror \
    "$@" -I"$core" $sources "$here/test_core.c" -o "$out" -pthread -lm
