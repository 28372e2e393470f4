"""Tensor parallel on CPUs: tokens per second of ranks of one thread each, beside one rank, and the bytes that cross.

    python benchmarks/parallel.py [--model smollm2 | llama | phi35 | DIRECTORY] [--ranks 2] [--json FILE]

`llama` and `phi35` have the shapes of Llama-3.2-1B and Phi-3.5-mini, with random weights and `--layers` layers. Each
contestant is a run of torchrun; they take turns `--rounds` times, and the best counts. Each decodes the same prompt,
and the tokens must be the same. SmolLM2 has 9 heads and 3 of keys, so 2 ranks use a plan that gathers them.

Bytes are those that a rank sends for a token if collective operations run in a ring.
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
from torch.utils._python_dispatch import TorchDispatchMode

import qins
from qins.cli.bench import machine

LLAMA = {
    "vocab_size": 32768, "hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 64, "max_position_embeddings": 4096, "tie_word_embeddings": True,
}  # fmt: skip
PHI35 = {
    "vocab_size": 32064, "hidden_size": 3072, "intermediate_size": 8192, "num_attention_heads": 32,
    "num_key_value_heads": 32, "max_position_embeddings": 4096, "pad_token_id": 32000,
}  # fmt: skip
GATHERED = {
    **{f"model.layers.*.self_attn.{p}_proj": "colwise_gather_output" for p in "qkv"},
    "model.layers.*.self_attn.o_proj": "rowwise_split_input",
}


def write_codes(name: str, layers: int, path: Path) -> None:
    """Write a checkpoint of codes, in all layers."""
    import transformers

    from qins.hf import find_model

    source = name
    if name in ("llama", "phi35"):
        kind, sizes = ("Llama", LLAMA) if name == "llama" else ("Phi3", PHI35)
        config = getattr(transformers, f"{kind}Config")(**sizes, num_hidden_layers=layers)
        torch.manual_seed(0)
        torch.set_default_dtype(torch.bfloat16)
        getattr(transformers, f"{kind}ForCausalLM")(config).save_pretrained(path / "float")
        torch.set_default_dtype(torch.float32)
        source = str(path / "float")
    elif name == "smollm2":
        source = find_model()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        source, dtype=torch.bfloat16, quantization_config=qins.QinsConfig(lm_head=True, embeddings=True)
    )
    model.save_pretrained(path / "codes")


CHUNK = 4  # tokens between two readings of the clock; on a shared machine the best chunk is the least disturbed


class SentBytes(TorchDispatchMode):
    """Counts the bytes that this rank sends in collective operations, as if each ran in a ring."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.operations = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function._schema.name
        if name.startswith(("c10d::", "_c10d_functional::")) and ("reduce" in name or "gather" in name):
            ranks = torch.distributed.get_world_size()
            given = args[1] if "allgather" in name and name.startswith("c10d") else args[0]
            size = sum(t.nbytes for t in (given if isinstance(given, (list, tuple)) else [given]))
            # a ring passes each part once to gather them, and once more to sum them first
            self.bytes += size * (ranks - 1) * 2 // ranks if "reduce" in name else size * (ranks - 1)
            self.operations += 1
        return function(*args, **(kwargs or {}))


def run_rank(arguments: argparse.Namespace) -> dict[str, Any]:
    """Load the codes, and decode; return the figures."""
    import transformers

    ranks = int(os.environ.get("WORLD_SIZE", 1))
    told: dict[str, Any] = {}
    if ranks > 1:
        from transformers.distributed import DistributedConfig

        plan = GATHERED if arguments.model == "smollm2" and ranks % 3 else "auto"
        told = {"distributed_config": DistributedConfig(tp_size=ranks, tp_plan=plan)}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        arguments.codes, dtype=getattr(torch, arguments.dtype), **told
    )
    prompt = torch.randint(3, 30000, (1, arguments.prompt), generator=torch.Generator().manual_seed(0))
    prefill = decode = float("inf")
    with torch.inference_mode():
        for _ in range(arguments.repeats):
            begin = time.perf_counter()
            given = model(prompt, use_cache=True)
            prefill = min(prefill, time.perf_counter() - begin)
            tokens: list[int] = []
            for _ in range(arguments.tokens // CHUNK):
                begin = time.perf_counter()
                for _ in range(CHUNK):
                    token = given.logits[:, -1:].argmax(-1)
                    tokens.append(int(token))
                    given = model(token, past_key_values=given.past_key_values, use_cache=True)
                decode = min(decode, (time.perf_counter() - begin) / CHUNK)
        figures = {"decode": 1 / decode, "prefill": arguments.prompt / prefill, "tokens": tokens}
        if ranks > 1:
            with SentBytes() as sent:
                model(token, past_key_values=given.past_key_values, use_cache=True)
            figures |= {"bytes a token": sent.bytes, "collective operations a token": sent.operations}
    return figures


def start(ranks: int, threads: int, codes: Path, arguments: argparse.Namespace, step: bool) -> dict[str, Any]:
    """Run a contestant in processes of its own."""
    own = [f"--{n}={getattr(arguments, n)}" for n in ("model", "dtype", "prompt", "tokens", "repeats")]
    runner = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    command = [sys.executable, *runner, __file__, *own, f"--codes={codes}"]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "QINS_DECODE_STEP": str(int(step))}
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(run.stderr)
    figures: dict[str, Any] = json.loads(next(line for line in run.stdout.splitlines() if line.startswith("{")))
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama")
    parser.add_argument("--dtype", default="float32", help="in bfloat16, rounding may choose other tokens")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--codes", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.codes:
        figures = run_rank(arguments)
        if int(os.environ.get("RANK", 0)) == 0:
            print(json.dumps(figures), flush=True)
        return
    ranks = arguments.ranks
    contestants = {
        "1 rank, 1 thread": (1, 1, True),
        f"1 rank, {ranks} threads": (1, ranks, True),
        f"1 rank, {ranks} threads, modules alone": (1, ranks, False),  # what ranks run, too: no step of a whole layer
        f"{ranks} ranks, 1 thread each": (ranks, 1, True),
    }
    best: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as work:
        write_codes(arguments.model, arguments.layers, Path(work))
        for _ in range(arguments.rounds):
            for name, (n, threads, step) in contestants.items():
                found = start(n, threads, Path(work) / "codes", arguments, step)
                before = best.setdefault(name, found)
                before |= {k: max(before[k], found[k]) for k in ("decode", "prefill")}
    tokens = [b.pop("tokens") for b in best.values()]
    same = sum(t == tokens[0] for t in tokens)
    about = f"{machine()['cpu']}, {os.cpu_count()} cores, {qins.isa()}"
    print(f"{arguments.model}, {about}; same tokens: {same} of {len(tokens)}")
    for name, b in best.items():
        sent = f"{b['bytes a token']:,} bytes in {b['collective operations a token']}" if "bytes a token" in b else "-"
        print(f"{name:32} decode {b['decode']:7.2f}/s  prefill {b['prefill']:8.1f}/s  sent a token: {sent}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine(), "same tokens": same, "figures": best}, indent=1))


if __name__ == "__main__":
    main()
