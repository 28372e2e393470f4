"""Threads that share codes and models, while others change threads and instruction sets, and the process forks.

    python tests/trust/stress.py [--seconds 10] [--threads 4] [--torch]

Every result must be one that a single thread computes: bit for bit while the instruction set stays, and from one of
them while it changes. NumPy alone, unless --torch adds quantized modules. races.py runs this under ThreadSanitizer.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import struct
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import qins
from qins import _core
from qins.decoder import Decoder

CODECS = [
    ("golden", None), ("log9", None), ("rational", None), ("log8", 64), ("log8", 100), ("log6", 32), ("log5", 64),
    ("log4", 32),
]  # fmt: skip
ROWS, COLS = 96, 512
BATCHES = (1, 5, 40, 140)
MUS = 300  # more than the core's cache of tables holds
HIDDEN, INNER, HEADS, KV_HEADS, VOCABULARY, LAYERS = 64, 96, 4, 2, 160, 2
FORK_LIMIT = 100  # seconds, after which a child is taken for one that waits forever


def write_model(path: Path) -> None:
    """Write a small Llama of log8 and log5 codes, whose directory Decoder opens."""
    rng = np.random.default_rng(0)
    tensors = {
        "model.embed_tokens.weight": rng.normal(0, 1, (VOCABULARY, HIDDEN)).astype(np.float32),
        "model.norm.weight": np.ones(HIDDEN, np.float32),
        "lm_head.weight": rng.normal(0, 0.2, (VOCABULARY, HIDDEN)).astype(np.float32),
    }
    kv, modules = KV_HEADS * HIDDEN // HEADS, {}
    shapes = {
        "self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (kv, HIDDEN), "self_attn.v_proj": (kv, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HIDDEN), "mlp.gate_proj": (INNER, HIDDEN), "mlp.up_proj": (INNER, HIDDEN),
        "mlp.down_proj": (HIDDEN, INNER),
    }  # fmt: skip
    for i in range(LAYERS):
        codec, prefix = ("log8", "log5")[i % 2], f"model.layers.{i}."
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}{name}.weight"] = np.ones(HIDDEN, np.float32)
        for name, shape in shapes.items():
            e = qins.encode(rng.normal(0, 0.2, shape).astype(np.float32), codec, group_size=64)
            modules[prefix + name] = [codec, 64]
            tensors |= {f"{prefix}{name}.{field}": np.asarray(value) for field, value in e.fields.items()}
    header, at = {}, 0
    for name, t in tensors.items():
        dtype = {np.float32: "F32", np.uint8: "U8", np.int8: "I8"}[t.dtype.type]
        header[name] = {"dtype": dtype, "shape": list(t.shape), "data_offsets": [at, at + t.nbytes]}
        at += t.nbytes
    told = json.dumps(header).encode()
    told += b" " * (-len(told) % 8)
    content = struct.pack("<Q", len(told)) + told + b"".join(t.tobytes() for t in tensors.values())
    (path / "model.safetensors").write_bytes(content)
    config = {
        "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "vocab_size": VOCABULARY, "hidden_act": "silu",
        "rms_norm_eps": 1e-5, "rope_theta": 1e4, "tie_word_embeddings": False,
        "quantization_config": {"quant_method": "qins", "modules": modules},
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(config), "utf-8")


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.tobytes() == b.tobytes()


class Work:
    """What threads share, and what their results must be."""

    def __init__(self, path: Path) -> None:
        rng = np.random.default_rng(2)
        write_model(path)
        self.path = path
        self.switching = False  # whether the instruction set changes meanwhile
        self.w = rng.normal(0, 0.02, (ROWS, COLS)).astype(np.float32)
        self.half = self.w.astype(np.float16)
        self.x = rng.normal(0, 1, (max(BATCHES), COLS)).astype(np.float32)
        gram = self.x.T.astype(np.float64) @ self.x
        self.feedback = qins.ErrorFeedback(gram)
        self.calibrated = self.feedback.encode(self.w, "log4", group_size=32)
        self.codes = {(c, g): qins.encode(self.w, c, group_size=g) for c, g in CODECS}
        self.residual = {k: qins.codec.residual(self.half, e) for k, e in self.codes.items()}
        self.curved = [qins.encode(self.w[:8, :64], "log8", mu=0.5 + i / 16) for i in range(MUS)]
        self.model = Decoder.open(path)  # for its codes; each thread opens its own
        self.products: dict[Any, list[np.ndarray]] = {}
        self.logits: list[np.ndarray] = []
        for isa in qins.isas():
            with qins.use_isa(isa):
                for (codec, group), e in self.codes.items():
                    for n in BATCHES:
                        y = qins.matmul(self.x[:n], e)
                        self.products.setdefault((codec, group, n), []).append(y)
                for i, e in enumerate(self.curved):
                    self.products.setdefault(i, []).append(qins.matmul(self.x[:2, :64], e))
                self.logits.append(self.run_model())

    def run_model(self) -> np.ndarray:
        """Load a model, run a prompt and a few tokens, and drop it."""
        model = Decoder.open(self.path)
        return np.stack([model.logits([3, 5, 8, 13, 21, 34, 55]), model.logits([89]), model.logits([144, 7])])

    def check_product(self, key: Any, y: np.ndarray) -> None:
        """Compare a product with those of all instruction sets, or of the one in use."""
        found = self.products[key]
        expected = found if self.switching else [found[qins.isas().index(qins.isa())]]
        assert any(same_bits(y, e) for e in expected), f"product {key}"

    # -- what threads do, again and again ----------------------------------------------------------

    def multiply(self, rng: np.random.Generator) -> None:
        key = CODECS[rng.integers(len(CODECS))]
        n = BATCHES[rng.integers(len(BATCHES))]
        self.check_product((*key, n), qins.matmul(self.x[:n], self.codes[key]))

    def multiply_curved(self, rng: np.random.Generator) -> None:
        first = int(rng.integers(MUS))
        for i in range(first, min(first + 20, MUS)):
            self.check_product(i, qins.matmul(self.x[:2, :64], self.curved[i]))

    def code(self, rng: np.random.Generator) -> None:
        codec, group = CODECS[rng.integers(len(CODECS))]
        expected = self.codes[codec, group]
        e = qins.encode(self.w, codec, group_size=group)
        assert all(same_bits(e.fields[n], f) for n, f in expected.fields.items()), f"codes {codec}, {group}"
        assert same_bits(e.decode(), expected.decode()), f"decoded {codec}, {group}"

    def feed_back(self, rng: np.random.Generator) -> None:
        e = self.feedback.encode(self.w, "log4", group_size=32)
        assert all(same_bits(e.fields[n], f) for n, f in self.calibrated.fields.items()), "calibrated codes"

    def restore(self, rng: np.random.Generator) -> None:
        key = CODECS[rng.integers(len(CODECS))]
        stream = qins.codec.residual(self.half, self.codes[key])
        assert same_bits(stream, self.residual[key]), f"residual {key}"
        assert same_bits(qins.codec.restore(self.codes[key], stream, "float16"), self.half), f"restored {key}"

    def cache(self, rng: np.random.Generator) -> None:
        heads, room, dim = 4, 20, 64
        codes, scale = np.zeros((heads, room, dim), np.uint8), np.zeros((heads, room), np.uint16)
        x, out = self.x[:10].reshape(-1), np.zeros((heads, room, dim), np.float32)
        numbers = (_core.CODECS.index("log8"), codes.ctypes.data, scale.ctypes.data, 0, heads, room, dim, 0, room)
        threads = qins.get_num_threads()
        assert _core.cache_at(1, *numbers, x.ctypes.data, 0, threads)
        _core.cache_at(0, *numbers, out.ctypes.data, 0, threads)
        error = out.reshape(-1) - x
        assert np.square(error).sum() < 1e-2 * np.square(x).sum(), "cache"

    def load(self, rng: np.random.Generator) -> None:
        got = self.run_model()
        if self.switching:  # also between layers, so that no single instruction set computed all of it
            assert np.abs(got - self.logits[-1]).max() < 0.02 * np.abs(got).max(), "logits"
        else:
            assert same_bits(got, self.logits[qins.isas().index(qins.isa())]), "logits"


def torch_work(work: Work) -> Callable[[np.random.Generator], None]:
    """Return work on modules that all threads share."""
    import torch
    from torch import nn

    torch.manual_seed(0)
    x = torch.from_numpy(work.x)

    def converted() -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(COLS, ROWS), nn.ReLU(), nn.Linear(ROWS, COLS, bias=False))
        qins.convert(model, "log8", group_size=32)
        return model.eval()

    shared = converted()
    with torch.inference_mode():
        expected = [shared(x[:n]) for n in BATCHES]

    def run(rng: np.random.Generator) -> None:
        i = int(rng.integers(len(BATCHES)))
        model = converted() if rng.random() < 0.1 else shared
        with torch.inference_mode():
            got = model(x[: BATCHES[i]])
        torch.testing.assert_close(got, expected[i], rtol=0, atol=1e-2)

    return run


def fork_once(work: Work, rng: np.random.Generator) -> None:
    """Multiply in a forked child, whose pool of threads starts anew."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(FORK_LIMIT)
            work.switching = True  # its thread that changes the instruction set is gone, but it may have changed it
            qins.set_num_threads(3)
            for _ in range(3):
                work.multiply(rng)
            work.restore(rng)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    assert status == 0, f"a forked child ended with status {status}"


