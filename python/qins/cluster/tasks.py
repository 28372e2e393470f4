"""Tasks of a Ray cluster: connecting to it, collecting results, and errors as one process raises them."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

from ..system import naming_extras

K = TypeVar("K")

RETRIES = 20  # of a task whose worker or machine is lost, or whose store does not answer
POLL = 0.25  # seconds between updates of a bar


@contextmanager
def connected(address: str | None) -> Iterator[None]:
    """Be connected to a cluster: the present one, or that of an address; None as in `ray.init`.

    Raises:
        ConnectionError: there is none at the address.

    """
    with naming_extras():
        import ray

    if ray.is_initialized():
        yield
        return
    if address is not None:
        _require_reachable(address)
    ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
    try:
        yield
    finally:
        ray.shutdown()


def _require_reachable(address: str) -> None:
    """Raise a ConnectionError if nothing listens at host:port; Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except OSError as e:
        raise ConnectionError(f"{address}: no Ray cluster there: {e}") from None


def task_options(cpus: float, memory: int, what: str) -> dict[str, Any]:
    """Return the options of tasks that need this many bytes of memory for `what`.

    Raises:
        MemoryError: no machine has as many; a task would wait forever.

    """
    import ray

    there = max((n["Resources"].get("memory", 0) for n in ray.nodes() if n["Alive"]), default=0)
    if memory > there:
        raise MemoryError(f"{what}: needs {memory:,} bytes of memory, {there:,.0f} are on the largest machine")
    return {
        "num_cpus": cpus, "memory": memory, "max_retries": RETRIES, "retry_exceptions": [ConnectionError],
        "scheduling_strategy": "SPREAD",
    }  # fmt: skip


def results(tasks: dict[Any, K], name: Callable[[K], str], poll: Callable[[], object]) -> Iterator[tuple[K, Any]]:
    """Yield what each task is for and what it returned, as tasks end; an error cancels the rest.

    Args:
        tasks: references, each with what it is for.
        name: what to call a task in an error.
        poll: called several times a second.

    Raises:
        RuntimeError: a task was lost too often.
        Exception: what a task raised.

    """
    import ray

    left = dict(tasks)
    try:
        while left:
            done, _ = ray.wait(list(left), timeout=POLL)
            for task in done:
                key = left.pop(task)
                yield key, result_of(task, name(key))
            poll()
    finally:
        for task in left:
            with suppress(Exception):  # the first error is the one to report
                ray.cancel(task, force=True)  # an interrupted import would spoil the worker for later tasks


def result_of(task: Any, name: str) -> Any:
    """Return what a task returned, or raise as `results` does."""
    import ray

    try:
        return ray.get(task)
    except ray.exceptions.RayTaskError as e:
        raise (e.cause if isinstance(e.cause, Exception) else RuntimeError(f"{name}: {e}")) from None
    except ray.exceptions.RayError as e:
        raise RuntimeError(f"{name}: {RETRIES} attempts ended without a result; the last one: {e}") from None
