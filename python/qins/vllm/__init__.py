"""vLLM's CPU back end: a plug-in that serves checkpoints of codes.

vLLM finds `register` by its entry point (group `vllm.general_plugins`). Importing this package imports neither vLLM nor
torch.
"""

from __future__ import annotations

__all__ = ["register"]


def register() -> None:
    """Register quant_method "qins" with vLLM, which calls this once or more in each of its processes."""
    from vllm.model_executor.layers.quantization import register_quantization_config

    from .config import CodesConfig

    register_quantization_config("qins")(CodesConfig)
