"""The codecs on NumPy arrays, over the C core. torch is optional: names that need it import it on first access."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..system import lazily
from .array import EncodedArray, decode, encode, matmul
from .exact import RESTORABLE, residual, restore
from .feedback import DAMPING, ErrorFeedback
from .fields import (
    ARRAYS,
    CODEC_NUMBER,
    EXPERT_STACKS,
    FIELD_DTYPES,
    FIELD_ROLES,
    LOG_BITS,
    SCALARS,
    check_alpha,
    check_codec,
    check_group_size,
    code_columns,
    core_addresses,
    field_names,
    field_shapes,
    is_packed,
    split_field,
    weights_of,
)
from .golden import QINSCodec
from .group_sizes import (
    default_group_size,
    fallback_note,
    format_of,
    resolve_group_size,
    slow_group_size,
    warn_if_slow,
)
from .instruction_sets import isa, isas, use_isa
from .packed import unpack
from .quality import snr_db
from .rational import DEFAULT_TARGETS, qins_decode, qins_encode, warn_deprecated
from .rational_arrays import RationalArray, codes_of, decode_old

if TYPE_CHECKING:
    from .rational_tensors import RationalTensor, decode_tensor, encode_tensor
    from .tensors import DTYPE_NUMBER, Blocks, decode_fields, decode_on_device, dtype_name

__all__ = [
    "ARRAYS",
    "CODEC_NUMBER",
    "DAMPING",
    "DEFAULT_TARGETS",
    "DTYPE_NUMBER",
    "EXPERT_STACKS",
    "FIELD_DTYPES",
    "FIELD_ROLES",
    "LOG_BITS",
    "RESTORABLE",
    "SCALARS",
    "Blocks",
    "EncodedArray",
    "ErrorFeedback",
    "QINSCodec",
    "RationalArray",
    "RationalTensor",
    "check_alpha",
    "check_codec",
    "check_group_size",
    "code_columns",
    "codes_of",
    "core_addresses",
    "decode",
    "decode_fields",
    "decode_old",
    "decode_on_device",
    "decode_tensor",
    "default_group_size",
    "dtype_name",
    "encode",
    "encode_tensor",
    "fallback_note",
    "field_names",
    "field_shapes",
    "format_of",
    "is_packed",
    "isa",
    "isas",
    "matmul",
    "qins_decode",
    "qins_encode",
    "residual",
    "resolve_group_size",
    "restore",
    "slow_group_size",
    "snr_db",
    "split_field",
    "unpack",
    "use_isa",
    "warn_deprecated",
    "warn_if_slow",
    "weights_of",
]

__getattr__ = lazily(
    __name__,
    {
        "DTYPE_NUMBER": "tensors",
        "Blocks": "tensors",
        "decode_fields": "tensors",
        "decode_on_device": "tensors",
        "dtype_name": "tensors",
        "RationalTensor": "rational_tensors",
        "decode_tensor": "rational_tensors",
        "encode_tensor": "rational_tensors",
    },
)
