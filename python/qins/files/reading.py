"""Reading checkpoints that may be damaged or hostile: safetensors, torch files, GGUF headers, sharded directories.

Nothing here runs code from a file, and only requested tensors are read into memory.
"""

from __future__ import annotations

import hashlib
import pickletools
import re
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from ..system import naming_extras, naming_file, read_json, require_address_space, uninterrupted

_SAFETENSORS_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "U16": 16, "I16": 16, "F16": 16,
    "BF16": 16, "U32": 32, "I32": 32, "F32": 32, "U64": 64, "I64": 64, "F64": 64, "C64": 64,
}  # fmt: skip
_SAFETENSORS_NAMES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16", "F16": "float16",
    "BF16": "bfloat16", "U32": "uint32", "I32": "int32", "F32": "float32", "U64": "uint64", "I64": "int64",
    "F64": "float64", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
}  # fmt: skip

# The globals that the pickle of a state dict may name. torch's own list for weights_only also allows bytearray, whose
# size comes from the file.
_PICKLED = {
    "collections.OrderedDict", "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter", "torch.Size",
    "torch.serialization._get_layout", "torch._tensor._rebuild_from_type_v2", "torch.Tensor",
    "torch.storage.UntypedStorage", "torch.nn.parameter.Parameter",
}  # fmt: skip


_CHUNK = 1 << 26  # bytes of a tensor that are summed at a time, so that signals do not wait for gigabytes
_HASHED = 1 << 24  # bytes of a file that are hashed at a time
_ENTRIES = 1 << 22  # elements of arrays in a GGUF header: three times those of a vocabulary of 262,144 tokens
_COUNTS = re.compile("layer|block_count|expert|depth")  # in names of numbers of modules
_MOST_STACKED = 1 << 12
_MAPPED = 1 << 26  # bytes of tensors after which a file is mapped anew, so that those no longer used leave memory


