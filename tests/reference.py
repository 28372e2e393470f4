"""The formats in float64 NumPy, slow and obvious: the reference for everything else."""

from __future__ import annotations

import numpy as np


def log8_levels(mu: float) -> np.ndarray:
    """f(m) for m in 0..127, rounded to float32."""
    part = np.arange(128) / 127
    f = np.expm1(part * np.log1p(mu)) / mu if mu > 0 else part
    return f.astype(np.float32)


def log8_scale(fields: dict, group_size: int | None, shape: tuple[int, int]) -> np.ndarray:
    """S of every weight, in float32 as the format specifies."""
    s = np.asarray(fields["scale"], np.float32)[:, None] * np.ones(shape, np.float32)
    if group_size:
        multiplier = (fields["group_scale"].astype(np.float32) + np.float32(1)) / np.float32(256)
        s = s * np.repeat(multiplier, group_size, axis=1)[:, : shape[1]]
    return s


def decode_log8(fields: dict, group_size: int | None = None) -> np.ndarray:
    codes = fields["codes"]
    value = log8_levels(float(fields["mu"]))[codes & 127] * log8_scale(fields, group_size, codes.shape)
    return np.where(codes >= 128, -value, value)


def nearest_log8(w: np.ndarray, scale: np.ndarray, mu: float) -> np.ndarray:
    """Codes of the nearest values."""
    f = log8_levels(mu).astype(np.float64)
    middle = (f[1:] + f[:-1]) / 2
    r = np.abs(w.astype(np.float64)) / np.where(scale > 0, scale, 1).astype(np.float64)
    m = np.searchsorted(middle, r, side="right")
    return (m | (np.signbit(w) << 7)).astype(np.uint8)


# bits of a packed code
BITS = {"log6": 6, "log5": 5, "log4": 4}


def packed_values(mu: float, bits: int) -> np.ndarray:
    """Value of every code q of log6, log5 or log4 for S = 1: first f(i/h), then -f((i + 1)/h)."""
    h = 1 << (bits - 1)
    part = np.arange(h + 1) / h
    f = (np.expm1(part * np.log1p(mu)) / mu if mu > 0 else part).astype(np.float32)
    return np.concatenate([f[:-1], -f[1:]])


def packed_scale(fields: dict, group_size: int, shape: tuple[int, int]) -> np.ndarray:
    """S of every weight, with its sign, in float32 as the format specifies."""
    group = fields["group_scale"].astype(int)
    multiplier = np.where(group >= 128, -1, 1) * ((group & 127) + 1) / 128
    s = np.asarray(fields["scale"], np.float32)[:, None] * multiplier.astype(np.float32)
    return np.repeat(s, group_size, axis=1)[:, : shape[1]]


