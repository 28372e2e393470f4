"""Conversion of a checkpoint on disk, tensor by tensor, without building the model: `qins quantize`."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from ..calibration import Rounding, Store
from ..codec import EncodedArray, encode, fallback_note
from ..files import (
    Checkpoint,
    GgufCheckpoint,
    ReadAhead,
    RemoteFolder,
    ShardWriter,
    check_restorable,
    exact_name,
    is_kept,
    is_remote,
    open_checkpoint,
    open_gguf,
    open_remote,
    open_scaled,
    others_of,
    remove_parts,
)
from ..hf import CARD, Calibration, CheckpointCalibration, QinsConfig, find_source, hub_name, tokenized, write_card
from ..system import Advance, atomically, naming_file, progress, require_memory, write_json
from .destination import CALIBRATION, LOCK, PROGRESS, Destination, destination_of
from .planning import Item, Output, Plan, architecture, converted, plan
from .recording import ItemRecorder

Write = Callable[..., None]  # as ShardWriter.write

_WAITING = 64 << 20  # bytes queued for writing, above which the next tensor has to wait
_FILES = 3  # increased when a version writes other tensors, so that it does not resume an older version's conversion
_OWN = (PROGRESS, LOCK, CALIBRATION)
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".index.json")


def directory_of(checkpoint: Checkpoint) -> Path:
    """Return the directory that holds a checkpoint."""
    return checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent


def _fingerprint(checkpoint: Checkpoint, config: QinsConfig, exact: bool) -> str:
    """Return a hash of what must not change if a conversion is to be resumed: source files, headers and settings."""
    h = hashlib.sha256(json.dumps([_FILES, config.to_dict(), exact], sort_keys=True, default=str).encode())
    for path, size in checkpoint.files.items():
        h.update(f"{path.name} {size} {checkpoint.version(path)}".encode())
    for name, t in checkpoint.tensors.items():
        h.update(f"{name} {t.dtype} {t.shape}".encode())
    return h.hexdigest()


@dataclass
class Conversion:
    """What the conversion of any shard needs. It can be pickled, for workers in other processes.

    Attributes:
        checkpoint: the source.
        planned: what each tensor becomes.
        exact: whether to record how the source is restored.
        store: calibrated codes; None to encode all.
        others: what restores the files beside the source's weights, which the first shard's exact file holds.

    """

    checkpoint: Checkpoint
    planned: Plan
    exact: bool = False
    store: Store | None = None
    others: dict[str, Any] = field(default_factory=dict)

    def source_bytes(self, file: Path) -> int:
        """Return the bytes of the tensors that a shard is made from."""
        return sum(self.checkpoint.tensors[k].bytes for i in self.planned.items[file] for k in i.all_keys)

    def names(self, file: Path) -> list[str]:
        """Return the names of the files that a shard becomes; the one with the codes, which completes it, is last."""
        return [exact_name(file.name)] * self.exact + [self.planned.names[file]]

    def memory(self) -> tuple[int, str]:
        """Return the bytes of memory for the largest tensors, what they are made from and what is written; its name."""

        def needed(item: Item) -> int:
            made, read = [t.nbytes for t in item.targets], [self.checkpoint.tensors[k].bytes for k in item.all_keys]
            if any(o.is_stack for o in item.outputs):  # encoded matrix by matrix
                return max(made, default=0) + max(read, default=0)
            return sum(made) + sum(read)

        items = (item for items in self.planned.items.values() for item in items)
        largest = max(items, key=needed, default=None)
        return (0, "") if largest is None else (needed(largest), f"{self.checkpoint.path}: {largest.name}")

    def convert(self, ahead: ReadAhead, file: Path, directory: Path, advance: Advance) -> dict[str, str]:
        """Convert one shard; return the checksums of its tensors."""
        with self.recorder(file, directory) as recorder:
            target = directory / self.planned.names[file]
            return _convert_shard(ahead, self.planned, self.store, file, target, recorder, advance)

    def recorder(self, file: Path, directory: Path) -> Any:
        """Return a context of what records how a file is restored, or of None."""
        if not self.exact:
            return nullcontext()
        others = self.others if file == next(iter(self.planned.names)) else {}
        return ItemRecorder(self.checkpoint, self.planned, file, directory / exact_name(file.name), others)


# Converts the shards that are missing, and reads the others back; returns the checksums of all their tensors.
Shards = Callable[[Conversion, Destination, Advance], dict[str, str]]


def one_after_the_other(conversion: Conversion, destination: Destination, advance: Advance) -> dict[str, str]:
    """Convert the shards in this process."""
    checksums: dict[str, str] = {}
    with ReadAhead(conversion.checkpoint) as ahead:
        for file, name in conversion.planned.names.items():
            if destination.has(name):
                checksums |= destination.checksums(name)
                advance(conversion.source_bytes(file))
                continue
            checksums |= conversion.convert(ahead, file, destination.directory, advance)
            for made in conversion.names(file):
                destination.put(made)
    return checksums


def quantize_checkpoint(
    source: str | Path,
    out: str | Path,
    config: QinsConfig | None = None,
    *,
    calibration: Calibration | None = None,
    exact: bool = False,
    show_progress: bool | None = None,
    shards: Shards = one_after_the_other,
    rounding: Rounding | None = None,
) -> dict[str, Any]:
    """Quantize a checkpoint, file by file; the model is never built, and only a few tensors are in memory at a time.

    With a calibration text the model does run, with weights memory-mapped from the files; see `qins.calibrate`.

    An interrupted conversion resumes where it stopped: complete files are kept.

    Args:
        source: directory or hub name of a checkpoint in safetensors or torch files, or a GGUF file; or the URL of a
            folder with safetensors files, such as `s3://bucket/model`, that fsspec can open.
        out: output directory, or such a URL; it must not exist, or must be empty or hold this conversion, interrupted.
        config: how to quantize; None for the defaults.
        calibration: text on which codes are calibrated, and target bits; None rounds to the nearest codes.
        exact: also write `exact-*.safetensors`, from which `qins.files.restore_checkpoint` restores the source bit for
            bit.
        show_progress: None shows a progress bar on a terminal.
        shards: what converts the shards; `qins.cluster` has one for several machines.
        rounding: what chooses calibrated codes, likewise; None: this process.

    Returns:
        dict: layers, bytes_before, bytes_after, files, skipped, notes (on layers whose codec is not the one asked for)
            and source (the quantized format of the source, or None); with a target, also plan (its description);
            with `exact`, also exact_bytes, and not_restored: names of what lies beside the source's weights and cannot
            be restored.

    Raises:
        FileNotFoundError, FileExistsError, OSError, ValueError: no partial file is left under a final name.
        BlockingIOError: another process is converting into the directory.
        MemoryError: there is no memory for the largest tensor; nothing is written.

    """
    if calibration is not None and (is_remote(source) or is_remote(out)):
        raise ValueError(
            f"{source}, {out}: calibration expects directories, got a URL: it reads the model several times"
        )
    destination = destination_of(out)
    with _opened(source) as checkpoint:
        if checkpoint.format == "gguf":
            if calibration is not None:
                raise ValueError(f"{source}: calibration needs a model in safetensors or torch files, got GGUF")
            checkpoint = open_gguf(checkpoint)
        checkpoint = open_scaled(checkpoint)
        base = hub_name(str(source).removeprefix("hf://")) or hub_name(checkpoint.config.get("_name_or_path"))
        result = _quantize(
            checkpoint, destination, config or QinsConfig(), base, calibration, exact, show_progress, shards, rounding
        )
    destination.end()
    return result


@contextmanager
def _opened(source: str | Path) -> Iterator[Checkpoint]:
    """Yield a source; errors name its URL, not the temporary directory with its headers."""
    if not is_remote(source):
        yield open_checkpoint(find_source(source))
        return
    with TemporaryDirectory(prefix="qins-") as directory:
        try:
            yield open_remote(RemoteFolder(str(source)), Path(directory))
        except (OSError, ValueError) as e:
            if directory not in str(e):
                raise
            kind = next(k for k in (FileNotFoundError, OSError, ValueError) if isinstance(e, k))
            raise kind(str(e).replace(directory, str(source).rstrip("/"))) from e


def _quantize(
    checkpoint: Checkpoint,
    destination: Destination,
    config: QinsConfig,
    base: str | None,
    calibration: Calibration | None,
    exact: bool,
    show_progress: bool | None,
    shards: Shards,
    rounding: Rounding | None,
) -> dict[str, Any]:
    with naming_file(directory_of(checkpoint)):  # transformers reads files there, too
        planned, quantizer = plan(checkpoint, config)
    if exact:
        check_restorable(checkpoint, planned.encoded_keys)
    if shards is one_after_the_other:
        require_memory(*Conversion(checkpoint, planned).memory())
    data = None
    if calibration is not None:
        with naming_file(directory_of(checkpoint)):
            data = tokenized(directory_of(checkpoint), calibration.text, calibration.tokens)
        config.calibration = calibration.record(data)
    fingerprint = _fingerprint(checkpoint, config, exact)
    with destination.reserved():
        out = destination.directory
        total = sum(t.bytes for t in checkpoint.tensors.values())
        needed = planned.nbytes * (1 if data is None else 2)
        needed += 3 * total // 4 if exact else 0  # residuals are written twice
        destination.prepare(fingerprint, needed)
        store, spending = None, None
        if calibration is not None and data is not None:
            store = Store(out / CALIBRATION, fingerprint)
            with naming_file(directory_of(checkpoint)):
                work = CheckpointCalibration(
                    directory_of(checkpoint), architecture(checkpoint), data, store, show_progress
                )
            if calibration.has_target:
                spending = work.plan(planned.modules, calibration, config)
                planned, quantizer = plan(checkpoint, config)
            work.encode(planned.modules, rounding)
        others = others_of(directory_of(checkpoint), copied_names(checkpoint)) if exact else {}
        conversion = Conversion(checkpoint, planned, exact, store, others)
        codecs = ", ".join(sorted({o.codec for o in planned.encoded})) or config.codec  # a plan's are several
        with progress(f"encoding to {codecs}", total, show_progress, in_bytes=True) as advance:
            checksums = shards(conversion, destination, advance)
        for file in checkpoint.files if exact else ():
            if file not in planned.names and not destination.has(exact_name(file.name)):  # part of other files' tensors
                with conversion.recorder(file, out) as rest:
                    rest.write()
                destination.put(exact_name(file.name))
        config.checksums = dict(sorted(checksums.items()))
        result = (
            {
                "layers": len(planned.encoded),
                "bytes_before": total,
                "bytes_after": planned.nbytes,
                "files": [planned.names[f] for f in planned.names],
                "skipped": [vars(s) for s in quantizer.report.skipped],
                "notes": [*_notes(planned, config)],
                "source": config.source_format,
            }
            | ({} if spending is None else {"plan": spending})
            | ({"exact_bytes": destination.exact_bytes(), "not_restored": _not_restored(checkpoint)} if exact else {})
        )
        destination.show(planned.names.values())
        _finish(checkpoint, planned, config, out, base, spending)
        destination.finish()
    return result


def _not_restored(checkpoint: Checkpoint) -> list[str]:
    """Return the names of what lies beside the source's weights and neither is copied nor kept in exact files."""
    known = {*copied_names(checkpoint), *(p.name for p in checkpoint.files)}
    beside = (p for p in directory_of(checkpoint).iterdir() if p.name not in known and not is_kept(p))
    return sorted(p.name + "/" * p.is_dir() for p in beside)


