"""Converting a checkpoint on disk, tensor by tensor, without making the model: `qins quantize`."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ._atomic import atomically, write_json
from ._hf_calibration import Calibration, CheckpointCalibration, tokenized
from ._hf_config import QinsConfig
from ._hf_modules import pending_layers
from .array import SCALARS, array_names, encode, field_shapes
from .calibration import Store
from .coded import FIELD_DTYPES
from .conversion import progress
from .files import Checkpoint, StoredTensor, open_checkpoint
from .hf import QinsHfQuantizer

_PROGRESS = "qins-progress.json"
_CALIBRATION = "qins-calibration"
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".index.json")
_DTYPE_CODES = {
    "float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64", "uint8": "U8", "int8": "I8",
    "int16": "I16", "int32": "I32", "int64": "I64", "bool": "BOOL",
}  # fmt: skip
# The order in which safetensors lays tensors out: by dtype, widest first, then by name.
_DTYPE_ORDER = ["U64", "I64", "F64", "F32", "U32", "I32", "BF16", "F16", "U16", "I16", "I8", "U8", "BOOL"]


@dataclass(frozen=True)
class Target:
    """A tensor that the new checkpoint will have."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        size = {"64": 8, "32": 4, "16": 2}.get(self.dtype[-2:], 1)
        for s in self.shape:
            size *= s
        return size


@dataclass
class Plan:
    """What `quantize_checkpoint` will do, shard by shard.

    Attributes:
        layers: checkpoint key of each weight that is encoded, to (module, codec, group_size, transposed).
        shards: source file to the tensors of the file that is made of it.
        names: source file to the name of that file.

    """

    layers: dict[str, tuple[str, str, int | None, bool]] = field(default_factory=dict)
    shards: dict[Path, list[Target]] = field(default_factory=dict)
    names: dict[Path, str] = field(default_factory=dict)

    @property
    def modules(self) -> dict[str, tuple[str, int | None, bool]]:
        """Module to (codec, group_size, transposed)."""
        return {module: (codec, size, turned) for module, codec, size, turned in self.layers.values()}

    @property
    def nbytes(self) -> int:
        """Bytes of all new tensors."""
        return sum(t.nbytes for targets in self.shards.values() for t in targets)


def find_source(name: str | Path) -> Path:
    """Return the directory of a checkpoint, downloading what a hub name stands for.

    Raises:
        FileNotFoundError: there is no such directory, and the hub does not have it either.

    """
    path = Path(name)
    if path.exists():
        return path
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(str(name), ignore_patterns=["*.h5", "*.msgpack", "*.onnx", "*.gguf"]))
    except Exception as e:
        raise FileNotFoundError(f"{name}: neither a directory nor a model that the hub gives: {e}") from None


def plan(checkpoint: Checkpoint, config: QinsConfig) -> tuple[Plan, QinsHfQuantizer]:
    """Decide what becomes of every tensor, from config.json and the headers of the files.

    Raises:
        ValueError: transformers does not know the architecture, or its loader rearranges these weights.

    """
    quantizer = QinsHfQuantizer(config, pre_quantized=False)
    model = _meta_model(checkpoint)
    quantizer._process_model_before_weight_loading(model)
    prefix = model.base_model_prefix + "." if model.base_model_prefix else ""
    result, missing = Plan(), []
    for module, layer in pending_layers(model).items():
        # a checkpoint of the model without its head has the same names without the prefix, and the other way round
        keys = [f"{n}.weight" for n in (module, prefix + module, module.removeprefix(prefix))]
        key = next((k for k in keys if k in checkpoint.tensors), None)
        if key is None:
            missing.append(module)
            continue
        stored = checkpoint.tensors[key]
        shape = (layer.in_features, layer.out_features) if layer.transposed else (layer.out_features, layer.in_features)
        if stored.shape != shape:
            raise ValueError(f"{checkpoint.path}: {key}: expected shape {shape}, got {stored.shape}")
        result.layers[key] = (module, layer.codec, layer.group_size, layer.transposed)
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ValueError(
            f"{checkpoint.path}: no weight for {', '.join(missing[:3])}{more}; where transformers rearranges weights "
            "while loading, use from_pretrained(..., quantization_config=qins.QinsConfig()) and save_pretrained"
        )
    files = list(checkpoint.files)
    for i, file in enumerate(files):
        single = len(files) == 1
        result.names[file] = "model.safetensors" if single else f"model-{i + 1:05}-of-{len(files):05}.safetensors"
        targets: list[Target] = []
        for key, tensor in checkpoint.tensors.items():
            if checkpoint.where(key) == file:
                targets += _targets(key, tensor, result.layers.get(key))
        result.shards[file] = targets
    return result, quantizer


def _directory(checkpoint: Checkpoint) -> Path:
    return checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent


def _architecture(checkpoint: Checkpoint) -> Any:
    """Transformers' class of the model."""
    import transformers

    name = (checkpoint.config.get("architectures") or [""])[0]
    cls = getattr(transformers, name, None)
    if cls is None:
        raise ValueError(f"{checkpoint.path}: architecture {name!r} is not one that this transformers has")
    return cls


