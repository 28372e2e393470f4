"""Error feedback: rounding that minimizes the error of a layer's outputs, given second moments of its inputs."""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import _core
from ..system import get_num_threads
from .array import EncodedArray, encode
from .dtypes import Array, as_float32

DAMPING = 0.1

_ROWS = 256  # rows of a matrix processed at a time; all at once would double the memory, and Ctrl-C would wait


class ErrorFeedback:
    """Quantizes to log8, log6, log5 or log4, minimizing the error of a layer's outputs rather than of its weights.

    The inputs' mean squares weight the search for mu and scales. Then columns are rounded one after another, by
    descending mean square, and each compensates for the errors that earlier columns caused in the outputs. With the
    inputs' second moments H, in that order, plus `damping` times its mean diagonal,

        H = (A + I) D (A + I)^T,  A strictly upper triangular, D diagonal

    (a Cholesky factorization from the last column back), and column j takes the codes nearest to
    w_j + sum over i < j of (w_i - value_i) A[i, j]. This is GPTQ (Frantar et al., 2022, arXiv:2210.17323) in the form
    of LDLQ (Chee et al., 2023, arXiv:2307.13304, Theorem 6), which needs no inverse. The format stays the same.

    Args:
        gram: (K, K), the sum or mean of x x^T over the layer's input tokens x.
        damping: added to gram's diagonal, as a share of its mean.

    Attributes:
        importance: (K,), gram's diagonal.
        order: (K,) uint32, the columns in rounding order.
        factors: (K, K) float32, A^T.

    Raises:
        ValueError: gram is not a symmetric matrix of finite numbers with a diagonal >= 0, or is singular despite the
            damping.

    """

    def __init__(self, gram: Any, damping: float = DAMPING) -> None:
        """Factorize gram; one object serves all layers that share their inputs."""
        if not damping >= 0:
            raise ValueError(f"damping: expected a number >= 0, got {damping!r}")
        h = _check_gram(gram)
        cols = h.shape[0]
        self.importance: Array = h.diagonal().copy()
        order = np.argsort(-self.importance, kind="stable")
        self.order: Array = order.astype(np.uint32)
        self.factors: Array = np.zeros((cols, cols), np.float32)
        mean = float(self.importance.mean()) if cols else 0.0
        if mean == 0.0:  # inputs that are always zero need no feedback
            return
        # from the last column back; float64 matrices are freed as soon as possible
        backward = np.empty_like(h)
        for row in range(0, cols, _ROWS):
            backward[row : row + _ROWS] = h[np.ix_(order[::-1][row : row + _ROWS], order[::-1])]
        del h
        backward[np.diag_indices(cols)] += damping * mean
        try:
            _factorize(backward)
        except np.linalg.LinAlgError:
            raise ValueError(
                f"gram: singular with a damping of {damping:g}; use more tokens of more varied text, or more damping"
            ) from None
        upper = backward[::-1, ::-1]  # H = upper upper^T
        for j in range(0, cols, _ROWS):
            columns = upper[:, j : j + _ROWS]
            scaled = columns / upper.diagonal()[j : j + _ROWS]
            self.factors[j : j + _ROWS] = np.tril(scaled.T, j - 1)

    def encode(
        self, weights: Any, codec: str = "log8", *, group_size: int | None = None, mu: float | None = None
    ) -> EncodedArray:
        """Quantize an (N, K) floating-point array or CPU tensor to log8, log6, log5 or log4.

        Arguments and errors are those of `qins.encode`.
        """
        w = as_float32(weights)
        cols = len(self.order)
        if w.ndim != 2 or w.shape[1] != cols:
            raise ValueError(f"weights: expected shape (N, {cols}), got {w.shape}")
        e = encode(w, codec, group_size=group_size, mu=mu, importance=self.importance)
        (mu_found,) = e.scalars
        _core.feedback(codec, w, self.order, self.factors, e.arrays, mu_found, e.group_size or 0, get_num_threads())
        return e


def _factorize(h: Array) -> None:
    """Replace the lower triangle of h by its Cholesky factor, in parts that Ctrl-C need not wait for.

    Raises:
        numpy.linalg.LinAlgError: h is not positive definite.

    """
    size = len(h)
    for begin in range(0, size, _ROWS):
        end = min(begin + _ROWS, size)
        h[begin:end, begin:end] = np.linalg.cholesky(h[begin:end, begin:end])
        h[end:, begin:end] = np.linalg.solve(h[begin:end, begin:end], h[end:, begin:end].T).T
        for row in range(end, size, 4 * _ROWS):
            below = slice(row, min(row + 4 * _ROWS, size))
            h[below, end : below.stop] -= h[below, begin:end] @ h[end : below.stop, begin:end].T


def _check_gram(gram: Any) -> Array:
    h = np.asarray(gram, np.float64)
    if h.ndim != 2 or h.shape[0] != h.shape[1]:
        raise ValueError(f"gram: expected a square matrix, got shape {h.shape}")
    largest = float(max(h.max(initial=0.0), -h.min(initial=0.0)))
    if not np.isfinite(largest):
        raise ValueError("gram: expected finite numbers, got NaN or infinite ones")
    if (h.diagonal() < 0).any():
        raise ValueError(f"gram: expected a diagonal that is not negative, got {h.diagonal().min()}")
    for row in range(0, h.shape[0], _ROWS):
        part, turned = h[row : row + _ROWS], h[:, row : row + _ROWS].T
        if np.abs(part - turned).max(initial=0.0) > 1e-4 * largest:
            raise ValueError("gram: expected a symmetric matrix, got one that differs from its transpose")
    return h
