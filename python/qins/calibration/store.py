"""Chosen codes, in memory and on disk."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..codec import EncodedArray
from ..system import atomically, naming_file, read_json, write_json


@dataclass
class Choice:
    """The codes of one layer, and how they were chosen."""

    encoded: EncodedArray
    nearest_error: float = float("nan")
    error: float = float("nan")
    kept: str = "calibrated"


class Store:
    """Codes of finished layers on disk, from which an interrupted calibration resumes."""

    def __init__(self, directory: Path, fingerprint: str) -> None:
        self.directory = directory
        about = directory / "about.json"
        directory.mkdir(parents=True, exist_ok=True)
        if about.exists():
            if read_json(about).get("fingerprint") != fingerprint:
                raise FileExistsError(
                    f"{directory}: holds an unfinished calibration of another model, with another text or other "
                    "settings; remove it"
                )
        else:
            write_json(about, {"fingerprint": fingerprint})

    def put(self, name: str, choice: Choice) -> None:
        """Save a layer's codes."""
        from safetensors.numpy import save_file

        e = choice.encoded
        about = {"codec": e.codec, "group_size": str(e.group_size or 0), "nearest_error": repr(choice.nearest_error),
                 "error": repr(choice.error), "kept": choice.kept}  # fmt: skip
        with atomically(self.directory / f"{name}.safetensors") as temporary:
            save_file({n: np.asarray(f) for n, f in e.fields.items()}, str(temporary), about)

    def has(self, name: str) -> bool:
        """Return whether a layer's codes are stored."""
        return (self.directory / f"{name}.safetensors").exists()

    def get(self, name: str) -> Choice | None:
        """Return a layer's codes, or None if they are not stored."""
        from safetensors import safe_open

        if not self.has(name):
            return None
        path = self.directory / f"{name}.safetensors"
        with naming_file(path), safe_open(str(path), "np") as f:
            about = f.metadata()
            fields = {n: f.get_tensor(n) for n in f.keys()}  # noqa: SIM118 - not a dict
        e = EncodedArray.from_fields(about["codec"], fields, int(about["group_size"]) or None)
        return Choice(e, float(about["nearest_error"]), float(about["error"]), about["kept"])
