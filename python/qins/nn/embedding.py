"""QINSEmbedding: torch's embedding with its matrix as codes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..codec import EncodedArray, encode, warn_if_slow
from .affine_form import Affine, affine
from .coded import CodedWeight
from .ops import embedding


class QINSEmbedding(CodedWeight, nn.Embedding):
    """An embedding that keeps its matrix as 8-bit logarithmic codes and decodes the rows that are asked for.

    The codes are frozen: there is no gradient. `max_norm` and sparse gradients do not apply. Where it stands for
    a subclass that multiplies the rows by a factor, or adds a parameter `bias`, it does the same.

    Args:
        num_embeddings: rows of the matrix.
        embedding_dim: its columns.
        padding_idx: as nn.Embedding's; kept for whoever reads it.
        codec: "log8", "log9", "golden" or "rational".
        group_size: columns that share a group scale (log8); None for one scale a row; "default" for what
            `qins.default_group_size` says of embedding_dim.
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
        """Make a matrix of zeros, for `load_state_dict` to fill; `from_embedding` encodes an existing one."""
        nn.Module.__init__(self)
        self._make_codes((num_embeddings, embedding_dim), codec, group_size, device, dtype)
        self.embedding_dim, self.padding_idx = embedding_dim, padding_idx
        self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse = None, 2.0, False, False

    @property
    def num_embeddings(self) -> int:
        """Rows of the matrix; they cannot be more or fewer afterwards."""
        return self._shape[0]

    @num_embeddings.setter
    def num_embeddings(self, value: int) -> None:
        # what transformers sets when it resizes, having put new floats where nobody sees them
        if value != self._shape[0]:
            rows = self._shape[0]
            raise ValueError(
                f"a QINSEmbedding keeps its {rows} rows, got {value}; resize the float model, then quantize"
            )

    @classmethod
    def from_embedding(
        cls, source: nn.Embedding, codec: str = "log8", *, group_size: int | str | None = "default"
    ) -> QINSEmbedding:
        """Encode an embedding's matrix.

        Raises:
            TypeError: `source` is not an nn.Embedding.
            ValueError: it has max_norm, which changes weights in forward, or is of a class that computes something else
                than rows times a factor plus a bias; or a weight is NaN or infinite.

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
        """Wrap codes that stand for source's weight; None makes an embedding on the meta device."""
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
        """Return an embedding of the floats that the codes stand for."""
        weight = nn.Parameter(self.weight.to(dtype or self._dtype))
        bias = self._parameters.get("bias")
        plain = self._affine == Affine() and bias is None
        new = (nn.Embedding if plain else _AffineEmbedding)(*self._shape, self.padding_idx, _weight=weight)
        if isinstance(new, _AffineEmbedding):
            new.affine = self._affine
            new.register_parameter("bias", bias)
        return new.train(self.training)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return the rows of these numbers: (...) integers to (..., embedding_dim)."""
        fields: list[torch.Tensor] = [self._buffers[n] for n in self._names]  # type: ignore[misc]
        y: torch.Tensor = embedding(input, fields, self.codec, self.group_size or 0, self._dtype)
        return self._affine(y, self._parameters.get("bias"))

    def extra_repr(self) -> str:
        """num_embeddings, embedding_dim, a factor, codec and group_size."""
        factor = "" if self._affine.factor == 1.0 else f"factor={self._affine.factor:g}, "
        return f"{self.num_embeddings}, {self.embedding_dim}, {factor}{self._codec_repr()}"


class _AffineEmbedding(nn.Embedding):
    """What a QINSEmbedding with a factor or a bias becomes as floats."""

    affine: Affine
    bias: nn.Parameter | None

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return the rows times the factor, plus the bias."""
        return self.affine(super().forward(input), self.bias)
