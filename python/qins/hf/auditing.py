"""The report of which parts of a model are quantized."""

from __future__ import annotations

import logging
import math
from typing import Any

from ..codec import fallback_note
from ..nn import (
    ConversionReport,
    ConvertedModule,
    SkippedModule,
    other_matrices,
)
from .config import QinsConfig
from .modules import (
    coded_modules,
)
from .names import some
from .parallel import part_of_matrix

logger = logging.getLogger("qins")


def audit(model: Any, config: QinsConfig, skipped: list[SkippedModule]) -> ConversionReport:
    """List what is quantized and what is not, in the report and in `config.modules`.

    Raises:
        RuntimeError: less is quantized than `min_quantized` requires.

    """
    report = ConversionReport(skipped=list(skipped), source_format=config.source_format)
    config.modules = {}
    coded = floats = 0
    owners: dict[int, str] = {}
    for name, module in coded_modules(model):
        matrices, asked = list(module.matrices(name)), config.asked(name)[0]
        told = (fallback_note(asked, shape[-1]) for _, shape, *_ in matrices) if module.codec != asked else ()
        note = next(filter(None, told), "")
        for part, shape, group_size, fields in matrices:
            size = sum(f.nbytes for f in fields)
            if (kept := part_of_matrix(module, name, part)) is not None:
                shape, group_size, size = kept.shape, kept.group_size, kept.whole_bytes
            owner = owners.setdefault(id(fields[0]), part)
            config.modules[part] = [module.codec, group_size]
            if module._non_persistent_buffers_set:
                config.modules[part].append(owner)
                continue
            weights = math.prod(shape)
            report.converted.append(
                ConvertedModule(part, shape, module.codec, group_size, weights * 4, size, float("nan"), note=note)
            )
            coded += weights
    seen: set[int] = set()
    for name, p in model.named_parameters():
        if id(p) not in seen:
            seen.add(id(p))
            floats += p.numel()
            if p.dim() >= 3 and p.shape[0] > 1:
                owner = name.rpartition(".")[0]
                module = model.get_submodule(owner)
                about = SkippedModule(name, "parameter", "a stack of matrices, such as experts")
                if other_matrices(module):
                    about = SkippedModule(owner, type(module).__name__, other_matrices(module))
                if about not in report.skipped:
                    report.skipped.append(about)
    share = coded / max(coded + floats, 1)
    text = f"qins: {100 * share:.1f} % of the parameters are quantized, in {len(report.converted)} layers"
    text += f", from weights in {config.source_format}" if config.source_format else ""
    left = sorted({f"{s.name} ({s.reason})" for s in report.skipped})
    level = logging.WARNING if share < 0.5 else logging.INFO
    logger.log(level, "%s%s", text, f"; left: {some(left)}" if left else "")
    if share < config.min_quantized:
        raise RuntimeError(f"{text}, less than min_quantized = {config.min_quantized:g}; left: {some(left)}")
    return report