def _meta_model(checkpoint: Checkpoint) -> Any:
    import transformers

    if not checkpoint.config:
        raise ValueError(f"{checkpoint.path}: expected a directory with a config.json, got none")
    if "quantization_config" in checkpoint.config:
        raise ValueError(f"{checkpoint.path}: is quantised already: {checkpoint.config['quantization_config']}")
    config = transformers.AutoConfig.from_pretrained(checkpoint.path)
    cls = _architecture(checkpoint)
    with torch.device("meta"):
        return cls(config)


def _targets(key: str, tensor: StoredTensor, layer: tuple[str, str, int | None, bool] | None) -> list[Target]:
    if layer is None:
        if tensor.dtype not in _DTYPE_CODES:
            raise ValueError(f"{key}: expected a dtype that safetensors and torch share, got {tensor.dtype}")
        return [Target(key, tensor.dtype, tensor.shape)]
    _, codec, group_size, transposed = layer
    shape = tensor.shape[::-1] if transposed else tensor.shape
    stem = key.removesuffix("weight")
    shapes = field_shapes(codec, shape, group_size)
    arrays = [Target(stem + n, str(FIELD_DTYPES[n])[6:], shapes[n]) for n in array_names(codec, group_size)]
    return [*arrays, *(Target(stem + n, "float32", ()) for n in SCALARS[codec])]


class _ShardWriter:
    """Writes one safetensors file whose tensors come in any order, each at its place, never all in memory.

    The library's own writer takes a dictionary of all tensors of a file. The layout is the library's, byte for byte
    (tests compare them), and the library reads the result back.
    """

    def __init__(self, path: Path, targets: list[Target], metadata: dict[str, str]) -> None:
        ordered = sorted(targets, key=lambda t: (_DTYPE_ORDER.index(_DTYPE_CODES[t.dtype]), t.name))
        header: dict[str, Any] = {"__metadata__": metadata}
        self.places: dict[str, tuple[int, Target]] = {}
        at = 0
        for t in ordered:
            header[t.name] = {
                "dtype": _DTYPE_CODES[t.dtype], "shape": list(t.shape), "data_offsets": [at, at + t.nbytes],
            }  # fmt: skip
            self.places[t.name] = (at, t)
            at += t.nbytes
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        self.start = 8 + len(text)
        self.file = path.open("wb")
        try:
            self.file.write(len(text).to_bytes(8, "little") + text)
            self.file.truncate(self.start + at)
        except OSError:
            with suppress(OSError):
                self.file.close()
            raise
        self.left = set(self.places)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write one tensor."""
        at, target = self.places[name]
        if tuple(tensor.shape) != target.shape or str(tensor.dtype)[6:] != target.dtype:
            raise ValueError(
                f"{name}: expected {target.dtype} {target.shape}, got {tensor.dtype} {tuple(tensor.shape)}"
            )
        self.file.seek(self.start + at)
        flat = tensor.detach().contiguous().reshape(-1)
        if flat.numel():
            self.file.write(flat.view(torch.uint8).numpy().data)
        self.left.discard(name)

    def close(self) -> None:
        """Finish the file."""
        with self.file:
            if self.left:
                raise ValueError(f"{self.file.name}: not written: {', '.join(sorted(self.left)[:5])}")


def _fingerprint(checkpoint: Checkpoint, config: QinsConfig) -> str:
    """What must be the same for a conversion to be resumed: the source's headers and files, and how it is quantised."""
    h = hashlib.sha256(json.dumps(config.to_dict(), sort_keys=True, default=str).encode())
    for path, size in checkpoint.files.items():
        h.update(f"{path.name} {size} {path.stat().st_mtime_ns}".encode())
    for name, t in checkpoint.tensors.items():
        h.update(f"{name} {t.dtype} {t.shape}".encode())
    return h.hexdigest()


def _prepare(out: Path, fingerprint: str, needed: int) -> None:
    """Make the output directory, or see that the one there is this very conversion, begun before."""
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{out}: expected a directory or nothing, got a file")
    begun = out / _PROGRESS
    if begun.is_file():
        try:
            told = json.loads(begun.read_text("utf-8")).get("fingerprint")
        except ValueError:
            told = None
        if told != fingerprint:
            raise FileExistsError(
                f"{out}: holds an unfinished conversion of another source or with other settings; remove it, or give "
                "another directory"
            )
    elif out.exists() and any(out.iterdir()):
        raise FileExistsError(f"{out}: is not empty; nothing is overwritten")
    out.mkdir(parents=True, exist_ok=True)
    done = sum(p.stat().st_size for p in out.glob("*.safetensors"))
    free = shutil.disk_usage(out).free
    if free < needed - done:
        raise OSError(f"{out}: needs {needed - done:,} bytes, the disk has {free:,} free")
    if not begun.is_file():
        write_json(begun, {"fingerprint": fingerprint})


