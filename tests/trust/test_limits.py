"""A limited address space: the product says beforehand what does not fit, and products fail with MemoryError alone."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytestmark = [
    pytest.mark.once,
    pytest.mark.skipif(sys.platform != "linux", reason="NOT RUN: only Linux tells the address space in use"),
]

LIMITED = """
import contextlib, resource

@contextlib.contextmanager
def limited(more):
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + more, resource.RLIM_INFINITY))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

def refused(call, more):
    with limited(more):
        try:
            call()
        except MemoryError as e:
            return str(e)
    raise SystemExit("no MemoryError")
"""


def run(lines, *arguments):
    command = [sys.executable, "-W", "ignore", "-c", LIMITED + lines, *map(str, arguments)]
    # one arena: others would take address space, 64 MiB each, whenever a thread starts
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"MALLOC_ARENA_MAX": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_products_in_too_little_memory():
    """Each of them raises MemoryError or returns what it does with enough; threads that cannot start are not missed."""
    told = run("""
import numpy as np, qins
rng = np.random.default_rng(0)
w, x = rng.normal(0, 0.02, (300, 4096)).astype(np.float32), rng.normal(0, 1, (512, 4096)).astype(np.float32)
failed = right = 0
for codec in ("log8", "log5", "golden"):
    e = qins.encode(w, codec, group_size=None if codec == "golden" else 64)
    for threads in (1, 4):
        qins.set_num_threads(threads)
        for rows in (1, 8, 512):
            y = np.empty((rows, 300), np.float32)
            for more in (0, 1 << 18, 1 << 21, 1 << 24):
                try:
                    with limited(more):
                        qins.matmul(x[:rows], e, out=y)
                except MemoryError:
                    failed += 1
                    continue
                kept = y.copy()
                assert qins.matmul(x[:rows], e, out=y).tobytes() == kept.tobytes()
                right += 1
print(failed, right)
""")
    failed, right = map(int, told.split())
    assert failed > 0
    assert right > 0


@pytest.mark.long
def test_models_that_do_not_fit(tmp_path):
    """`quantize_checkpoint` and `from_pretrained` name what they need and what there is, and leave nothing behind."""
    pytest.importorskip("transformers")
    told = run(
        """
import sys
from pathlib import Path
import transformers, qins
from qins.checkpoint import quantize_checkpoint
source, out = Path(sys.argv[1]) / "floats", Path(sys.argv[1]) / "codes"
config = transformers.LlamaConfig(
    vocab_size=400_000, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4,
    num_key_value_heads=2, tie_word_embeddings=True,
)  # an embedding of 102 MB, which stays float
transformers.LlamaForCausalLM(config).save_pretrained(source)
print(refused(lambda: quantize_checkpoint(source, out), 60 << 20))
assert not out.exists()
quantize_checkpoint(source, out)

def load(path, **given):
    return transformers.AutoModelForCausalLM.from_pretrained(path, **given)

load(out)  # imports what loading needs
print(refused(lambda: load(out), 60 << 20))
print(refused(lambda: load(source, quantization_config=qins.QinsConfig()), 60 << 20))
assert load(out).get_input_embeddings().weight.shape == (400_000, 64)
""",
        tmp_path,
    )
    for line, path in zip(told.splitlines()[-3:], ("floats", "codes", "floats"), strict=True):
        assert f"{tmp_path}/{path}" in line
        assert ": needs 102," in line
        assert line.endswith(" are available")
