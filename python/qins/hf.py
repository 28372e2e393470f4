"""transformers: quantising while a model loads, loading and saving codes.

`qins.QinsConfig` is the quantization_config; transformers finds the quantizer under quant_method "qins" once this
module is imported, which torch or `import qins` sees to (see _qins_autoload.py).
"""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Iterable
from contextlib import suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    AutoHfQuantizer,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer

from ._card import UploadWithCard
from ._hf_calibration import calibrate_loaded
from ._hf_config import QinsConfig
from ._hf_embeddings import encode_embeddings, expect_embeddings, share_codes, tied_output, untie
from ._hf_modules import (
    PendingExperts,
    PendingLinear,
    check_layer,
    coded_modules,
    conv1d,
    empty_module,
    pending_experts,
    pending_layers,
    sizes,
)
from ._hf_names import guard, saved_names, with_and_without_prefix
from ._pages import page_out
from .array import FIELD_ROLES
from .coded import Coded, CodedWeight
from .conversion import ConversionReport, ConvertedModule, SkippedModule, other_matrices
from .experts import QINSExperts, projections, stack_sizes
from .files import checksum, fingerprint, open_checkpoint, verify
from .linear import QINSEmbedding, QINSLinear
from .models import read_text

_VERSION = int(transformers.__version__.partition(".")[0])

logger = logging.getLogger("qins")

