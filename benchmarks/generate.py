"""Tokens per second end to end: transformers' `generate` with QINSLinear, in fp32 and bf16, and llama.cpp's Q8_0.

    python benchmarks/generate.py [--model smollm2 | phi35 | DIRECTORY | HUB NAME] [--json FILE] [--plot PNG]

`smollm2` is the demo's model. `phi35` has the shape of Phi-3.5-mini, 3.8 billion random weights; speed does not depend
on their values. Each contestant runs in its own process, because most machines cannot hold two such models. They take
turns `--rounds` times, and the best counts. llama.cpp runs if llama-cpp-python and gguf are installed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import qins
from qins.cli.bench import machine

# dtype of the activations and of the unquantized modules; codec, or None for float weights
TORCH_CONTESTANTS = {
    "fp32": (torch.float32, None),
    "bf16": (torch.bfloat16, None),
    "log8 fp32": (torch.float32, "log8"),
    "log8 bf16": (torch.bfloat16, "log8"),
    "log9 fp32": (torch.float32, "log9"),
    "golden fp32": (torch.float32, "golden"),
}
LLAMA = "llama.cpp Q8_0"
DEFAULT = ["fp32", "bf16", "log8 fp32", "log8 bf16", LLAMA]
PHI35 = {
    "vocab_size": 32064, "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 4096, "pad_token_id": 32000,
}  # fmt: skip


def random_phi35(dtype: torch.dtype, codec: str | None, layers: int) -> nn.Module:
    """Build a model of Phi-3.5-mini's shape; layers with equal shapes get copies of one random matrix or its codes."""
    from transformers import Phi3Config, Phi3ForCausalLM

    config = Phi3Config(**PHI35 | {"num_hidden_layers": layers})
    with torch.device("meta"):
        model = Phi3ForCausalLM(config).to(dtype).eval()
    first: dict[torch.Size, nn.Module] = {}
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.Linear:
                shape = child.weight.shape
                if shape not in first:
                    made = nn.Linear(shape[1], shape[0], bias=False, dtype=dtype)
                    nn.init.normal_(made.weight, std=0.02)
                    first[shape] = qins.QINSLinear.from_linear(made, codec).to(dtype) if codec else made
                    parent._modules[name] = first[shape]
                else:
                    twin = qins.QINSLinear(shape[1], shape[0], False, codec=codec, device="meta") if codec else child
                    twin = twin.to_empty(device="cpu").to(dtype)
                    twin.load_state_dict(first[shape].state_dict())
                    parent._modules[name] = twin
    rest = [m for m in model.modules() if any(p.is_meta for p in (*m.parameters(False), *m.buffers(False)))]
    for module in rest:
        module.to_empty(device="cpu", recurse=False)
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        elif "norm" in type(module).__name__.lower():
            nn.init.ones_(module.weight)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its buffers are computed, not loaded
    return model


def torch_model(name: str, dtype: torch.dtype, codec: str | None, layers: int) -> nn.Module:
    if name == "phi35":
        return random_phi35(dtype, codec, layers)
    from qins.hf import find_model, load_causal_lm

    model, _ = load_causal_lm(find_model(None if name == "smollm2" else name))
    if codec:
        qins.convert(model, codec, exclude=(), show_progress=False)
    return model.to(dtype)


class Memory:
    """Resident memory: before the model, and its peak since `watch` (on Linux; elsewhere the peak of the process)."""

    def __init__(self) -> None:
        self.before = self._read("VmRSS")

    @staticmethod
    def _read(field: str) -> float:
        try:
            lines = Path("/proc/self/status").read_text().splitlines()
            return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1e3
        except (OSError, StopIteration):
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3

    def watch(self) -> None:
        """Reset the peak, so that it excludes making the model."""
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")

    def figures(self, weights: float) -> dict[str, float]:
        peak = self._read("VmHWM")
        return {"weights MB": weights, "peak resident MB": peak, "beside weights MB": peak - self.before - weights}


