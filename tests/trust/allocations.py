"""Every allocation of the extension fails once, and every start of a thread, in every way of computing.

    python tests/trust/allocations.py [--brief]

Each case is a call of a function of `qins._core` (or of the package). It runs in children forked from a process whose
extension has allocated nothing yet, since later calls reuse memory: one child to see the result, then one with the n-th
allocation failing, for n from 1 until none fails. Such a call must raise MemoryError or return the same result, and the
next one must return it. With one thread, the number of live blocks must also be what it is without a failure.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import functools
import hashlib
import importlib.machinery
import importlib.util
import os
import pickle
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
OWN, ON_BEHALF, THREADS, LARGE = 1, 2, 3, 4  # as in failing.c
ROWS, COLS = 200, 1024  # several parts for each of 4 threads
CODECS = [
    ("golden", None), ("log9", None), ("rational", None), ("log8", None), ("log8", 32), ("log8", 64), ("log8", 128),
    ("log8", 100), ("log6", 32), ("log6", 128), ("log5", 64), ("log4", 32), ("log4", 64),
]  # fmt: skip
MOST = 300  # failures per case, above which a case is taken for one that never ends


class WrongResultError(Exception):
    """A call did what it must not do."""


def as_bfloat16(x: np.ndarray) -> np.ndarray:
    """Return the bits of float32 numbers, cut to bfloat16."""
    return np.ascontiguousarray((x.view(np.uint32) >> 16).astype(np.uint16))


def run_preloaded(arguments: list[str]) -> int:
    """Build failing.c and run this program again with it preloaded."""
    with tempfile.TemporaryDirectory() as work:
        library = Path(work) / "failing.so"
        command = [os.environ.get("CC", "cc"), "-std=c11", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
        subprocess.run([*command, "-o", library, HERE / "failing.c", "-ldl"], check=True)
        environment = os.environ | {
            "LD_PRELOAD": str(library), "PYTHONMALLOC": "malloc", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
        }  # fmt: skip
        return subprocess.run([sys.executable, __file__, *arguments], env=environment).returncode


@dataclass(frozen=True)
class Case:
    """A call to repeat, and which of its allocations fail."""

    name: str
    what: int
    threads: int
    call: Callable[[], Any]  # returns arrays, numbers or bytes, in tuples
    prepare: Callable[[], Any] | None = None  # runs first in each child
    errors: tuple[type[BaseException], ...] = (MemoryError,)


def digest(result: Any) -> str:
    """Return a hash of all bits of a result."""
    h = hashlib.sha256()

    def add(part: Any) -> None:
        if isinstance(part, (tuple, list)):
            for p in part:
                add(p)
        elif isinstance(part, np.ndarray):
            h.update(part.tobytes())
        else:
            h.update(part if isinstance(part, bytes) else repr(part).encode())

    add(result)
    return h.hexdigest()


def in_child(work: Callable[[], Any]) -> Any:
    """Return what `work` returns in a forked child."""
    reads, writes = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reads)
            try:
                told = (True, work())
            except BaseException as e:
                told = (False, f"{type(e).__name__}: {e}")
            with os.fdopen(writes, "wb") as pipe:
                pickle.dump(told, pipe)
        finally:
            os._exit(0)
    os.close(writes)
    with os.fdopen(reads, "rb") as pipe:
        told = pipe.read()
    _, status = os.waitpid(child, 0)
    if not told:
        raise WrongResultError(f"the process ended with signal {os.WTERMSIG(status)}")
    fine, result = pickle.loads(told)
    if not fine:
        raise WrongResultError(str(result))
    return result


class Faults:
    """What failing.c does, from Python."""

    def __init__(self) -> None:
        self.library = ctypes.CDLL(None)
        for name in ("failing_seen", "failing_disarm", "failing_live"):
            getattr(self.library, name).restype = ctypes.c_long
        if not self.library.failing_watch(b"_core"):
            raise SystemExit("qins/_core*.so is not loaded")

    def run(self, case: Case, n: int) -> tuple[str, int, str, int]:
        """Call with the n-th allocation failing; return how it ended, failures, the next result and live blocks."""
        call = functools.partial(case.call, *([case.prepare()] if case.prepare else []))
        self.library.failing_arm(case.what, ctypes.c_long(n))
        try:
            result, error = call(), None
        except BaseException as e:
            result, error = None, e
        finally:
            refused = self.library.failing_disarm()
        ended = "as usual"
        if error is not None:
            if not isinstance(error, case.errors):
                raise WrongResultError(f"{type(error).__name__}: {error}")
            if refused == 0:
                raise WrongResultError(f"without a failure: {type(error).__name__}: {error}")
            ended = type(error).__name__
        del error
        after = digest(call())
        if result is not None and digest(result) != after:
            raise WrongResultError("another result, and no error")
        del result
        if case.what == THREADS and case.threads > 1:
            there = len(os.listdir("/proc/self/task"))
            if there != case.threads:
                raise WrongResultError(f"{there} threads after the next call, expected {case.threads}")
        return ended, refused, after, self.library.failing_live()

    def check(self, case: Case) -> Counter[str]:
        """Run a case for every n; return how often calls ended how."""
        _, _, expected, live = in_child(lambda: self.run(case, 0))
        ends: Counter[str] = Counter()
        wanted: Iterator[int] = iter(range(1, MOST))
        if case.what == THREADS:
            wanted = iter((-1, *range(1, MOST)))
        for n in wanted:
            try:
                ended, refused, after, live_after = in_child(lambda n=n: self.run(case, n))
                if after != expected:
                    raise WrongResultError("another result after the failure")
                if case.threads == 1 and case.what == OWN and live_after != live:
                    raise WrongResultError(f"{live_after} live blocks, {live} without a failure")
                # more threads may hold as many blocks at a time as one does, each
                if live_after > case.threads * live:
                    raise WrongResultError(
                        f"{live_after} live blocks with {case.threads} threads, {live} without a failure"
                    )
            except WrongResultError as e:
                raise WrongResultError(f"{case.name}: failure {n}: {e}") from None
            if refused == 0:
                return ends
            ends[ended] += 1
        raise WrongResultError(f"{case.name}: {MOST} allocations, and no end")


# -- cases ------------------------------------------------------------------------------------------------------


class Cases:
    """All cases; `brief` leaves out most instruction sets, codecs and sizes."""

    def __init__(self, brief: bool) -> None:
        import qins
        from qins import _core

        self.qins, self.core, self.brief = qins, _core, brief
        rng = np.random.default_rng(1)
        self.weights = rng.normal(0, 0.02, (ROWS, COLS)).astype(np.float32)
        self.x = rng.normal(0, 1, (1100, COLS)).astype(np.float32)
        self.x[::7, 5] = 80.0  # outliers
        square = rng.normal(0, 1, (COLS, COLS)).astype(np.float32)
        self.factors = np.ascontiguousarray(np.tril(square, -1)) / np.float32(COLS)
        qins.set_num_threads(1)  # a pool's threads would not survive the forks
        self.codes = {(c, g): qins.encode(self.weights, c, group_size=g) for c, g in CODECS}
        best, *others = qins.isas()
        self.isas = [best, others[-1]] if brief and others else [best, *others]

    def codec_arguments(self, codec: str, group: int | None) -> tuple[Any, ...]:
        """Return the core's arguments that describe codes."""
        e = self.codes[codec, group]
        return codec, e.arrays, e.scalars, ROWS, COLS, group or 0

    def linear(self, codec: str, group: int | None, rows: int, dtype: str, threads: int) -> Callable[[], np.ndarray]:
        """Return a call that multiplies."""
        x = self.x[:rows] if dtype == "float32" else as_bfloat16(self.x[:rows])

        def call() -> np.ndarray:
            y = np.zeros((rows, ROWS), x.dtype)
            self.core.linear(*self.codec_arguments(codec, group), x, dtype, y, threads)
            return y

        return call

    def products(self) -> Iterator[Case]:
        """Yield products: instruction sets, codecs, rows, dtypes, threads."""
        codecs = [("log8", 64), ("log4", 32), ("golden", None), ("log8", 100)] if self.brief else CODECS
        for isa in self.isas:
            for codec, group in codecs:
                for rows in (1, 8, 64, 512):
                    for dtype in ("float32", "bfloat16"):
                        for threads in (1, 4):
                            if self.brief and (rows, threads) not in ((1, 1), (8, 1), (64, 4), (512, 1)):
                                continue
                            name = f"linear, {isa}, {codec}, {group}, {rows} rows of {dtype}, {threads} threads"
                            yield Case(
                                name, OWN, threads, with_isa(isa, self.linear(codec, group, rows, dtype, threads))
                            )
        yield Case("linear, 1100 rows", OWN, 1, self.linear("golden", None, 1100, "float32", 1))

    def forced_ways(self) -> Iterator[Case]:
        """Yield products in every way, whether or not it is the fastest."""
        for isa in self.isas:
            for way in self.core.WAYS:
                for codec, group in [("log8", 64), ("log5", 64)]:
                    for dtype in ("float32", "bfloat16"):
                        for rows in (1, 17):
                            if self.brief and (rows == 1 or dtype == "bfloat16"):
                                continue
                            call = with_way(way, self.linear(codec, group, rows, dtype, 1))
                            yield Case(f"linear, {isa}, {way}, {codec}, {rows} rows", OWN, 1, with_isa(isa, call))

    def codings(self) -> Iterator[Case]:
        """Yield encoding, decoding, error feedback and residuals."""
        original = as_bfloat16(self.weights)
        for codec, group in CODECS:
            for threads in (1, 4):
                arguments = self.codec_arguments(codec, group)
                if codec.startswith("log") and codec != "log9":
                    yield Case(
                        f"feedback, {codec}, {group}, {threads} threads",
                        OWN,
                        threads,
                        self.feedback(codec, group, threads),
                    )
                if self.brief and group not in (None, 64):
                    continue

                def encode(codec=codec, group=group, threads=threads):
                    self.qins.set_num_threads(threads)
                    e = self.qins.encode(self.weights, codec, group_size=group)
                    return *e.fields.values(), e.decode()

                yield Case(f"encode, decode, {codec}, {group}, {threads} threads", OWN, threads, encode)

                def residual(arguments=arguments, threads=threads):
                    return self.core.exact_encode(*arguments, original, "bfloat16", threads)

                stream = np.frombuffer(in_child(residual), np.uint8)

                def restore(arguments=arguments, threads=threads, stream=stream):
                    out = np.zeros((ROWS, COLS), np.uint16)
                    return self.core.exact_decode(*arguments, out, "bfloat16", threads, stream), out

                yield Case(f"exact_encode, {codec}, {group}, {threads} threads", OWN, threads, residual)
                yield Case(f"exact_decode, {codec}, {group}, {threads} threads", OWN, threads, restore)

    def feedback(self, codec: str, group: int | None, threads: int) -> Callable[[], np.ndarray]:
        """Return a call that rounds with error feedback."""
        e = self.codes[codec, group]
        order = np.arange(COLS, dtype=np.uint32)[::-1].copy()

        def call() -> np.ndarray:
            arrays = tuple(np.array(a) for a in e.arrays)
            mu = float(e.fields["mu"])
            self.core.feedback(codec, self.weights, order, self.factors, arrays, mu, group or 0, threads)
            return arrays[0]

        return call

    def caches(self) -> Iterator[Case]:
        """Yield KV caches, written and read."""
        heads, room, dim, tokens = 4, 50, 64, 40
        for codec in ("log8", "golden", "log5"):
            for dtype in ("float32", "bfloat16"):
                for threads in (1, 4):
                    x = self.x.reshape(-1)[: heads * tokens * dim].reshape(heads, tokens, dim)
                    x = x if dtype == "float32" else as_bfloat16(x)

                    def call(codec=codec, x=x, threads=threads, dtype=dtype):
                        codes = np.zeros((heads, room, dim), np.uint8)
                        second = np.zeros((heads, room, dim if codec == "golden" else 1), np.uint16)
                        third, out = np.zeros((heads, room, 2), np.float32), np.zeros_like(x)
                        numbers = (
                            self.core.CODECS.index(codec), *(a.ctypes.data for a in (codes, second, third)),
                            heads, room, dim, 0, tokens,
                        )  # fmt: skip
                        element = {"float32": 0, "bfloat16": 2}[dtype]
                        finite = self.core.cache_at(1, *numbers, x.ctypes.data, element, threads)
                        self.core.cache_at(0, *numbers, out.ctypes.data, element, threads)
                        return finite, codes, second, third, out

                    yield Case(f"cache_at, {codec}, {dtype}, {threads} threads", OWN, threads, call)

    def decoder_layers(self, what: int = OWN) -> Iterator[Case]:
        """Yield decoder layers, of one token and of several."""
        codecs = [("log8", 64), ("log5", 64), ("golden", None)]
        for isa in self.isas:
            for codec, group in codecs:
                for tokens in (1, 7):
                    for dtype in (0, 2):
                        for threads in (1, 4):
                            if self.brief and (dtype or threads > 1):
                                continue
                            name = f"decode_layer, {isa}, {codec}, {tokens} tokens of dtype {dtype}, {threads} threads"
                            call = functools.partial(self.decode, codec, group, tokens, dtype, threads)
                            yield Case(name, what, threads, with_isa(isa, call))

    @functools.cache  # noqa: B019 - there is one object of this class
    def layer_codes(self, codec: str, group: int | None) -> list[Any]:
        """Return the matrices of a small layer: q, k, v, o, gate, up, down."""
        shapes = [(256, 256), (128, 256), (128, 256), (256, 256), (320, 256), (320, 256), (256, 320)]
        return [self.qins.encode(self.weights.reshape(-1)[: a * b].reshape(a, b), codec, group_size=group)
                for a, b in shapes]  # fmt: skip

    def decode(self, codec: str, group: int | None, tokens: int, dtype: int, threads: int) -> tuple[np.ndarray, ...]:
        """Run a layer of 4 heads and 2 KV heads of 64 on some tokens after 3 others."""
        from qins.codec import CODEC_NUMBER, core_addresses, field_names

        hidden, heads, kv_heads, dim, inner, past, room = 256, 4, 2, 64, 320, 3, 16
        kept, products = [], []
        for e in self.layer_codes(codec, group):
            at = [e.fields[n].ctypes.data for n in field_names(codec, group)]
            products.append((CODEC_NUMBER[codec], *core_addresses(at, codec, group), *e.shape, group or 0, 0))
        norm = np.ones(hidden, np.float32)
        layer = self.core.decoder_layer(
            tuple(products), (norm.ctypes.data, 0, norm.ctypes.data, 0, 0, 0, 0),
            (hidden, heads, kv_heads, dim, inner, 0, 0), (1e-5, 1e-5, dim**-0.5, 0.0, 1.0),
        )  # fmt: skip
        narrow = as_bfloat16 if dtype else np.ascontiguousarray
        x = narrow(self.x.reshape(-1)[: tokens * hidden])
        y = np.zeros_like(x)
        cache = narrow(self.x.reshape(-1)[: 2 * kv_heads * room * dim].copy())
        angles = np.arange(past, past + tokens, dtype=np.float32)[:, None] * np.ones(dim, np.float32)
        cos, sin = narrow(np.cos(angles)), narrow(np.sin(angles))
        mask = np.tril(np.ones((tokens, past + tokens), np.uint8), past)
        kept += [cos, sin, mask]
        keys = cache.ctypes.data
        self.core.decode_layer(
            layer, dtype, x.ctypes.data, y.ctypes.data, 1, tokens, keys, keys + cache.nbytes // 2, room, past,
            cos.ctypes.data, sin.ctypes.data, dim, 0, mask.ctypes.data if tokens > 1 else 0, 1, 0, past + tokens,
            threads,
        )  # fmt: skip
        return y, cache

    def threads(self) -> Iterator[Case]:
        """Yield parallel work of which threads cannot be started."""
        yield Case("threads of linear", THREADS, 4, self.linear("log8", 64, 64, "float32", 4))
        yield Case("threads of feedback", THREADS, 4, self.feedback("log8", 64, 4))
        original = as_bfloat16(np.tile(self.weights, (20, 1)))
        e = self.qins.encode(np.tile(self.weights, (20, 1)), "log8")

        def residual():
            return self.core.exact_encode("log8", e.arrays, e.scalars, 20 * ROWS, COLS, 0, original, "bfloat16", 4)

        yield Case("threads of exact_encode", THREADS, 4, residual)

    def on_behalf(self) -> Iterator[Case]:
        """Yield calls of which allocations by Python and NumPy fail: every function, and errors."""
        core, small = self.core, np.zeros((2, 8), np.float32)
        path = core.__file__

        def load():
            loader = importlib.machinery.ExtensionFileLoader("qins._core", path)
            module = importlib.util.module_from_spec(importlib.util.spec_from_loader("qins._core", loader))
            loader.exec_module(module)
            return sorted(set(dir(module)) - {"__loader__", "__spec__"})

        # NumPy's C API turns what hinders its import into an ImportError
        yield Case("import", ON_BEHALF, 1, load, errors=(MemoryError, ImportError))
        for name in ("isas", "isa"):
            yield Case(name, ON_BEHALF, 1, getattr(core, name))
        yield Case("has_bf16", ON_BEHALF, 1, lambda: core.has_bf16("scalar"))
        yield Case("set_isa", ON_BEHALF, 1, lambda: core.set_isa(core.isas()[0]))
        yield Case("way", ON_BEHALF, 1, lambda: core.way("log8", 2.5, 0, 1, "float32"))
        yield Case("levels", ON_BEHALF, 1, lambda: core.levels("log8", (2.5,)))
        yield Case("read", ON_BEHALF, 1, lambda: core.read(small, 1))

        def rational():
            out = np.zeros(8, np.float32)
            core.rational(np.ones(8, np.float32), 1.0, False, out, 1)
            return out

        yield Case("rational", ON_BEHALF, 1, rational)
        for case in (*self.codings(), *self.decoder_layers(), *self.caches()):
            if case.threads == 1 and ("log8, 64" in case.name or "golden" in case.name or "log4, 64" in case.name):
                yield Case(f"{case.name}, on behalf", ON_BEHALF, 1, case.call)
        yield Case("linear, on behalf", ON_BEHALF, 1, self.linear("log8", 64, 8, "float32", 1))
        wrong: list[tuple[str, Callable[[], Any]]] = [
            ("set_isa", lambda: core.set_isa("abacus")),
            ("encode, dtype", lambda: core.encode("log8", small, "int3", (), 0, 1.0, None, 1)),
            ("encode, codec", lambda: core.encode("log0", small, "float32", (), 0, 1.0, None, 1)),
            ("encode, arrays", lambda: core.encode("log8", small, "float32", (small, small), 0, 1.0, None, 1)),
            ("encode, mu", lambda: core.encode("log8", small, "float32", (small, small), 0, 1e9, None, 1)),
            ("encode, NaN", lambda: self.qins.encode(np.full((2, 2), np.nan, np.float32))),
            ("linear_at", lambda: core.linear_at(1, 2)),
            ("linear_at, type", lambda: core.linear_at(*["x"] * 14)),
            ("decode", lambda: core.decode("log8", (small,), (1.0,), 2, 8, 0, small, "float32", 0, 0, 1)),
            ("force_way", lambda: core.force_way("FAST")),
            ("decoder_layer", lambda: core.decoder_layer(((),) * 7, (0,) * 7, (0,) * 7, (0.0,) * 5)),
            ("decode_layer", lambda: core.decode_layer(3)),
            ("rational", lambda: core.rational(small, 1.0, False, small, 1)),
        ]
        for name, call in wrong:
            yield Case(f"error of {name}", ON_BEHALF, 1, functools.partial(told, call))

    def package(self) -> Iterator[Case]:
        """Yield calls of the package of which large allocations fail, whoever makes them: arrays, too."""
        qins = self.qins
        e = self.codes["log8", 64]
        gram = self.x.T.astype(np.float64) @ self.x
        bfloat16 = self.weights.astype(np.float16)

        def single(call):
            def with_one_thread():
                qins.set_num_threads(1)
                return call()

            return with_one_thread

        calls: dict[str, Callable[[], Any]] = {
            "qins.encode": lambda: tuple(qins.encode(self.weights, "log4").fields.values()),
            "qins.decode": lambda: qins.decode(e, np.float64),
            "qins.matmul": lambda: qins.matmul(self.x[:64], e),
            "qins.matmul, float64": lambda: qins.matmul(self.x[:64].astype(np.float64), e),
            "qins.matmul, strided": lambda: qins.matmul(self.x[:128:2], e),
            "qins.residual": lambda: qins.codec.residual(bfloat16, e),
        }
        if not self.brief:
            calls["qins.ErrorFeedback"] = lambda: tuple(
                qins.ErrorFeedback(gram).encode(self.weights, "log8", group_size=64).fields.values()
            )
        for name, call in calls.items():
            yield Case(name, LARGE, 1, single(call))

    def all(self) -> Iterator[Case]:
        """Yield every case."""
        for group in (
            self.products, self.forced_ways, self.codings, self.caches, self.decoder_layers, self.threads,
            self.on_behalf, self.package,
        ):  # fmt: skip
            yield from group()


