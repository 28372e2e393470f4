"""vLLM's CPU back end: tokens per second of decoding with codes, beside the same model's floats in bfloat16.

    .venv/vllm/bin/python benchmarks/serving_vllm.py [--model smollm2 | llama | DIRECTORY] [--codecs log8 log4]
        [--sequences 1 4 16] [--threads 1] [--eager] [--json FILE]

`make test-vllm` makes the environment. `llama` has the shape of Llama-3.2-1B, with random weights and `--layers`
layers. Each contestant is a process of its own; they take turns `--rounds` times, and the best counts. All sequences
start at once, with a prompt of 16 tokens each, and the figures are those of the steps after it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import qins
from qins.cli.bench import machine

LLAMA = {
    "vocab_size": 32768, "hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 64, "max_position_embeddings": 4096, "tie_word_embeddings": True,
}  # fmt: skip
PROMPT = 16


def write_models(name: str, layers: int, codecs: list[str], path: Path) -> dict[str, tuple[Path, str]]:
    """Write the floats and the codes, in all layers; return directory and dtype of each contestant."""
    import transformers

    from qins.hf import find_model

    load = transformers.AutoModelForCausalLM.from_pretrained
    if name == "llama":
        torch.manual_seed(0)
        config = transformers.LlamaConfig(**LLAMA, num_hidden_layers=layers)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    else:
        model = load(find_model() if name == "smollm2" else name, dtype=torch.bfloat16)
    model.save_pretrained(path / "floats")
    contestants = {"floats": (path / "floats", "bfloat16")}
    for codec in codecs:
        settings = qins.QinsConfig(codec=codec, lm_head=True, embeddings=True)
        load(path / "floats", dtype=torch.bfloat16, quantization_config=settings).save_pretrained(path / codec)
        contestants[codec] = (path / codec, "bfloat16")
    return contestants


CHUNK = 4  # steps between two readings of the clock; on a shared machine the best chunk is the least disturbed


def measure(arguments: argparse.Namespace) -> dict[str, float]:
    """Return the tokens per second of decoding, by number of sequences."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=str(arguments.serve), dtype=arguments.dtype, enforce_eager=arguments.eager, skip_tokenizer_init=True,
        max_model_len=512, max_num_seqs=max(arguments.sequences), enable_prefix_caching=False,
    )  # fmt: skip
    greedy = SamplingParams(temperature=0, max_tokens=arguments.tokens, detokenize=False, ignore_eos=True)
    engine, found = llm.llm_engine, {}
    for count in arguments.sequences:
        prompts = torch.randint(3, 30000, (count, PROMPT), generator=torch.Generator().manual_seed(count)).tolist()
        for i, tokens in enumerate(prompts):
            engine.add_request(str(i), {"prompt_token_ids": tokens}, greedy)
        ends = []
        while engine.has_unfinished_requests():
            if len(engine.step()) == count:  # the first steps may have some of the prompts only
                ends.append(time.perf_counter())
        best = min(b - a for a, b in zip(ends, ends[CHUNK:], strict=False))
        found[str(count)] = CHUNK * count / best
    engine.engine_core.shutdown()
    return found


def start(directory: Path, dtype: str, arguments: argparse.Namespace) -> dict[str, float]:
    """Run a contestant in processes of its own."""
    own = [f"--tokens={arguments.tokens}", f"--dtype={dtype}"]
    own += ["--eager"] if arguments.eager else []
    command = [sys.executable, __file__, *own, f"--serve={directory}", "--sequences", *map(str, arguments.sequences)]
    cores = ",".join(map(str, sorted(os.sched_getaffinity(0))[: arguments.threads]))
    # the scheduler in the process that reads the clock, so that a step ends when its tokens are there
    environment = os.environ | {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": cores, "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(run.stdout + run.stderr)
    found: dict[str, float] = json.loads(next(line for line in run.stdout.splitlines() if line.startswith('{"')))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--codecs", nargs="*", default=["log8", "log4"])
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--eager", action="store_true", help="without torch.compile, which vLLM uses by default")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--dtype", help=argparse.SUPPRESS)
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        print(json.dumps(measure(arguments)), flush=True)
        return
    best: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as work:
        contestants = write_models(arguments.model, arguments.layers, arguments.codecs, Path(work))
        for _ in range(arguments.rounds):
            for name, (directory, dtype) in contestants.items():
                found = start(directory, dtype, arguments)
                before = best.setdefault(name, found)
                before |= {count: max(before[count], speed) for count, speed in found.items()}
                print(name, found, file=sys.stderr, flush=True)
    about: dict[str, Any] = {
        "machine": machine(),
        "model": arguments.model,
        "eager": arguments.eager,
        "threads": arguments.threads,
    }
    print(f"{arguments.model}, {about['machine']['cpu']}, {qins.isa()}, threads: {arguments.threads}")
    for name, speeds in best.items():
        print(f"{name:12}", *(f"{count:>3} sequences {speed:8.1f}/s" for count, speed in speeds.items()), sep="  ")
    if arguments.json:
        arguments.json.write_text(json.dumps(about | {"tokens per second": best}, indent=1))


if __name__ == "__main__":
    main()