def best_of(run: Callable[[], object], repeats: int) -> float:
    best = float("inf")
    for _ in range(repeats):
        begin = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - begin)
    return best


def run_torch(contestant: str, arguments: argparse.Namespace) -> dict[str, float]:
    import transformers.generation.utils  # noqa: F401 - imported first, so that its memory does not count

    dtype, codec = TORCH_CONTESTANTS[contestant]
    memory = Memory()
    model: Any = torch_model(arguments.model, dtype, codec, arguments.layers)
    generator = torch.Generator().manual_seed(0)
    long, short = (torch.randint(3, 30000, (1, n), generator=generator) for n in (arguments.prompt, 16))
    options = {"do_sample": False, "use_cache": True, "eos_token_id": None, "pad_token_id": 0}

    def generate(prompt: torch.Tensor, new: int) -> object:
        mask = torch.ones_like(prompt)
        return model.generate(prompt, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, **options)

    memory.watch()
    with torch.inference_mode():
        generate(short, 2)
        prefill = best_of(lambda: generate(long, 1), arguments.repeats)
        first = best_of(lambda: generate(short, 1), arguments.repeats)
        all_of = best_of(lambda: generate(short, 1 + arguments.tokens), arguments.repeats)
    tensors = {t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers())}
    return {
        "decode tokens/s": arguments.tokens / (all_of - first),
        "prefill tokens/s": arguments.prompt / prefill,
        **memory.figures(sum(tensors.values()) / 1e6),
    }


