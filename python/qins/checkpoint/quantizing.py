"""Conversion of a checkpoint on disk, tensor by tensor, without building the model: `qins quantize`."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..calibration import Store
from ..codec import EncodedArray, encode, fallback_note
from ..files import (
    Checkpoint,
    GgufCheckpoint,
    ReadAhead,
    ShardWriter,
    check_restorable,
    checksum,
    exact_bytes,
    exact_name,
    is_kept,
    open_checkpoint,
    open_gguf,
    open_scaled,
    others_of,
    remove_parts,
)
from ..hf import CARD, Calibration, CheckpointCalibration, QinsConfig, find_source, hub_name, tokenized, write_card
from ..system import atomically, locked, naming_file, progress, read_json, require_memory, write_json
from .planning import Item, Output, Plan, architecture, converted, plan
from .recording import ItemRecorder

Write = Callable[..., None]  # as ShardWriter.write

_WAITING = 64 << 20  # bytes queued for writing, above which the next tensor has to wait
_PROGRESS = "qins-progress.json"
_LOCK = "qins.lock"
_FILES = 3  # increased when a version writes other tensors, so that it does not resume an older version's conversion
_CALIBRATION = "qins-calibration"
_OWN = (_PROGRESS, _LOCK, _CALIBRATION)
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".index.json")


def directory_of(checkpoint: Checkpoint) -> Path:
    """Return the directory that holds a checkpoint."""
    return checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent


def _fingerprint(checkpoint: Checkpoint, config: QinsConfig, exact: bool) -> str:
    """Return a hash of what must not change if a conversion is to be resumed: source files, headers and settings."""
    h = hashlib.sha256(json.dumps([_FILES, config.to_dict(), exact], sort_keys=True, default=str).encode())
    for path, size in checkpoint.files.items():
        h.update(f"{path.name} {size} {path.stat().st_mtime_ns}".encode())
    for name, t in checkpoint.tensors.items():
        h.update(f"{name} {t.dtype} {t.shape}".encode())
    return h.hexdigest()


def _reserve(out: Path) -> AbstractContextManager[None]:
    """Create the output directory; return a lock that keeps other processes from writing to it."""
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{out}: expected a directory or nothing, got a file")
    out.mkdir(parents=True, exist_ok=True)
    return locked(out / _LOCK, f"{out}: another process is converting into it; wait for it, or give another directory")


def _prepare(out: Path, fingerprint: str, needed: int) -> None:
    """Check that the output directory is empty or holds this conversion, interrupted, and that the disk has room."""
    begun = out / _PROGRESS
    if begun.is_file():
        try:
            told = read_json(begun).get("fingerprint")
        except ValueError:
            told = None
        if told != fingerprint:
            raise FileExistsError(
                f"{out}: holds an unfinished conversion of another source or with other settings; remove it, or give "
                "another directory"
            )
    elif any(p.name not in (begun.name + ".tmp", _LOCK) for p in out.iterdir()):  # these two precede the progress file
        raise FileExistsError(f"{out}: is not empty; nothing is overwritten")
    done = sum(p.stat().st_size for p in out.glob("*.safetensors"))
    free = shutil.disk_usage(out).free
    if free < needed - done:
        raise OSError(f"{out}: needs {needed - done:,} bytes, the disk has {free:,} free")
    if not begun.is_file():
        write_json(begun, {"fingerprint": fingerprint})


def _require_memory(checkpoint: Checkpoint, planned: Plan) -> None:
    """Check that there is memory for the largest tensors: what they are made from, and what is written."""

    def needed(item: Item) -> int:
        made, read = [t.nbytes for t in item.targets], [checkpoint.tensors[k].bytes for k in item.all_keys]
        if any(o.is_stack for o in item.outputs):  # encoded matrix by matrix
            return max(made, default=0) + max(read, default=0)
        return sum(made) + sum(read)

    largest = max((item for items in planned.items.values() for item in items), key=needed, default=None)
    if largest is not None:
        require_memory(needed(largest), f"{checkpoint.path}: {largest.name}")


def quantize_checkpoint(
    source: str | Path,
    out: str | Path,
    config: QinsConfig | None = None,
    *,
    calibration: Calibration | None = None,
    exact: bool = False,
    show_progress: bool | None = None,
) -> dict[str, Any]:
    """Quantize a checkpoint, file by file; the model is never built, and only a few tensors are in memory at a time.

    With a calibration text the model does run, with weights memory-mapped from the files; see `qins.calibrate`.

    An interrupted conversion resumes where it stopped: complete files are kept.

    Args:
        source: directory or hub name of a checkpoint in safetensors or torch files, or a GGUF file.
        out: output directory; it must not exist, or must be empty or hold this conversion, interrupted.
        config: how to quantize; None for the defaults.
        calibration: text on which codes are calibrated, and target bits; None rounds to the nearest codes.
        exact: also write `exact-*.safetensors`, from which `qins.files.restore_checkpoint` restores the source bit for
            bit.
        show_progress: None shows a progress bar on a terminal.

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
    config = config or QinsConfig()
    checkpoint, out = open_checkpoint(find_source(source)), Path(out)
    if checkpoint.format == "gguf":
        if calibration is not None:
            raise ValueError(f"{source}: calibration needs a model in safetensors or torch files, got GGUF")
        checkpoint = open_gguf(checkpoint)
    checkpoint = open_scaled(checkpoint)
    with naming_file(directory_of(checkpoint)):  # transformers reads files there, too
        planned, quantizer = plan(checkpoint, config)
    if exact:
        check_restorable(checkpoint, planned.encoded_keys)
    _require_memory(checkpoint, planned)
    data = None
    if calibration is not None:
        with naming_file(directory_of(checkpoint)):
            data = tokenized(directory_of(checkpoint), calibration.text, calibration.tokens)
        config.calibration = calibration.record(data)
    fingerprint = _fingerprint(checkpoint, config, exact)
    with _reserve(out):
        total = sum(t.bytes for t in checkpoint.tensors.values())
        needed = planned.nbytes * (1 if data is None else 2)
        needed += 3 * total // 4 if exact else 0  # residuals are written twice
        _prepare(out, fingerprint, needed)
        store, spending = None, None
        if calibration is not None and data is not None:
            store = Store(out / _CALIBRATION, fingerprint)
            with naming_file(directory_of(checkpoint)):
                work = CheckpointCalibration(
                    directory_of(checkpoint), architecture(checkpoint), data, store, show_progress
                )
            if calibration.has_target:
                spending = work.plan(planned.modules, calibration, config)
                planned, quantizer = plan(checkpoint, config)
            work.encode(planned.modules)
        checksums: dict[str, str] = {}
        bar = progress(f"encoding to {config.codec}", total, show_progress, in_bytes=True)
        with bar as advance, ReadAhead(checkpoint) as ahead:
            for file, name in planned.names.items():
                if (out / name).exists():
                    made = open_checkpoint(out / name)
                    checksums |= {k: checksum(made.load(k)) for k in made.tensors}
                    advance(sum(checkpoint.tensors[k].bytes for i in planned.items[file] for k in i.all_keys))
                else:
                    with _recorder(checkpoint, planned, file, out, exact) as recorder:
                        checksums |= _convert_shard(ahead, planned, store, file, out / name, recorder, advance)
        for file in checkpoint.files if exact else ():
            if file not in planned.names and not (out / exact_name(file.name)).exists():  # part of other files' tensors
                with ItemRecorder(checkpoint, planned, file, out / exact_name(file.name)) as rest:
                    rest.write()
        config.checksums = dict(sorted(checksums.items()))
        base = hub_name(source) or hub_name(checkpoint.config.get("_name_or_path"))
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
            | ({"exact_bytes": exact_bytes(out), "not_restored": _not_restored(checkpoint)} if exact else {})
        )
        _finish(checkpoint, planned, config, out, base, spending)
    # after the lock is gone: until then a second run resumes, and finds everything complete
    (out / _PROGRESS).unlink(missing_ok=True)
    return result


def _recorder(checkpoint: Checkpoint, planned: Plan, file: Path, out: Path, exact: bool) -> Any:
    """Return a context of what records how a file is restored, or of None."""
    if not exact:
        return nullcontext()
    first = file == next(iter(planned.names))
    others = others_of(directory_of(checkpoint), copied_names(checkpoint)) if first else {}
    return ItemRecorder(checkpoint, planned, file, out / exact_name(file.name), others)


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
    advance: Callable[[int], None],
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
    if (out / _CALIBRATION).exists():
        shutil.rmtree(out / _CALIBRATION)
