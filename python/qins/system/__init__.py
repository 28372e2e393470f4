"""The operating system and environment: threads, memory, files, terminals, optional packages.

The lowest room: it imports no other room.
"""

from . import threads
from .atomic import atomically, locked, sync_directory, write_json
from .environment import switch
from .extras import naming_extras, require
from .huge_pages import arena_for, rounded
from .lazy import lazily
from .machine import (
    available_bytes,
    cpu_name,
    peak_resident_bytes,
    require_address_space,
    require_memory,
    reset_peak_resident_bytes,
)
from .naming import naming_file, uninterrupted
from .pages import give_back_freed_memory, is_resident, let_go, page_in, page_out
from .progress_bar import Advance, allow_bars, progress
from .text import read_json, read_text
from .threads import get_num_threads, set_num_threads
from .upward import upward
from .version import VERSION

__all__ = [
    "VERSION",
    "Advance",
    "allow_bars",
    "arena_for",
    "atomically",
    "available_bytes",
    "cpu_name",
    "get_num_threads",
    "give_back_freed_memory",
    "is_resident",
    "lazily",
    "let_go",
    "locked",
    "naming_extras",
    "naming_file",
    "page_in",
    "page_out",
    "peak_resident_bytes",
    "progress",
    "read_json",
    "read_text",
    "require",
    "require_address_space",
    "require_memory",
    "reset_peak_resident_bytes",
    "rounded",
    "set_num_threads",
    "switch",
    "sync_directory",
    "threads",
    "uninterrupted",
    "upward",
    "write_json",
]
