#!/usr/bin/env bash
# Runs the tests that need only NumPy with every CPython from 3.10 to 3.14 found in PATH or by pyenv, each in its own
# environment; prints the versions that were not found. pythons.sh VERSION...: only these. NUMPY: the version of NumPy
# to run with, instead of the newest; the extension is built with the newest in any case, as wheels are. PIP: what
# installs into the environments.
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cp "$here"/tests/{conftest,reference}.py "$here"/tests/codec/test_{array,feedback,ways}.py "$work"
cp -r "$here/pyproject.toml" "$here/setup.py" "$here/MANIFEST.in" "$here/README.md" "$here/LICENSE" "$here/python" "$here/qins_ext" "$work/"
rm -f "$work"/python/qins/*.so
find_python() { # find_python VERSION: print the path of one that works
    local candidate
    for candidate in "$(command -v "python$1" || true)" "${PYENV_ROOT:-$HOME/.pyenv}/versions/$1".*/bin/python; do
        if [ -n "$candidate" ] && "$candidate" -c 'import ensurepip, ctypes' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
}
versions=("$@")
[ $# -gt 0 ] || versions=(3.10 3.11 3.12 3.13 3.14)
for version in "${versions[@]}"; do
    python=$(find_python "$version")
    if [ -z "$python" ]; then
        echo "NOT RUN: CPython $version (not found)"
        continue
    fi
    echo "== NumPy suite, CPython $version"
    "$python" -m venv --without-pip "$work/$version"
    # no constraints: for an old Python, the last releases of packages are older
    pip=("${PIP:-pip}" --python "$work/$version/bin/python" --disable-pip-version-check install --quiet --no-compile)
    "${pip[@]}" "numpy${NUMPY:+==$NUMPY}" pytest hypothesis ml_dtypes setuptools
    if [ -n "${NUMPY:-}" ]; then "${pip[@]}" "$work"; else "${pip[@]}" --no-build-isolation "$work"; fi
    (cd "$work" && "$work/$version/bin/python" -m pytest -q -p no:cacheprovider -m "not slow" test_array.py test_feedback.py test_ways.py)
done
