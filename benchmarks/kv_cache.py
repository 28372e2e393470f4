"""KV caches side by side: bytes, speed, KL divergence and greedy agreement with transformers' DynamicCache.

    python benchmarks/kv_cache.py [--context 1000] [--steps 100] [--model NAME] [--float] [--bfloat16] [--json FILE]

Head and embeddings are quantized, too.

Every cache first prefills the same context. Then all of them take decode steps in turn, so that changes of the
machine's speed affect all of them at the same length. Figures are medians over the steps, as ratios to DynamicCache.
KLD: mean KL divergence, in nats, of the next-token distributions of one text of up to 2,048 tokens.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from importlib import resources

import torch
from transformers import Cache, DynamicCache

import qins
from qins.cli.bench import machine
from qins.hf import find_model, load_causal_lm

KINDS: dict[str, Callable[[object], Cache]] = {
    "DynamicCache": lambda config: DynamicCache(config=config),
    "QINSCache, v log8": lambda config: qins.QINSCache(config, v_codec="log8"),
    "QINSCache, v golden": lambda config: qins.QINSCache(config, v_codec="golden"),
    "QINSCache, v log4": lambda config: qins.QINSCache(config, v_codec="log4"),
    "QINSCache, k and v log8": lambda config: qins.QINSCache(config, v_codec="log8", k_codec="log8"),
    "QINSCache, k and v log6": lambda config: qins.QINSCache(config, v_codec="log6", k_codec="log6"),
    "QINSCache, k and v log5": lambda config: qins.QINSCache(config, v_codec="log5", k_codec="log5"),
    "QINSCache, k and v log4": lambda config: qins.QINSCache(config, v_codec="log4", k_codec="log4"),
}


def quanto(config: object) -> Cache:
    from transformers.cache_utils import QuantizedCache

    return QuantizedCache("quanto", config, nbits=4, q_group_size=64, residual_length=128)


def cache_bytes(cache: Cache) -> float:
    """Return the bytes that a cache takes for its tokens."""
    if isinstance(cache, qins.QINSCache):
        return cache.memory_savings()["total_bytes"]
    tensors = []
    for layer in cache.layers:
        tensors += [layer.keys, layer.values]
        for name in ("_quantized_keys", "_quantized_values"):
            q = getattr(layer, name, None)
            tensors += [] if q is None else [q._data, q._scale, q._shift] if hasattr(q, "_shift") else [q]
    # quanto packs four-bit codes into a tensor of its own
    return float(sum(getattr(t, "_data", t).numel() * getattr(t, "_data", t).element_size() for t in tensors))


def divergences(model: torch.nn.Module, ids: torch.Tensor, kinds: dict[str, Callable[[object], Cache]]) -> list[float]:
    """Return the mean KL divergence of each cache's next-token distributions from those of the first."""
    found: list[float] = []
    reference = None
    with torch.no_grad():
        for make in kinds.values():
            got = model(ids, past_key_values=make(model.config)).logits[0].float().log_softmax(-1)
            reference = got if reference is None else reference
            of_token = ((p.exp() * (p - q)).sum(-1) for p, q in zip(reference.split(64), got.split(64), strict=True))
            found.append(float(torch.cat(list(of_token)).double().mean()))
    return found


def race(model: torch.nn.Module, context: torch.Tensor, steps: int) -> dict[str, dict[str, float]]:
    kinds = dict(KINDS)
    try:
        import optimum.quanto  # noqa: F401

        kinds["QuantizedCache (quanto, 4 bits)"] = quanto
    except ImportError:
        print("not run: QuantizedCache (optimum-quanto is not installed)", file=sys.stderr)
    caches = {name: make(model.config) for name, make in kinds.items()}
    tokens: dict[str, list[int]] = {}
    times: dict[str, list[float]] = {name: [] for name in caches}
    prefill: dict[str, float] = {}
    with torch.no_grad():
        for name, cache in caches.items():
            start = time.perf_counter()
            logits = model(context, past_key_values=cache, logits_to_keep=1).logits
            prefill[name] = time.perf_counter() - start
            tokens[name] = [int(logits[0, -1].argmax())]
        for _ in range(steps):
            for name, cache in caches.items():
                step = torch.tensor([[tokens[name][-1]]])
                start = time.perf_counter()
                logits = model(step, past_key_values=cache).logits
                times[name].append(time.perf_counter() - start)
                tokens[name].append(int(logits[0, -1].argmax()))
    reference = tokens["DynamicCache"]
    base = statistics.median(times["DynamicCache"])
    results = {}
    of_kinds = divergences(model, context[:, :2048], kinds)
    for (name, cache), divergence in zip(caches.items(), of_kinds, strict=True):
        median = statistics.median(times[name])
        same = [a == b for a, b in zip(tokens[name], reference, strict=True)]
        results[name] = {
            "tokens_per_second": 1 / median,
            "speed_ratio": base / median,
            "prefill_seconds": prefill[name],
            "bytes": cache_bytes(cache),
            "kld": divergence,
            "same_first_tokens": same.index(False) if False in same else len(same),
            "tokens": len(same),
        }
    return results


def table(results: dict[str, dict[str, float]]) -> str:
    most = results["DynamicCache"]["bytes"]
    lines = ["| cache | MB | bytes | tokens/s | speed | KLD | same greedy tokens |", "|---|---|---|---|---|---|---|"]
    for name, r in results.items():
        lines.append(
            f"| {name} | {r['bytes'] / 1e6:.2f} | {r['bytes'] / most:.3f}x | {r['tokens_per_second']:.1f} "
            f"| {r['speed_ratio']:.3f}x | {r['kld']:.1e} | {r['same_first_tokens']:.0f} of {r['tokens']:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--model")
    parser.add_argument("--float", action="store_true", help="leave the model's weights in float32")
    parser.add_argument("--bfloat16", action="store_true", help="of activations and of DynamicCache")
    parser.add_argument("--json")
    arguments = parser.parse_args()
    model, tokenizer = load_causal_lm(find_model(arguments.model))
    if arguments.bfloat16:
        model.to(torch.bfloat16)
    if not arguments.float:
        qins.convert(model, exclude=(), embeddings=True)
    text = resources.files("qins").joinpath("data", "constitution.txt").read_text("utf-8")
    context = tokenizer(text, return_tensors="pt").input_ids[:, : arguments.context]
    results = race(model, context, arguments.steps)
    print(f"{json.dumps(machine())}\n{context.shape[1]} tokens of context, {arguments.steps} steps\n\n{table(results)}")
    if arguments.json:
        with open(arguments.json, "w") as f:
            json.dump({"machine": machine(), "results": results}, f, indent=1)


if __name__ == "__main__":
    main()
