#!/usr/bin/env bash
# Runs stress.py under ThreadSanitizer on a free-threaded CPython: the first one found in PATH or by pyenv, else one
# that it builds with ThreadSanitizer from the sources of Debian's package (minutes, once, in build/free-threaded).
# PIP: the pip that installs NumPy for it. Arguments are passed on to races.py.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
place=$here/../../build/free-threaded
mkdir -p "$place"
place=$(cd "$place" && pwd)
suite=trixie package=python3.13
export TSAN_OPTIONS=report_bugs=0 # while building: races.py sets its own
plain() { if command -v setarch >/dev/null; then setarch -R "$@"; else "$@"; fi; } # as in races.py

find_one() {
    local candidate
    for candidate in "$place/python/bin"/python3.*t $(compgen -c python3. | grep -E '^python3\.[0-9]+t$' || true) \
        "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.*t/bin/python; do
        if plain "$candidate" -c 'import ctypes, sys; sys.exit(sys._is_gil_enabled())' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
}

build_one() {
    local mirror
    mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 'Origin: Debian' 2>/dev/null | head -n 1)
    if [ -z "$mirror" ] || ! command -v dpkg-source >/dev/null || ! command -v clang >/dev/null; then
        return 1
    fi
    # a list of its own: the system's stays as it is
    mkdir -p "$place"/apt/{lists/partial,cache/archives/partial}
    printf 'Types: deb-src\nURIs: %s\nSuites: %s\nComponents: main\nSigned-By: %s\n' "$mirror" "$suite" \
        /usr/share/keyrings/debian-archive-keyring.gpg >"$place/apt/list.sources"
    local apt=(apt-get -qq -o "Dir::Etc::sourcelist=$place/apt/list.sources" -o Dir::Etc::sourceparts=-
        -o "Dir::State::lists=$place/apt/lists" -o "Dir::Cache=$place/apt/cache" -o APT::Sandbox::User=root)
    (cd "$place/apt" && "${apt[@]}" update && "${apt[@]}" source --download-only "$package") || return 1
    mkdir -p "$place/source" "$place/objects"
    tar xf "$place"/apt/"$package"_*.orig.tar.xz -C "$place/source" --strip-components 1
    (
        cd "$place/objects"
        CC=clang ../source/configure --disable-gil --with-thread-sanitizer --without-ensurepip --disable-test-modules \
            --prefix="$place/python" OPT='-O1 -g1'
        plain make -j"$(nproc)"
        plain make install
    ) >"$place/log" 2>&1 || { tail "$place/log"; return 1; }
}

python=$(find_one)
if [ -z "$python" ] && build_one; then
    python=$(find_one)
fi
if [ -z "$python" ]; then
    echo "NOT RUN: races on a free-threaded CPython (none found, and none could be built)"
    exit 0
fi
version=$(plain "$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
${PIP:-pip} install --quiet --disable-pip-version-check --target "$place/numpy-$version" --only-binary=:all: \
    --implementation cp --python-version "$version" --abi "cp${version/./}t" numpy
export PYTHONPATH=$place/numpy-$version
exec python3 "$here/races.py" --python "$python" "$@"
