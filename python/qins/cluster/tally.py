"""What all workers have done. This module imports neither torch nor Ray, so that its actor starts at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass
class Spent:
    """What one attempt at a shard has used so far: bytes of the source, bytes written, CPU seconds."""

    worker: str
    done: int = 0
    written: int = 0
    cpu: float = 0.0


class Tally:
    """Counts the work of all workers; an actor.

    Only the latest attempt at a shard counts as progress, but all attempts cost.
    """

    def __init__(self) -> None:
        self.attempts: dict[tuple[str, str], Spent] = {}
        self.latest: dict[str, str] = {}

    def tell(self, shard: str, attempt: str, spent: Spent) -> None:
        """Take note of an attempt."""
        if (shard, attempt) not in self.attempts:
            self.latest[shard] = attempt
        self.attempts[shard, attempt] = spent

    def total(self) -> dict[str, Any]:
        """Return bytes done, and the cost: attempts, workers, bytes read and written, and CPU seconds."""
        spent = list(self.attempts.values())
        return {
            "done": sum(self.attempts[item].done for item in self.latest.items()),
            "attempts": len(spent),
            "workers": len({s.worker for s in spent}),
            "bytes_read": sum(s.done for s in spent),
            "bytes_written": sum(s.written for s in spent),
            "cpu_seconds": sum(s.cpu for s in spent),
        }
