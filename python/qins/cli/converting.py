"""`qins quantize`, `qins restore` and `qins inspect`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from .options import group_size_of


def quantize(
    model: Annotated[
        str, typer.Argument(help="Directory, hub name or URL (s3://...) of a float checkpoint, or a GGUF file.")
    ],
    out: Annotated[str, typer.Argument(help="Directory or URL to write; an interrupted conversion is resumed.")],
    codec: Annotated[
        str, typer.Option(help="log8; log6, log5 or log4 for fewer bits; log9, golden or rational.")
    ] = "log8",
    group_size: Annotated[
        int | None,
        typer.Option(help="Inputs that share a scale: default 64, or 32 (log6, log5, log4); 0: per-row scales (log8)."),
    ] = None,
    include: Annotated[list[str] | None, typer.Option(help="Pattern of modules to quantize; may be repeated.")] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="Pattern of modules to skip; may be repeated.")] = None,
    lm_head: Annotated[bool, typer.Option("--lm-head", help="Also quantize the output embedding.")] = False,
    embeddings: Annotated[bool, typer.Option("--embeddings", help="Also quantize the input embedding.")] = False,
    calibrate: Annotated[
        Path | None, typer.Option(help="Text file to calibrate codes on; it should resemble what the model will read.")
    ] = None,
    calibration_tokens: Annotated[int, typer.Option(min=256, help="Maximum number of tokens of that text.")] = 8192,
    target_bits: Annotated[
        float | None,
        typer.Option(help="Bits per weight, such as 4.5: layers get log4 to log8, more bits where they matter."),
    ] = None,
    target_kld: Annotated[
        float | None,
        typer.Option(help="Instead, the fewest bits for this estimated mean KL divergence (encoder: 1 - cosine)."),
    ] = None,
    exact: Annotated[
        bool,
        typer.Option(
            "--exact", help="Also write what restores the model bit for bit: 3 bits per bfloat16 weight, 6 per float16."
        ),
    ] = False,
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="[ADDRESS]",
            help="Convert on the machines of a Ray cluster: host:port or ray://host:port; without an address, the "
            "cluster of RAY_ADDRESS or of this machine, or a new one on it.",
        ),
    ] = None,
    ray_cpus: Annotated[float, typer.Option(min=0.01, help="Processors that each shard takes on the cluster.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Quantize a checkpoint on disk, one tensor at a time: checkpoints of any size, without building the model."""
    from ..hf import require_transformers
    from ..system import read_text

    require_transformers()
    from ..checkpoint import quantize_checkpoint
    from ..hf import Calibration, QinsConfig

    config = QinsConfig(
        codec, group_size_of(group_size), include or None, exclude or (), lm_head=lm_head, embeddings=embeddings
    )
    calibration = None
    if calibrate is not None:
        calibration = Calibration(read_text(calibrate), calibration_tokens, target_bits, target_kld)
    elif target_bits is not None or target_kld is not None:
        raise ValueError("target-bits, target-kld: expected --calibrate TEXT with them, got none")
    if ray is None:
        result = quantize_checkpoint(model, out, config, calibration=calibration, exact=exact)
    else:
        from ..cluster import quantize_on_ray

        result = quantize_on_ray(
            model, out, config, address=ray or None, cpus=ray_cpus, calibration=calibration, exact=exact
        )
    if as_json:
        typer.echo(json.dumps(result, indent=2))
        return
    if "plan" in result:
        typer.echo(result["plan"])
    ratio = result["bytes_before"] / max(result["bytes_after"], 1)
    sizes = f"{result['bytes_before']:,} to {result['bytes_after']:,} bytes ({ratio:.2f}x)"
    sizes += f", from {result['source']}" if result["source"] else ""
    for note in result["notes"]:
        typer.echo(note)
    typer.echo(f"{result['layers']} layers, {sizes}, {len(result['files'])} files in {out}")
    if exact:
        share = (result["bytes_after"] + result["exact_bytes"]) / max(result["bytes_before"], 1)
        typer.echo(f"{result['exact_bytes']:,} bytes more restore the original: {share:.1%} of its bytes in all")
        if result["not_restored"]:
            typer.echo(f"not restored, and not copied: {', '.join(result['not_restored'])}")
    if "cost" in result:
        typer.echo(
            "{workers} workers, {seconds:,.1f} s, {cpu_seconds:,.1f} CPU seconds, {bytes_read:,} bytes read and "
            "{bytes_written:,} written in {attempts} tasks".format(**result["cost"])
        )


def restore(
    model: Annotated[Path, typer.Argument(help="Directory that `qins quantize --exact` wrote.")],
    out: Annotated[Path, typer.Argument(help="Directory to write; an interrupted run is resumed.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Restore the original of a model that was quantized with --exact, bit for bit."""
    from ..files import restore_checkpoint

    result = restore_checkpoint(model, out)
    if as_json:
        typer.echo(json.dumps(result, indent=2))
        return
    for name in result["changed"]:
        typer.echo(f"{name}: not restored: it is missing beside the codes, or differs from the original's")
    typer.echo(f"{len(result['files'])} files in {out}, {result['bytes']:,} bytes, as their SHA-256 says")


def inspect(
    path: Annotated[Path, typer.Argument(help="A safetensors, torch or GGUF file, or a directory with one model.")],
    against: Annotated[
        Path | None, typer.Option(help="Another checkpoint of the model; prints the error of every layer against it.")
    ] = None,
    histogram: Annotated[bool, typer.Option("--histogram", help="Draw a histogram of each layer's codes.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Show codecs, dtypes, bytes by kind and compression of a saved model. Exits with 1 if something is wrong."""
    from ..files import inspect as look

    report = look(path, against, histograms=histogram)
    typer.echo(report.to_json() if as_json else str(report))
    if report.problems:
        raise typer.Exit(1)
