"""Scripts and checkpoints of the project's prototype (the seed), on the C core: `python -m qins.compat script.py`."""

from .scripts import QINSLinear, install, main
from .seed_checkpoint import load_seed_checkpoint

__all__ = ["QINSLinear", "install", "load_seed_checkpoint", "main"]
