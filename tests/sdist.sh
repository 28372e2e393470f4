#!/usr/bin/env bash
# Builds an sdist, installs it into a fresh environment and uses it; checks that the extension exports only qins_ names.
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
echo "== sdist"
"$BIN/python" -m build --sdist --no-isolation --outdir "$work" "$here" >"$work/log" 2>&1 || { cat "$work/log"; exit 1; }
"$BIN/python" -m venv --without-pip "$work/venv"
"$BIN/pip" --python "$work/venv/bin/python" install --quiet --disable-pip-version-check "$work"/qins-*.tar.gz
cd "$work"
"$work/venv/bin/python" - <<'PY'
import sys
import numpy as np, qins
assert "site-packages" in qins.__file__, qins.__file__
w = np.random.default_rng(0).normal(0, 0.02, (64, 256)).astype(np.float32)
for codec in ("golden", "log9", "log8"):
    e = qins.encode(w, codec)
    assert np.abs(e.decode() - w).max() < 0.005
assert qins.matmul(w, e).shape == (64, 64)
try:
    qins.QINSLinear
except ImportError as error:
    assert "qins[torch]" in str(error), error
else:
    raise AssertionError("torch is not installed here")
print("installed from the sdist, with NumPy alone:", qins.__version__, qins.isas())
PY
echo "== glue: warnings are errors, gcc and clang"
includes=$("$BIN/python" -c 'import numpy, sysconfig; print("-I" + sysconfig.get_paths()["include"], "-I" + numpy.get_include())')
for compiler in gcc clang; do
    if command -v "$compiler" >/dev/null; then
        for file in "$here"/qins_ext/module*.c "$here"/qins_ext/args.c; do
            # shellcheck disable=SC2086
            "$compiler" -std=c11 -O1 -Wall -Wextra -Werror -fPIC $includes -c "$file" -o "$work/glue.o"
        done
    else
        echo "NOT RUN: glue with $compiler (not installed)"
    fi
done
extension=$(find "$work/venv" -name '_core*.so')
leaked=$(nm -D --defined-only "$extension" | awk '$2 ~ /[A-Z]/ {print $3}' | grep -v -e '^PyInit__core$' -e '^_init$' -e '^_fini$' || true)
[ -z "$leaked" ] || { echo "exported: $leaked"; exit 1; }
leaked=$(nm "$extension" 2>/dev/null | awk '$2 == "T" || $2 == "D" || $2 == "R" || $2 == "B" {print $3}' | grep -v -e '^PyInit__core$' -e '^_' -e '^qins_' || true)
[ -z "$leaked" ] || { echo "external names without the prefix qins_: $leaked"; exit 1; }
