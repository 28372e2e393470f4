"""Where a conversion writes: a directory, or a folder of an object store."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import ClassVar

from ..files import Checkpoint, RemoteFolder, checksum, exact_bytes, is_remote, open_checkpoint, open_remote, sketch
from ..system import locked, read_json, sync_directory, write_json

PROGRESS = "qins-progress.json"
LOCK = "qins.lock"
CALIBRATION = "qins-calibration"
_PART = "qins-part-"  # begins the name of the directory of a shard that a worker converts


def destination_of(out: str | Path) -> Destination:
    """Return the destination of a path or URL."""
    return RemoteDestination(Path(), RemoteFolder(str(out))) if is_remote(out) else Destination(Path(out))


@dataclass
class Destination:
    """A directory. A worker may use a copy, which was pickled after `prepare`."""

    is_remote: ClassVar[bool] = False

    directory: Path

    def __str__(self) -> str:
        return str(self.directory)

    @contextmanager
    def reserved(self) -> Iterator[None]:
        """Create the directory, and keep other processes from writing to it.

        Raises:
            FileExistsError: it is a file.
            BlockingIOError: another process is converting into it.

        """
        out = self.directory
        if out.exists() and not out.is_dir():
            raise FileExistsError(f"{out}: expected a directory or nothing, got a file")
        out.mkdir(parents=True, exist_ok=True)
        with locked(
            out / LOCK, f"{out}: another process is converting into it; wait for it, or give another directory"
        ):
            yield

    def prepare(self, fingerprint: str, needed: int) -> None:
        """Check that this is empty or holds this conversion, interrupted, and that the disk has room.

        Raises:
            FileExistsError, OSError: otherwise.

        """
        out, begun = self.directory, self.directory / PROGRESS
        if begun.is_file():
            try:
                told = read_json(begun).get("fingerprint")
            except ValueError:
                told = None
            if told != fingerprint:
                raise self._other()
        elif any(p.name not in (begun.name + ".tmp", LOCK) for p in out.iterdir()):  # these two precede the other one
            raise FileExistsError(f"{out}: is not empty; nothing is overwritten")
        self.remove_parts()
        done = sum(p.stat().st_size for p in out.glob("*.safetensors"))
        free = shutil.disk_usage(out).free
        if free < needed - done:
            raise OSError(f"{out}: needs {needed - done:,} bytes, the disk has {free:,} free")
        if not begun.is_file():
            write_json(begun, {"fingerprint": fingerprint})

    def _other(self) -> FileExistsError:
        return FileExistsError(
            f"{self}: holds an unfinished conversion of another source or with other settings; remove it, or give "
            "another directory"
        )

    def has(self, name: str) -> bool:
        """Return whether a file is there, which is then complete."""
        return (self.directory / name).exists()

    def checksums(self, name: str) -> dict[str, str]:
        """Return the checksums of a shard's tensors, read back."""
        return _checksums(open_checkpoint(self.directory / name))

    @contextmanager
    def part(self) -> Iterator[Path]:
        """Yield a directory of its own for one attempt at a shard; an error deletes it."""
        part = self.directory / f"{_PART}{uuid.uuid4().hex}"
        part.mkdir()
        try:
            yield part
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise

    def deliver(self, part: Path, names: Iterable[str]) -> str:
        """Bring the files of a part where `commit` finds them; return its name."""
        return part.name

    def commit(self, part: str, names: Iterable[str]) -> None:
        """Give the files of a part their final place, in this order."""
        for name in names:
            (self.directory / part / name).replace(self.directory / name)
            sync_directory(self.directory)
        shutil.rmtree(self.directory / part, ignore_errors=True)

    def put(self, name: str) -> None:
        """Publish a file that was made in `directory`."""

    def remove_parts(self) -> None:
        """Delete what workers have left that were killed."""
        for path in self.directory.glob(f"{_PART}*"):
            shutil.rmtree(path, ignore_errors=True)

    def exact_bytes(self) -> int:
        """Return the bytes of the files that restore the original."""
        return exact_bytes(self.directory)

    def show(self, names: Iterable[str]) -> None:
        """Make the headers of shards readable in `directory`."""

    def finish(self) -> None:
        """Publish the rest, the configuration last, which makes this a model."""
        self.remove_parts()

    def end(self) -> None:
        """Delete what says that this may be incomplete.

        The lock must be gone: until then a second run resumes, and finds everything complete.
        """
        (self.directory / PROGRESS).unlink(missing_ok=True)


