"""torch: operators on codes, quantized modules, and in-place conversion of models."""

from .affine_form import affine
from .choosing import check_finite, choose, choose_experts, other_matrices
from .coded import Coded, CodedWeight, field_layout, floats_as_bits
from .comparing import WeightComparison
from .converting import (
    Places,
    after_conversion,
    convert,
    encode_experts,
    keep_hooks,
    places_of,
    sharing_codes,
    tell_others,
)
from .embedding import QINSEmbedding
from .experts import QINSExperts, format_of_experts, projections, stack_sizes
from .kv_cache import GrowingTokens, QINSKVCache, cache_row_bytes, check_cache_codec, savings
from .linear import QINSLinear
from .memory import MemoryReport, memory_report
from .ops import is_watched, linear, multiply, multiply_codes, numbers_of, set_fused_rows
from .placing import place_codes
from .rational import QINSWeightLinear, convert_linear_to_qins, verify_qins_layer
from .report import ConversionReport, ConvertedModule, SkippedModule

__all__ = [
    "Coded",
    "CodedWeight",
    "ConversionReport",
    "ConvertedModule",
    "GrowingTokens",
    "MemoryReport",
    "Places",
    "QINSEmbedding",
    "QINSExperts",
    "QINSKVCache",
    "QINSLinear",
    "QINSWeightLinear",
    "SkippedModule",
    "WeightComparison",
    "affine",
    "after_conversion",
    "cache_row_bytes",
    "check_cache_codec",
    "check_finite",
    "choose",
    "choose_experts",
    "convert",
    "convert_linear_to_qins",
    "encode_experts",
    "field_layout",
    "floats_as_bits",
    "format_of_experts",
    "is_watched",
    "keep_hooks",
    "linear",
    "memory_report",
    "multiply",
    "multiply_codes",
    "numbers_of",
    "other_matrices",
    "place_codes",
    "places_of",
    "projections",
    "savings",
    "set_fused_rows",
    "sharing_codes",
    "stack_sizes",
    "tell_others",
    "verify_qins_layer",
]
