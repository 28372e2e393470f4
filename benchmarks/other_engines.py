"""llama.cpp and OpenVINO GenAI for generate.py: GGUF files of random weights in a model's shape, and their speed."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from speeds import Memory, speeds_of

import qins

CONTESTANTS = ["llama.cpp Q8_0", "llama.cpp Q4_0", "llama.cpp Q4_K_M", "OpenVINO int8"]


@dataclass
class Shape:
    """Sizes of a model, and the name of its architecture in GGUF files."""

    vocabulary: int
    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    head: int
    architecture: str = "llama"


SHAPES = {
    "smollm2": Shape(49152, 576, 1536, 30, 9, 3, 64),
    "phi35": Shape(32064, 3072, 8192, 32, 32, 32, 96),
    "gemma3": Shape(262144, 640, 2048, 18, 4, 1, 256, "gemma3"),
}


def _bytes_as_characters() -> list[str]:
    """Return the characters that stand for the 256 bytes in byte-level vocabularies."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = iter(range(256, 512))
    return [chr(b) if b in shown else chr(next(hidden)) for b in range(256)]


class _File:
    """A GGUF file that is being written; matrices with equal shapes are the same random one."""

    def __init__(self, path: Path, shape: Shape):
        import gguf
        import numpy as np

        self.gguf, self.np, self.shape = gguf, np, shape
        self.writer = gguf.GGUFWriter(path, shape.architecture, use_temp_file=False)
        self.made: dict[tuple[str, int, int], Any] = {}

    def describe(self) -> None:
        w, s = self.writer, self.shape
        w.add_context_length(8192)
        w.add_embedding_length(s.hidden)
        w.add_block_count(s.layers)
        w.add_feed_forward_length(s.inner)
        w.add_head_count(s.heads)
        w.add_head_count_kv(s.kv_heads)
        w.add_key_length(s.head)
        w.add_value_length(s.head)
        w.add_layer_norm_rms_eps(1e-6)
        w.add_rope_dimension_count(s.head)
        w.add_rope_freq_base(10000.0)
        w.add_vocab_size(s.vocabulary)
        w.add_file_type(self.gguf.LlamaFileType.MOSTLY_Q8_0)
        if s.architecture == "gemma3":
            w.add_sliding_window(512)
        w.add_tokenizer_model("gpt2")
        w.add_tokenizer_pre("smollm")
        tokens = ["<s>", "</s>", *_bytes_as_characters()]
        w.add_token_list(tokens + [f"w{i}" for i in range(s.vocabulary - len(tokens))])
        w.add_token_types([self.gguf.TokenType.CONTROL] * 2 + [self.gguf.TokenType.NORMAL] * (s.vocabulary - 2))
        w.add_token_merges(["a b"])
        w.add_bos_token_id(0)
        w.add_eos_token_id(1)

    def add_ones(self, tensor: str, size: int) -> None:
        self.writer.add_tensor(f"{tensor}.weight", self.np.ones(size, self.np.float32))

    def add(self, tensor: str, rows: int, cols: int, kind: str) -> None:
        if (kind, rows, cols) not in self.made:
            weight = self.np.random.default_rng(0).standard_normal((rows, cols), self.np.float32) * self.np.float32(
                0.02
            )
            self.made[kind, rows, cols] = self._quantized(weight, kind)
        self.writer.add_tensor(
            f"{tensor}.weight", self.made[kind, rows, cols], raw_dtype=self.gguf.GGMLQuantizationType[kind]
        )

    def _quantized(self, weight: Any, kind: str) -> Any:
        type_ = self.gguf.GGMLQuantizationType[kind]
        if kind in ("Q8_0", "Q4_0"):
            return self.gguf.quants.quantize(weight, type_)
        from ggml_peers import quantized_by_ggml

        return quantized_by_ggml(kind, weight)

    def close(self) -> None:
        self.writer.write_header_to_file()
        self.writer.write_kv_data_to_file()
        self.writer.write_tensors_to_file()
        self.writer.close()


