"""What workers do: a shard at a time, with the functions that convert in one process."""

from __future__ import annotations

import os
import socket
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint import Conversion, Destination
from ..files import ReadAhead
from ..system import VERSION
from .tally import Spent

_EVERY = 0.5  # seconds between what a worker tells of its progress
_kept: dict[str, Conversion] = {}  # the conversion of the shards before, by the job that it belongs to


@dataclass(frozen=True)
class Job:
    """What all tasks of a conversion share.

    Attributes:
        name: unique name of the run.
        conversion: a list with the reference of the Conversion, so that a worker takes it once for many shards.
        destination: where the shards go.
        tally: actor that counts.
        version: version of qins that has planned.

    """

    name: str
    conversion: list[Any]
    destination: Destination
    tally: Any
    version: str = VERSION

    def opened(self) -> Conversion:
        """Return the conversion.

        Raises:
            RuntimeError: this machine has another version of qins, which might write other bytes.

        """
        require_version(self.version)
        if self.name not in _kept:
            import ray

            _kept.clear()
            _kept[self.name] = ray.get(self.conversion[0])
        return _kept[self.name]


def require_version(version: str) -> None:
    """Raise a RuntimeError if this machine has another version of qins than the driver."""
    if version != VERSION:
        raise RuntimeError(f"{socket.gethostname()}: has qins {VERSION}, the driver has {version}")


@dataclass(frozen=True)
class Made:
    """A shard that is converted, or was.

    Attributes:
        part: where `Destination.commit` finds it; None if it was complete before.
        checksums: checksums of its tensors.

    """

    part: str | None
    checksums: dict[str, str]


class Telling:
    """Tells the tally of one attempt at a shard, and Ray's metrics, which its dashboard shows."""

    def __init__(self, tally: Any, shard: str) -> None:
        self._tally, self._shard, self._attempt = tally, shard, uuid.uuid4().hex
        self._cpu, self._last = time.process_time(), 0.0
        self.spent = Spent(f"{socket.gethostname()} {os.getpid()}")
        self.tell()

    def advance(self, n: int, told: str | None = None, /) -> None:
        """Count n bytes of the source."""
        self.spent.done += n
        if time.monotonic() - self._last > _EVERY:
            self.tell()

    def tell(self) -> Any:
        """Tell what was spent so far; return the reference of the answer, for which nobody has to wait."""
        before, self._last = self.spent.cpu, time.monotonic()
        self.spent.cpu = time.process_time() - self._cpu
        _metric("qins_cpu_seconds", "CPU time of conversions").inc(max(self.spent.cpu - before, 1e-9))
        return self._tally.tell.remote(self._shard, self._attempt, self.spent)

    def end(self, written: int) -> None:
        """Tell the rest, and wait until it is counted."""
        import ray

        self.spent.written = written
        ray.get(self.tell())
        _metric("qins_source_bytes", "Bytes of converted tensors").inc(max(self.spent.done, 1))


_metrics: dict[str, Any] = {}


def _metric(name: str, description: str) -> Any:
    from ray.util.metrics import Counter

    if name not in _metrics:
        _metrics[name] = Counter(name, description)
    return _metrics[name]


def convert(job: Job, file: Path) -> Made:
    """Convert one shard into a directory of its own, or into the store."""
    conversion, destination = job.opened(), job.destination
    _require_shared(conversion, destination, file)
    telling = Telling(job.tally, file.name)
    names = conversion.names(file)
    with destination.part() as part:
        with ReadAhead(conversion.checkpoint) as ahead:
            checksums = conversion.convert(ahead, file, part, telling.advance)
        written = sum((part / name).stat().st_size for name in names)
        delivered = destination.deliver(part, names)
    telling.end(written)
    return Made(delivered, checksums)


def read_back(job: Job, file: Path) -> Made:
    """Read the checksums of a shard that is complete."""
    conversion = job.opened()
    telling = Telling(job.tally, file.name)
    checksums = job.destination.checksums(conversion.planned.names[file])
    telling.advance(conversion.source_bytes(file))
    telling.end(0)
    return Made(None, checksums)


def _require_shared(conversion: Conversion, destination: Destination, file: Path) -> None:
    """Raise a FileNotFoundError if this machine does not see the directories that the driver does."""
    places = [] if destination.is_remote else [destination.directory]
    if conversion.checkpoint.mapped:
        places.append(file)
    for place in places:
        if not place.exists():
            raise FileNotFoundError(
                f"{place}: not there on {socket.gethostname()}: with several machines, use a shared folder or the URL "
                "of an object store"
            )
