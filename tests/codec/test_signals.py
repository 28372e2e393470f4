"""A signal whose handler raises ends long calls of the core early; other handlers change nothing."""

from __future__ import annotations

import signal
import threading
import time
from contextlib import contextmanager

import numpy as np
import pytest
from cases import long_but

import qins
from qins import _core
from qins.codec.exact import residual

pytestmark = [
    pytest.mark.once,
    pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs POSIX timers"),
]

FILL = 77  # what results hold before a call


class Stopped(BaseException):
    """Raised by the handler, as KeyboardInterrupt is by the one of Ctrl-C."""


@contextmanager
def alarms(handler, first=0.02, every=0.0):
    before = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, first, every)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def stop(*_):
    raise Stopped


def weights(rows, cols, dtype=np.float32):
    """Rows of random weights, so repeated that they take little time to make."""
    rng = np.random.default_rng(0)
    return np.tile(rng.standard_normal((16, cols)).astype(dtype), (-(-rows // 16), 1))[:rows]


def encoding(rows=1 << 13):
    w = weights(rows, 2048)
    codes, groups = np.full((rows, 1024), FILL, np.uint8), np.zeros((rows, 64), np.uint8)
    arrays = (codes, np.zeros(rows, np.float32), groups)
    return codes, lambda: _core.encode("log4", w, "float32", arrays, 32, -1.0, None, qins.get_num_threads())


def feeding(size=4096):
    e = qins.encode(weights(size, size), group_size=64)
    codes = np.full((size, size), FILL, np.uint8)
    arrays = (codes, *e.arrays[1:])
    factors, order = np.zeros((size, size), np.float32), np.arange(size, dtype=np.uint32)
    w = weights(size, size)
    return codes, lambda: _core.feedback("log8", w, order, factors, arrays, 2.0, 64, qins.get_num_threads())


def multiplying(size=4096, batch=2048):
    e = qins.encode(weights(size, size), group_size=64)
    x, y = weights(batch, size), np.full((batch, size), FILL, np.float32)
    return y, lambda: qins.matmul(x, e, out=y)


CALLS = {"encode": encoding, "feedback": feeding, "matmul": multiplying}


@pytest.mark.parametrize("threads", long_but([3], [1, 3]))
@pytest.mark.parametrize("name", CALLS)
def test_raising(name, threads):
    """The call ends with the exception, before it has written everything, and the next call is as any other."""
    result, call = CALLS[name]()
    qins.set_num_threads(threads)
    start = time.perf_counter()
    call()
    whole = time.perf_counter() - start
    # the thread that polls may itself be waiting for a processor while the others finish: not every try tells
    for part in (0.4, 0.2, 0.1, 0.05, 0.02):
        result[...] = FILL
        with pytest.raises(Stopped), alarms(stop, part * whole):
            call()
            time.sleep(10)
        if (result == FILL).mean() > 0.02:
            break
    else:
        pytest.fail("every call went on to its end")
    again = qins.encode(weights(64, 128))
    assert np.array_equal(again.decode(), qins.encode(weights(64, 128)).decode())


@pytest.mark.parametrize("threads", long_but([3], [1, 3]))
@pytest.mark.parametrize("name", CALLS)
def test_returning(name, threads):
    """Handlers that return, and that make calls of their own, do not change the result."""
    calls = []

    def handle(*_):
        calls.append(qins.encode(weights(1024, 1024)).fields["codes"].sum())

    result, call = CALLS[name]()
    qins.set_num_threads(threads)
    with alarms(handle, 0.02, 0.2):
        call()
    interrupted = result.copy()
    result[...] = FILL
    call()
    assert calls
    assert len({*calls}) == 1
    assert np.array_equal(result, interrupted)


@pytest.mark.parametrize("threads", [1, 3])
def test_restoring(threads):
    """Residuals are whole or not there."""
    w = weights(1 << 12, 4096, np.float16)
    e = qins.encode(w, group_size=64)
    qins.set_num_threads(threads)
    whole = residual(w, e)
    with pytest.raises(Stopped), alarms(stop):
        for _ in range(100):
            residual(w, e)
    assert np.array_equal(residual(w, e), whole)


def test_other_threads_are_not_stopped():
    """Python runs handlers in the main thread only, whose exception leaves other threads' calls alone."""
    result, call = encoding(1 << 11)
    thread = threading.Thread(target=call)
    thread.start()
    with pytest.raises(Stopped), alarms(stop):
        while True:
            time.sleep(0.01)
    thread.join()
    assert not (result == FILL).all(axis=1).any()