def _notes(planned: Plan, config: QinsConfig) -> Iterator[str]:
    """Yield a note for each layer that could not have the codec asked for."""
    for o in planned.encoded:
        asked, _ = config.asked(o.module.rpartition(".")[0] if o.is_stack else o.module)
        told = fallback_note(asked, o.targets[0].shape[-1]) if o.codec != asked else ""
        if told:
            yield f"{o.module}: {told}"


def _convert_shard(
    ahead: ReadAhead,
    planned: Plan,
    store: Store | None,
    file: Path,
    target: Path,
    recorder: ItemRecorder | None,
    advance: Advance,
) -> dict[str, str]:
    """Write one shard; return its tensors' checksums."""
    with atomically(target) as temporary:
        items = planned.items[file]
        targets = [t for item in items for t in item.targets]
        with (
            ShardWriter(temporary, targets, {"format": "pt"}) as writer,
            _in_background(writer.write) as write,
        ):
            for item in items[:2]:
                _announce(ahead, store, item)
            for item, coming in zip_longest(items, items[2:]):
                if coming is not None:
                    _announce(ahead, store, coming)
                _convert_item(ahead, planned, store, item, write, recorder)
                advance(sum(ahead.checkpoint.tensors[k].bytes for k in item.all_keys))
        if recorder is not None:
            recorder.write()  # before the codes get their name, which tells that the shard is complete
    return writer.checksums


