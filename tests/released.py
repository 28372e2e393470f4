"""Tiny models in the 8- and 4-bit formats of released models, and their floats, computed independently of qins."""

from __future__ import annotations

import json

import numpy as np
import torch
from safetensors.torch import load_file, save_file

FP4 = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]


def _spread(per_block, block, shape):
    """Repeat one number per block to one number per weight."""
    h, w = block
    return np.repeat(np.repeat(per_block, h, 0), w, 1)[: shape[0], : shape[1]]


def _scales(rng, block, shape, dtype):
    grid = -(-shape[0] // block[0]), -(-shape[1] // block[1])
    return torch.from_numpy(rng.uniform(1e-4, 1e-2, grid)).to(dtype)


def _floats(numbers, scale, block):
    exact = numbers.double().numpy() * _spread(scale.double().numpy(), block, numbers.shape)
    return torch.from_numpy(exact.astype(np.float32))


def fp8(name, w, rng, block):
    """quant_method fp8: one scale per block, or one per tensor."""
    codes = (w * 1000).clamp(-448, 448).to(torch.float8_e4m3fn)
    scale = _scales(rng, block or w.shape, w.shape, torch.float32)
    stored = {name: codes, f"{name}_scale_inv": scale if block else scale.reshape(())}
    return stored, _floats(codes.float(), scale, block or tuple(w.shape))


def compressed_fp8(name, w, rng, block, dtype=torch.bfloat16):
    codes = (w * 1000).clamp(-448, 448).to(torch.float8_e4m3fn)
    scale = _scales(rng, block, w.shape, dtype)
    scale_as = scale.reshape(1) if scale.numel() == 1 else scale
    return {name: codes, f"{name}_scale": scale_as}, _floats(codes.float(), scale, block)


def integers(name, w, rng, bits, block, symmetric, dtype=torch.bfloat16):
    """Integers, their zero points, the dequantized floats, and the scales."""
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    numbers = torch.from_numpy(rng.integers(low, high + 1, tuple(w.shape))).to(torch.int8)
    scale = _scales(rng, block, w.shape, dtype)
    zeros = torch.from_numpy(rng.integers(low, high + 1, tuple(scale.shape))).to(torch.int8)
    shift = 0 if symmetric else torch.from_numpy(_spread(zeros.numpy(), block, w.shape)).int()
    return numbers, None if symmetric else zeros, _floats(numbers.int() - shift, scale, block), scale


def pack(numbers, bits, axis):
    """Integers in 32-bit words, the lowest bits first, one word after the other."""
    unsigned = np.moveaxis(numbers.numpy().astype(np.int64) + (1 << (bits - 1)), axis, -1)
    words = np.zeros((len(unsigned), -(-unsigned.shape[1] * bits // 32)), np.uint32)
    for i in range(unsigned.shape[1]):
        words[:, i * bits // 32] |= (unsigned[:, i] << (i * bits % 32)).astype(np.uint32)
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(words.view(np.int32), -1, axis)))


def int8(name, w, rng, block, symmetric=True):
    numbers, zeros, floats, scale = integers(name, w, rng, 8, block, symmetric)
    return {name: numbers, f"{name}_scale": scale} | ({} if symmetric else {f"{name}_zero_point": zeros}), floats


def packed(name, w, rng, bits, block, symmetric=True):
    numbers, zeros, floats, scale = integers(name, w, rng, bits, block, symmetric)
    stored = {f"{name}_packed": pack(numbers, bits, 1), f"{name}_scale": scale,
              f"{name}_shape": torch.tensor(w.shape)}  # fmt: skip
    return stored | ({} if symmetric else {f"{name}_zero_point": pack(zeros, bits, 0)}), floats


def mxfp4(name, w, rng):
    """GPT-OSS' stacks: (matrices, rows, blocks, 16) bytes of two numbers each, and one exponent per block."""
    matrices, columns, rows = w.shape
    blocks = rng.integers(0, 256, (matrices, rows, columns // 32, 16)).astype(np.uint8)
    scales = rng.integers(112, 122, blocks.shape[:3]).astype(np.uint8)
    numbers = np.array(FP4)[np.stack([blocks & 15, blocks >> 4], -1).reshape(*blocks.shape[:3], 32)]
    exact = (numbers * 2.0 ** (scales.astype(int) - 127)[..., None]).reshape(matrices, rows, columns)
    floats = torch.from_numpy(exact.swapaxes(1, 2).astype(np.float32)).contiguous()
    return {f"{name}_blocks": torch.from_numpy(blocks), f"{name}_scales": torch.from_numpy(scales)}, floats


def weights(args, **more):
    """Return a quantization_config of compressed-tensors with one group."""
    group = {"targets": ["Linear"], "weights": {"type": "int", "num_bits": 8, "symmetric": True} | args}
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}, "ignore": ["lm_head"],
            "quantization_status": "compressed"} | more  # fmt: skip


def _compressed(args, store, fmt):
    return weights(args, format=fmt), store


FP8_BLOCK = (24, 40)
FORMATS = {
    "fp8 block": ({"quant_method": "fp8", "weight_block_size": list(FP8_BLOCK)},
                  lambda *a: fp8(*a, FP8_BLOCK)),
    "fp8 even blocks": ({"quant_method": "fp8", "weight_block_size": [16, 32]}, lambda *a: fp8(*a, (16, 32))),
    "fp8 tensor": ({"quant_method": "fp8", "weight_block_size": None}, lambda *a: fp8(*a, None)),
    "ct fp8 tensor": _compressed({"type": "float", "strategy": "tensor"},
                                 lambda n, w, r: compressed_fp8(n, w, r, tuple(w.shape)), "float-quantized"),
    "ct fp8 row": _compressed({"type": "float", "strategy": "channel"},
                              lambda n, w, r: compressed_fp8(n, w, r, (1, w.shape[1])), "float-quantized"),
    "ct fp8 block": _compressed({"type": "float", "strategy": "block", "block_structure": [24, 40]},
                                lambda n, w, r: compressed_fp8(n, w, r, (24, 40), torch.float32), "float-quantized"),
    "ct int8 row": _compressed({"strategy": "channel"}, lambda n, w, r: int8(n, w, r, (1, w.shape[1])),
                               "int-quantized"),
    "ct int8 asymmetric": _compressed({"strategy": "channel", "symmetric": False},
                                      lambda n, w, r: int8(n, w, r, (1, w.shape[1]), False), "int-quantized"),
    "ct int4 groups": _compressed({"num_bits": 4, "strategy": "group", "group_size": 16},
                                  lambda n, w, r: packed(n, w, r, 4, (1, 16)), "pack-quantized"),
    "ct int4 asymmetric": _compressed({"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": False},
                                      lambda n, w, r: packed(n, w, r, 4, (1, 32), False), "pack-quantized"),
    "ct int4 row": _compressed({"num_bits": 4, "group_size": -1},
                               lambda n, w, r: packed(n, w, r, 4, (1, w.shape[1])), "pack-quantized"),
    "ct int8 packed": _compressed({"strategy": "group", "group_size": 32, "symmetric": False},
                                  lambda n, w, r: packed(n, w, r, 8, (1, 32), False), "pack-quantized"),
    "mxfp4": ({"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}, mxfp4),
}  # fmt: skip
NAMES = {
    "fp8 block": "block-scaled FP8", "fp8 even blocks": "block-scaled FP8", "fp8 tensor": "FP8",
    "ct fp8 tensor": "compressed-tensors FP8 (a scale a tensor)",
    "ct fp8 row": "compressed-tensors FP8 (a scale a row)", "ct fp8 block": "compressed-tensors FP8 (scales of blocks)",
    "ct int8 row": "compressed-tensors int8 (a scale a row)",
    "ct int8 asymmetric": "compressed-tensors int8 (a scale a row, with zero points)",
    "ct int4 groups": "compressed-tensors int4 (groups of 16)",
    "ct int4 asymmetric": "compressed-tensors int4 (groups of 32, with zero points)",
    "ct int4 row": "compressed-tensors int4 (a scale a row)",
    "ct int8 packed": "compressed-tensors int8 (groups of 32, with zero points)", "mxfp4": "MXFP4",
}  # fmt: skip


def released(directory, model, name, change=lambda state, about: None):
    """Save a model with its linear layers, or its experts, in a released format, and the same values as floats.

    Args:
        directory: gets the directories "released" and "float".
        model: a model with random weights.
        name: a key of FORMATS.
        change: changes the tensors and the quantization_config in place before they are written.

    """
    about, store = FORMATS[name]
    about = json.loads(json.dumps(about))
    model.save_pretrained(directory / "float")
    floats = load_file(directory / "float" / "model.safetensors")
    state, rng = dict(floats), np.random.default_rng(0)
    stacks = name == "mxfp4"
    for key in [
        k for k in floats if (k.endswith(("gate_up_proj", "down_proj")) if stacks else k.endswith("_proj.weight"))
    ]:
        stored, floats[key] = store(key, state.pop(key).float(), rng)
        state |= stored
    change(state, about)
    (directory / "released").mkdir()
    save_file(state, directory / "released" / "model.safetensors", {"format": "pt"})
    save_file(floats, directory / "float" / "model.safetensors", {"format": "pt"})
    config = json.loads((directory / "float" / "config.json").read_text())
    (directory / "released" / "config.json").write_text(json.dumps(config | {"quantization_config": about}))
    return directory / "released", directory / "float"
