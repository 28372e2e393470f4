"""transformers: quantising while a model loads, loading and saving codes.

`qins.QinsConfig` is the quantization_config; transformers finds the quantizer under quant_method "qins" once this
module is imported, which `import qins` sees to (see _autoload.py).
"""

from __future__ import annotations

import logging
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ._hf_calibration import calibrate_loaded
from ._pages import page_out
from .array import check_codec, encode, field_shapes
from .conversion import ConversionReport, ConvertedModule, SkippedModule
from .linear import FIELD_DTYPES, QINSLinear, resolve_group_size
from .models import read_text

_VERSION = int(transformers.__version__.partition(".")[0])

logger = logging.getLogger("qins")

FORMAT_VERSION = 1

# Routers of experts are small and decide where every token goes; transformers 4 has them as linear layers.
_ROUTERS = ("*.gate", "*.router", "*.shared_expert_gate")


class QinsConfig(QuantizationConfigMixin):
    """How to quantise a model: `AutoModel.from_pretrained(name, quantization_config=QinsConfig())`.

    Args:
        codec: "log8", "log9", "golden" or "rational".
        group_size: inputs that share a group scale (log8); "default" for what `qins.default_group_size` says of each
            layer, None for one scale a row.
        include: fnmatch patterns of module names to quantise; None for all linear layers.
        exclude: patterns of module names to leave alone, besides the output embedding and routers of experts.
        modules_to_not_convert: names or endings of names, as in other quantization configs; added to `exclude`.
        overrides: pattern to a dict with "codec" and "group_size"; the first pattern that matches a module counts.
        calibration: text file that log8's codes are chosen with in view (see `qins.calibrate`), when a float model is
            loaded; in a saved checkpoint a dict that says what was used.
        calibration_tokens: of that text, at most.
        min_quantized: least share of the bytes of all parameters, 0 to 1, that must become codes; less is an error.
        format_version: of a saved checkpoint.
        modules: of a saved checkpoint: name of each quantised module to its codec and group_size.

    Raises:
        ValueError, TypeError: an argument is unknown or out of range.

    """

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
        min_quantized: float = 0.0,
        format_version: int = FORMAT_VERSION,
        modules: dict[str, list[Any]] | None = None,
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
        resolve_group_size(codec, group_size, 1)
        for pattern, values in (overrides or {}).items():
            other = sorted(set(values) - {"codec", "group_size"})
            if other:
                raise ValueError(f"overrides[{pattern!r}]: expected codec and group_size, got {', '.join(other)}")
            resolve_group_size(values.get("codec", codec), values.get("group_size", "default"), 1)
        if not 0.0 <= float(min_quantized) <= 1.0:
            raise ValueError(f"min_quantized: expected a share from 0 to 1, got {min_quantized!r}")
        self.quant_method = "qins"  # type: ignore[assignment]
        self.codec, self.group_size = codec, group_size
        self.include = None if include is None else _strings("include", include)
        self.exclude = _strings("exclude", exclude)
        self.modules_to_not_convert = _strings("modules_to_not_convert", modules_to_not_convert or [])
        self.overrides = dict(overrides or {})
        if not (calibration is None or isinstance(calibration, (str, dict))):
            raise TypeError(f"calibration: expected the name of a text file, got {calibration!r}")
        self.calibration, self.calibration_tokens = calibration, calibration_tokens
        self.min_quantized = float(min_quantized)
        self.format_version = format_version
        self.modules = modules
        for name, (module_codec, _) in (modules or {}).items():
            try:
                check_codec(module_codec)
            except ValueError as e:
                raise ValueError(f"modules[{name!r}]: {e}") from None

    def to_diff_dict(self) -> dict[str, Any]:
        """Everything: transformers 4 asks for it and has no default."""
        return self.to_dict()

    def layer(self, name: str, in_features: int) -> tuple[str, int | None]:
        """Codec and group size of a module."""
        for pattern, values in self.overrides.items():
            if fnmatchcase(name, pattern):
                codec = values.get("codec", self.codec)
                return codec, resolve_group_size(codec, values.get("group_size", "default"), in_features)
        return self.codec, resolve_group_size(self.codec, self.group_size, in_features)


