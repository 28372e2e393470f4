"""Tensors of a converted checkpoint as NumPy arrays, mapped into memory."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np

from ..codec import EncodedArray, check_codec, check_group_size, field_names
from ..system import arena_for, page_out, read_json, rounded

Array = np.ndarray[Any, Any]

_DTYPES = {
    "F32": np.float32, "F16": np.float16, "BF16": np.uint16, "F64": np.float64,
    "U8": np.uint8, "I8": np.int8, "I16": np.int16, "I32": np.int32, "I64": np.int64, "BOOL": np.bool_,
}  # fmt: skip
_MOST_HEADER = 100 << 20  # the format's own limit


class Tensors:
    """The tensors of a directory of safetensors files.

    Attributes:
        path: the directory.
        config: its config.json.

    """

    def __init__(self, path: Path) -> None:
        """Read the headers.

        Raises:
            FileNotFoundError: there is no such checkpoint.
            ValueError: a file is damaged, or qins did not write the checkpoint.

        """
        self.path = path
        if not (path / "config.json").is_file():
            raise FileNotFoundError(f"{path}: expected the directory of a converted model, found no config.json in it")
        self.config = config = read_json(path / "config.json")
        about = config.get("quantization_config")
        if (
            not isinstance(about, dict)
            or about.get("quant_method") != "qins"
            or not isinstance(about.get("modules"), dict)
        ):
            raise ValueError(
                f"{path}: expected a checkpoint that `qins quantize` wrote, config.json has no codes of qins"
            )
        self._modules: dict[str, Any] = about["modules"]
        self._arrays: dict[str, tuple[Array, bool]] = {}
        for file in _files(path):
            self._read_header(file)

    def _read_header(self, file: Path) -> None:
        size = file.stat().st_size
        with file.open("rb") as f:
            start = f.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
            if length > min(size - 8, _MOST_HEADER):
                raise ValueError(f"{file}: expected a safetensors file, got {size} bytes with a header of {length}")
            try:
                header = json.loads(f.read(length))
            except (ValueError, RecursionError) as e:
                raise ValueError(f"{file}: expected a safetensors header of JSON: {e}") from None
        memory = np.memmap(file, np.uint8, "r") if size else np.empty(0, np.uint8)
        if not isinstance(header, dict):
            raise ValueError(f"{file}: expected a safetensors header that is an object")
        for name, about in header.items():
            if name == "__metadata__":
                continue
            try:
                dtype, shape = np.dtype(_DTYPES[about["dtype"]]), tuple(int(n) for n in about["shape"])
                begin, end = (int(n) for n in about["data_offsets"])
            except (KeyError, TypeError, ValueError, OverflowError) as e:
                raise ValueError(f"{file}: {name}: expected dtype, shape and offsets, got {about!r}") from e
            count = int(np.prod(shape, dtype=object)) if shape else 1
            if (
                not 0 <= begin <= end <= size - 8 - length
                or min(shape, default=0) < 0
                or end - begin != count * dtype.itemsize
            ):
                raise ValueError(f"{file}: {name}: offsets {begin} to {end} do not fit shape {shape} and the file")
            if name in self._arrays:
                raise ValueError(f"{file}: {name}: is also in another file")
            data = memory[8 + length + begin : 8 + length + end]
            try:
                array = data.view(dtype).reshape(shape)
            except (ValueError, OverflowError) as e:  # NumPy has at most 64 dimensions, and sizes of 63 bits
                raise ValueError(f"{file}: {name}: shape {shape} does not fit: {e}") from None
            self._arrays[name] = array, about["dtype"] == "BF16"

    def place_codes(self) -> None:
        """Copy all codes to huge pages where that is faster, see `qins.system.huge_pages`."""
        names = [n for n in self._arrays if n.rpartition(".")[0] in self._modules]
        arena = arena_for(sum(rounded(self._arrays[n][0].nbytes) for n in names))
        if arena is None:
            return
        for name in names:
            array, is_bfloat16 = self._arrays[name]
            self._arrays[name] = arena.copy(array), is_bfloat16
            page_out(array)

    def __contains__(self, name: str) -> bool:
        """Return whether there is a tensor of this name."""
        return name in self._arrays

    def floats(self, name: str, shape: tuple[int, ...] | None = None) -> Array:
        """Return a tensor as float32, a copy unless it is stored so.

        Raises:
            ValueError: it is missing, or has another shape than expected.

        """
        if name not in self._arrays:
            raise ValueError(f"{self.path}: expected a tensor {name}, found none")
        array, is_bfloat16 = self._arrays[name]
        if shape is not None and array.shape != shape:
            raise ValueError(f"{self.path}: {name}: expected shape {shape}, got {array.shape}")
        if is_bfloat16:
            return (array.astype(np.uint32) << 16).view(np.float32)
        return np.ascontiguousarray(array, np.float32)

    def codes(self, module: str, shape: tuple[int, int]) -> EncodedArray | None:
        """Return a module's codes, shared ones included, after checking every field; None if it has none.

        Raises:
            ValueError, TypeError: they are damaged or of another shape.

        """
        entry = self._modules.get(module)
        if entry is None:
            return None
        if not isinstance(entry, list) or len(entry) < 2 or not isinstance(entry[0], str):
            raise ValueError(f"{self.path}: modules: {module}: expected a codec and a group size, got {entry!r}")
        codec, group_size = entry[0], entry[1]
        owner = entry[2] if len(entry) > 2 else module
        try:
            check_group_size(check_codec(codec), group_size)
        except ValueError as e:
            raise ValueError(f"{self.path}: modules: {module}: {e}") from None
        fields = {}
        for name in field_names(codec, group_size):
            key = f"{owner}.{name}"
            if key not in self._arrays:
                raise ValueError(f"{self.path}: expected a tensor {key}, found none")
            fields[name] = self._arrays[key][0]
        try:
            encoded = EncodedArray.from_fields(codec, fields, group_size)
        except (TypeError, ValueError) as e:
            raise type(e)(f"{self.path}: {owner}: {e}") from None
        if encoded.shape != shape:
            raise ValueError(f"{self.path}: {owner}: expected codes of shape {shape}, got {encoded.shape}")
        return encoded


def _files(path: Path) -> list[Path]:
    """Return the files of a checkpoint: those of the index if there is one, else the one file.

    Raises:
        FileNotFoundError: there is none, or one of the index is missing.
        ValueError: the index is damaged, or there are several files and no index.

    """
    index = path / "model.safetensors.index.json"
    if index.is_file():
        names = read_json(index).get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(n, str) and Path(n).name == n for n in names.values()):
            raise ValueError(f"{index}: expected a weight_map of names to files beside it")
        files = [path / n for n in sorted(set(names.values()))]
    else:
        files = sorted(path.glob("*.safetensors"))
        files = [f for f in files if f.name == "model.safetensors"] or files
    if len(files) > 1 and not index.is_file():
        raise ValueError(f"{path}: expected one model, got {len(files)} files and no index")
    missing = [f for f in files if not f.is_file()] if files else [path / "model.safetensors"]
    if missing:
        raise FileNotFoundError(f"{missing[0]}: expected safetensors files, found none")
    return files
