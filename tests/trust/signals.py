"""Interrupts long calls, and measures how long they take to return: `python tests/trust/signals.py [CALL...]`.

Each call is interrupted several times, at points that are spread over its duration, as Ctrl-C does. Printed is the time
from the signal's handler, which raises, until the call has ended; and how long it takes undisturbed. A signal that
comes while Python cannot run handlers waits, so the handler's own delay is measured, too. `qins quantize` gets
SIGTERM, and the time is until its process has ended.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
ALLOWED = 0.5  # seconds


class Interrupted(KeyboardInterrupt):
    """Raised by the handler."""


def seconds_to_return(call, after: float) -> float | None:
    """Return the seconds from a signal until the call has ended; None if it had ended before."""
    sent = time.monotonic() + after

    def handle(*_):
        raise Interrupted

    before = signal.signal(signal.SIGALRM, handle)
    signal.setitimer(signal.ITIMER_REAL, after)
    try:
        call()
        return None
    except Interrupted:
        return time.monotonic() - sent
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Quantize:
    """A conversion by `qins quantize` into an empty directory; called, it runs to its end."""

    def __init__(self, source: Path, out: Path, *options: object):
        self.arguments = [sys.executable, "-m", "qins.cli", "quantize", *map(str, (source, out, *options))]
        self.out = out

    def start(self) -> subprocess.Popen:
        shutil.rmtree(self.out, ignore_errors=True)
        return subprocess.Popen(self.arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def __call__(self) -> None:
        assert self.start().wait() == 0, self.arguments

    def seconds_to_end(self, after: float) -> float | None:
        """Return the seconds from SIGTERM until the process has ended; None if it had ended before."""
        with self.start() as process:
            time.sleep(after)
            sent = time.monotonic()
            process.send_signal(signal.SIGTERM)
            return None if process.wait() == 0 else time.monotonic() - sent


def weights(rows: int, cols: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    return np.tile(rng.standard_normal((256, cols), dtype=np.float32), (rows // 256, 1))


def codec_calls(scale: int):
    """Calls of the core; `scale`: thousands of rows."""
    import qins
    from qins.codec.exact import residual, restore

    w, half = weights(scale << 10, 8192), weights(scale << 10, 4096).astype(np.float16)
    for codec in ("log8", "log4", "golden"):
        yield f"encode {codec}", partial(qins.encode, w, codec)
    e, small = qins.encode(w, "golden"), qins.encode(half, group_size=64)
    yield "decode", e.decode
    yield "matmul", partial(qins.matmul, weights(1024, 8192), e)
    data = np.frombuffer(residual(half, small), np.uint8)
    yield "residual", partial(residual, half, small)
    yield "restore", partial(restore, small, data, "float16")
    feedback = qins.ErrorFeedback(np.eye(4096, dtype=np.float32) + 1 / 4096)
    yield "error feedback", partial(feedback.encode, weights(scale << 10, 4096), "log8")


def model_calls(directory: Path):
    """Conversions, and generating."""
    import torch
    import transformers
    from tokens import save_tokenizer, text

    from qins.checkpoint import quantize_checkpoint
    from qins.files import restore_checkpoint
    from qins.hf import Calibration

    config = transformers.LlamaConfig(
        vocab_size=1024, hidden_size=1024, intermediate_size=4096, num_hidden_layers=6, num_attention_heads=8
    )
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(directory / "float")
    save_tokenizer(directory / "float", 1024)
    words = text(4096)

    def anew(name, call):
        shutil.rmtree(directory / name, ignore_errors=True)
        call(directory / name)

    def convert(out, **how):
        return quantize_checkpoint(directory / "float", out, **how)

    yield "quantize", partial(anew, "out", convert)
    yield "quantize --exact", partial(anew, "out", partial(convert, exact=True))
    text_of = Calibration(words, 2048)
    yield "quantize --calibrate", partial(anew, "out", partial(convert, calibration=text_of))
    shutil.rmtree(directory / "out", ignore_errors=True)
    convert(directory / "exact", exact=True)
    yield "restore a checkpoint", partial(anew, "back", partial(restore_checkpoint, directory / "exact"))
    (directory / "text.txt").write_text(words)
    how = "--calibrate", directory / "text.txt", "--calibration-tokens", 2048
    yield "SIGTERM to quantize", Quantize(directory / "float", directory / "out")
    yield "SIGTERM to quantize --calibrate", Quantize(directory / "float", directory / "out", *how)
    coded = transformers.LlamaForCausalLM.from_pretrained(directory / "exact")
    ids = torch.arange(64)[None]
    yield "generate", partial(coded.generate, ids, max_new_tokens=64, do_sample=False, pad_token_id=0, eos_token_id=-1)


def measure(name: str, call, times: int) -> bool:
    """Measure one call; return whether every interruption was in time."""
    begin = time.monotonic()
    call()
    whole = time.monotonic() - begin
    interrupt = call.seconds_to_end if isinstance(call, Quantize) else partial(seconds_to_return, call)
    told = [interrupt(whole * (i + 0.5) / times) for i in range(times)]
    met = [t for t in told if t is not None]
    if not met:
        print(f"{name}: {whole:.2f} s undisturbed; too short to be interrupted", flush=True)
        return True
    late = sum(t > ALLOWED for t in met)
    print(f"{name}: {whole:.2f} s undisturbed; returns in {max(met):.3f} s at most, {sorted(met)[len(met) // 2]:.3f} s "
          f"as median of {len(met)}{f'; {late} LATE' if late else ''}", flush=True)  # fmt: skip
    return not late


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("calls", nargs="*", metavar="CALL", help="only those whose names begin so")
    parser.add_argument("--times", type=int, default=7, help="interruptions of each call")
    parser.add_argument("--scale", type=int, default=32, help="thousands of rows of the matrices; 32: 1 GiB of floats")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    given = parser.parse_args()
    os.environ |= {"TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    import torch

    torch.set_num_threads(given.threads)
    right = True
    with tempfile.TemporaryDirectory(prefix="qins-signals-") as made:
        for calls in (codec_calls(given.scale), model_calls(Path(made))):
            for name, call in calls:
                if not given.calls or name.startswith(tuple(given.calls)):
                    right = measure(name, call, given.times) and right
    sys.exit(not right)


if __name__ == "__main__":
    main()