def _strings(argument: str, values: Any) -> list[str]:
    listed = [values] if isinstance(values, str) else list(values)
    if not all(isinstance(v, str) for v in listed):
        raise TypeError(f"{argument}: expected strings, got {values!r}")
    return listed


class _PendingLinear(QINSLinear):
    """A QINSLinear that still waits for its float weight, for the loader to find a key to match.

    The weight is a parameter on the meta device, of the shape that the checkpoint has.
    """

    transposed: bool  # the checkpoint's weight is (in_features, out_features), as Conv1D's

    @property
    def weight(self) -> torch.Tensor:
        """The parameter that stands for the weight to come."""
        return self._parameters["weight"]  # type: ignore[return-value]

    @weight.setter
    def weight(self, value: Any) -> None:
        # transformers fills what the checkpoint lacks; the quantizer then says what that was
        self._parameters["weight"] = value

    def accept(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """Encode the weight; from now on this is a QINSLinear."""
        fields = encode(weight.T if self.transposed else weight, self.codec, group_size=self.group_size).fields
        del self._parameters["weight"]
        self.__class__ = QINSLinear  # type: ignore[assignment]
        return {n: torch.from_numpy(f) for n, f in fields.items()}


def pending_layers(model: nn.Module) -> dict[str, _PendingLinear]:
    """The layers of a model, by name, that wait for a weight to encode."""
    return {n: m for n, m in model.named_modules() if isinstance(m, _PendingLinear)}


def conv1d() -> type[nn.Module]:
    """Transformers' linear layer with the weight transposed, as GPT-2 has it."""
    from transformers.pytorch_utils import Conv1D

    conv: type[nn.Module] = Conv1D
    return conv


class QinsHfQuantizer(HfQuantizer):
    """What transformers calls while it loads a model with a QinsConfig."""

    quantization_config: QinsConfig
    requires_calibration = False
    requires_parameters_quantization = True  # transformers 4

    def __init__(self, quantization_config: QinsConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.report = ConversionReport()
        self._dtype: torch.dtype | None = None
        self._missing_biases: list[str] = []

    @property
    def is_trainable(self) -> bool:
        """Gradients flow through the codes, so adapters can be trained."""
        return True

    @property
    def is_compileable(self) -> bool:
        """The operators have fake kernels."""
        return True

    def is_serializable(self, safe_serialization: Any = None) -> bool:
        """Codes are ordinary buffers."""
        return True

    def update_device_map(self, device_map: Any) -> Any:
        """Codes are made and multiplied on the CPU.

        Raises:
            ValueError: the map names anything else.

        """
        if device_map is None:
            return None  # which is the CPU, and does not need accelerate
        if device_map in ("auto", "cpu") or device_map == torch.device("cpu"):
            return {"": "cpu"}
        devices = set(device_map.values()) if isinstance(device_map, dict) else {device_map}
        if all(str(d) == "cpu" for d in devices):
            return device_map
        raise ValueError(f"device_map: qins runs on the CPU, got {device_map!r}; leave device_map out or give 'cpu'")

    # -- before the weights -----------------------------------------------------------------------

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        if self.pre_quantized:
            self._expect_codes(model)
        elif isinstance(self.quantization_config.calibration, str):
            read_text(self.quantization_config.calibration)  # a file that cannot be read is better known now
        else:
            self._expect_floats(model)

    def _expect_codes(self, model: Any) -> None:
        """Replace the modules that the checkpoint has codes for."""
        modules = self.quantization_config.modules
        if modules is None:
            raise ValueError("quantization_config: expected the list of quantised modules of a saved checkpoint")
        prefix = model.base_model_prefix + "." if model.base_model_prefix else ""
        found = 0
        for name, module in list(model.named_modules()):
            # a headless model, or one with a new head, has the same modules with or without the prefix
            entry = next((modules[n] for n in (name, prefix + name, name.removeprefix(prefix)) if n in modules), None)
            if entry is None or not isinstance(module, (nn.Linear, conv1d())):
                continue
            in_features, out_features = sizes(module)
            weight: torch.Tensor = module.weight  # type: ignore[assignment]
            new = QINSLinear(
                in_features, out_features, bias=module.bias is not None, codec=entry[0], group_size=entry[1],
                device="meta", dtype=weight.dtype,
            )  # fmt: skip
            self.put(model, name, module, new)
            found += 1
        # What the model keeps in float32, transformers 5.0 casts whole: of these modules the codes, too.
        coded = {part for n, m in model.named_modules() if isinstance(m, QINSLinear) for part in n.split(".")}
        plan = getattr(model, "dtype_plan", None)
        if plan:
            model.dtype_plan = {k: v for k, v in plan.items() if k not in coded}
        if modules and not found:
            first = next(iter(modules))
            raise ValueError(f"no module of {type(model).__name__} is among those of the checkpoint, such as {first}")

    def chosen(self, model: Any) -> dict[str, nn.Module]:
        """Return the modules that are to be quantised, by name; the report is told of the others."""
        output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        found: dict[str, nn.Module] = {}
        for name, module in model.named_modules():
            if not isinstance(module, (nn.Linear, conv1d())):
                continue
            reason = self._reason_to_skip(name, module, output)
            if reason is None:
                found[name] = module
            else:
                self.report.skipped.append(SkippedModule(name, type(module).__name__, reason))
        if not found:
            raise ValueError(f"QinsConfig: no linear layer of {type(model).__name__} is to be quantised")
        return found

    def _expect_floats(self, model: Any) -> None:
        """Replace the modules that are to be quantised while their weights arrive."""
        config = self.quantization_config
        for name, module in self.chosen(model).items():
            in_features, out_features = sizes(module)
            weight: torch.Tensor = module.weight  # type: ignore[assignment]
            codec, size = config.layer(name, in_features)
            new = _PendingLinear(
                in_features, out_features, bias=module.bias is not None, codec=codec, group_size=size, device="meta",
                dtype=weight.dtype,
            )  # fmt: skip
            new.transposed = not isinstance(module, nn.Linear)
            new._parameters["weight"] = nn.Parameter(weight.detach().to("meta"), requires_grad=False)
            self.put(model, name, module, new)

    def put(self, model: Any, name: str, old: nn.Module, new: QINSLinear) -> None:
        """Replace a module."""
        new.train(old.training)
        new.__dict__["_is_hf_initialized"] = True  # there is no float weight to initialise
        model.set_submodule(name, new)

    def _reason_to_skip(self, name: str, module: nn.Module, output: nn.Module | None) -> str | None:
        config = self.quantization_config
        if module is output:
            return "the output embedding"
        if type(module) not in (nn.Linear, conv1d()):
            return "a subclass, which may compute something else"
        if any(name == n or name.endswith("." + n) or name.startswith(n + ".") for n in config.modules_to_not_convert):
            return "in modules_to_not_convert"
        if any(fnmatchcase(name, p) for p in config.exclude):
            return "excluded"
        if config.include is not None and not any(fnmatchcase(name, p) for p in config.include):
            return "not included"
        if any(fnmatchcase(name, p) for p in _ROUTERS):
            return "a router"
        return None

    # -- while they arrive ------------------------------------------------------------------------

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Whether a key of the checkpoint is a weight that is to be encoded."""
        module, _, tensor = param_name.rpartition(".")
        return tensor == "weight" and isinstance(_submodule(model, module), _PendingLinear)

    def get_quantize_ops(self) -> Any:
        """The operation that transformers 5 runs on such a weight."""
        from transformers.core_model_loading import ConversionOps

        quantizer = self

        class QinsQuantize(ConversionOps):
            def convert(self, input_dict: dict[str, Any], *args: Any, model: Any = None, **kwargs: Any) -> Any:
                missing = kwargs.get("missing_keys")
                result: dict[str, Any] = {}
                for name in list(input_dict):  # several where one stored weight is split into more
                    value = input_dict.pop(name)
                    value = value[0] if isinstance(value, list) else value
                    if not quantizer.param_needs_quantization(model, name):
                        result[name] = value
                        continue
                    result |= quantizer.encode_weight(model, name, value)
                    if missing is not None:
                        missing.discard(name)
                return result

        return QinsQuantize()

    def create_quantized_param(self, model: Any, param_value: torch.Tensor, param_name: str, *args: Any) -> None:
        """Encode a weight: what transformers 4 calls."""
        for name, value in self.encode_weight(model, param_name, param_value).items():
            path, _, field = name.rpartition(".")
            model.get_submodule(path)._buffers[field] = value

    def update_missing_keys(self, model: Any, missing_keys: list[str], prefix: str) -> list[str]:
        """Raise for missing weights and codes before transformers 4 makes them up."""
        # It would also cast scales to the model's dtype; so nothing is cast, and what is not codes is afterwards.
        self._dtype, model.config._pre_quantization_dtype = model.config._pre_quantization_dtype, None
        kept, lost = [], []
        for key in missing_keys:
            path, _, field = key.rpartition(".")
            module = _submodule(model, path)
            if not isinstance(module, QINSLinear):
                kept.append(key)
            elif field == "bias":
                self._missing_biases.append(path)
                kept.append(key)
            elif field == "weight" or not isinstance(module, _PendingLinear):
                lost.append(key)
        if lost:
            what = "codes" if self.pre_quantized else "weight"
            raise RuntimeError(f"the checkpoint has no {what} for {_some(lost)}")
        return kept

    def encode_weight(self, model: Any, name: str, value: torch.Tensor) -> dict[str, torch.Tensor]:
        """Encode the weight of this key; return buffers by key."""
        path = name.rpartition(".")[0]
        module: _PendingLinear = model.get_submodule(path)
        try:
            codes = module.accept(value)
            page_out(value)
        except ValueError as e:
            raise ValueError(f"{path}: {e}") from None
        return {f"{path}.{n}": t for n, t in codes.items()}

    # -- after them -------------------------------------------------------------------------------

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if not self.pre_quantized and isinstance(self.quantization_config.calibration, str):
            calibrate_loaded(self, model)
        layers = {n: m for n, m in model.named_modules() if isinstance(m, QINSLinear)}
        pending = pending_layers(model)
        if pending:
            raise RuntimeError(f"the checkpoint has no weight for {_some(list(pending))}")
        lost = [f"{n}.{b}" for n, m in layers.items() for b in m._names if not _is_loaded(m._buffers[b])]
        if lost:
            raise RuntimeError(f"the checkpoint has no codes, or codes of another shape, for {_some(lost)}")
        for name, layer in layers.items():
            _check_layer(name, layer)
            bias = layer._parameters["bias"]
            if bias is not None and (name in self._missing_biases or not _is_loaded(bias)):
                nn.init.zeros_(bias)
        if _VERSION < 5:
            model.config._pre_quantization_dtype = self._dtype
            model.to(self._dtype)
        model.config.quantization_config = self.quantization_config
        self._keep_names_on_saving(model)
        self.audit(model)
        return model

    def _keep_names_on_saving(self, model: Any) -> None:
        """Drop conversions that would take codes for the weights that they split or join."""
        conversions = getattr(model, "_weight_conversions", None)
        if conversions:
            from transformers.core_model_loading import WeightConverter

            model._weight_conversions = [c for c in conversions if not isinstance(c, WeightConverter)]

    def audit(self, model: Any) -> ConversionReport:
        """List what is quantised and what is not; raise if it is less than min_quantized asks for."""
        config = self.quantization_config
        report = ConversionReport(skipped=list(self.report.skipped))
        config.modules = {}
        coded = floats = 0
        for name, module in model.named_modules():
            if isinstance(module, QINSLinear):
                shape = (module.out_features, module.in_features)
                size = sum(b.nbytes for b in module._buffers.values() if b is not None)
                report.converted.append(
                    ConvertedModule(name, shape, module.codec, module.group_size, shape[0] * shape[1] * 4, size,
                                    float("nan"))
                )  # fmt: skip
                config.modules[name] = [module.codec, module.group_size]
                coded += shape[0] * shape[1]
        seen: set[int] = set()
        for name, p in model.named_parameters():
            if id(p) not in seen:
                seen.add(id(p))
                floats += p.numel()
                if p.dim() >= 3:
                    report.skipped.append(SkippedModule(name, "parameter", "a stack of matrices, such as experts"))
        share = coded / max(coded + floats, 1)
        self.report = report
        text = f"qins: {100 * share:.1f} % of the parameters are codes, in {len(report.converted)} layers"
        left = sorted({f"{s.name} ({s.reason})" for s in report.skipped})
        level = logging.WARNING if share < 0.5 else logging.INFO
        logger.log(level, "%s%s", text, f"; left: {_some(left)}" if left else "")
        if share < config.min_quantized:
            raise RuntimeError(f"{text}, less than min_quantized = {config.min_quantized:g}; left: {_some(left)}")
        return report

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        """Replace codes by the floats that they stand for."""
        for name, module in list(model.named_modules()):
            if isinstance(module, QINSLinear):
                with torch.device("meta"):
                    linear = nn.Linear(module.in_features, module.out_features, bias=False)
                linear.weight = nn.Parameter(module.weight.to(dtype or module._dtype))
                linear.bias = module.bias
                model.set_submodule(name, linear.train(module.training))
        return model


def _is_loaded(tensor: torch.Tensor | None) -> bool:
    """Whether a buffer or a parameter came from the checkpoint: transformers 5 marks these."""
    if tensor is None or tensor.is_meta:
        return False
    return _VERSION < 5 or bool(getattr(tensor, "_is_hf_initialized", False))


def sizes(module: nn.Module) -> tuple[int, int]:
    """in_features and out_features of a linear layer or a Conv1D."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    weight: torch.Tensor = module.weight  # type: ignore[assignment]
    return weight.shape[0], weight.shape[1]


def _submodule(model: Any, path: str) -> nn.Module | None:
    try:
        module: nn.Module = model.get_submodule(path)
    except AttributeError:
        return None
    return module


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _check_layer(name: str, layer: QINSLinear) -> None:
    """Check shapes, dtypes, and what is small: reading all codes would touch every page of a mapped file."""
    shapes = field_shapes(layer.codec, (layer.out_features, layer.in_features), layer.group_size)
    for n in layer._names:
        buffer = layer.get_buffer(n)
        expected = shapes.get(n, ())
        if buffer.shape != expected:
            raise ValueError(f"{name}.{n}: expected shape {tuple(expected)}, got {tuple(buffer.shape)}")
        dtype = FIELD_DTYPES.get(n, torch.float32)
        if buffer.dtype != dtype:
            raise ValueError(f"{name}.{n}: expected {dtype}, got {buffer.dtype}")
        if dtype == torch.float32 and not bool(torch.isfinite(buffer).all()):
            raise ValueError(f"{name}.{n}: expected finite numbers, got NaN or infinity; the file is damaged")


def attach(model: Any) -> None:
    """Give a model that `qins.convert` changed the config and quantizer with which it saves and loads."""
    quantizer = QinsHfQuantizer(QinsConfig(), pre_quantized=True)
    quantizer.audit(model)
    model.hf_quantizer = quantizer
    model.config.quantization_config = quantizer.quantization_config
    model.is_quantized = True
    model.quantization_method = "qins"


def load(path: str | Path, **kwargs: Any) -> Any:
    """Load a model that was saved with codes, as its own class; for those who would forget `import qins`.

    Args:
        path: directory or hub name.
        **kwargs: for `from_pretrained`.

    Raises:
        ValueError: it was not saved by qins.

    """
    config = transformers.AutoConfig.from_pretrained(path)
    method = getattr(config, "quantization_config", None) or {}
    method = method.get("quant_method") if isinstance(method, dict) else getattr(method, "quant_method", None)
    if method != "qins":
        raise ValueError(f"{path}: expected a checkpoint with quant_method 'qins', got {method!r}")
    architecture = (config.architectures or ["AutoModel"])[0]
    return getattr(transformers, architecture).from_pretrained(path, **kwargs)


def register() -> None:
    """Make transformers know quant_method "qins"; doing it twice is harmless."""
    if "qins" not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config("qins")(QinsConfig)
    if "qins" not in AUTO_QUANTIZER_MAPPING:
        register_quantizer("qins")(QinsHfQuantizer)


register()