def phase(work: Work, jobs: list[Callable[..., None]], threads: int, seconds: float, switching: bool) -> Counter[str]:
    """Run jobs in threads, and what changes settings, until the time is over; return how often each ran."""
    work.switching = switching
    over, done, lock = threading.Event(), Counter[str](), threading.Lock()
    wrong: list[str] = []

    def repeat(job: Callable[..., None] | None, seed: int) -> None:
        rng = np.random.default_rng(seed)
        while not over.is_set():
            chosen = job or jobs[rng.integers(len(jobs))]
            try:
                chosen(rng)
            except BaseException:
                with lock:
                    wrong.append(traceback.format_exc())
                over.set()
            with lock:
                done[chosen.__name__] += 1

    def change_threads(rng: np.random.Generator) -> None:
        qins.set_num_threads(int(rng.integers(1, 6)))
        time.sleep(0.002)

    def change_isa(rng: np.random.Generator) -> None:
        qins.use_isa(qins.isas()[rng.integers(len(qins.isas()))])
        time.sleep(0.002)

    best = qins.isa()
    changing = [change_threads, *([change_isa] if switching else [])]
    workers = [threading.Thread(target=repeat, args=(None, i)) for i in range(threads)]
    workers += [threading.Thread(target=repeat, args=(job, 100)) for job in changing]
    for worker in workers:
        worker.start()
    began, rng = time.monotonic(), np.random.default_rng(3)
    while time.monotonic() - began < seconds and not over.is_set():
        fork_once(work, rng)
        with lock:
            done["fork"] += 1
        over.wait(0.1)
    over.set()
    for worker in workers:
        worker.join()
    qins.use_isa(best)
    qins.set_num_threads(None)
    if wrong:
        raise SystemExit("".join(wrong))
    return done


def main() -> None:
    """Run both phases; the exit status tells whether all results were right."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10, help="of each of the two phases")
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--torch", action="store_true", help="quantized modules, too")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)  # forks
    sys.setswitchinterval(1e-4)
    with tempfile.TemporaryDirectory() as made:
        work = Work(Path(made))
        jobs: list[Callable[..., None]] = [
            work.multiply, work.multiply_curved, work.code, work.feed_back, work.restore, work.cache, work.load,
        ]  # fmt: skip
        if arguments.torch:
            jobs.append(torch_work(work))
        total = Counter[str]()
        for switching in (False, True):
            total += phase(work, jobs, arguments.threads, arguments.seconds, switching)
    gil = getattr(sys, "_is_gil_enabled", lambda: True)()
    print(f"GIL: {gil}; {dict(total)}")


if __name__ == "__main__":
    main()
