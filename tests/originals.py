"""Small checkpoints that conversions restore bit for bit."""

import torch
from tokens import save_tokenizer

from qins.files import open_checkpoint


def tree(path):
    """Name to bytes of a directory's files."""
    return {p.name: p.read_bytes() for p in sorted(path.iterdir())}


def save(model, path, dtype=torch.bfloat16, **options):
    """Save a model with what lies beside its weights; return the model."""
    model.to(dtype).save_pretrained(path, **options)
    (path / "README.md").write_text("# Original\n")
    save_tokenizer(path)
    return model


def whole_tensors(path):
    """Names of the tensors of the original that are stored whole."""
    files = (open_checkpoint(file) for file in path.glob("exact-*.safetensors"))
    return sorted(k.removesuffix("#raw") for f in files for k in f.tensors if k.endswith("#raw"))