def write_gguf(path: Path, shape: Shape, mixture: str) -> None:
    """Write a GGUF file of random weights with a made-up vocabulary.

    Args:
        path: the file.
        shape: the sizes.
        mixture: a format, or Q4_K_M: Q4_K with Q6_K for the head and, in half of the layers, for the values and the
            MLP's second matrix, as llama.cpp chooses them.

    """
    if mixture == "Q4_K_M" and (shape.hidden % 256 or shape.inner % 256):
        raise ImportError("Q4_K_M: rows must be multiples of 256")
    usual, large = ("Q4_K", "Q6_K") if mixture == "Q4_K_M" else (mixture, mixture)
    file = _File(path, shape)
    file.describe()
    norms = ["attn_norm", "ffn_norm"]
    if shape.architecture == "gemma3":  # whose head is the embeddings
        norms += ["post_attention_norm", "post_ffw_norm"]
        file.add("token_embd", shape.vocabulary, shape.hidden, large)
    else:
        file.add("token_embd", shape.vocabulary, shape.hidden, usual)
        file.add("output", shape.vocabulary, shape.hidden, large)
    file.add_ones("output_norm", shape.hidden)
    queries, keys = shape.heads * shape.head, shape.kv_heads * shape.head
    for i in range(shape.layers):
        second = large if i % 2 == 0 else usual
        for tensor, rows, cols, kind in (
            ("attn_q", queries, shape.hidden, usual), ("attn_k", keys, shape.hidden, usual),
            ("attn_v", keys, shape.hidden, second), ("attn_output", shape.hidden, queries, usual),
            ("ffn_gate", shape.inner, shape.hidden, usual), ("ffn_up", shape.inner, shape.hidden, usual),
            ("ffn_down", shape.hidden, shape.inner, second),
        ):  # fmt: skip
            file.add(f"blk.{i}.{tensor}", rows, cols, kind)
        for norm in norms:
            file.add_ones(f"blk.{i}.{norm}", shape.hidden)
        if shape.architecture == "gemma3":
            file.add_ones(f"blk.{i}.attn_q_norm", shape.head)
            file.add_ones(f"blk.{i}.attn_k_norm", shape.head)
    file.close()


@contextlib.contextmanager
def _gguf(name: str, layers: int, mixture: str) -> Iterator[tuple[Path, int]]:
    if name not in SHAPES:
        raise ImportError(f"shapes for {', '.join(SHAPES)} only")
    shape = replace(SHAPES[name], layers=layers) if name == "phi35" else SHAPES[name]
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "model.gguf"
        write_gguf(path, shape, mixture)
        yield path, path.stat().st_size


def run(contestant: str, arguments: Any) -> dict[str, float]:
    """Return a contestant's figures.

    Raises:
        ImportError: a package is missing, or cannot run this model.

    """
    engine, mixture = contestant.rsplit(" ", 1)
    with _gguf(arguments.model, arguments.layers, "Q8_0" if mixture == "int8" else mixture) as (path, size):
        memory = Memory()
        memory.watch()
        evaluate = (_llama if engine == "llama.cpp" else _openvino)(path, arguments)
        return speeds_of(evaluate, arguments) | memory.figures(size / 1e6)


def _llama(path: Path, arguments: Any) -> Callable[[int, int], None]:
    from llama_cpp import Llama

    threads = qins.get_num_threads()
    model = Llama(
        str(path), n_ctx=arguments.prompt + 64, n_batch=512, n_threads=threads, n_threads_batch=threads, verbose=False
    )

    def evaluate(prompt: int, new: int) -> None:
        model.reset()
        model.eval(list(range(3, 3 + prompt)))
        for i in range(new):
            model.eval([300 + i])

    return evaluate


def _openvino(path: Path, arguments: Any) -> Callable[[int, int], None]:
    import numpy as np
    import openvino
    import openvino_genai

    try:
        pipeline = openvino_genai.LLMPipeline(str(path), "CPU", INFERENCE_NUM_THREADS=qins.get_num_threads())
    except Exception as e:  # its reader of GGUF files knows few architectures
        raise ImportError(f"OpenVINO GenAI does not read this model: {str(e).splitlines()[-1]}") from None

    generator = np.random.default_rng(0)

    def evaluate(prompt: int, new: int) -> None:
        options = openvino_genai.GenerationConfig()
        options.max_new_tokens = options.min_new_tokens = new + 1
        options.ignore_eos = True
        ids = generator.integers(300, 30000, (1, prompt))  # others each time: it keeps the states of prompts
        pipeline.generate(openvino.Tensor(ids), options)

    return evaluate
