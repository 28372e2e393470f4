"""`qins eval --ray`: windows of text are answered on several machines."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..fidelity import Compared, Recording, compare_window
from ..files import open_checkpoint
from ..hf import find_source
from ..system import VERSION, progress
from .tasks import results, task_options
from .work import require_version

_BASE = 2 << 30  # bytes of memory that a worker needs besides the model: libraries, activations, log probabilities
_models: dict[str, Any] = {}  # the model of the windows before, by the phase that it belongs to


@dataclass(frozen=True)
class Phase:
    """What all windows of a model share.

    Attributes:
        name: unique name.
        recording: where the reference's answers are; a shared directory.
        path: the model.
        is_reference: whether it is the reference, which is loaded as float32.
        told: the model's name in errors.
        threads: threads of each worker.
        version: version of qins on the driver.

    """

    name: str
    recording: Recording
    path: str
    is_reference: bool
    told: str
    threads: int
    version: str = VERSION

    def model(self) -> Any:
        """Return the model, which a worker keeps for its next windows."""
        require_version(self.version)
        torch.set_num_threads(self.threads)
        if self.name not in _models:
            _models.clear()
            told = {"dtype": torch.float32} if self.is_reference else {}
            model = self.recording.subject.load(self.path, **told)
            if self.is_reference:
                self.recording.check(model)
            _models[self.name] = model
        return _models[self.name]


def record(phase: Phase, i: int) -> None:
    """Record the reference's answer on window i."""
    phase.recording.record_window(phase.model(), i)


def compare(phase: Phase, i: int) -> Compared:
    """Compare the model's answer on window i with the recorded one."""
    return compare_window(phase.recording.subject, phase.model(), phase.recording, i, phase.told)


class RayWindows:
    """Answers windows of text as tasks of the cluster that Ray is connected to; see `qins.fidelity`.

    Answers depend on the number of threads as in one process: a worker has as many as processors.

    Args:
        cpus: processors per worker.
        show_progress: None shows a bar on a terminal.

    """

    def __init__(self, cpus: float = 1, show_progress: bool | None = None) -> None:
        self.cpus, self.show_progress = cpus, show_progress

    def record(self, recording: Recording, reference: str) -> None:
        """Record the reference's answers that are missing."""
        self._run(record, recording, reference, reference, is_reference=True)

    def compare(self, recording: Recording, path: str, name: str) -> list[Compared]:
        """Compare a saved model's answers with the reference's; in the windows' order."""
        return self._run(compare, recording, path, name, is_reference=False)

    def _run(
        self, function: Callable[..., Any], recording: Recording, path: str, name: str, is_reference: bool
    ) -> list[Any]:
        import ray

        threads = max(1, int(self.cpus))
        phase = ray.put(Phase(uuid.uuid4().hex, recording, path, is_reference, name, threads))
        options = task_options(self.cpus, _memory(path, is_reference), name)
        remote = ray.remote(**options)(function)
        verb = "record" if is_reference else "compare"
        tasks = {
            remote.options(name=f"qins {verb} {Path(path).name} window {i}").remote(phase, i): i
            for i in range(len(recording.items))
        }
        found: dict[int, Any] = {}
        total = sum(item.text.numel() for item in recording.items)
        with progress(name, total, self.show_progress) as advance:
            for i, result in results(tasks, lambda i: f"{name}, window {i}", lambda: None):
                found[i] = result
                advance(recording.items[i].text.numel())
        return [found[i] for i in range(len(recording.items))]


def _memory(path: str, is_reference: bool) -> int:
    """Return the bytes that a worker reserves for a model."""
    tensors = open_checkpoint(find_source(path)).tensors.values()
    return _BASE + sum(4 * t.elements if is_reference else t.bytes for t in tensors)