# Routers of experts are small and decide where every token goes; transformers 4 has them as linear layers.
_ROUTERS = ("*.gate", "*.router", "*.shared_expert_gate")


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
        self._shared: dict[str, str] = {}

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
        files = kwargs.get("checkpoint_files")
        if _VERSION < 5 and files is None and model.config._name_or_path:  # it does not say which
            with suppress(OSError, ValueError):  # a hub's name, or files that open_checkpoint does not choose among
                files = open_checkpoint(model.config._name_or_path).files
        if self.pre_quantized:
            if self.quantization_config.verify or _environment_asks_to_verify():
                self._verify(files)
            self._expect_codes(model)
            return
        self.quantization_config.source = fingerprint(files) if files else None
        expect_embeddings(model, self.quantization_config)
        if isinstance(self.quantization_config.calibration, str):
            read_text(self.quantization_config.calibration)  # a file that cannot be read is better known now
        else:
            self._expect_floats(model)

    def _verify(self, files: Iterable[str | Path] | None) -> None:
        """Raise unless the files' tensors have the checksums of config.json."""
        checksums = self.quantization_config.checksums
        if not checksums:
            raise ValueError("verify: expected checksums in config.json, got none; an early qins wrote it")
        if not files:
            raise ValueError("verify: expected a checkpoint in files, got none: only files have checksums")
        problems: list[str] = []
        for file in files:
            problems += verify(open_checkpoint(file), checksums)[1]
        if problems:
            raise ValueError("; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if problems[5:] else ""))

    def _expect_codes(self, model: Any) -> None:
        """Replace the modules that the checkpoint has codes for."""
        modules = self.quantization_config.modules
        if modules is None:
            raise ValueError("quantization_config: expected the list of quantised modules of a saved checkpoint")
        fields = {name.rpartition(".")[2] for name in self.quantization_config.checksums or ()}
        if not modules and fields & set(FIELD_ROLES):
            raise ValueError("modules: expected the modules whose codes the checkpoint has, got none")
        left = set(modules)
        shared: dict[str, str] = {}

        def entry(name: str) -> list[Any] | None:
            known = next((n for n in with_and_without_prefix(model, name) if n in modules), None)
            left.discard(known or "")
            return modules[known] if known else None

        for name, module in list(model.named_modules()):
            stacks = {stack: entry(f"{name}.{stack}") for stack in projections(module)}
            if stacks and None not in stacks.values():
                about: dict[str, list[Any]] = stacks  # type: ignore[assignment]
                codec = next(iter(about.values()))[0]
                self.put(model, name, module, QINSExperts(module, codec, {s: a[1] for s, a in about.items()}))
                continue
            told = entry(name)
            if told is None or not isinstance(module, (nn.Linear, conv1d(), nn.Embedding)):
                continue
            try:
                new = empty_module(module, *told[:2])
            except ValueError as e:
                raise ValueError(f"{name}: {e}") from None
            self.put(model, name, module, new)
            if len(told) > 2:
                shared[name] = told[2]
        experts = sorted(n for n in left if ".experts." in n)
        if experts:
            raise ValueError(
                f"the checkpoint has codes of {_some(experts)}, which {type(model).__name__} has not in transformers "
                f"{transformers.__version__}: versions 4 and 5 keep experts in different modules; quantise the float "
                "model again with this version"
            )
        self._shared = share_codes(model, shared)
        if guarded := _guard(model):
            ignored = [re.escape(n) + "$" for n in with_and_without_prefix(model, guarded)]
            known = model._keys_to_ignore_on_load_unexpected  # versions of transformers differ in what this is
            ignored += known or ()
            model._keys_to_ignore_on_load_unexpected = set(ignored) if isinstance(known, set) else ignored
        found = len(modules) - len(left)
        # What the model keeps in float32, transformers 5.0 casts whole: of these modules the codes, too.
        coded = {part for n, _ in coded_modules(model) for part in n.split(".")}
        plan = getattr(model, "dtype_plan", None)
        if plan:
            model.dtype_plan = {k: v for k, v in plan.items() if k not in coded}
        if modules and not found:
            first = next(iter(modules))
            raise ValueError(f"no module of {type(model).__name__} is among those of the checkpoint, such as {first}")

    def chosen(self, model: Any) -> dict[str, nn.Module]:
        """Return the linear layers and experts to quantise, by name; the report is told of the others.

        Embeddings, and an output embedding that is tied to one, have their turn when everything is loaded.
        """
        output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        later = tied_output(model) if self.quantization_config.lm_head else None
        found: dict[str, nn.Module] = {}
        for name, module in model.named_modules():
            if name == later or not (isinstance(module, (nn.Linear, conv1d())) or projections(module)):
                if other_matrices(module):
                    self.report.skipped.append(SkippedModule(name, type(module).__name__, other_matrices(module)))
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
        for name, module in self.chosen(model).items():
            if projections(module):
                self.put(model, name, module, PendingExperts(module, *self.experts_codec(name, module)))
                continue
            codec, size = self.quantization_config.layer(name, sizes(module)[0])
            new = empty_module(module, codec, size, PendingLinear)
            assert isinstance(new, PendingLinear)
            new.transposed = not isinstance(module, nn.Linear)
            new._parameters["weight"] = nn.Parameter(
                module.get_parameter("weight").detach().to("meta"), requires_grad=False
            )
            self.put(model, name, module, new)

    def experts_codec(self, name: str, module: nn.Module) -> tuple[str, dict[str, int | None]]:
        """Codec and group sizes of a module of experts; overrides match its name."""
        about = {s: self.quantization_config.layer(name, stack_sizes(module, s)[2]) for s in projections(module)}
        return next(iter(about.values()))[0], {s: size for s, (_, size) in about.items()}

    def put(self, model: Any, name: str, old: nn.Module, new: nn.Module) -> None:
        """Replace a module."""
        new.train(old.training)
        new.__dict__["_is_hf_initialized"] = True  # there is no float weight to initialise
        model.set_submodule(name, new)

    def _reason_to_skip(self, name: str, module: nn.Module, output: nn.Module | None) -> str | None:
        config = self.quantization_config
        if module is output and not config.lm_head:
            return "the output embedding"
        if type(module) not in (nn.Linear, conv1d()) and not projections(module):
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
        path, _, tensor = param_name.rpartition(".")
        module = _submodule(model, path)
        if isinstance(module, PendingExperts):
            return tensor in module.waiting
        return tensor == "weight" and isinstance(module, PendingLinear)

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

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        """Let transformers 5 encode experts one by one, instead of putting their floats together first."""
        from transformers.core_model_loading import MergeModulelist, WeightConverter

        from ._hf_experts import EncodeExperts

        super_ = getattr(super(), "update_weight_conversions", None)
        conversions: list[Any] = super_(weight_conversions, model) if super_ else weight_conversions
        if not self.pre_quantized and not isinstance(self.quantization_config.calibration, str):
            for c in conversions:
                if isinstance(c, WeightConverter) and type(c.operations[0]) is MergeModulelist:
                    c.operations = [EncodeExperts(c.operations)]
        return conversions

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
            if not isinstance(module, CodedWeight):
                kept.append(key)
            elif field == "bias":
                self._missing_biases.append(path)
                kept.append(key)
            elif field == "weight" or not isinstance(module, PendingLinear):
                lost.append(key)
        if lost:
            what = "codes" if self.pre_quantized else "weight"
            raise RuntimeError(f"the checkpoint has no {what} for {_some(lost)}")
        return kept

    def encode_weight(self, model: Any, name: str, value: torch.Tensor) -> dict[str, torch.Tensor]:
        """Encode the weight of this key; return buffers by key."""
        path, _, tensor = name.rpartition(".")
        module: PendingLinear | PendingExperts = model.get_submodule(path)
        try:
            codes = module.accept(tensor, value) if isinstance(module, PendingExperts) else module.accept(value)
            page_out(value)
        except ValueError as e:
            raise ValueError(f"{path}: {e}") from None
        return {f"{path}.{n}": t for n, t in codes.items()}

    # -- after them -------------------------------------------------------------------------------

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if not self.pre_quantized and isinstance(self.quantization_config.calibration, str):
            calibrate_loaded(self, model)
        pending = [*pending_layers(model), *(f"{n}.{s}" for n, m in pending_experts(model).items() for s in m.waiting)]
        if pending:
            raise RuntimeError(f"the checkpoint has no weight for {_some(pending)}")
        if self.pre_quantized:
            for name, source in self._shared.items():
                model.get_submodule(name)._buffers.update(model.get_submodule(source)._buffers)
        else:
            encode_embeddings(self, model)
        layers = dict(coded_modules(model))
        lost = [f"{n}.{b}" for n, m in layers.items() for b in m._names if not _is_loaded(m._buffers[b])]
        if lost:
            raise RuntimeError(f"the checkpoint has no codes, or codes of another shape, for {_some(lost)}")
        for name, layer in layers.items():
            check_layer(name, layer)
            bias = layer._parameters.get("bias")
            if bias is not None and (name in self._missing_biases or not _is_loaded(bias)):
                nn.init.zeros_(bias)
        if _VERSION < 5:
            model.config._pre_quantization_dtype = self._dtype
            _cast(model, self._dtype)
        model.config.quantization_config = self.quantization_config
        self._prepare_saving(model)
        self.audit(model)
        return model

    def _keep_names_on_saving(self, model: Any) -> None:
        """Drop conversions that would take codes for the weights that they split or join."""
        if _VERSION < 5:
            return
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter

        conversions = getattr(model, "_weight_conversions", None)
        if conversions is None:  # a model that was not loaded is saved by the names of its class
            conversions = get_model_conversion_mapping(model, add_legacy=False)
            conversions = [c for c in conversions if type(c).__name__ != "PrefixChange"]
        model._weight_conversions = [c for c in conversions if not isinstance(c, WeightConverter)]

    def _prepare_saving(self, model: Any) -> None:
        """Have codes saved under names that are theirs, and uploaded with a card that says how to read them."""
        model._upload_modified_files = UploadWithCard(str(model.config._name_or_path or ""))
        self._keep_names_on_saving(model)

    def audit(self, model: Any) -> ConversionReport:
        """List what is quantised and what is not; raise if it is less than min_quantized asks for."""
        config = self.quantization_config
        report = ConversionReport(skipped=list(self.report.skipped))
        config.modules = {}
        coded = floats = 0
        owners: dict[int, str] = {}
        for name, module in coded_modules(model):
            for part, shape, group_size, fields in module.matrices(name):
                owner = owners.setdefault(id(fields[0]), part)
                config.modules[part] = [module.codec, group_size]
                if module._non_persistent_buffers_set:
                    config.modules[part].append(owner)
                    continue
                size = sum(f.nbytes for f in fields)
                weights = math.prod(shape)
                report.converted.append(
                    ConvertedModule(part, shape, module.codec, group_size, weights * 4, size, float("nan"))
                )
                coded += weights
        seen: set[int] = set()
        for name, p in model.named_parameters():
            if id(p) not in seen:
                seen.add(id(p))
                floats += p.numel()
                if p.dim() >= 3 and p.shape[0] > 1:
                    owner = name.rpartition(".")[0]
                    module = model.get_submodule(owner)
                    about = SkippedModule(name, "parameter", "a stack of matrices, such as experts")
                    if other_matrices(module):
                        about = SkippedModule(owner, type(module).__name__, other_matrices(module))
                    if about not in report.skipped:
                        report.skipped.append(about)
        share = coded / max(coded + floats, 1)
        self.report = report
        text = f"qins: {100 * share:.1f} % of the parameters are codes, in {len(report.converted)} layers"
        left = sorted({f"{s.name} ({s.reason})" for s in report.skipped})
        level = logging.WARNING if share < 0.5 else logging.INFO
        logger.log(level, "%s%s", text, f"; left: {_some(left)}" if left else "")
        if share < config.min_quantized:
            raise RuntimeError(f"{text}, less than min_quantized = {config.min_quantized:g}; left: {_some(left)}")
        return report

    def get_state_dict_and_metadata(self, model: Any, *args: Any) -> tuple[Any, dict[str, str]]:
        """What transformers calls first when it saves: the checksums are of what is saved."""
        state: dict[tuple[int, Any], tuple[str, torch.Tensor]] = {}
        saved = model.state_dict()
        if guarded := _guard(model):
            saved[guarded] = torch.empty(0, dtype=torch.uint8)
        for name, tensor in saved.items():  # of those that share memory the first is saved
            key = (tensor.data_ptr(), tensor.shape) if tensor.numel() else (id(tensor), name)
            state.setdefault(key, (name, tensor))
        names = saved_names(model, (name for name, _ in state.values()))
        self.quantization_config.checksums = dict(sorted((names[n], checksum(t)) for n, t in state.values()))
        return None if getattr(model, "_hf_peft_config_loaded", False) else saved, {}

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        """Replace codes by the floats that they stand for."""
        if isinstance(dtype, str):  # a copied config has the name
            dtype = getattr(torch, dtype)
        for name, module in list(model.named_modules()):
            new: nn.Module
            if isinstance(module, QINSExperts):
                new = module.to_float(dtype)
            elif isinstance(module, QINSLinear):
                with torch.device("meta"):
                    new = nn.Linear(module.in_features, module.out_features, bias=False)
                new.weight = nn.Parameter(module.weight.to(dtype or module.weight_dtype))
                new.bias = module.bias
            elif isinstance(module, QINSEmbedding):
                new = module.to_float(dtype)
            else:
                continue
            model.set_submodule(name, new.train(module.training))
        return model


def _is_loaded(tensor: torch.Tensor | None) -> bool:
    """Whether a buffer or a parameter came from the checkpoint: transformers 5 marks these."""
    if tensor is None or tensor.is_meta:
        return False
    return _VERSION < 5 or bool(getattr(tensor, "_is_hf_initialized", False))


def _guard(model: Any) -> str | None:
    layers = ((n, m) for n, m in coded_modules(model) if not m._non_persistent_buffers_set)
    return guard((part, isinstance(m, QINSExperts)) for n, m in layers for part, *_ in m.matrices(n))


def _cast(model: nn.Module, dtype: torch.dtype | None) -> None:
    """Cast what a checkpoint holds; frequencies of rotations and the like stay as their modules made them."""
    kept = [
        (m, n, m._buffers[n])
        for m in model.modules()
        if not isinstance(m, Coded)
        for n in m._non_persistent_buffers_set
    ]
    model.to(dtype)
    for module, name, buffer in kept:
        module._buffers[name] = buffer


def _submodule(model: Any, path: str) -> nn.Module | None:
    try:
        module: nn.Module = model.get_submodule(path)
    except AttributeError:
        return None
    return module


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def attach(model: Any) -> None:
    """Give a model that `qins.convert` changed the config and quantizer with which it saves and loads."""
    quantizer = QinsHfQuantizer(QinsConfig(), pre_quantized=True)
    untie(model, {n for n, m in model.named_modules() if isinstance(m, CodedWeight)})
    quantizer.audit(model)
    quantizer._prepare_saving(model)
    model.hf_quantizer = quantizer
    model.config.quantization_config = quantizer.quantization_config
    model.is_quantized = True
    model.quantization_method = "qins"


def _environment_asks_to_verify() -> bool:
    told = os.environ.get("QINS_VERIFY", "")
    if told not in ("", "0", "1"):
        raise ValueError(f"environment variable QINS_VERIFY: expected 0 or 1, got {told!r}")
    return told == "1"


def load(path: str | Path, *, verify: bool = False, **kwargs: Any) -> Any:
    """Load a model that was saved with codes, as its own class.

    Args:
        path: directory or hub name.
        verify: compare every tensor with its checksum first, which reads all of the files.
        **kwargs: for `from_pretrained`.

    Raises:
        ValueError: it was not saved by qins, or is not what was saved.

    """
    if verify:
        kwargs["quantization_config"] = QinsConfig(verify=True)
    told, _ = transformers.PretrainedConfig.get_config_dict(path)
    about = told.get("quantization_config") or {}
    if not isinstance(about, dict):
        raise ValueError(f"{path}: quantization_config: expected an object, got {about!r}")
    method = about.get("quant_method")
    if method != "qins":
        raise ValueError(f"{path}: expected a checkpoint with quant_method 'qins', got {method!r}")
    names = told.get("architectures") or transformers.AutoConfig.from_pretrained(path).architectures or ["AutoModel"]
    if not isinstance(names, list) or not isinstance(names[0], str) or not hasattr(transformers, names[0]):
        raise ValueError(f"{path}: architectures: expected a list of classes of transformers, got {names!r}")
    architecture = names[0]
    return getattr(transformers, architecture).from_pretrained(path, **kwargs)


def register() -> None:
    """Make transformers know quant_method "qins"; doing it twice is harmless."""
    if "qins" not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config("qins")(QinsConfig)
    if "qins" not in AUTO_QUANTIZER_MAPPING:
        register_quantizer("qins")(QinsHfQuantizer)
        _merge_loading_attributes()


def _merge_loading_attributes() -> None:
    """Let a QinsConfig say how to load codes: transformers does so for a closed list of its own classes."""
    merge = AutoHfQuantizer.merge_quantization_configs

    def merged(quantization_config: Any, quantization_config_from_args: Any) -> Any:
        given = quantization_config_from_args
        if not isinstance(given, QinsConfig):
            return merge(quantization_config, given)
        # which warns that the rest of it is ignored
        result = merge(quantization_config, given if given.to_dict() != QinsConfig().to_dict() else None)
        if isinstance(result, QinsConfig):
            vars(result).update(given.get_loading_attributes())
        return result

    AutoHfQuantizer.merge_quantization_configs = staticmethod(merged)  # type: ignore[method-assign]


register()
