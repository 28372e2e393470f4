"""Tokens per second end to end: transformers' `generate` with QINSLinear, `qins.Decoder`, llama.cpp and OpenVINO GenAI.

    python benchmarks/generate.py [--model smollm2 | phi35 | gemma3 | DIRECTORY | HUB NAME] [--json FILE] [--plot PNG]

`smollm2` is the demo's model. `phi35` has the shape of Phi-3.5-mini, 3.8 billion random weights, `gemma3` that of
Gemma 3 270M; speed does not depend on their values. Heads and embeddings are quantized, too. Each contestant runs in
its own process, because most machines cannot hold two such models. They take turns `--rounds` times, and the best
counts. llama.cpp and OpenVINO run if llama-cpp-python, or openvino-genai, and gguf are installed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import other_engines
import torch
from speeds import Memory, speeds_of
from torch import nn

import qins
from qins.cli.bench import machine

# dtype of the activations and of the unquantized modules; codec, or None for float weights
TORCH_CONTESTANTS: dict[str, tuple[torch.dtype, str | None]] = {
    f"{codec or ''} {name}".strip(): (dtype, codec)
    for codec in (None, "log8", "log6", "log5", "log4", "log9", "golden")
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
}
NUMPY_CONTESTANTS = {f"{codec} NumPy": codec for codec in ("log8", "log6", "log5", "log4")}
CONTESTANTS = [*TORCH_CONTESTANTS, *NUMPY_CONTESTANTS, *other_engines.CONTESTANTS]
DEFAULT = ["fp32", "bf16", "log8 fp32", "log8 bf16", "log8 NumPy", "llama.cpp Q8_0", "OpenVINO int8"]
PHI35 = {
    "vocab_size": 32064, "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 4096, "pad_token_id": 32000,
}  # fmt: skip
GEMMA3 = {
    "vocab_size": 262144, "hidden_size": 640, "intermediate_size": 2048, "num_hidden_layers": 18,
    "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256, "query_pre_attn_scalar": 256,
    "sliding_window": 512,
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


def random_gemma3() -> nn.Module:
    """Build a model of the shape of Gemma 3 270M."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    kinds = ["full_attention" if i % 6 == 5 else "sliding_attention" for i in range(18)]
    return Gemma3ForCausalLM(Gemma3TextConfig(**GEMMA3, layer_types=kinds)).eval()


def torch_model(name: str, dtype: torch.dtype, codec: str | None, layers: int) -> nn.Module:
    from qins.hf import find_model, load_causal_lm

    if name == "phi35":
        model: Any = random_phi35(dtype, codec, layers)
    elif name == "gemma3":
        model = random_gemma3()
    else:
        model, _ = load_causal_lm(find_model(None if name == "smollm2" else name))
    if codec:
        qins.convert(model, codec, exclude=(), embeddings=True, show_progress=False)
    return model.to(dtype)  # type: ignore[no-any-return]


def run_torch(contestant: str, arguments: argparse.Namespace) -> dict[str, float]:
    import transformers.generation.utils  # noqa: F401 - imported first, so that its memory does not count

    dtype, codec = TORCH_CONTESTANTS[contestant]
    memory = Memory()
    model: Any = torch_model(arguments.model, dtype, codec, arguments.layers)
    generator = torch.Generator().manual_seed(0)
    options = {"do_sample": False, "use_cache": True, "eos_token_id": None, "pad_token_id": 0}

    def evaluate(prompt: int, new: int) -> object:
        ids = torch.randint(3, 30000, (1, prompt), generator=generator)
        new += 1  # the first comes from the prompt
        mask = torch.ones_like(ids)
        return model.generate(ids, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, **options)

    memory.watch()
    with torch.inference_mode():
        speeds = speeds_of(evaluate, arguments)
    tensors = {t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers())}
    return speeds | memory.figures(sum(tensors.values()) / 1e6)


def run_numpy(contestant: str, arguments: argparse.Namespace) -> dict[str, float]:
    """Measure `qins.Decoder`. In a process without torch memory beside weights would be smaller, so it is left out."""
    if arguments.model in ("phi35", "gemma3"):
        raise ImportError("needs a checkpoint on disk")
    from qins.checkpoint import quantize_checkpoint
    from qins.hf import find_model

    source = find_model(None if arguments.model == "smollm2" else arguments.model)
    with tempfile.TemporaryDirectory() as directory:
        codec = NUMPY_CONTESTANTS[contestant]
        quantize_checkpoint(source, directory, qins.QinsConfig(codec, lm_head=True, embeddings=True))
        memory = Memory()
        memory.watch()
        decoder = qins.Decoder.open(directory)

        def evaluate(prompt: int, new: int) -> None:
            decoder.reset()
            decoder.logits(list(range(3, 3 + prompt)))
            for i in range(new):
                decoder.logits([300 + i])

        speeds = speeds_of(evaluate, arguments)
        weights = sum(f.stat().st_size for f in Path(directory).glob("*.safetensors")) / 1e6
    return speeds | memory.figures(weights)


def one(contestant: str, arguments: argparse.Namespace) -> None:
    """Measure one contestant in its own process; print its figures as JSON on the last line."""
    try:
        if contestant in TORCH_CONTESTANTS:
            result = run_torch(contestant, arguments)
        elif contestant in NUMPY_CONTESTANTS:
            result = run_numpy(contestant, arguments)
        else:
            result = other_engines.run(contestant, arguments)
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
    parser.add_argument("--contestants", nargs="+", default=DEFAULT, choices=CONTESTANTS)
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
