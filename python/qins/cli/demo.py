"""`qins demo`: quantize a real language model and show what changes."""

from __future__ import annotations

import copy
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from ..codec import isa
from ..fidelity import bytes_by_component, fidelity, greedy, sample_text, windows
from ..hf import find_model, load_causal_lm
from ..nn import ConversionReport, convert
from ..system import cpu_name, progress

PROMPT = "What is the capital of France, and what is it known for?"
_NEW_TOKENS = 32
_ROUNDS = 3


def run(
    model_name: str | None = None,
    codec: str = "log8",
    group_size: int | str | None = "default",
    tokens: int = 2048,
    picture: Path = Path("qins-demo.png"),
    console: Console | None = None,
) -> dict[str, Any]:
    """Quantize a model, compare it with the float original, and print and plot the comparison.

    Args:
        model_name: directory or hub name; None for SmolLM2-135M-Instruct from its package.
        codec: codec of the weights.
        group_size: as in `convert`.
        tokens: number of tokens of the bundled text to compare on.
        picture: where the PNG is written.
        console: where to print.

    Returns:
        every printed figure, as a dictionary for JSON.

    """
    console = console or Console()
    with console.status("getting the model"):
        path = find_model(model_name)
        reference, tokenizer = load_causal_lm(path)
    model = copy.deepcopy(reference)
    console.print(f"model [bold]{path}[/]", soft_wrap=True)
    console.print(f"on {cpu_name()}, {isa()}, {torch.get_num_threads()} threads")

    begin = time.perf_counter()
    report = convert(model, codec, group_size=group_size)
    seconds = time.perf_counter() - begin
    if not report.converted:
        raise RuntimeError(f"{path}: no linear layer to quantize:\n{report}")
    console.print(f"quantized {len(report.converted)} layers to {codec} in {seconds:.1f} s\n")

    ids = tokenizer(sample_text(), return_tensors="pt").input_ids
    parts = windows(ids, tokens)
    with progress("comparing next-token distributions", sum(p.numel() for p in parts), None) as advance:
        measured = fidelity(reference, model, parts, advance)

    prompt = _prompt_ids(tokenizer)
    answers, speeds = _race({"float32": reference, codec: model}, prompt)
    result = {
        "model": path,
        "cpu": cpu_name(),
        "isa": isa(),
        "threads": torch.get_num_threads(),
        "seconds_to_quantize": seconds,
        "bytes_before": bytes_by_component(reference),
        "bytes_after": bytes_by_component(model),
        "layers": report.to_dict(),
        "snr_db": _pooled_snr(report),
        "fidelity": asdict(measured),
        "tokens_per_second": speeds,
        "answers": {
            name: tokenizer.decode(answer, skip_special_tokens=True).strip() for name, answer in answers.items()
        },
        "picture": str(picture),
    }
    _print(result, codec, console)
    draw(result, report, picture)
    console.print(f"\npicture: [bold]{picture}[/]", soft_wrap=True)
    return result


def _prompt_ids(tokenizer: Any) -> torch.Tensor:
    """Return the prompt's token ids, in the model's chat format if it has one."""
    text = PROMPT
    if getattr(tokenizer, "chat_template", None):
        messages = [{"role": "user", "content": PROMPT}]
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    ids: torch.Tensor = tokenizer(text, return_tensors="pt").input_ids
    return ids


def _race(models: dict[str, Any], prompt: torch.Tensor) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Let the models answer the prompt in turn, several times; keep the best speed of each."""
    answers, speeds = {}, dict.fromkeys(models, 0.0)
    for _ in range(_ROUNDS):
        for name, model in models.items():
            answers[name], speed = greedy(model, prompt, _NEW_TOKENS)
            speeds[name] = max(speeds[name], speed)
    return answers, speeds


def _pooled_snr(report: ConversionReport) -> float:
    """Return the SNR in dB of all converted weights together: each layer's noise weighted by its size."""
    noise = sum(10 ** (-m.snr_db / 10) * m.bytes_before for m in report.converted)
    total = sum(m.bytes_before for m in report.converted)
    return float(10 * torch.tensor(total / noise).log10())


def _megabytes(n: int) -> str:
    return f"{n / 1e6:,.1f} MB"


def _print(result: dict[str, Any], codec: str, console: Console) -> None:
    before, after = result["bytes_before"], result["bytes_after"]
    sizes = Table(title="size", title_justify="left")
    for column in ("component", "float32", codec, "ratio"):
        sizes.add_column(column, justify="left" if column == "component" else "right")
    for kind in sorted(before, key=lambda k: -before[k]):
        sizes.add_row(
            kind, _megabytes(before[kind]), _megabytes(after.get(kind, 0)), f"{before[kind] / after[kind]:.2f}x"
        )
    total, total_after = sum(before.values()), sum(after.values())
    sizes.add_row("all", _megabytes(total), _megabytes(total_after), f"{total / total_after:.2f}x", style="bold")
    console.print(sizes)

    f = result["fidelity"]
    quality = Table(title=f"fidelity over {f['tokens']:,} predictions of English text", title_justify="left")
    for column in ("measure", "float32", codec):
        quality.add_column(column, justify="left" if column == "measure" else "right")
    quality.add_row("signal to noise of the weights", "", f"{result['snr_db']:.2f} dB")
    quality.add_row("mean KL divergence", "0", f"{f['kl_mean']:.2e}")
    quality.add_row("99th percentile", "0", f"{f['kl_p99']:.2e}")
    quality.add_row("same most likely token", "", f"{100 * f['top1']:.2f} %")
    quality.add_row("perplexity", f"{f['reference_perplexity']:.4f}", f"{f['perplexity']:.4f}")
    speeds = result["tokens_per_second"]
    quality.add_row("tokens per second, batch 1", f"{speeds['float32']:.1f}", f"{speeds[codec]:.1f}")
    console.print(quality)
    console.print(f"\n[bold]prompt[/]: {PROMPT}")
    for name, answer in result["answers"].items():
        console.print(f"[bold]{name}[/]: {answer}", highlight=False)


def draw(result: dict[str, Any], report: ConversionReport, path: Path) -> None:
    """Write the PNG: SNR of every layer, and bytes by component before and after."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 4.5), width_ratios=(2.2, 1), layout="constrained")
    kinds: dict[str, list[tuple[int, float]]] = {}
    for i, m in enumerate(report.converted):
        kinds.setdefault(m.name.rpartition(".")[2], []).append((i, m.snr_db))
    markers = "osD^v<>PX*"
    for n, (kind, points) in enumerate(kinds.items()):
        left.plot(*zip(*points, strict=True), markers[n % len(markers)], ms=4, label=kind)
    left.set(xlabel="layer, in the model's order", ylabel="SNR of the weights, dB", title="error by layer")
    left.grid(alpha=0.3)
    left.legend(ncols=4, fontsize=8)

    codec = next(m.codec for m in report.converted)
    bottoms = [0.0, 0.0]
    for kind in sorted(result["bytes_before"], key=lambda k: -result["bytes_before"][k]):
        heights = [result["bytes_before"][kind] / 1e6, result["bytes_after"][kind] / 1e6]
        right.bar(["float32", codec], heights, bottom=bottoms, label=kind)
        bottoms = [b + h for b, h in zip(bottoms, heights, strict=True)]
    for i, b in enumerate(bottoms):
        right.annotate(f"{b:,.0f} MB", (i, b), ha="center", va="bottom")
    right.set(ylabel="MB", title="size")
    right.margins(y=0.12)
    right.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
