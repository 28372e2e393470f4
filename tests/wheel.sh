#!/usr/bin/env bash
# Builds a wheel, repairs it with auditwheel for other Linux distributions, and runs the NumPy tests with it in a fresh
# environment without a compiler.
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
remove=$(command -v rm)
trap '"$remove" -rf "$work"' EXIT
echo "== wheel"
if [ "$(uname -s)" != Linux ]; then
    echo "NOT RUN: wheels of other systems than Linux are made by cibuildwheel"
    exit 0
fi
"$BIN/python" -m build --wheel --outdir "$work/built" "$here" >"$work/log" 2>&1 || { cat "$work/log"; exit 1; }
PATH="$BIN:$PATH" "$BIN/auditwheel" repair --wheel-dir "$work/repaired" "$work"/built/qins-*.whl >"$work/log" 2>&1 ||
    { cat "$work/log"; exit 1; }
wheel=$(echo "$work"/repaired/qins-*.whl)
case "$wheel" in *manylinux*) ;; *) echo "not a manylinux wheel: $wheel"; exit 1 ;; esac
unzipped=$("$BIN/python" -m zipfile -l "$wheel")
for part in _core. py.typed _core.pyi data/constitution.txt data/report.html LICENSE; do
    grep -q "$part" <<<"$unzipped" || { echo "not in the wheel: $part"; exit 1; }
done
"$BIN/python" -m venv --without-pip "$work/venv"
pip=("$BIN/pip" --python "$work/venv/bin/python" --disable-pip-version-check install --quiet --no-compile)
mkdir "$work/bin" "$work/away"
for tool in env bash sh ls uname; do ln -s "$(command -v $tool)" "$work/bin/$tool"; done
cp "$here"/tests/{conftest,reference}.py "$here"/tests/codec/test_{array,feedback,ways}.py "$work/away"
cd "$work/away"
"${pip[@]}" -c "$here/constraints.txt" numpy pytest hypothesis ml_dtypes
export PATH="$work/bin"  # nothing that compiles
"${pip[@]}" --no-index --no-deps "$wheel"
"$work/venv/bin/python" -m pytest -q -p no:cacheprovider -m "not slow" -o markers="slow
once" .
echo "${wheel##*/}: the NumPy tests pass with it"
