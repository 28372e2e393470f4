"""The prototype's golden codec with its original name and signature, for torch tensors and NumPy arrays."""

from __future__ import annotations

from typing import Any

import numpy as np

from .array import EncodedArray, encode
from .dtypes import is_torch


class QINSCodec:
    """Logarithmic codec with 2 bytes per weight: `stored` uint8 in 1..255, `sign` int8, one range per tensor.

    stored = round(255 - 254 (ln|w| - log_min) / (log_max - log_min)), so the largest magnitude is stored as 1 and the
    smallest as 255. Results are torch tensors for torch tensors, and NumPy arrays for NumPy arrays.
    """

    @staticmethod
    def encode(weight: Any) -> tuple[Any, Any, Any, Any]:
        """Return (stored, sign, log_min, log_max): uint8 and int8 arrays of weight's shape, two float32 scalars.

        Raises:
            ValueError: a weight is NaN or infinite.

        """
        f = encode(weight, "golden").fields
        parts = f["stored"], f["sign"], f["log_min"], f["log_max"]
        if is_torch(weight):
            import torch

            return tuple(torch.from_numpy(p).to(weight.device) for p in parts)  # type: ignore[return-value]
        return parts

    @staticmethod
    def decode(stored: Any, sign: Any, log_min: Any, log_max: Any) -> Any:
        """Return float32 weights: sign * exp(log_min + (255 - stored)/254 * (log_max - log_min)).

        Exact zeros decode to the smallest magnitude.

        Raises:
            ValueError, TypeError: an argument cannot be a result of `encode`.

        """
        if is_torch(stored):
            import torch

            from .tensors import decode_fields

            fields = {
                "stored": stored,
                "sign": sign,
                "log_min": torch.as_tensor(log_min, dtype=torch.float32),
                "log_max": torch.as_tensor(log_max, dtype=torch.float32),
            }
            if stored.device.type == "cpu":
                EncodedArray.from_fields("golden", {n: t.detach().numpy() for n, t in fields.items()})
            return decode_fields("golden", fields, None, torch.float32)
        fields = {"stored": stored, "sign": sign, "log_min": log_min, "log_max": log_max}
        return EncodedArray.from_fields("golden", fields).decode(np.float32)
