"""QinsConfig: the quantization config for transformers."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from ..codec import check_codec, check_group_size, format_of, resolve_group_size, warn_if_slow

FORMAT_VERSION = 1


class QinsConfig(QuantizationConfigMixin):
    """How to quantize a model: `AutoModel.from_pretrained(name, quantization_config=QinsConfig())`.

    Args:
        codec: "log8", "log6", "log5", "log4", "log9", "golden" or "rational". If in_features is not a
            multiple of 8, a module gets log8 instead of log6, log5 or log4.
        group_size: inputs per group scale; "default" for 64 (log8) or 32 (log6, log5, log4), None for per-row scales
            (log8).
        include: fnmatch patterns of module names to quantize; None for all linear layers.
        exclude: patterns of module names to skip, in addition to the output embedding and routers of experts.
        modules_to_not_convert: names or name suffixes, as in other quantization configs; added to `exclude`.
        overrides: pattern to a dict with "codec" and "group_size"; the first pattern that matches a module applies.
        calibration: text file to calibrate codes on when a float model is loaded (see `qins.calibrate`); in a saved
            checkpoint, a dict that records the calibration.
        calibration_tokens: maximum number of tokens of that text.
        lm_head: also quantize the output embedding. If it is tied to the input embedding, it gets codes of its own,
            unless `embeddings` makes both share one set.
        embeddings: also quantize the input embedding.
        min_quantized: minimum quantized share of all parameters, 0 to 1; less is an error.
        format_version: format version of a saved checkpoint.
        checksums: of a saved checkpoint: CRC-32 of each tensor's bytes, in hexadecimal; `qins inspect` checks them.
        source: of a saved checkpoint: `qins.files.fingerprint` of the files it was made from.
        source_format: of a saved checkpoint: the format of these files' weights, if they were in 8 or 4 bits.
        modules: of a saved checkpoint: name of each quantized module, or stack of experts, to its codec, its group_size
            and, if it shares another module's codes, that module's name.
        verify: check the tensors of a quantized checkpoint against its checksums while loading, which reads all of its
            files. The environment variable QINS_VERIFY=1 does the same. It is not saved.
        decode_step: run decoder layers that the core supports in one call of the core each when decoding a few tokens.
            The environment variable QINS_DECODE_STEP=0 disables it for all models. It is not saved.
        restore: load the original of a checkpoint that was converted with `qins quantize --exact`: its float weights,
            bit for bit. It is not saved.
        exact: when the model is saved, also write `exact-*.safetensors`, from which `qins restore` restores the float
            checkpoint that was loaded, bit for bit. It is not saved.

    Raises:
        ValueError, TypeError: an argument is unknown or out of range.

    """

    quant_method: Any  # Any: transformers' enum has only its own methods
    released: dict[str, Any] | None  # during loading: quantization_config of an 8-bit or 4-bit checkpoint

    def __init__(
        self,
        codec: str = "log8",
        group_size: int | str | None = "default",
        include: list[str] | None = None,
        exclude: list[str] | tuple[str, ...] = (),
        modules_to_not_convert: list[str] | None = None,
        overrides: dict[str, dict[str, Any]] | None = None,
        calibration: str | dict[str, Any] | None = None,
        calibration_tokens: int = 8192,
        lm_head: bool = False,
        embeddings: bool = False,
        min_quantized: float = 0.0,
        format_version: int = FORMAT_VERSION,
        modules: dict[str, list[Any]] | None = None,
        checksums: dict[str, str] | None = None,
        source: str | None = None,
        source_format: str | None = None,
        verify: bool = False,
        decode_step: bool = True,
        restore: bool = False,
        exact: bool = False,
        **unknown: Any,
    ) -> None:
        method = unknown.pop("quant_method", "qins")
        if method != "qins":
            raise ValueError(f"quant_method: expected 'qins', got {method!r}")
        if unknown:
            raise TypeError(f"QinsConfig: unknown arguments {', '.join(sorted(unknown))}")
        if format_version != FORMAT_VERSION:
            raise ValueError(
                f"format_version: this qins reads version {FORMAT_VERSION}, the checkpoint has {format_version!r}; "
                "another version of qins wrote it"
            )
        _expect("codec", codec, str)
        resolve_group_size(codec, group_size, 1)
        for name, value in {"overrides": overrides, "modules": modules, "checksums": checksums}.items():
            _expect(name, value, dict, type(None))
        _expect("source", source, str, type(None))
        _expect("source_format", source_format, str, type(None))
        _expect("calibration_tokens", calibration_tokens, int)
        _expect("min_quantized", min_quantized, float, int)
        if modules is None:  # for a saved checkpoint, the warning comes too late
            warn_if_slow(codec, group_size)
        for pattern, values in (overrides or {}).items():
            _expect(f"overrides[{pattern!r}]", values, dict)
            other = sorted(set(values) - {"codec", "group_size"})
            if other:
                raise ValueError(f"overrides[{pattern!r}]: expected codec and group_size, got {', '.join(other)}")
            chosen = values.get("codec", codec), values.get("group_size", "default")
            resolve_group_size(*chosen, 1)
            if modules is None:
                warn_if_slow(*chosen)
        if not 0.0 <= float(min_quantized) <= 1.0:
            raise ValueError(f"min_quantized: expected a share from 0 to 1, got {min_quantized!r}")
        self.quant_method, self.released = "qins", None
        self.codec, self.group_size = codec, group_size
        self.include = None if include is None else _strings("include", include)
        self.exclude = _strings("exclude", exclude)
        self.modules_to_not_convert = _strings("modules_to_not_convert", modules_to_not_convert or [])
        self.overrides = dict(overrides or {})
        if not (calibration is None or isinstance(calibration, (str, dict))):
            raise TypeError(f"calibration: expected the name of a text file, got {calibration!r}")
        self.calibration, self.calibration_tokens = calibration, calibration_tokens
        self.lm_head, self.embeddings = bool(lm_head), bool(embeddings)
        self.min_quantized = float(min_quantized)
        self.format_version = format_version
        self.modules, self.checksums, self.source, self.source_format = modules, checksums, source, source_format
        self.verify, self.decode_step = bool(verify), bool(decode_step)
        self.restore, self.exact = bool(restore), bool(exact)
        for name, about in (modules or {}).items():
            try:
                _check_entry(about)
            except (ValueError, TypeError) as e:
                raise type(e)(f"modules[{name!r}]: {e}") from None

    def to_dict(self) -> dict[str, Any]:
        """Return what is saved: everything except the loading attributes."""
        saved: dict[str, Any] = super().to_dict()
        for name in self.get_loading_attributes():
            del saved[name]
        saved.pop("released")
        if self.source_format is None:  # earlier versions do not know the key
            del saved["source_format"]
        return saved

    def get_loading_attributes(self) -> dict[str, Any]:
        """Return the settings that still apply if this config is passed for a checkpoint that has its own."""
        return {name: getattr(self, name) for name in ("verify", "decode_step", "restore", "exact")}

    @property
    def dequantize(self) -> bool:
        """Whether a checkpoint of codes becomes a float model; transformers then forgets this config."""
        return self.restore

    def to_diff_dict(self) -> dict[str, Any]:
        """Return everything: transformers 4 calls this and has no default implementation."""
        return self.to_dict()

    def asked(self, name: str) -> tuple[str, int | str | None]:
        """Return the codec and group size that the settings give a module."""
        for pattern, values in self.overrides.items():
            if fnmatchcase(name, pattern):
                return values.get("codec", self.codec), values.get("group_size", "default")
        return self.codec, self.group_size

    def layer(self, name: str, in_features: int) -> tuple[str, int | None]:
        """Return codec and group size of a module; log8 replaces a packed codec that its rows do not fit."""
        return format_of(*self.asked(name), in_features)


def _expect(name: str, value: Any, *kinds: type) -> None:
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        words = " or ".join("null" if k is type(None) else k.__name__ for k in kinds)
        raise TypeError(f"{name}: expected {words}, got {value!r}")


def _check_entry(about: Any) -> None:
    """Check a saved module entry: codec, group size, and optionally the module whose codes it shares."""
    _expect("codes", about, list, tuple)
    if len(about) not in (2, 3):
        raise ValueError(f"expected codec and group_size, and optionally a module's name, got {about!r}")
    _expect("codec", about[0], str)
    check_codec(about[0])
    check_group_size(about[0], about[1])
    if len(about) == 3:
        _expect("the module whose codes it shares", about[2], str)


def _strings(argument: str, values: Any) -> list[str]:
    if not isinstance(values, (str, list, tuple, set, frozenset)):
        raise TypeError(f"{argument}: expected strings, got {values!r}")
    listed = [values] if isinstance(values, str) else list(values)
    if not all(isinstance(v, str) for v in listed):
        raise TypeError(f"{argument}: expected strings, got {values!r}")
    return listed
