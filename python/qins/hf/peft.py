"""LoRA on QINSLinear: PEFT trains it like any nn.Linear, but merging an adapter must make new codes.

To merge, PEFT's own layer adds to `weight.data`, which for a QINSLinear is a dequantized copy: the adapter would be
lost silently. So every LoraConfig gets our layer for QINSLinear, through PEFT's `_register_custom_module`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, wraps
from typing import Any

import torch
from torch import nn

from ..codec import encode
from ..nn import CodedWeight, QINSLinear
from .parts import parts_of

# These subtract part of the weight from the base layer, or rescale it. The rest would have to be encoded again, and the
# initial outputs would differ from those of the original weights.
_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@cache
def lora_layer() -> type[nn.Module]:
    """Return PEFT's LoRA layer class for QINSLinear, created on first use, when PEFT is imported."""
    from peft.tuners.lora.layer import Linear

    class QINSLoraLinear(Linear):
        """A LoRA layer whose base layer is a QINSLinear."""

        _unmerged: dict[str, Any] | None = None  # the base layer's codes before the first merge

        def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: Any, **kwargs: Any) -> None:
            if parts_of(self.base_layer):
                raise ValueError("LoRA: a rank has a part of this layer's codes, expected a model on one rank")
            if getattr(config, "use_dora", False):
                raise ValueError("use_dora: DoRA rescales the base weight, which is quantized; use LoRA")
            init = config.init_lora_weights
            if isinstance(init, str) and init.lower().startswith(_CHANGE_THE_BASE):
                raise ValueError(f"init_lora_weights: {init!r} changes the base weight, which is quantized; use True")
            super().update_layer(adapter_name, r, lora_alpha, config=config, **kwargs)

        @contextmanager
        def _float_base(self) -> Iterator[nn.Linear]:
            """Replace the base layer temporarily with a float one that has the dequantized weight."""
            codes: QINSLinear = self.base_layer  # type: ignore[assignment]
            with torch.device("meta"):
                stand_in = nn.Linear(codes.in_features, codes.out_features, bias=False)
            stand_in.weight = nn.Parameter(codes.weight.float(), requires_grad=False)
            stand_in.bias = codes.bias
            self.base_layer: nn.Module = stand_in
            try:
                yield stand_in
            finally:
                self.base_layer = codes

        def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
            """Add adapters to the dequantized weight and encode the sum; `unmerge` restores the previous codes."""
            codes: QINSLinear = self.base_layer  # type: ignore[assignment]
            merged = len(self.merged_adapters)
            with self._float_base() as stand_in:
                super().merge(safe_merge, adapter_names)
            if len(self.merged_adapters) == merged:
                return
            if self._unmerged is None:
                self._unmerged = {n: codes._buffers[n] for n in codes._names}
            fields = encode(stand_in.weight, codes.codec, group_size=codes.group_size).fields
            for n, array in fields.items():
                codes._buffers[n] = torch.from_numpy(array)

        def unmerge(self) -> None:
            """Remove all merged adapters; this restores the codes from before the first merge, bit for bit."""
            with self._float_base():
                super().unmerge()
            if self._unmerged is not None:
                self.base_layer._buffers.update(self._unmerged)
                self._unmerged = None

    return QINSLoraLinear


def _refuse_other_merges() -> None:
    """Keep tuners other than LoRA from merging into codes: they would add to a dequantized copy of the weight."""
    from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer

    def check(tuner: Any) -> None:
        for name, module in tuner.model.named_modules():
            if (
                isinstance(module, BaseTunerLayer)
                and isinstance(module.get_base_layer(), CodedWeight)
                and not isinstance(module, lora_layer())
            ):
                raise ValueError(
                    f"{name}: {type(tuner).__name__} cannot merge into the codes of a "
                    f"{type(module.get_base_layer()).__name__}; only LoRA can, into a QINSLinear; use the adapter "
                    "without merging it"
                )

    def guarded(original: Any) -> Any:
        @wraps(original)
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            merging = original.__name__ == "merge_adapter" or (args[0] if args else kwargs.get("merge", True))
            if merging:
                check(self)
            return original(self, *args, **kwargs)

        method._qins = True  # type: ignore[attr-defined]
        return method

    def putting_back(original: Any) -> Any:
        @wraps(original)
        def method(self: Any, parent: nn.Module, child_name: str, new_module: nn.Module, child: Any) -> Any:
            if isinstance(new_module, CodedWeight):  # the base layer: PEFT would assign its dequantized weight
                setattr(parent, child_name, new_module)
                return None
            return original(self, parent, child_name, new_module, child)

        method._qins = True  # type: ignore[attr-defined]
        return method

    for name, wrap in (("merge_adapter", guarded), ("_unload_and_optionally_merge", guarded),
                       ("_replace_module", putting_back)):  # fmt: skip
        original = getattr(BaseTuner, name)
        if not getattr(original, "_qins", False):
            setattr(BaseTuner, name, wrap(original))


def _register() -> None:
    """Patch LoraConfig, so that every one uses our layer for QINSLinear."""
    from peft.tuners.lora.config import LoraConfig

    original = LoraConfig.__post_init__
    if getattr(original, "_qins", False):
        return

    @wraps(original)
    def post_init(self: Any) -> None:
        original(self)  # type: ignore[no-untyped-call]
        self._register_custom_module({QINSLinear: lora_layer()})

    post_init._qins = True  # type: ignore[attr-defined]
    LoraConfig.__post_init__ = post_init  # type: ignore[method-assign]


_register()
_refuse_other_merges()
