"""Checkpoints on disk: reading files that may be damaged or hostile, inspecting them, and writing shards."""

from ..system import read_json, read_text  # kept here for those who import them from this room
from .ahead import ReadAhead
from .exact import ExactRecorder, check_restorable, exact_bytes, exact_name, is_kept, others_of, remove_parts
from .gguf import GgufCheckpoint, open_gguf, reading_once
from .inspecting import inspect
from .inspection_report import InspectionReport
from .layers import EncodedLayer, encoded_layers, load_layer
from .reading import Checkpoint, StoredTensor, check_counts, checksum, fingerprint, open_checkpoint, open_files, verify
from .remote import RemoteFolder, is_remote, open_remote, sketch
from .restoring import RestoredCheckpoint, restore_checkpoint
from .scaled import ScaledCheckpoint
from .shards import DTYPE_CODES, ShardWriter, Target
from .source_formats import open_scaled, require_decodable, source_quantization

__all__ = [
    "DTYPE_CODES",
    "Checkpoint",
    "EncodedLayer",
    "ExactRecorder",
    "GgufCheckpoint",
    "InspectionReport",
    "ReadAhead",
    "RemoteFolder",
    "RestoredCheckpoint",
    "ScaledCheckpoint",
    "ShardWriter",
    "StoredTensor",
    "Target",
    "check_counts",
    "check_restorable",
    "checksum",
    "encoded_layers",
    "exact_bytes",
    "exact_name",
    "fingerprint",
    "inspect",
    "is_kept",
    "is_remote",
    "load_layer",
    "open_checkpoint",
    "open_files",
    "open_gguf",
    "open_remote",
    "open_scaled",
    "others_of",
    "read_json",
    "read_text",
    "reading_once",
    "remove_parts",
    "require_decodable",
    "restore_checkpoint",
    "sketch",
    "source_quantization",
    "verify",
]