@dataclass(frozen=True)
class StoredTensor:
    """One tensor in a file.

    Attributes:
        name: key of the tensor.
        dtype: name as in NumPy or torch, or the file's own name of a block format.
        shape: shape of the tensor.
        bytes: bytes of its elements.
        storage: identity of its memory; the same for tensors that share it.

    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int
    storage: tuple[str, int]

    @property
    def elements(self) -> int:
        """Number of elements."""
        n = 1
        for s in self.shape:
            n *= s
        return n


@dataclass
class Checkpoint:
    """The tensors of one or several files.

    Attributes:
        path: the file or directory.
        format: "safetensors", "torch" or "gguf".
        files: files and their sizes in bytes.
        tensors: tensors by name.
        config: config.json beside the files, if there is one; else empty.
        metadata: the files' own metadata.
        decodes: whether `load` dequantizes what the files hold, so that read-ahead of their bytes does not help.
        mapped: whether `load` maps files, so that read-ahead has to read them.

    """

    decodes: ClassVar[bool] = False
    mapped: ClassVar[bool] = True

    path: Path
    format: str
    files: dict[Path, int] = field(default_factory=dict)
    tensors: dict[str, StoredTensor] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    _where: dict[str, Path] = field(default_factory=dict)
    _loaded: dict[str, torch.Tensor] = field(default_factory=dict)
    _open: tuple[Path | None, Any, int] = (None, None, 0)  # a safetensors file, open, and what is left of _MAPPED

    @property
    def file_bytes(self) -> int:
        """Size of all files."""
        return sum(self.files.values())

    def where(self, name: str) -> Path:
        """Return the file that contains a tensor."""
        return self._where[name]

    def version(self, file: Path) -> str:
        """Return what changes when a file does."""
        return str(file.stat().st_mtime_ns)

    def header(self, file: Path) -> bytes:
        """Return the header of a safetensors file, its length included."""
        with naming_file(file), file.open("rb") as f:
            length = f.read(8)
            return length + f.read(int.from_bytes(length, "little"))

    def sha256(self, file: Path) -> str:
        """Return the SHA-256 of a file in hexadecimal."""
        return sha256(file)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what another process has to open itself."""
        return self.__dict__ | {"_loaded": {}, "_open": (None, None, 0)}

    def load(self, name: str) -> torch.Tensor:
        """Return one tensor, memory-mapped where possible.

        Raises:
            KeyError: there is no tensor of this name.
            ValueError: only headers of this format are read.

        """
        if name not in self.tensors:
            raise KeyError(f"{self.path}: no tensor {name!r}")
        if self.format == "gguf":
            raise ValueError(f"{self.path}: tensors of GGUF files are listed, not loaded")
        if self.format == "torch" and name not in self._loaded:  # in another process
            for _ in _read_torch(self, self._where[name]):
                pass
        if name in self._loaded:
            return self._loaded[name]
        with naming_file(self._where[name]):
            tensor: torch.Tensor = self._opened(name).get_tensor(name)
        return tensor

    def _opened(self, name: str) -> Any:
        """Return the open file of a tensor. Opening parses a header that may list thousands of tensors."""
        file, opened, left = self._open
        if file != self._where[name] or left <= 0:
            file, left = self._where[name], _MAPPED
            opened = open_safetensors(file)
        self._open = file, opened, left - self.tensors[name].bytes
        return opened

    def load_matrices(self, name: str) -> Iterator[torch.Tensor]:
        """Return an iterator over the matrices of a stack."""
        return iter(self.load(name))

    def load_each(self, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield names and tensors as `load` returns them, in the files' order; each file is opened once."""
        wanted = set(names)
        for path in self.files:
            here = [n for n in self.tensors if n in wanted and self._where[n] == path]
            if self.format != "safetensors":
                yield from ((n, self.load(n)) for n in here)
                continue
            with naming_file(path), open_safetensors(path) as f:
                for n in here:
                    yield n, f.get_tensor(n)


def open_safetensors(path: Path) -> Any:
    """Open a safetensors file."""
    from safetensors import safe_open

    return uninterrupted(lambda: safe_open(path, framework="pt"))


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    h = hashlib.sha256()
    with naming_file(path), path.open("rb") as f:
        while chunk := f.read(_HASHED):
            h.update(chunk)
    return h.hexdigest()


def checksum(tensor: torch.Tensor, before: str | None = None) -> str:
    """Return the CRC-32 of a tensor's bytes in hexadecimal; `before` is the CRC-32 of the preceding bytes."""
    flat = tensor.detach().contiguous().reshape(-1)
    data = flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")
    crc = int(before or "0", 16)
    for at in range(0, len(data), _CHUNK):
        crc = zlib.crc32(data[at : at + _CHUNK], crc)
    return f"{crc:08x}"


def verify(checkpoint: Checkpoint, checksums: Mapping[str, str]) -> tuple[int, list[str]]:
    """Compare tensors with their checksums; return the number of matches, and a sentence on each mismatch."""

    def compare(found: tuple[str, torch.Tensor]) -> str:
        name, got = found[0], checksum(found[1])
        if got == checksums[name]:
            return ""
        where = checkpoint.where(name)
        return f"{where}: {name}: expected checksum {checksums[name]}, got {got}: the file is damaged"

    with ThreadPoolExecutor() as pool:  # checksums release the GIL, and disks are faster with many requests at once
        told = list(pool.map(compare, checkpoint.load_each(checksums)))
    problems = [t for t in told if t]
    return len(told) - len(problems), problems


def fingerprint(files: Iterable[str | Path]) -> str:
    """Return a SHA-256 of the files' sizes and their first and last mebibytes (the headers), in order of file name."""
    h = hashlib.sha256()
    for path in sorted(map(Path, files), key=lambda p: p.name):
        size = path.stat().st_size
        h.update(size.to_bytes(8, "little"))
        with naming_file(path), path.open("rb") as f:
            h.update(f.read(1 << 20))
            f.seek(max(size - (1 << 20), 0))
            h.update(f.read(1 << 20))
    return h.hexdigest()


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a file, or a directory with one model's files; only headers are read.

    Raises:
        FileNotFoundError: the path does not exist, or a shard is missing.
        ValueError: a file is damaged, truncated, of an unknown format, or holds more than tensors.

    """
    path = Path(path)
    if path.is_dir():
        return _open_directory(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file or directory")
    checkpoint = Checkpoint(path, _format(path))
    _add_file(checkpoint, path)
    return checkpoint


def check_counts(source: Path, config: Mapping[str, Any], tensors: int) -> None:
    """Check that a model may have so many layers and experts, before transformers makes modules and lists for them.

    Args:
        source: the file that says so, for messages.
        config: of the model; dictionaries in it are checked, too.
        tensors: how many the checkpoint has. Every layer has one, and stacks of fewer experts are one.

    Raises:
        ValueError: a number is larger.

    """
    most = max(tensors, _MOST_STACKED)
    for key, value in config.items():
        if isinstance(value, Mapping):
            check_counts(source, value, tensors)
        elif isinstance(value, int) and value > most and _COUNTS.search(str(key)):
            raise ValueError(
                f"{source}: {key}: expected at most {most} in a checkpoint of {tensors} tensors, got {value}"
            )


def open_files(files: Iterable[str | Path], config: dict[str, Any]) -> Checkpoint:
    """Open the files of one model; only headers are read.

    Raises:
        ValueError: a file is damaged, or the formats differ.

    """
    paths = [Path(f) for f in files]
    checkpoint = Checkpoint(paths[0].parent, _format(paths[0]), config=config)
    for path in paths:
        if _format(path) != checkpoint.format:
            raise ValueError(f"{path}: expected a {checkpoint.format} file")
        _add_file(checkpoint, path)
    return checkpoint


def _format(path: Path) -> str:
    with naming_file(path), path.open("rb") as f:
        start = f.read(16)
    if start[:4] == b"GGUF":
        return "gguf"
    # checked before torch, since the eight bytes of the header's length may begin as a pickle does
    if path.suffix == ".safetensors" or (start[8:9] == b"{" and int.from_bytes(start[:8], "little") < 1 << 30):
        return "safetensors"
    if start[:4] == b"PK\x03\x04" or start[:1] == b"\x80":
        return "torch"
    raise ValueError(
        f"{path}: expected a safetensors, torch or GGUF file, got {len(start)} bytes that begin with {start[:8]!r}"
    )


def _open_directory(path: Path) -> Checkpoint:
    for index in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        if (path / index).is_file():
            return _open_sharded(path, path / index)
    for pattern in ("model.safetensors", "pytorch_model.bin", "*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf"):
        found = sorted(p for p in path.glob(pattern) if p.is_file())
        if len(found) > 1:
            names = ", ".join(p.name for p in found[:4])
            raise ValueError(f"{path}: expected one model, got {len(found)} files ({names}) and no index")
        if found:
            checkpoint = Checkpoint(path, _format(found[0]), config=_config(path))
            _add_file(checkpoint, found[0])
            return checkpoint
    raise FileNotFoundError(f"{path}: no safetensors, torch or GGUF file in it")


def _config(path: Path) -> dict[str, Any]:
    return read_json(path / "config.json") if (path / "config.json").is_file() else {}


def _open_sharded(path: Path, index: Path) -> Checkpoint:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise ValueError(f"{index}: expected a weight_map of names to files")
    checkpoint = Checkpoint(path, "safetensors" if "safetensors" in index.name else "torch", config=_config(path))
    for name in sorted(set(weight_map.values())):
        if Path(name).name != name or name in ("", ".", ".."):
            raise ValueError(f"{index}: expected names of files beside it, got {name!r}")
        if not (path / name).is_file():
            raise FileNotFoundError(f"{path / name}: named in {index.name}, but not there")
        if _format(path / name) != checkpoint.format:
            raise ValueError(f"{path / name}: expected a {checkpoint.format} file")
        _add_file(checkpoint, path / name)
    for tensor, name in weight_map.items():
        if checkpoint._where.get(tensor) != path / name:
            raise ValueError(f"{path / name}: no tensor {tensor!r}, which {index.name} says is there")
    return checkpoint


def _add_file(checkpoint: Checkpoint, path: Path) -> None:
    checkpoint.files[path] = path.stat().st_size
    read = {"safetensors": _read_safetensors, "torch": _read_torch, "gguf": _read_gguf}[checkpoint.format]
    for tensor in read(checkpoint, path):
        if tensor.name in checkpoint.tensors:
            raise ValueError(f"{path}: tensor {tensor.name!r} is also in {checkpoint._where[tensor.name].name}")
        checkpoint.tensors[tensor.name] = tensor
        checkpoint._where[tensor.name] = path


def _read_safetensors(checkpoint: Checkpoint, path: Path) -> Iterator[StoredTensor]:
    with naming_extras():
        from safetensors import SafetensorError

    require_address_space(path.stat().st_size if path.is_file() else 0, f"{path}: mapping it")
    try:
        with open_safetensors(path) as f:
            checkpoint.metadata |= f.metadata() or {}
            for i, name in enumerate(f.keys()):
                part = f.get_slice(name)
                dtype, shape = part.get_dtype(), tuple(part.get_shape())
                size = _SAFETENSORS_BITS.get(dtype, 8)
                for s in shape:
                    size *= s
                yield StoredTensor(name, _SAFETENSORS_NAMES.get(dtype, dtype), shape, size // 8, (str(path), i))
    except (SafetensorError, OSError, MemoryError) as e:
        raise ValueError(f"{path}: not a readable safetensors file (truncated or damaged): {e}") from None


def _check_pickle(path: Path, stream: Any, pickles: int) -> None:
    """Refuse a pickle that names anything but the parts of a state dict."""
    for _ in range(pickles):
        for opcode, argument, _ in pickletools.genops(stream):
            if opcode.name == "STACK_GLOBAL" or opcode.name in ("INST", "OBJ", "NEWOBJ", "NEWOBJ_EX"):
                raise ValueError(f"{path}: expected a state dict, got pickled objects ({opcode.name})")
            if opcode.name == "GLOBAL":
                name = str(argument).replace(" ", ".")
                storage = name.startswith("torch.") and name.endswith("Storage") and name.count(".") == 1
                dtype = name.startswith("torch.") and isinstance(getattr(torch, name[6:], None), torch.dtype)
                if not storage and not dtype and name not in _PICKLED:
                    raise ValueError(
                        f"{path}: expected a state dict, got a pickle that calls {name}; it was not run "
                        "(torch.save(model.state_dict()) writes what can be read here)"
                    )


def _check_torch_file(path: Path) -> bool:
    """Check what torch.load would unpickle; return True for the zip format, which can be memory-mapped."""
    if not zipfile.is_zipfile(path):
        with path.open("rb") as f:
            if f.read(2) == b"PK":
                raise ValueError("truncated: the end of the zip archive is missing")
            f.seek(0)
            _check_pickle(path, f, 4)  # magic number, protocol, system, and then the objects
        return False
    with zipfile.ZipFile(path) as z:
        entries = z.infolist()
        if any(e.compress_type != zipfile.ZIP_STORED for e in entries):
            raise ValueError("compressed entries, which torch.save does not write")
        if sum(e.file_size for e in entries) > path.stat().st_size:
            raise ValueError("entries larger than the file")
        pickles = [e for e in entries if e.filename.endswith("data.pkl")]
        if len(pickles) != 1:
            raise ValueError(f"expected one data.pkl, got {len(pickles)}")
        with z.open(pickles[0]) as f:
            _check_pickle(path, f, 1)
    return True


def _read_torch(checkpoint: Checkpoint, path: Path) -> Iterator[StoredTensor]:
    try:
        mapped = _check_torch_file(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as e:  # torch does not catch errors in parsing, which may be of any class
        reason = str(e).splitlines()[0] if str(e) else type(e).__name__
        if reason.startswith(str(path)):
            raise ValueError(reason) from None
        raise ValueError(f"{path}: not a readable torch file (truncated or damaged): {reason}") from None
    for name, tensor in _state_dict(path, loaded).items():
        if tensor.layout != torch.strided or tensor.device.type != "cpu":
            raise ValueError(f"{path}: {name}: expected a dense tensor, got {tensor.layout} on {tensor.device}")
        storage = tensor.untyped_storage()
        size = tensor.numel() * tensor.element_size()
        if size > max(storage.nbytes(), 0) or storage.nbytes() > path.stat().st_size:
            raise ValueError(f"{path}: {name}: shape {tuple(tensor.shape)} is more than the file holds")
        checkpoint._loaded[name] = tensor
        dtype = str(tensor.dtype).removeprefix("torch.")
        yield StoredTensor(name, dtype, tuple(tensor.shape), size, (str(path), storage.data_ptr()))


def _state_dict(path: Path, loaded: Any) -> dict[str, torch.Tensor]:
    """Return the tensors of a state dict, or of one nested in a dictionary with other entries."""
    for _ in range(3):
        if not isinstance(loaded, dict):
            break
        tensors = {str(k): v.detach() for k, v in loaded.items() if isinstance(v, torch.Tensor)}
        if tensors:
            return tensors
        inner = [loaded[k] for k in ("state_dict", "model_state_dict", "model") if isinstance(loaded.get(k), dict)]
        loaded = inner[0] if inner else None
    raise ValueError(f"{path}: expected a state dict (names to tensors), got none")


def _header_reader() -> Any:
    """Return the gguf package's reader, without what arrays hold, and bounded by the file.

    Itself, it makes two or three objects for each element, as many as an array claims to have: 170 MB and seconds for a
    vocabulary of 49,152 tokens.
    """
    from gguf import GGUFValueType
    from gguf.gguf_reader import GGUFReader

    class HeaderReader(GGUFReader):
        _entries = 0

        def _get(self, offset: Any, dtype: Any, count: Any = 1, *order: Any, **named: Any) -> Any:
            if int(offset) + np.dtype(dtype).itemsize * int(count) > len(self.data):
                raise ValueError(f"it ends within its entries, at {len(self.data):,} bytes")
            return super()._get(offset, dtype, count, *order, **named)

        def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
            if raw_type != GGUFValueType.ARRAY:
                return super()._get_field_parts(orig_offs, raw_type)
            kind, length = self._get(orig_offs, np.uint32), self._get(orig_offs + 4, np.uint64)
            at, elements = orig_offs + 12, int(length[0])
            self._entries += elements
            if self._entries > _ENTRIES:
                raise ValueError(f"arrays of {self._entries:,} elements in its header")
            dtype = self.gguf_scalar_to_np.get(kind[0])
            if dtype is not None:
                at += self._get(at, dtype, elements).nbytes
                return at - orig_offs, [kind, length], [], [GGUFValueType.ARRAY]
            for _ in range(elements):
                if kind[0] == GGUFValueType.STRING:
                    at += 8 + int(self._get(at, np.uint64)[0])
                else:
                    at += self._get_field_parts(at, kind[0])[0]
            return at - orig_offs, [kind, length], [], [GGUFValueType.ARRAY]

    return HeaderReader


def _read_gguf(checkpoint: Checkpoint, path: Path) -> Iterator[StoredTensor]:
    with naming_extras():
        header_reader = _header_reader()
    size = path.stat().st_size
    with naming_file(path), path.open("rb") as f:
        head = f.read(24)
    # bound the counts: every tensor and every key takes at least 12 bytes of the header
    counts = [int.from_bytes(head[i : i + 8], "little") for i in (8, 16)]
    if len(head) < 24 or sum(counts) > size // 12:
        raise ValueError(f"{path}: not a readable GGUF file: {sum(counts)} entries in {size} bytes")
    try:
        reader = header_reader(path)
        architecture = reader.get_field("general.architecture")
        if architecture is not None:
            checkpoint.metadata["architecture"] = str(architecture.contents())
    except Exception as e:  # the library does not catch errors in parsing, which may be of any class
        reason = str(e).splitlines()[0] if str(e) else type(e).__name__
        raise ValueError(f"{path}: not a readable GGUF file (truncated or damaged): {reason}") from None
    for i, t in enumerate(reader.tensors):
        shape = tuple(int(s) for s in reversed(t.shape))
        dtype = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}.get(t.tensor_type.name, t.tensor_type.name)
        yield StoredTensor(str(t.name), dtype, shape, int(t.n_bytes), (str(path), i))