@contextmanager
def _in_background(write: Write) -> Iterator[Write]:
    """Yield a function that queues tensors for another thread, which writes them in order."""
    waiting: deque[tuple[Future[None], int]] = deque()

    def later(name: str, tensor: torch.Tensor, part: int | None = None) -> None:
        while sum(size for _, size in waiting) > _WAITING:
            waiting.popleft()[0].result()
        waiting.append((pool.submit(write, name, tensor, part), tensor.nbytes))

    with ThreadPoolExecutor(1) as pool:
        try:
            yield later
            for made, _ in waiting:
                made.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # what is queued will be deleted
            raise


def _announce(ahead: ReadAhead, store: Store | None, item: Item) -> None:
    """Announce an item's tensors, to be read while earlier ones are encoded, unless its codes are in the store."""
    kept = store is not None and all(o.codec and store.has(o.module) for o in item.outputs)
    if not kept and not ahead.checkpoint.decodes:
        for key in item.all_keys[:2]:
            ahead.announce(key)


def _convert_item(
    ahead: ReadAhead, planned: Plan, store: Store | None, item: Item, write: Write, recorder: ItemRecorder | None
) -> None:
    chosen = {o.name: store.get(o.module) if store is not None and o.codec else None for o in item.outputs}
    made: dict[str, Any] = {}
    if ahead.checkpoint.decodes and item.converter is None and all(o.is_stack and o.codec for o in item.outputs):
        made = {item.name: ahead.checkpoint.load_matrices(item.all_keys[0])}
    elif recorder is not None or any(c is None for c in chosen.values()):
        made = converted(item, planned.model, ahead.load)
    for output in item.outputs:
        if output.guard:
            write(output.guard, torch.empty(0, dtype=torch.uint8))
        choice = chosen[output.name]
        if choice is not None:
            for n, array in choice.encoded.fields.items():
                write(output.stem + n, torch.from_numpy(array))
            if recorder is not None:
                recorder.matrix(item, output, None, made[output.name], choice.encoded)
        elif not output.codec:
            write(output.stem, made[output.name])
        else:
            try:
                for part, matrix, encoded in _encode(output, made[output.name], write):
                    if recorder is not None:
                        recorder.matrix(item, output, part, matrix, encoded)
            except ValueError as e:
                raise ValueError(f"{ahead.checkpoint.where(item.all_keys[0])}: {output.name}: {e}") from None
    if recorder is not None:
        recorder.item(item)


