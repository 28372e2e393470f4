"""QINSEmbedding: torch's embedding with a quantized matrix."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..codec import EncodedArray, encode, warn_if_slow
from .affine_form import Affine, affine
from .coded import CodedWeight
from .ops import look_up


class QINSEmbedding(CodedWeight, nn.Embedding):
    """An embedding that stores its matrix as logarithmic codes and dequantizes only the rows that it looks up.

    The codes are frozen and have no gradient. `max_norm` and sparse gradients do not apply. If it replaces a subclass
    that multiplies the rows by a factor, or adds a parameter `bias`, it does the same.

    Args:
        num_embeddings: rows of the matrix.
        embedding_dim: its columns.
        padding_idx: as in nn.Embedding; only stored, since codes have no gradient.
        codec: "log8", "log6", "log5", "log4", "log9", "golden" or "rational".
        group_size: columns per group scale; "default" for 64 (log8) or 32 (log6, log5, log4); None for per-row scales
            only (log8).
        device: of the buffers.
        dtype: of the result.

    """

    _affine = Affine()

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        *,
        codec: str = "log8",
        group_size: int | str | None = "default",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Make a matrix of zeros, to be filled by `load_state_dict`; `from_embedding` quantizes an existing one."""
        nn.Module.__init__(self)
        self._make_codes((num_embeddings, embedding_dim), codec, group_size, device, dtype)
        self.embedding_dim, self.padding_idx = embedding_dim, padding_idx
        self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse = None, 2.0, False, False

    @property
    def num_embeddings(self) -> int:
        """Rows of the matrix; their number is fixed."""
        return self._shape[0]

    @num_embeddings.setter
    def num_embeddings(self, value: int) -> None:
        # transformers sets this when it resizes, after storing new float weights, which this module never reads
        if value != self._shape[0]:
            rows = self._shape[0]
            raise ValueError(
                f"a QINSEmbedding keeps its {rows} rows, got {value}; resize the float model, then quantize"
            )

    @classmethod
    def from_embedding(
        cls, source: nn.Embedding, codec: str = "log8", *, group_size: int | str | None = "default"
    ) -> QINSEmbedding:
        """Quantize an embedding.

        Args:
            source: the float embedding.
            codec: "log8", "log6", "log5", "log4", "log9", "golden" or "rational".
            group_size: as in the constructor.

        Returns:
            the quantized embedding.

        Raises:
            TypeError: `source` is not an nn.Embedding.
            ValueError: it has max_norm, which changes weights in forward; its class computes something other than rows
                times a factor plus a bias; or a weight is NaN or infinite.

        """
        if not isinstance(source, nn.Embedding) or isinstance(source, QINSEmbedding):
            raise TypeError(f"source: expected an nn.Embedding, got {type(source).__name__}")
        weight = source.weight
        new = cls.from_encoded(source, None, codec, group_size)
        warn_if_slow(codec, new.group_size)
        if weight.device.type != "meta":
            new._take_codes(encode(weight, codec, group_size=new.group_size), weight.device)
        return new

    @classmethod
    def from_encoded(
        cls, source: nn.Embedding, encoded: EncodedArray | None, codec: str, group_size: int | str | None
    ) -> QINSEmbedding:
        """Wrap the codes of source's weight; None makes an embedding on the meta device."""
        if source.max_norm is not None:
            raise ValueError(f"source: expected max_norm None, got {source.max_norm}")
        try:
            form = affine(source)
        except ValueError as e:
            raise ValueError(f"source: expected an nn.Embedding, got {e}") from None
        weight = source.weight
        new = cls(
            source.num_embeddings, source.embedding_dim, source.padding_idx, codec=codec, group_size=group_size,
            device="meta", dtype=weight.dtype,
        )  # fmt: skip
        if encoded is not None:
            new._take_codes(encoded, weight.device)
        new._affine = form
        if source._parameters.get("bias") is not None:
            new._parameters["bias"] = source._parameters["bias"]
        new.train(source.training)
        return new

    def to_float(self, dtype: torch.dtype | None = None) -> nn.Embedding:
        """Return a float embedding with the dequantized weight."""
        weight = nn.Parameter(self.weight.to(dtype or self._dtype))
        bias = self._parameters.get("bias")
        plain = self._affine == Affine() and bias is None
        new = (nn.Embedding if plain else _AffineEmbedding)(*self._shape, self.padding_idx, _weight=weight)
        if isinstance(new, _AffineEmbedding):
            new.affine = self._affine
            new.register_parameter("bias", bias)
        return new.train(self.training)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Look up and dequantize rows: (...) integers to (..., embedding_dim)."""
        fields: list[torch.Tensor] = [self._buffers[n] for n in self._names]  # type: ignore[misc]
        y = look_up(input, fields, self.codec, self.group_size, self._dtype)
        return self._affine(y, self._parameters.get("bias"))

    def extra_repr(self) -> str:
        """num_embeddings, embedding_dim, a factor, codec and group_size."""
        factor = "" if self._affine.factor == 1.0 else f"factor={self._affine.factor:g}, "
        return f"{self.num_embeddings}, {self.embedding_dim}, {factor}{self._codec_repr()}"


class _AffineEmbedding(nn.Embedding):
    """The float form of a QINSEmbedding with a factor or a bias."""

    affine: Affine
    bias: nn.Parameter | None

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return the rows times the factor, plus the bias."""
        return self.affine(super().forward(input), self.bias)
