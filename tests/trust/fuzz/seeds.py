"""Makes the corpus of the fuzz targets in C from real codes and residuals, in the layouts of the targets: seeds.py."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np

import qins
from qins import _core
from qins.codec import residual

CORPUS = Path(__file__).parent / "corpus"
CODECS = {name: i for i, name in enumerate(_core.CODECS)}
ROWS, COLS = 4, 72  # take_cols() and take_shape() in fuzz.h leave these as they are
GROUPS = {None: 0, 32: 2, 64: 3}  # take_shape()'s table
PARTS = [("log8", None), ("log8", 64), ("log6", 64), ("log5", 32), ("log4", 32), ("golden", None), ("log9", None),
         ("rational", None)]  # fmt: skip
ISA, F32, BF16 = 0, 0, 2


def shape(codec: str, group: int | None) -> bytes:
    return struct.pack("<BBBH", CODECS[codec], GROUPS[group], ROWS, COLS)


def scalars(e: qins.EncodedArray) -> bytes:
    return struct.pack("<3f", *(*e.scalars, 0.0, 0.0)[:3])


def fields(e: qins.EncodedArray) -> bytes:
    return b"\0" + b"".join(a.tobytes() for a in e.arrays)  # a zero: aligned


def made(codec: str, group: int | None) -> qins.EncodedArray:
    weights = np.random.default_rng(3).standard_normal((ROWS, COLS)).astype(np.float32)
    return qins.encode(weights, codec, group_size=group)


def filled(data: bytes, size: int) -> tuple[np.ndarray, bytes]:
    """As filled() in fuzz.h: the data's bytes, then pseudo-random ones; and the data that is left."""
    out, seed = bytearray(data[:size]), 2166136261
    for b in out:
        seed = (seed ^ b) * 16777619 & 0xFFFFFFFF
    while len(out) < size:
        seed = (seed * 1664525 + 1013904223) & 0xFFFFFFFF
        out.append(seed >> 24)
    return np.frombuffer(bytes(out), np.uint8), data[size:]


def stream(codec: str, data: bytes, flags: int) -> bytes:
    """An input of exact.c whose stream is one of the codes that it makes from 8 bytes."""
    left = data[1:]
    stored, left = filled(left, ROWS * COLS)
    signs, _ = filled(left, ROWS * COLS if codec == "golden" else ROWS * -(-COLS // 8))
    e = made(codec, None)
    e.fields["stored"] = stored.reshape(ROWS, COLS)
    e.fields["sign" if codec == "golden" else "sign_bits"] = signs.reshape(ROWS, -1).view(
        np.int8 if codec == "golden" else np.uint8
    )
    near = (e.decode().view(np.uint32) >> 16).astype(np.uint16) + (np.arange(ROWS * COLS).reshape(ROWS, COLS) % 5)
    import ml_dtypes

    told = residual(near.astype(np.uint16).view(ml_dtypes.bfloat16), e)
    return bytes([ISA, flags]) + shape(codec, None) + scalars(e) + data + told.tobytes()


def main() -> None:
    found: dict[str, list[bytes]] = {name: [] for name in ("decode", "products", "exact", "encode", "cache", "layer")}
    x = np.random.default_rng(4).standard_normal((5, COLS)).astype(np.float32).tobytes()
    for codec, group in PARTS:
        e = made(codec, group)
        block = struct.pack("<BHBHB", 1, 3, 3, COLS - 3, 1)
        found["decode"].append(bytes([ISA, BF16, 1]) + shape(codec, group) + b"\0" + scalars(e) + block + fields(e))
        for batch in (0, 5, 9):
            found["products"].append(
                bytes([ISA, F32, 0, 15, batch]) + shape(codec, group) + scalars(e) + fields(e) + x[: 4 * COLS]
            )
        weights = e.decode().tobytes()
        found["encode"].append(bytes([ISA, F32]) + shape(codec, group) + struct.pack("<fB", -1.0, 0) + weights)
        found["exact"].append(bytes([ISA, 0]) + shape(codec, group) + scalars(e) + fields(e) + b"\1")
        layer = bytes([ISA, 19, 1, 1, 3, 63, 95, 1]) + struct.pack("<5f", 1e-5, 1e-6, 0.25, 0.0, 1.0)
        product = shape(codec, group) + b"\0" + scalars(e) + b"\0" + e.arrays[0].tobytes()[:40]
        found["layer"].append(layer + 2 * product)
    for codec, value in (("golden", np.nan), ("log8", np.nan), ("log8", np.inf)):  # which tables once converted to int
        e, hostile = made(codec, None), struct.pack("<3f", value, value, value)
        place = struct.pack("<BHBHB", 0, 0, ROWS, COLS, 0)
        found["decode"].append(bytes([ISA, F32, 0]) + shape(codec, None) + b"\0" + hostile + place + fields(e))
        found["products"].append(bytes([ISA, F32, 0, 15, 5]) + shape(codec, None) + hostile + fields(e) + x[: 4 * COLS])
    for codec in ("golden", "log9"):
        found["exact"] += [stream(codec, bytes(range(1, 9)), flags) for flags in (8, 24)]
    for codec in range(5):
        found["cache"].append(bytes([ISA, F32, codec, 1, 4]) + struct.pack("<HBB", 64, 0, 4) + x[:400])
    for name, inputs in found.items():
        directory = CORPUS / name
        directory.mkdir(parents=True, exist_ok=True)
        for i, data in enumerate(inputs):
            (directory / f"seed-{i:02}").write_bytes(data)


if __name__ == "__main__":
    main()