def with_isa(isa: str, call: Callable[[], Any]) -> Callable[[], Any]:
    """Return `call` on an instruction set."""

    def on_isa() -> Any:
        import qins

        qins.use_isa(isa)
        return call()

    return on_isa


def with_way(way: str, call: Callable[[], Any]) -> Callable[[], Any]:
    """Return `call` with products forced to a way."""

    def forced() -> Any:
        from qins import _core

        _core.force_way(way)
        return call()

    return forced


def told(call: Callable[[], Any]) -> str:
    """Return the error of a wrong call; a failed allocation may come first."""
    try:
        call()
    except MemoryError:
        raise
    except Exception as e:
        return f"{type(e).__name__}: {e}"
    raise WrongResultError("no error")


def main() -> int:
    """Run all cases; return 1 if one is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--brief", action="store_true", help="fewer instruction sets, codecs and sizes")
    parser.add_argument("--only", default="", help="cases whose names begin so")
    arguments = parser.parse_args()
    if "failing.so" not in os.environ.get("LD_PRELOAD", ""):
        return run_preloaded(sys.argv[1:])
    cases = Cases(arguments.brief)
    faults = Faults()
    passed, failed, ends = 0, 0, Counter[str]()
    for case in cases.all():
        if not case.name.startswith(arguments.only):
            continue
        try:
            found = faults.check(case)
            if arguments.only:
                print(f"{case.name}: {dict(found)}", flush=True)
            ends += found
            passed += 1
        except WrongResultError as e:
            print(f"WRONG: {case.name}: {e}" if case.name not in str(e) else f"WRONG: {e}", flush=True)
            failed += 1
    print(f"failures: {ends.total()}, of which ended {dict(ends)}")
    print(f"{passed} passed, {failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())
