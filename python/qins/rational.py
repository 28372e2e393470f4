"""The prototype's second codec, deprecated: encoding, and the layer and conversion that need torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .codec import DEFAULT_TARGETS, RationalArray, decode_old, qins_decode, qins_encode
from .system import lazily

if TYPE_CHECKING:
    from .codec import RationalTensor
    from .nn import QINSWeightLinear, convert_linear_to_qins, verify_qins_layer

__all__ = [
    "DEFAULT_TARGETS",
    "QINSWeightLinear",
    "RationalArray",
    "RationalTensor",
    "convert_linear_to_qins",
    "decode_old",
    "qins_decode",
    "qins_encode",
    "verify_qins_layer",
]

_TORCH = {
    "QINSWeightLinear": "nn",
    "RationalTensor": "codec",
    "convert_linear_to_qins": "nn",
    "verify_qins_layer": "nn",
}
__getattr__ = lazily(__name__, _TORCH, "qins")