@dataclass
class RemoteDestination(Destination):
    """A folder of an object store; `directory` is a temporary one, for files that are not published yet.

    There is no lock: two runs of one conversion write the same bytes, and other conversions are refused. An object
    appears under its name only once it is whole, so workers write them without `commit`.
    """

    is_remote = True

    folder: RemoteFolder
    published: set[str] = field(default_factory=set)

    def __str__(self) -> str:
        return self.folder.url

    @contextmanager
    def reserved(self) -> Iterator[None]:
        """Make the temporary directory."""
        with TemporaryDirectory(prefix="qins-") as directory:
            self.directory = Path(directory)
            yield

    def prepare(self, fingerprint: str, needed: int) -> None:
        """Check that this is empty or holds this conversion, interrupted."""
        there = self.folder.entries()
        if PROGRESS not in there:
            if there:
                raise FileExistsError(f"{self}: is not empty; nothing is overwritten")
            write_json(self.directory / PROGRESS, {"fingerprint": fingerprint})
            self.folder.create(PROGRESS, (self.directory / PROGRESS).read_bytes())
            (self.directory / PROGRESS).unlink()
            there = self.folder.entries()
        told = self.directory / PROGRESS
        told.write_bytes(self.folder.read(PROGRESS, 0, int(there[PROGRESS]["size"])))
        if read_json(told).get("fingerprint") != fingerprint:
            raise self._other()
        told.unlink()
        self.published = {*there}

    def has(self, name: str) -> bool:
        """Return whether a file is there."""
        return name in self.published

    def checksums(self, name: str) -> dict[str, str]:
        """Return the checksums of a shard's tensors, read back."""
        with TemporaryDirectory(prefix="qins-") as directory:
            return _checksums(open_remote(self.folder, Path(directory), name))

    @contextmanager
    def part(self) -> Iterator[Path]:
        """Yield a directory of its own for one attempt at a shard."""
        with TemporaryDirectory(prefix="qins-") as part:
            yield Path(part)

    def deliver(self, part: Path, names: Iterable[str]) -> str:
        """Write the files of a part."""
        for name in names:
            self.folder.put(part / name, name)
        return ""

    def commit(self, part: str, names: Iterable[str]) -> None:
        """Take note of files that a worker has written."""
        self.published.update(names)

    def put(self, name: str) -> None:
        """Publish a file that was made in `directory`, and delete it there."""
        self.folder.put(self.directory / name, name)
        (self.directory / name).unlink()
        self.published.add(name)

    def remove_parts(self) -> None:
        """Do nothing: parts are in temporary directories."""

    def exact_bytes(self) -> int:
        """Return the bytes of the files that restore the original."""
        names = ((n, e) for n, e in self.folder.entries().items() if n.startswith("exact-"))
        return sum(int(e["size"]) for n, e in names if n.endswith(".safetensors"))

    def show(self, names: Iterable[str]) -> None:
        """Make the headers of shards readable in `directory`."""
        there = self.folder.entries()
        sketch(self.folder, {n: there[n] for n in names}, self.directory)

    def finish(self) -> None:
        """Publish the rest, the configuration last."""
        left = (p.name for p in self.directory.iterdir() if p.suffix != ".safetensors")
        for name in sorted(left, key=lambda n: (n == "config.json", n)):
            self.put(name)

    def end(self) -> None:
        """Delete what says that this may be incomplete."""
        self.folder.delete(PROGRESS)


def _checksums(made: Checkpoint) -> dict[str, str]:
    return {k: checksum(made.load(k)) for k in made.tensors}