def quantize_checkpoint(
    source: str | Path,
    out: str | Path,
    config: QinsConfig | None = None,
    *,
    calibration: Calibration | None = None,
    show_progress: bool | None = None,
) -> dict[str, Any]:
    """Convert a checkpoint to codes, file by file; the model is never made, and one tensor at a time is in memory.

    With a calibration text the model does run, its weights mapped from the files; see `qins.calibrate`.

    A conversion that was interrupted goes on where it stopped: files that are complete are not made again.

    Args:
        source: directory or hub name of a checkpoint in safetensors or torch files.
        out: directory to write; it must not exist, be empty, or hold the beginning of this conversion.
        config: how to quantise; None for the defaults.
        calibration: text that log8's codes are chosen with in view, and what bits to spend; None for the nearest codes.
        show_progress: None shows a bar on a terminal.

    Returns:
        dict: layers, bytes_before, bytes_after, files and skipped; with a target, the plan in words.

    Raises:
        FileNotFoundError, FileExistsError, OSError, ValueError: nothing half-written is left under a final name.

    """
    config = config or QinsConfig()
    checkpoint, out = open_checkpoint(find_source(source)), Path(out)
    if checkpoint.format == "gguf":
        raise ValueError(f"{source}: expected safetensors or torch files, got GGUF")
    planned, quantizer = plan(checkpoint, config)
    data = None
    if calibration is not None:
        data = tokenized(_directory(checkpoint), calibration.text, calibration.tokens)
        config.calibration = calibration.record(data)
    fingerprint = _fingerprint(checkpoint, config)
    _prepare(out, fingerprint, planned.nbytes * (1 if data is None else 2))
    total = sum(t.bytes for t in checkpoint.tensors.values())
    store, spending = None, None
    if calibration is not None and data is not None:
        store = Store(out / _CALIBRATION, fingerprint)
        work = CheckpointCalibration(_directory(checkpoint), _architecture(checkpoint), data, store, show_progress)
        if calibration.has_target:
            spending = work.plan(planned.modules, calibration, config)
            planned, quantizer = plan(checkpoint, config)
        work.encode(planned.modules)
    with progress(f"encoding to {config.codec}", total, show_progress) as advance:
        for file, name in planned.names.items():
            if (out / name).exists():
                advance(sum(t.bytes for k, t in checkpoint.tensors.items() if checkpoint.where(k) == file))
            else:
                _convert_shard(checkpoint, planned, store, file, out / name, advance)
    _finish(checkpoint, planned, config, out)
    return {
        "layers": len(planned.layers),
        "bytes_before": total,
        "bytes_after": planned.nbytes,
        "files": [planned.names[f] for f in planned.names],
        "skipped": [vars(s) for s in quantizer.report.skipped],
    } | ({} if spending is None else {"plan": spending})


def _convert_shard(
    checkpoint: Checkpoint,
    planned: Plan,
    store: Store | None,
    file: Path,
    target: Path,
    advance: Callable[[int], None],
) -> None:
    with atomically(target) as temporary:
        writer = _ShardWriter(temporary, planned.shards[file], {"format": "pt"})
        try:
            for key, stored in checkpoint.tensors.items():
                if checkpoint.where(key) == file:
                    _convert_tensor(checkpoint, planned, store, key, writer)
                    advance(stored.bytes)
            writer.close()
        finally:
            with suppress(OSError):  # of a full disk, once more
                writer.file.close()


def _convert_tensor(checkpoint: Checkpoint, planned: Plan, store: Store | None, key: str, writer: _ShardWriter) -> None:
    layer = planned.layers.get(key)
    if layer is None:
        writer.write(key, checkpoint.load(key))
        return
    module, codec, group_size, transposed = layer
    chosen = store.get(module) if store is not None else None
    if chosen is not None:
        fields = chosen.encoded.fields
    else:
        tensor = checkpoint.load(key)
        try:
            fields = encode(tensor.T if transposed else tensor, codec, group_size=group_size).fields
        except ValueError as e:
            raise ValueError(f"{checkpoint.where(key)}: {key}: {e}") from None
    for n, array in fields.items():
        writer.write(key.removesuffix("weight") + n, torch.from_numpy(array))


def _finish(checkpoint: Checkpoint, planned: Plan, config: QinsConfig, out: Path) -> None:
    """Write the index and the configuration; from then on the directory is a model."""
    source = _directory(checkpoint)
    for path in sorted(source.iterdir()):
        if path.is_file() and not path.name.endswith(_WEIGHTS) and path.name != "config.json":
            shutil.copyfile(path, out / path.name)
    if len(planned.names) > 1:
        weight_map = {t.name: planned.names[f] for f, targets in planned.shards.items() for t in targets}
        write_json(out / "model.safetensors.index.json",
                    {"metadata": {"total_size": planned.nbytes}, "weight_map": weight_map})  # fmt: skip
    config.modules = {module: [codec, group] for module, codec, group, _ in planned.layers.values()}
    write_json(out / "config.json", checkpoint.config | {"quantization_config": config.to_dict()})
    if (out / _CALIBRATION).exists():
        shutil.rmtree(out / _CALIBRATION)
    (out / _PROGRESS).unlink()
