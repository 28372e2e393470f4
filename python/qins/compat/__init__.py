"""Scripts and checkpoints of the seed, run and read on the C core: `python -m qins.compat script.py [arguments]`."""

from .scripts import QINSLinear, install, main
from .seed_checkpoint import load_seed_checkpoint

__all__ = ["QINSLinear", "install", "load_seed_checkpoint", "main"]