def pack(q: np.ndarray, bits: int) -> np.ndarray:
    """Rows of codes as bytes: each block of up to 64 codes is a plane of their low 4 bits, then one of the rest."""
    rows = []
    for row in q.astype(int):
        data = []
        for block in np.split(row, range(64, len(row), 64)):
            for low, width in ((0, 4), (4, bits - 4)):
                plane = [0] * (len(block) * width // 8)
                for i in range(len(block) if width else 0):
                    j, at = divmod(i, len(plane))
                    plane[at] |= (int(block[i]) >> low) % (1 << width) << (width * j)
                data += plane
        rows.append(data)
    return np.array(rows, np.uint8).reshape(len(q), q.shape[1] * bits // 8)


def unpack(packed: np.ndarray, bits: int) -> np.ndarray:
    """Return the codes that `pack` packed."""
    cols = packed.shape[1] * 8 // bits
    q = np.zeros((len(packed), cols), int)
    at = 0
    for begin in range(0, cols, 64):
        count = min(64, cols - begin)
        for low, width in ((0, 4), (4, bits - 4)):
            size = count * width // 8
            for i in range(count if width else 0):
                j, byte = divmod(i, size)
                q[:, begin + i] |= (packed[:, at + byte].astype(int) >> (width * j)) % (1 << width) << low
            at += size
    return q


def decode_packed(fields: dict, codec: str, group_size: int) -> np.ndarray:
    bits = BITS[codec]
    q = unpack(fields[f"codes{bits}"], bits)
    return packed_values(float(fields["mu"]), bits)[q] * packed_scale(fields, group_size, q.shape)


def nearest_packed(w: np.ndarray, scale: np.ndarray, mu: float, bits: int) -> np.ndarray:
    """Codes of the nearest values."""
    values = packed_values(mu, bits).astype(np.float64) * scale.astype(np.float64)[..., None]
    return np.abs(values - w.astype(np.float64)[..., None]).argmin(-1)


def bfloat16_above(x: np.float32) -> np.float32:
    """Return the smallest bfloat16 that is not less than x >= 0."""
    above = (int(np.float32(x).view(np.uint32)) + 0xFFFF) >> 16 << 16
    return np.uint32(above).view(np.float32)


def packed_cache_row(w: np.ndarray, mu: float, bits: int) -> list[dict[int, tuple[np.ndarray, float]]]:
    """Codes and squared error of each group of 32 in a row of a KV cache, by group_scale.

    The candidates are 100, 95, 90 and 105 % of the smallest multiplier that covers the group, with both signs.
    """
    scale = cache_row_scale(w)
    found = []
    for group in np.split(w, range(32, len(w), 32)):
        of_group = np.float32(np.abs(group).max())
        cover = next(m for m in range(1, 129) if scale * np.float32(m / 128) >= of_group or m == 128)
        tried = {}
        for percent in (100, 95, 90, 105):
            m = min(max((2 * cover * percent // 2 + 50) // 100, 1), 128)
            for negative in (0, 128):
                s = scale * np.float32(m / 128) * (-1 if negative else 1)
                q = nearest_packed(group, np.full(len(group), s), mu, bits)
                error = ((packed_values(mu, bits).astype(np.float64)[q] * s - group) ** 2).sum()
                tried[m - 1 + negative] = q, float(error)
        found.append(tried)
    return found


def cache_row_scale(w: np.ndarray) -> np.float32:
    """Scale of a row of log6, log5 or log4 in a KV cache: the least bfloat16 of which 120/128 covers the row."""
    most = np.float32(np.abs(w).max())
    scale = most * np.float32(256 / 240)
    while scale * np.float32(240 / 256) < most:
        scale = np.nextafter(scale, np.float32(np.inf))
    return bfloat16_above(scale)


def encode_golden(w: np.ndarray) -> dict:
    """The seed's encoding, correctly rounded."""
    a = np.abs(w.astype(np.float64))
    large = a > np.float64(np.float32(1e-8))
    sign = np.where(w < 0, -1, 1).astype(np.int8)
    if not large.any():
        return {"stored": np.full(w.shape, 128, np.uint8), "sign": sign, "log_min": -10.0, "log_max": 0.0}
    log_min, log_max = (float(np.float32(np.log(x))) for x in (a[large].min(), a[large].max()))
    if log_max - log_min < 1e-8:
        return {"stored": np.full(w.shape, 128, np.uint8), "sign": sign, "log_min": log_min, "log_max": log_min}
    y = 255 - 254 * ((np.log(np.maximum(a, 1e-8)) - log_min) / (log_max - log_min))
    return {
        "stored": np.clip(np.rint(y), 1, 255).astype(np.uint8),
        "sign": sign,
        "log_min": log_min,
        "log_max": log_max,
    }


def decode_golden(f: dict) -> np.ndarray:
    lo, hi = float(f["log_min"]), float(f["log_max"])
    return f["sign"] * np.exp(lo + (255 - f["stored"].astype(np.float64)) / 254 * (hi - lo))


def encode_rational(w: np.ndarray, alpha: float, z_min: float, z_max: float) -> np.ndarray:
    """Codes of the nearest |z| in the given range, except for ties and rounding."""
    z = 1 / (1 + alpha * np.abs(w.astype(np.float64)))
    m = np.rint((z_max - z) / (z_max - z_min) * 127) if z_max > z_min else np.zeros(w.shape)
    return (np.clip(m, 0, 127).astype(np.uint8) | (w < 0).astype(np.uint8) << 7).astype(np.uint8)


def decode_rational(codes: np.ndarray, alpha: float, z_min: float, z_max: float) -> np.ndarray:
    z = z_max - (codes & 127) / 127 * (z_max - z_min)
    return np.where(codes >= 128, -1, 1) * (1 - z) / (alpha * z)


def snr_db(w: np.ndarray, q: np.ndarray) -> float:
    w, q = w.astype(np.float64), q.astype(np.float64)
    noise = ((w - q) ** 2).sum()
    return float(10 * np.log10((w**2).sum() / noise)) if noise else float("inf")


def feedback_targets(w: np.ndarray, values: np.ndarray, gram: np.ndarray, damping: float) -> np.ndarray:
    """Target that each weight should be rounded to, given the rounded values of the columns before it (published GPTQ).

    After each column is rounded, the inverse of the second moments spreads its error over the remaining columns.
    """
    h = gram.astype(np.float64)
    order = np.argsort(-h.diagonal(), kind="stable")
    inverse = np.linalg.inv(h + damping * h.diagonal().mean() * np.eye(len(h)))
    left, targets = w.astype(np.float64).copy(), np.empty(w.shape)
    for j in order:
        targets[:, j] = left[:, j]
        error = (left[:, j] - values[:, j]) / inverse[j, j]
        left -= error[:, None] * inverse[j]
        inverse = inverse - np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return targets


def exact_schemes(values: np.ndarray, mantissa_bits: int) -> dict:
    """Table, bits that follow and center by level and highest 3 bits of a mantissa; values: magnitudes by level."""
    v, schemes = values.astype(np.float64), {}
    for p in range(len(v)):
        below, above = max(p - 1, 0), min(p + 1, len(v) - 1)
        for m in range(8):
            if v[p] == 0:
                schemes[p, m] = 20, mantissa_bits, 0
                continue
            distance = abs(v[above] - v[below]) / (above - below) / v[p] * 2**mantissa_bits * (8.5 + m) / 8
            q = int(np.floor(4 * np.log2(max(distance, 1))))
            shift = max(q // 4 - 4, 0)
            schemes[p, m] = q - 4 * shift, min(shift, 15), 64
    return schemes


class ExactStream:
    """Reads a stream of residuals; qins_ext/exact.h and rans.h have the format."""

    def __init__(self, stream: bytes) -> None:
        self.data, self.at = bytes(stream), 0
        assert self.take(4) == b"qex1"
        self.dtype = {1: "float16", 2: "bfloat16"}[self.number(4)]
        self.rows, self.cols, self.block_rows, blocks = (self.number(n) for n in (8, 8, 4, 4))
        self.tables = [self.table() for _ in range(21)]
        self.blocks = [(self.number(4), self.number(4)) for _ in range(blocks)]

    def take(self, n: int) -> bytes:
        part = self.data[self.at : self.at + n]
        assert len(part) == n
        self.at += n
        return part

    def number(self, n: int) -> int:
        return int.from_bytes(self.take(n), "little")

    def table(self) -> list:
        """Symbol, frequency and offset in the symbol's slots, by slot."""
        first, n = self.number(1), self.number(1)
        stored = dict(enumerate(self.take(n), first)) | {255: self.number(1)}
        weight = {s: (8 + (b - 1) % 8) << (b - 1) // 8 if b else 0 for s, b in stored.items()}
        total = sum(weight.values())
        frequency = {s: max((w * 1024 + total // 2) // total, w > 0) for s, w in weight.items()}
        while (over := sum(frequency.values()) - 1024) != 0:
            largest = max(frequency.values())
            s = min(s for s in frequency if frequency[s] == largest)
            frequency[s] -= 1 if over > 0 else -1
        return [(s, f, i) for s, f in sorted(frequency.items()) for i in range(f)]

    def weights(self, levels: np.ndarray, decoded: np.ndarray, values: np.ndarray) -> np.ndarray:
        """Restore weights from their codes' levels and dequantized values, as bits."""
        mantissa = {"float16": 10, "bfloat16": 7}[self.dtype]
        schemes = exact_schemes(values, mantissa)
        out = np.zeros((self.rows, self.cols), np.uint16)
        for block, (words, bytes_of_bits) in enumerate(self.blocks):
            states = [self.number(4) for _ in range(16)]
            stream = [self.number(2) for _ in range(words)]
            bits, used = self.number(bytes_of_bits), 0
            for row in range(block * self.block_rows, min((block + 1) * self.block_rows, self.rows)):
                for col in range(self.cols):
                    d = int(decoded[row, col])
                    table, shift, center = schemes[int(levels[row, col]), d >> (mantissa - 3) & 7]
                    x = states[col % 16]
                    symbol, frequency, offset = self.tables[table][x % 1024]
                    x = frequency * (x // 1024) + offset
                    if x < 1 << 16:
                        x = x << 16 | stream.pop(0)
                    states[col % 16] = x
                    count = 16 if symbol == 255 else shift
                    low = bits >> used & ((1 << count) - 1)
                    used += count
                    if symbol == 255:
                        out[row, col] = low
                        continue
                    order = (d & 0x7FFF) + ((symbol - center) << shift) + low
                    magnitude, negative = (~order, 1) if order < 0 else (order, 0)
                    out[row, col] = magnitude | (d & 0x8000) ^ (negative << 15)
            assert states == [1 << 16] * 16
            assert not stream
            assert (used + 7) // 8 == bytes_of_bits
        assert self.at == len(self.data)
        return out
