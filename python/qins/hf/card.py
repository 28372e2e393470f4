"""The model card (README.md) of a quantized model."""

from __future__ import annotations

import json
import logging
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

from ..codec import LOG_BITS
from ..files import EncodedLayer, open_checkpoint
from ..system import atomically, naming_file, upward

logger = logging.getLogger("qins")

CARD = "README.md"
_OURS = "<!-- Written by qins, which replaces it as long as this line is here. -->"
# marks transformers' own card, which has no information
_EMPTY = "This model card has been automatically generated"
_ORIGINAL = "## The original's card\n"
_CARRIED = ("license", "license_name", "license_link", "language", "tags", "pipeline_tag")

_TEXT = """\
{ours}

# {title}

**This needs `pip install "qins[hf]"`.** Without it transformers warns of an "Unknown quantization type, got qins" and
stops at an empty tensor whose size does not match. If told to ignore the mismatch, it outputs nonsense.

```python
import qins
from transformers import AutoTokenizer

name = "..."  # this directory, or its name on the hub
model, tokenizer = qins.load(name), AutoTokenizer.from_pretrained(name)
```

It runs on CPUs, straight from the codes. On the command line, `qins generate` and `qins chat` run it, and `qins
inspect` checks its checksums.

| | |
|---|---|
| codec | {codec} |
| bits per weight | {bits:.2f}, of {weights:,} weights in {layers} layers |
{source}| size | {size:,.1f} MB; in float32 {float_size:,.1f} MB |
| written by | qins {version} |
"""


def write_card(directory: Path, base: str | None, source: Path | None, fidelity: str | None = None) -> None:
    """Write the card of a converted model, unless it has a hand-written one.

    Args:
        directory: the complete model's directory.
        base: the float model's hub name, if it has one.
        source: directory of the float model, or of the codes that the model was loaded from; license, language and tags
            come from its card.
        fidelity: the measured fidelity, as text.

    """
    there = _read(directory / CARD)
    original = _read(source / CARD) if source is not None else ""
    if there not in ("", original) and _OURS not in there and _EMPTY not in there:
        return
    text = _card(directory, base, original or (there if _OURS in there else ""), _parts(there)[0].get("tags"), fidelity)
    with atomically(directory / CARD) as temporary:
        temporary.write_text(text, "utf-8")


def hub_name(name: Any) -> str | None:
    """Return the name if it can be a hub name, else None."""
    told = str(name or "")
    return told if re.fullmatch(r"[\w.-]+/[\w.-]+", told) and not Path(told).exists() else None


def _read(path: Path) -> str:
    with naming_file(path):
        return path.read_text("utf-8", "replace") if path.is_file() else ""


def _card(directory: Path, base: str | None, original: str, tags: Any, fidelity: str | None) -> str:
    from huggingface_hub import ModelCardData

    from ..files import encoded_layers
    from ..system import VERSION

    checkpoint = open_checkpoint(directory)
    layers = encoded_layers(checkpoint, [])
    weights = [math.prod(layer.shape) for layer in layers]
    fields = {key for layer in layers for key in layer.fields.values()}
    floats = sum(weights) + sum(t.elements for n, t in checkpoint.tensors.items() if n not in fields)
    carried, text = _parts(original)
    about = {k: carried[k] for k in _CARRIED if carried.get(k)}
    base = base or carried.get("base_model")
    widths = _widths(layers)
    ours = ["qins", *(f"{w}-bit" for w in widths), "cpu"]
    about["tags"] = list(dict.fromkeys([*_listed(about.get("tags")), *_listed(tags), *ours]))
    if base:
        about |= {"base_model": base, "base_model_relation": "quantized"}
    architecture = (checkpoint.config.get("architectures") or [""])[0]
    if architecture.endswith("ForCausalLM"):
        about.setdefault("pipeline_tag", "text-generation")
    named = base[0] if isinstance(base, list) and base else base
    made_from = checkpoint.config["quantization_config"].get("source_format")
    body = _TEXT.format(
        ours=_OURS,
        title=f"{named or architecture} in {_between(widths)} logarithmic codes",
        codec="; ".join(_codecs(checkpoint.config)),
        bits=8 * sum(layer.bytes for layer in layers) / max(sum(weights), 1),
        weights=sum(weights),
        layers=len(layers),
        source=f"| made from | {made_from} |\n" if made_from else "",
        size=checkpoint.file_bytes / 1e6,
        float_size=4 * floats / 1e6,
        version=VERSION,
    )
    if fidelity:
        body += f"\n## Fidelity\n\n{fidelity}\n"
    if text:
        body += f"\n{_ORIGINAL}\n{text}\n"
    data = ModelCardData(library_name="transformers", **about)
    return f"---\n{data.to_yaml()}\n---\n\n{body}"


def _parts(original: str) -> tuple[dict[str, Any], str]:
    """Return a card's metadata and text; of a card written by qins, the text is the original's that it quotes."""
    from huggingface_hub import ModelCard

    if not original.startswith("---"):
        return {}, original.strip()
    try:
        card = ModelCard(original, ignore_metadata_errors=True)
        head, text = card.data.to_dict(), str(card.text)  # type: ignore[no-untyped-call]
    except Exception as e:  # YAML and the library's checks raise various types
        logger.warning("qins: the metadata of the original's %s cannot be read, so none of it is kept: %s", CARD, e)
        return {}, original
    return head, (text.partition(_ORIGINAL)[2] if _OURS in text else text).strip()


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list) else [value] if value else []


def _codecs(config: dict[str, Any]) -> list[str]:
    """Return codecs and group sizes as text, the most frequent first."""
    modules = config["quantization_config"]["modules"].values()
    found = Counter((about[0], about[1]) for about in modules if len(about) < 3)
    return [f"{c}, {f'groups of {g} inputs' if g else 'per-row scales'}" for (c, g), _ in found.most_common()]


def _widths(layers: list[EncodedLayer]) -> list[int]:
    """Return the bits of the layers' codes, ascending."""
    return sorted({LOG_BITS.get(layer.codec, 8) for layer in layers}) or [8]


def _between(widths: list[int]) -> str:
    return f"{widths[0]}-bit" if len(widths) == 1 else f"{widths[0]}- to {widths[-1]}-bit"


def holds_codes(directory: Path) -> bool:
    """Return whether the model that is saved in a directory is quantized by qins."""
    config = directory / "config.json"
    told = json.loads(config.read_text("utf-8")) if config.is_file() else {}
    return (told.get("quantization_config") or {}).get("quant_method") == "qins"


class UploadWithCard:
    """A loaded model's `_upload_modified_files`, which adds a card to codes that `push_to_hub` uploads.

    Attributes:
        source: directory or hub name that the model was loaded from.
        original: directory of the floats that the uploaded files are to restore; None for none.

    """

    def __init__(self, source: str, original: Path | None = None) -> None:
        self.source, self.original = source, original

    def __call__(self, working_dir: Any, *args: Any, **kwargs: Any) -> Any:
        """Write the card and upload what transformers has saved."""
        from transformers.utils.hub import PushToHubMixin

        directory = Path(working_dir)
        if holds_codes(directory):
            source = Path(self.source) if self.source and Path(self.source).is_dir() else None
            write_card(directory, hub_name(self.source), source)
            if self.original is not None:
                upward["record_original"](self.original, directory)
        kwargs["commit_message"] = kwargs.get("commit_message") or "Upload model"
        return PushToHubMixin()._upload_modified_files(working_dir, *args, **kwargs)
