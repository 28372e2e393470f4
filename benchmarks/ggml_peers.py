"""llama.cpp's formats of 4 to 6 bits, and NF4, as the floats that they dequantize to.

The gguf package quantizes to Q4_0, Q4_1, Q5_0 and Q5_1. The K-quants and IQ4_NL, which it can only read, come from the
ggml library inside llama-cpp-python, if that is installed. llama.cpp gives rows that 256 does not divide another
format; here, blocks of 256 run across rows instead.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import gguf
import numpy as np
import torch

from qins.codec import snr_db
from qins.fidelity import PEERS
from qins.fidelity.peers import Peer

_BY_GGUF = ("Q4_0", "Q4_1", "Q5_0", "Q5_1")
_BY_GGML = ("IQ4_NL", "Q4_K", "Q5_K", "Q6_K")
# Dettmers et al., "QLoRA" (2023), appendix E
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


@cache
def _ggml() -> ctypes.CDLL | None:
    found = importlib.util.find_spec("llama_cpp")
    where = [Path(p) / "lib" for p in found.submodule_search_locations or ()] if found else []
    libraries = [f for d in where for f in sorted(d.glob("*ggml-base*"))]
    if not libraries:
        return None
    library = ctypes.CDLL(str(libraries[0]))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [
        ctypes.c_int,
        *[ctypes.c_void_p] * 2,
        *[ctypes.c_int64] * 3,
        ctypes.c_void_p,
    ]
    return library


def quantized_by_ggml(name: str, weight: np.ndarray) -> np.ndarray:
    """Return a float32 matrix, whose elements are a multiple of 256, in one of the formats that only ggml quantizes to.

    Raises:
        ImportError: llama-cpp-python is not installed.

    """
    library = _ggml()
    if library is None:
        raise ImportError("llama-cpp-python, whose library quantizes to this format, is not installed")
    kind = gguf.GGMLQuantizationType[name]
    block, size = gguf.GGML_QUANT_SIZES[kind]
    out = np.zeros((*weight.shape[:-1], weight.shape[-1] // block * size), np.uint8)
    library.ggml_quantize_chunk(int(kind), weight.ctypes.data, out.ctypes.data, 0, weight.size // 256, 256, None)
    return out


def _by_gguf(name: str, w: torch.Tensor) -> torch.Tensor:
    kind = gguf.GGMLQuantizationType[name]
    padded = torch.nn.functional.pad(w, (0, -w.shape[1] % 32)).numpy()
    return torch.from_numpy(gguf.dequantize(gguf.quantize(padded, kind), kind))[:, : w.shape[1]].contiguous()


def _by_ggml(name: str, w: torch.Tensor) -> torch.Tensor:
    flat = torch.nn.functional.pad(w.reshape(-1), (0, -w.numel() % 256)).numpy()
    decoded = gguf.dequantize(quantized_by_ggml(name, flat[None]), gguf.GGMLQuantizationType[name])
    return torch.from_numpy(decoded.reshape(-1)[: w.numel()].copy()).view(w.shape)


def _nf4(w: torch.Tensor) -> torch.Tensor:
    """Normal floats with a float32 scale per 64 weights, as in bitsandbytes without double quantization."""
    blocks = torch.nn.functional.pad(w.reshape(-1), (0, -w.numel() % 64)).view(-1, 64)
    scale = blocks.abs().amax(1, keepdim=True).clamp_min(1e-30)
    levels = torch.tensor(_NF4)
    nearest = levels[torch.bucketize(blocks / scale, (levels[1:] + levels[:-1]) / 2)]
    return (nearest * scale).view(-1)[: w.numel()].view(w.shape)


def add_peers() -> list[str]:
    """Add the formats to PEERS; return the names of those for which a library is missing."""

    def add(name: str, decoded: Callable[[torch.Tensor], torch.Tensor], bits: float) -> None:
        PEERS[name] = Peer(name, decoded, lambda k: bits)

    def bits_of(name: str) -> float:
        block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
        return 8 * size / block

    for name in _BY_GGUF:
        add(name, partial(_by_gguf, name), bits_of(name))
    add("NF4", _nf4, 4.5)
    if _ggml() is None:
        return list(_BY_GGML)
    for name in _BY_GGML:
        add(name, partial(_by_ggml, name), bits_of(name))
    return []


def main() -> None:
    """Print the signal-to-noise ratio of each format on normally distributed weights."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    ours = list(PEERS)
    for name in add_peers():
        print(f"{name:8} NOT RUN (llama-cpp-python is not installed)")
    w = torch.randn(512, 1024, generator=torch.Generator().manual_seed(0)) * 0.02
    for name in (n for n in PEERS if n not in ours):
        noise = float((PEERS[name].decoded(w) - w).double().square().sum())
        print(f"{name:8} {PEERS[name].bits(1024):6.3f} bits {snr_db(float(w.double().square().sum()), noise):6.2f} dB")


if __name__ == "__main__":
    main()
