"""The quantizer that transformers calls while it loads and saves a model with a QinsConfig."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.quantizers.base import HfQuantizer

from ..files import Checkpoint, ScaledCheckpoint, fingerprint, open_checkpoint, open_files, open_scaled
from ..nn import Coded, CodedWeight, ConversionReport, place_codes
from ..system import let_go, read_text, require_memory, switch, upward
from .auditing import audit
from .config import QinsConfig
from .decoding import decode_in_steps
from .dequantizing import dequantize
from .embeddings import encode_embeddings, expect_embeddings
from .expecting import bytes_to_load, expect_codes, expect_floats, verify_files
from .modules import (
    PendingExperts,
    PendingLinear,
    check_layer,
    coded_modules,
    pending_experts,
    pending_layers,
    submodule,
)
from .names import some
from .parallel import check_ranks, exchange_directly, is_parallel, keep_parts, plan_parts
from .released import drop_quantization, open_restored
from .saving import original_of, prepare_saving, state_to_save

_VERSION = int(transformers.__version__.partition(".")[0])


class QinsHfQuantizer(HfQuantizer):
    """The quantizer that transformers calls while it loads and saves a model with a QinsConfig."""

    quantization_config: QinsConfig
    requires_calibration = False
    requires_parameters_quantization = True  # transformers 4

    def __init__(self, quantization_config: QinsConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.floats: Checkpoint | None = None  # while it loads: what dequantizes or restores the floats
        self._released, quantization_config.released = quantization_config.released, None
        if self._released:
            self.pre_quantized = False  # not by qins
        self.report = ConversionReport()
        self._original: Path | None = None  # directory of the floats that saved codes are to restore
        self._dtype: torch.dtype | None = None
        self._missing_biases: list[str] = []
        self._shared: dict[str, str] = {}

    @property
    def is_trainable(self) -> bool:
        """True: gradients flow through quantized layers, so adapters can be trained."""
        return True

    @property
    def is_compileable(self) -> bool:
        """True: the operators have fake kernels."""
        return True

    def is_serializable(self, safe_serialization: Any = None) -> bool:
        """Return True: codes are ordinary buffers."""
        return True

    def update_dtype(self, dtype: Any) -> Any:
        """Return the model's dtype; bfloat16 for an 8-bit or 4-bit checkpoint that gives a one-byte dtype."""
        in_bytes = isinstance(dtype, torch.dtype) and dtype.itemsize == 1
        return torch.bfloat16 if self._released and in_bytes else dtype

    def update_device_map(self, device_map: Any) -> Any:
        """Return a device map for the CPU, where qins encodes and multiplies.

        Raises:
            ValueError: the map has any other device.

        """
        if device_map is None:
            return None  # means the CPU, without accelerate
        if device_map in ("auto", "cpu") or device_map == torch.device("cpu"):
            return {"": "cpu"}
        devices = set(device_map.values()) if isinstance(device_map, dict) else {device_map}
        if all(str(d) == "cpu" for d in devices):
            return device_map
        raise ValueError(f"device_map: qins runs on the CPU, got {device_map!r}; omit device_map or pass 'cpu'")

    # -- before the weights -----------------------------------------------------------------------

    def preprocess_model(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        """Prepare a model, and check that there is memory to load it; conversion on disk prepares it without this.

        Raises:
            MemoryError: there is not.

        """
        prepared = super().preprocess_model(model, *args, **kwargs)
        what = getattr(model.config, "_name_or_path", "") or type(model).__name__
        require_memory(bytes_to_load(model, self._shared), f"{what}: loading it")
        return prepared

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        self._expect(model, **kwargs)
        if is_parallel(model) and not self.quantization_config.restore:
            plan_parts(model)

    def _expect(self, model: Any, **kwargs: Any) -> None:
        """Replace the modules to quantize, or those whose codes the checkpoint has."""
        files = kwargs.get("checkpoint_files")
        if _VERSION < 5 and files is None and model.config._name_or_path:  # transformers 4 does not pass them
            with suppress(OSError, ValueError):  # a hub name, or files that open_checkpoint finds ambiguous
                files = open_checkpoint(model.config._name_or_path).files
        if self.quantization_config.restore:
            if not self.pre_quantized:
                raise ValueError("restore: expected a checkpoint of codes, got one of floats")
            self.floats = open_restored(files, str(model.config._name_or_path))
            return
        if self.quantization_config.exact:
            self._original = original_of(files, self.pre_quantized)
            upward["check_original"](self._original, self.quantization_config)
        if self.pre_quantized:
            if self.quantization_config.verify or switch("QINS_VERIFY", False):
                verify_files(self.quantization_config, files)
            self._shared = expect_codes(model, self.quantization_config)
            return
        self.quantization_config.source = fingerprint(files) if files else None
        self._read_released(model, files)
        expect_embeddings(model, self.quantization_config)
        if isinstance(self.quantization_config.calibration, str):
            if is_parallel(model):
                raise ValueError(
                    "calibration: needs the whole model, expected one rank; calibrate with `qins quantize`, and load "
                    "its codes"
                )
            read_text(self.quantization_config.calibration)  # fail on an unreadable file before loading
        else:
            expect_floats(model, self.quantization_config, self.report)

    def _read_released(self, model: Any, files: Any) -> None:
        """Open a checkpoint whose weights are in 8 or 4 bits, so that they are loaded as floats."""
        self.quantization_config.source_format = None
        if self._released:
            floats = open_scaled(open_files(files, {"quantization_config": self._released}))
            assert isinstance(floats, ScaledCheckpoint)
            self.floats, self.quantization_config.source_format = floats, floats.source_format
            drop_quantization(model.config)

    # -- while they load --------------------------------------------------------------------------

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Return whether a checkpoint key is a weight to encode."""
        check_ranks(model)
        path, _, tensor = param_name.rpartition(".")
        module = submodule(model, path)
        if isinstance(module, PendingExperts):
            return tensor in module.waiting
        return tensor == "weight" and isinstance(module, PendingLinear)

    def get_quantize_ops(self) -> Any:
        """Return the operation that transformers 5 runs on weights to encode."""
        from transformers.core_model_loading import ConversionOps

        quantizer = self

        class QinsQuantize(ConversionOps):
            def convert(self, input_dict: dict[str, Any], *args: Any, model: Any = None, **kwargs: Any) -> Any:
                missing = kwargs.get("missing_keys")
                result: dict[str, Any] = {}
                for name in list(input_dict):  # several if one stored weight is split
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

    def update_weight_conversions(self, weight_conversions: list[Any], *args: Any) -> list[Any]:
        """Make transformers 5 encode experts one by one, instead of stacking their floats first.

        Versions before 5.23 do not pass the model.
        """
        from transformers.core_model_loading import MergeModulelist, WeightConverter

        from .experts import EncodeExperts

        super_ = getattr(super(), "update_weight_conversions", None)
        conversions: list[Any] = super_(weight_conversions, *args) if super_ else weight_conversions
        if not self.pre_quantized and not isinstance(self.quantization_config.calibration, str):
            for c in conversions:
                if isinstance(c, WeightConverter) and type(c.operations[0]) is MergeModulelist:
                    c.operations = [EncodeExperts(c.operations)]
        return conversions

    def create_quantized_param(self, model: Any, param_value: torch.Tensor, param_name: str, *args: Any) -> None:
        """Encode a weight and set the buffers; transformers 4 calls this."""
        for name, value in self.encode_weight(model, param_name, param_value).items():
            path, _, field = name.rpartition(".")
            model.get_submodule(path)._buffers[field] = value

    def update_missing_keys(self, model: Any, missing_keys: list[str], prefix: str) -> list[str]:
        """Raise a RuntimeError for missing weights and codes, before transformers 4 initializes them at random."""
        check_ranks(model)
        # It would also cast scales to the model's dtype. So disable its cast, and cast all but codes after loading.
        self._dtype, model.config._pre_quantization_dtype = model.config._pre_quantization_dtype, None
        kept, lost = [], []
        for key in missing_keys:
            path, _, field = key.rpartition(".")
            module = submodule(model, path)
            if not isinstance(module, CodedWeight):
                kept.append(key)
            elif field == "bias":
                self._missing_biases.append(path)
                kept.append(key)
            elif field == "weight" or not isinstance(module, PendingLinear):
                lost.append(key)
        if lost:
            what = "codes" if self.pre_quantized else "weight"
            raise RuntimeError(f"the checkpoint has no {what} for {some(lost)}")
        return kept

    def encode_weight(self, model: Any, name: str, value: torch.Tensor) -> dict[str, torch.Tensor]:
        """Encode the weight with this key; return the buffers by key."""
        path, _, tensor = name.rpartition(".")
        module: PendingLinear | PendingExperts = model.get_submodule(path)
        try:
            codes = module.accept(tensor, value) if isinstance(module, PendingExperts) else module.accept(value)
            let_go(value)
        except ValueError as e:
            raise ValueError(f"{path}: {e}") from None
        return {f"{path}.{n}": t for n, t in codes.items()}

    # -- after the weights ------------------------------------------------------------------------

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        self.floats = None
        if self.quantization_config.restore:
            return model
        check_ranks(model)
        if not self.pre_quantized and isinstance(self.quantization_config.calibration, str):
            from .calibrating import calibrate_loaded  # only on use: loading codes does not need it

            calibrate_loaded(model, self.quantization_config, self.report)
        pending = [*pending_layers(model), *(f"{n}.{s}" for n, m in pending_experts(model).items() for s in m.waiting)]
        if pending:
            raise RuntimeError(f"the checkpoint has no weight for {some(pending)}")
        if self.pre_quantized:
            for name, source in self._shared.items():
                model.get_submodule(name)._buffers.update(model.get_submodule(source)._buffers)
        else:
            encode_embeddings(model, self.quantization_config)
        layers = dict(coded_modules(model))
        lost = [f"{n}.{b}" for n, m in layers.items() for b in m._names if not _is_loaded(m._buffers[b])]
        if lost:
            raise RuntimeError(f"the checkpoint has no codes, or codes of another shape, for {some(lost)}")
        keep_parts(model)
        for name, layer in layers.items():
            check_layer(name, layer)
            bias = layer._parameters.get("bias")
            if bias is not None and (name in self._missing_biases or not _is_loaded(bias)):
                nn.init.zeros_(bias)
        if _VERSION < 5:
            model.config._pre_quantization_dtype = self._dtype
            _cast(model, self._dtype)
        model.config.quantization_config = self.quantization_config
        prepare_saving(model, self._original)
        self.audit(model)
        place_codes(model, from_file=self.pre_quantized)
        if is_parallel(model):
            exchange_directly(model)
        elif self.quantization_config.decode_step:  # ranks exchange sums within a layer
            decode_in_steps(model)
        return model

    def audit(self, model: Any) -> ConversionReport:
        """List what is quantized and what is not; raise a RuntimeError if it is less than `min_quantized`."""
        self.report = audit(model, self.quantization_config, self.report.skipped)
        return self.report

    def get_state_dict_and_metadata(self, model: Any, *args: Any) -> tuple[Any, dict[str, str]]:
        """Return the state to save, and record its checksums in the config; transformers calls this first on saving."""
        saved = state_to_save(model, self.quantization_config)
        return None if getattr(model, "_hf_peft_config_loaded", False) else saved, {}

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        """Dequantize the model in place and return it."""
        return dequantize(model, dtype)


def _is_loaded(tensor: torch.Tensor | None) -> bool:
    """Return whether a buffer or a parameter came from the checkpoint; transformers 5 marks these."""
    if tensor is None or tensor.is_meta:
        return False
    return _VERSION < 5 or bool(getattr(tensor, "_is_hf_initialized", False))


def _in_float32(model: nn.Module, dtype: torch.dtype | None) -> list[nn.Parameter]:
    """Return the parameters that transformers 4 keeps in float32 in a model of this dtype."""
    of = {"_keep_in_fp32_modules": (torch.float16,), "_keep_in_fp32_modules_strict": (torch.float16, torch.bfloat16)}
    parts = [n for attribute, dtypes in of.items() if dtype in dtypes for n in getattr(model, attribute, None) or ()]
    return [p for name, p in model.named_parameters() if any(f".{part}." in f".{name}." for part in parts)]


def _cast(model: nn.Module, dtype: torch.dtype | None) -> None:
    """Cast what a checkpoint stores; non-persistent buffers, such as RoPE frequencies, keep their dtype."""
    in_float32 = [(p, p.data) for p in _in_float32(model, dtype)]
    kept = [
        (m, n, m._buffers[n])
        for m in model.modules()
        if not isinstance(m, Coded)
        for n in m._non_persistent_buffers_set
    ]
    model.to(dtype)
    for parameter, data in in_float32:
        parameter.data = data
    for module, name, buffer in kept:
        module._buffers[name] = buffer
