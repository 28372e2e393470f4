"""What a checkpoint stores as codes: the list of its matrices in config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from ..hf import QinsConfig


class Stored(NamedTuple):
    """How a matrix is stored: codec, group size and, if it has no codes of its own, whose it shares."""

    codec: str
    group_size: int | None
    shared: str | None = None


class StoredMatrices:
    """The matrices of codes of a checkpoint.

    Attributes:
        known: vLLM's name of each matrix to how it is stored.
        names: all their names, those in the checkpoint and vLLM's.
        claimed: vLLM's names of those for which it has created a layer.
        created: name of each embedding and head that this process has created to vLLM's layer.

    """

    def __init__(self, config: dict[str, Any]) -> None:
        """Read the quantization config of config.json.

        Raises:
            ValueError, TypeError: it is not one of saved codes, or of another version of qins.

        """
        modules = QinsConfig(**config).modules
        if modules is None:
            raise ValueError(
                "quantization_config: expected the list of quantized modules of a saved checkpoint; vLLM loads codes "
                "but makes none, so convert the model with `qins quantize`"
            )
        self.known = {name: Stored(*about) for name, about in modules.items()}
        self.names = set(self.known)
        self.claimed: set[str] = set()
        self.created: dict[str, Any] = {}

    def rename(self, mapper: Any) -> None:
        """Rename the matrices with a mapper of vLLM, which may drop some."""
        renamed = {mapper.map_name(name): about for name, about in self.known.items()}
        self.known = {
            name: about._replace(shared=about.shared and mapper.map_name(about.shared))
            for name, about in renamed.items()
            if name is not None
        }
        self.names |= set(self.known)

    def parts(self, prefix: str, joined: Mapping[str, list[str]]) -> dict[str, Stored | None]:
        """Return the matrices of one of vLLM's layers, in the order of its outputs; None for those of floats.

        Args:
            prefix: the layer's name.
            joined: last part of the names of layers that vLLM joins, such as "qkv_proj", to those in the checkpoint.

        """
        parent, dot, last = prefix.rpartition(".")
        names = [prefix] if prefix in self.known else [f"{parent}{dot}{n}" for n in joined.get(last, [last])]
        self.claimed.update(names)
        return {n: self.known.get(n) for n in names}

    def stacks(self, prefix: str) -> dict[str, Stored]:
        """Return the stacks of matrices of a module of experts."""
        found = {n: a for n, a in self.known.items() if n.startswith(prefix + ".")}
        self.claimed.update(found)
        return {n.removeprefix(prefix + "."): a for n, a in found.items()}

    def check_claimed(self) -> None:
        """Raise a ValueError unless all matrices have a layer: vLLM may ignore codes under names it does not know."""
        left = sorted(n for n, a in self.known.items() if a.shared is None and n not in self.claimed)
        if left:
            raise ValueError(
                f"vLLM's model has no layer for the codes of {left[0]}, and of {len(left) - 1} others: its layers have "
                "other names, or are no linear layers"
            )
