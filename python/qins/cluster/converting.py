"""The driver of a conversion on a Ray cluster: it plans, hands out shards, and commits them."""

from __future__ import annotations

import time
import uuid
from pathlib import Path
from typing import Any

from ..checkpoint import Conversion, Destination, quantize_checkpoint
from ..hf import QinsConfig
from ..system import Advance
from .rounding import RayRounding
from .tally import Tally
from .tasks import POLL, connected, results, task_options
from .work import Job, convert, read_back

_BASE = 1 << 30  # bytes of memory that a worker needs besides the tensors: libraries, and what waits to be written


def quantize_on_ray(
    source: str | Path,
    out: str | Path,
    config: QinsConfig | None = None,
    *,
    address: str | None = None,
    cpus: float = 1,
    **options: Any,
) -> dict[str, Any]:
    """Quantize a checkpoint as `quantize_checkpoint` does, with the same bytes, on a Ray cluster.

    Each shard is a task, and converted tensor by tensor. Calibrated codes are chosen layer by layer on the cluster,
    from statistics that the driver collects. A task whose worker or machine is lost is run again elsewhere.
    Run the same call again to resume: complete shards are kept.

    Args:
        source: as in `quantize_checkpoint`; a directory must be at the same path on all machines.
        out: likewise.
        config: how to quantize; None for the defaults.
        address: of the cluster; None for RAY_ADDRESS, or one that runs on this machine, or else a new one on it.
        cpus: processors per shard.
        **options: as in `quantize_checkpoint`.

    Returns:
        dict: as `quantize_checkpoint`, and `cost`: seconds, attempts, workers, bytes_read, bytes_written, cpu_seconds.

    Raises:
        ConnectionError: there is no cluster at the address.
        FileNotFoundError: a machine does not see the directories.
        MemoryError: no machine has memory for the largest tensor.
        OSError, ValueError, RuntimeError: as from `quantize_checkpoint`; a shard failed too often.

    """
    shards = RayShards(cpus)
    with connected(address):
        result = quantize_checkpoint(source, out, config, shards=shards, rounding=RayRounding(cpus), **options)
    return result | {"cost": shards.cost}


class RayShards:
    """Converts the shards of a checkpoint as tasks of the cluster that Ray is connected to.

    Args:
        cpus: processors per shard.

    Attributes:
        cost: what the run has used, over all workers.

    """

    def __init__(self, cpus: float = 1) -> None:
        self.cpus = cpus
        self.cost: dict[str, Any] = {}

    def __call__(self, conversion: Conversion, destination: Destination, advance: Advance) -> dict[str, str]:
        """Convert the shards that are missing; return the checksums of all tensors."""
        import ray

        if conversion.checkpoint.format == "gguf":
            raise ValueError(f"{conversion.checkpoint.path}: is one file, which one process converts: omit --ray")
        begin = time.monotonic()
        needed, largest = conversion.memory()
        options = task_options(self.cpus, needed + _BASE, largest)
        tally = _start_tally()
        job = ray.put(Job(uuid.uuid4().hex, [ray.put(conversion)], destination, tally))
        check, quantize = ray.remote(**options)(read_back), ray.remote(**options)(convert)
        tasks = {}
        for file, name in conversion.planned.names.items():
            function, verb = (check, "check") if destination.has(name) else (quantize, "quantize")
            tasks[function.options(name=f"qins {verb} {name}").remote(job, file)] = file
        told = _Bar(tally, advance)
        checksums: dict[str, str] = {}
        planned = conversion.planned.names
        for file, made in results(tasks, planned.__getitem__, told.update):
            if made.part is not None:
                destination.commit(made.part, conversion.names(file))
            checksums |= made.checksums
        self.cost = {"seconds": time.monotonic() - begin} | told.update(now=True)
        ray.kill(tally)
        return checksums


def _start_tally() -> Any:
    """Start the actor that counts, on the driver's machine, which is there as long as the driver."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(Tally).options(num_cpus=0, max_restarts=3, scheduling_strategy=here).remote()


class _Bar:
    """One bar for all workers."""

    def __init__(self, tally: Any, advance: Advance) -> None:
        self._tally, self._advance, self._shown, self._last = tally, advance, 0, 0.0

    def update(self, now: bool = False) -> dict[str, Any]:
        """Show the progress, unless it was shown just before; return the cost."""
        import ray

        if not now and time.monotonic() - self._last < POLL:
            return {}
        self._last = time.monotonic()
        total: dict[str, Any] = ray.get(self._tally.total.remote())
        done = total.pop("done")
        self._advance(done - self._shown, f"encoding: {total['workers']} workers, {total['cpu_seconds']:,.0f} CPU s")
        self._shown = done
        return total