def _encode(output: Output, floats: Any, write: Write) -> Iterator[tuple[int | None, torch.Tensor, EncodedArray]]:
    """Encode a matrix, or the matrices of a stack one by one, and write the codes; yield each with its codes."""
    for i, w in enumerate(floats if output.is_stack else [floats]):
        part = i if output.is_stack else None
        encoded = encode(w.T if output.transposed else w, output.codec, group_size=output.group_size)
        for n, array in encoded.fields.items():
            write(output.stem + n, torch.from_numpy(np.asarray(array)), part)
        yield part, w, encoded


def copied_names(checkpoint: Checkpoint) -> list[str]:
    """Return the names of the files that are copied from beside the weights."""
    if checkpoint.format == "gguf":
        return []
    weights = {p.name for p in checkpoint.files}
    return [
        p.name
        for p in sorted(directory_of(checkpoint).iterdir())
        if p.is_file()
        and p.name not in weights
        and not p.name.endswith(_WEIGHTS)
        and p.name not in ("config.json", CARD, *_OWN)
    ]


def _finish(
    checkpoint: Checkpoint, planned: Plan, config: QinsConfig, out: Path, base: str | None, spending: str | None
) -> None:
    """Write the index, the configuration and the card; this makes the directory a model."""
    if isinstance(checkpoint, GgufCheckpoint):  # files beside it may belong to other models, so none are copied
        checkpoint.save_tokenizer(out)
    for name in copied_names(checkpoint):
        with atomically(out / name) as temporary:  # a link in its place is replaced, not followed
            shutil.copyfile(directory_of(checkpoint) / name, temporary)
    if len(planned.names) > 1:
        weight_map = {t.name: planned.names[f] for f, items in planned.items.items() for i in items for t in i.targets}
        write_json(out / "model.safetensors.index.json",
                    {"metadata": {"total_size": planned.nbytes}, "weight_map": weight_map})  # fmt: skip
    config.modules = {o.module: [o.codec, o.group_size] for o in planned.encoded}
    config.modules |= {m: list(about) for m, about in planned.shared.items()}
    write_json(out / "config.json", checkpoint.config | {"quantization_config": config.to_dict()})
    beside = None if isinstance(checkpoint, GgufCheckpoint) else directory_of(checkpoint)
    estimate = None if spending is None else f"Estimated by the plan:\n\n```\n{spending}\n```"
    write_card(out, base, beside, estimate)
    remove_parts(out)
    if (out / CALIBRATION).exists():
        with naming_file(out / CALIBRATION):
            shutil.rmtree(out / CALIBRATION)
