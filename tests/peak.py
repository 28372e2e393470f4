"""Peak memory of lines of Python, by the kernel's high-water mark, in a process of their own."""

from __future__ import annotations

import subprocess
import sys

_BEFORE = """
import sys, qins
from qins.system import peak_resident_bytes, reset_peak_resident_bytes
{warm_up}
reset_peak_resident_bytes()
before = peak_resident_bytes()
{lines}
print(peak_resident_bytes() - before, sum(t.nbytes for t in tensors))
"""


def peak_memory(warm_up, lines, *arguments):
    """Run `lines` after `warm_up`, which imports what they need; return peak bytes and the bytes of their `tensors`."""
    code = _BEFORE.format(warm_up=warm_up, lines=lines)
    done = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    peak, held = map(int, done.stdout.split()[-2:])
    print(f"{held / 1e6:.0f} MB of tensors, {peak / 1e6:.0f} MB at the peak")
    return peak, held


def peak_while_loading(model, sizes, path):
    """Return `peak_memory` of `from_pretrained` with a QinsConfig; the class is warmed up on a model of `sizes`."""
    warm_up = f"import transformers\nmodel = transformers.{model}\nqins.convert(model(model.config_class(**{sizes!r})))"
    lines = """
model = model.from_pretrained(sys.argv[1], quantization_config=qins.QinsConfig())
tensors = [*model.parameters(), *model.buffers()]
"""
    return peak_memory(warm_up, lines, path)