def write_q8_0(path: Path, name: str, layers: int) -> None:
    """Write a GGUF file of random Q8_0 weights: a Llama with the model's sizes and a made-up vocabulary."""
    import gguf
    import numpy as np

    if name == "phi35":
        hidden, inner, heads, kv_heads, vocab = 3072, 8192, 32, 32, 32064
    elif name == "smollm2":
        hidden, inner, heads, kv_heads, vocab, layers = 576, 1536, 9, 3, 49152, 30
    else:
        raise ImportError("shapes for smollm2 and phi35 only")
    writer = gguf.GGUFWriter(path, "llama", use_temp_file=False)
    writer.add_context_length(4096)
    writer.add_embedding_length(hidden)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(hidden // heads)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([b"<unk>", b"<s>", b"</s>", *(f"w{i}".encode() for i in range(vocab - 3))])
    writer.add_token_scores([0.0] * vocab)
    kinds = [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL]
    writer.add_token_types(kinds + [gguf.TokenType.NORMAL] * (vocab - 3))
    generator = np.random.default_rng(0)
    made: dict[tuple[int, int], Any] = {}

    def add(tensor: str, rows: int, cols: int) -> None:
        if (rows, cols) not in made:
            weight = generator.standard_normal((rows, cols), np.float32) * np.float32(0.02)
            made[rows, cols] = gguf.quants.quantize(weight, gguf.GGMLQuantizationType.Q8_0)
        writer.add_tensor(tensor, made[rows, cols], raw_dtype=gguf.GGMLQuantizationType.Q8_0)

    add("token_embd.weight", vocab, hidden)
    add("output.weight", vocab, hidden)
    writer.add_tensor("output_norm.weight", np.ones(hidden, np.float32))
    for i in range(layers):
        head = hidden // heads
        for tensor, rows, cols in (
            ("attn_q", hidden, hidden), ("attn_k", kv_heads * head, hidden), ("attn_v", kv_heads * head, hidden),
            ("attn_output", hidden, hidden), ("ffn_gate", inner, hidden), ("ffn_up", inner, hidden),
            ("ffn_down", hidden, inner),
        ):  # fmt: skip
            add(f"blk.{i}.{tensor}.weight", rows, cols)
        for norm in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{i}.{norm}.weight", np.ones(hidden, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def run_llama(arguments: argparse.Namespace) -> dict[str, float]:
    from llama_cpp import Llama

    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "model.gguf"
        write_q8_0(path, arguments.model, arguments.layers)
        size = path.stat().st_size
        memory = Memory()
        memory.watch()
        threads = qins.get_num_threads()
        model = Llama(
            str(path), n_ctx=arguments.prompt + 64, n_batch=512, n_threads=threads, n_threads_batch=threads,
            verbose=False,
        )  # fmt: skip

        def evaluate(prompt: int, new: int) -> None:
            model.reset()
            model.eval(list(range(3, 3 + prompt)))
            for i in range(new):
                model.eval([100 + i])

        evaluate(16, 2)
        prefill = best_of(lambda: evaluate(arguments.prompt, 0), arguments.repeats)
        first = best_of(lambda: evaluate(16, 0), arguments.repeats)
        all_of = best_of(lambda: evaluate(16, arguments.tokens), arguments.repeats)
    return {
        "decode tokens/s": arguments.tokens / (all_of - first),
        "prefill tokens/s": arguments.prompt / prefill,
        **memory.figures(size / 1e6),
    }


def one(contestant: str, arguments: argparse.Namespace) -> None:
    """Measure one contestant in its own process; print its figures as JSON on the last line."""
    try:
        result = run_llama(arguments) if contestant == LLAMA else run_torch(contestant, arguments)
    except ImportError as e:
        result = {"not run": f"{e}"}  # type: ignore[dict-item]
    print(json.dumps(result))


def plot(results: dict[str, dict[str, float]], title: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13, 3.6), layout="constrained")
    names = list(results)
    for ax, key in zip(axes, ("decode tokens/s", "prefill tokens/s", "peak resident MB"), strict=True):
        bars = ax.barh(
            names, [results[n][key] for n in names], color=["0.6" if "log" not in n else "C0" for n in names]
        )
        ax.bar_label(bars, fmt="%.4g", padding=3)
        ax.invert_yaxis()
        ax.set_xlabel(key)
        ax.margins(x=0.2)
    figure.suptitle(title)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--contestants", nargs="+", default=DEFAULT, choices=[*TORCH_CONTESTANTS, LLAMA])
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prefill")
    parser.add_argument("--tokens", type=int, default=32, help="tokens to decode")
    parser.add_argument("--layers", type=int, default=32, help="number of layers of phi35")
    parser.add_argument("--repeats", type=int, default=3, help="repetitions in each process")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        one(arguments.one, arguments)
        return
    best: dict[str, dict[str, float]] = {}
    for _ in range(arguments.rounds):
        for contestant in arguments.contestants:
            command = [sys.executable, __file__, *sys.argv[1:], "--one", contestant]
            run = subprocess.run(command, capture_output=True, text=True)
            if run.returncode != 0:
                raise SystemExit(f"{contestant}: exit code {run.returncode}\n{run.stderr}")
            figures = json.loads(run.stdout.splitlines()[-1])
            if "not run" in figures:
                print(f"NOT RUN {contestant}: {figures['not run']}")
                continue
            before = best.setdefault(contestant, figures)
            for key, value in figures.items():
                before[key] = max(before[key], value)  # the best speed, the worst memory
    columns = ["decode tokens/s", "prefill tokens/s", "weights MB", "peak resident MB", "beside weights MB"]
    print(machine())
    print(f"{arguments.model}\n{'':16}" + "".join(f"{c:>18}" for c in columns) + f"{'decode x fp32':>16}{'x bf16':>8}")
    for name, figures in best.items():
        ratios = [figures[columns[0]] / best[f][columns[0]] if f in best else float("nan") for f in ("fp32", "bf16")]
        print(f"{name:16}" + "".join(f"{figures[c]:18.4g}" for c in columns) + f"{ratios[0]:16.2f}{ratios[1]:8.2f}")
    if arguments.json:
        text = {"machine": machine(), "model": arguments.model, "results": best}
        arguments.json.write_text(json.dumps(text, indent=2))
    if arguments.plot:
        plot(best, f"{arguments.model}: one sequence, {machine()['threads']} threads", arguments.plot)


if __name__ == "__main__":
    main()
