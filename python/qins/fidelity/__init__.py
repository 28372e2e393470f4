"""Fidelity: how far a model's answers are from those of its float original."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..system import lazily

if TYPE_CHECKING:
    from .evaluation import (
        WHOLE_BF16,
        Compared,
        Settings,
        compare_window,
        default_names,
        evaluate_all,
        evaluate_one,
        harness_results,
        kind_of,
    )
    from .metrics import bytes_by_component, fidelity, greedy, sample_text, windows
    from .peers import PEERS
    from .recording import Recording
    from .report import report_rows, report_tables, write_report
    from .subjects import DECODER, ENCODER

__all__ = [
    "DECODER",
    "ENCODER",
    "PEERS",
    "WHOLE_BF16",
    "Compared",
    "Recording",
    "Settings",
    "bytes_by_component",
    "compare_window",
    "default_names",
    "evaluate_all",
    "evaluate_one",
    "fidelity",
    "greedy",
    "harness_results",
    "kind_of",
    "report_rows",
    "report_tables",
    "sample_text",
    "windows",
    "write_report",
]

__getattr__ = lazily(
    __name__,
    {
        "bytes_by_component": "metrics",
        "fidelity": "metrics",
        "greedy": "metrics",
        "sample_text": "metrics",
        "windows": "metrics",
        "PEERS": "peers",
        "report_rows": "report",
        "report_tables": "report",
        "write_report": "report",
        "DECODER": "subjects",
        "ENCODER": "subjects",
        "WHOLE_BF16": "evaluation",
        "Compared": "evaluation",
        "Recording": "recording",
        "Settings": "evaluation",
        "compare_window": "evaluation",
        "default_names": "evaluation",
        "evaluate_all": "evaluation",
        "evaluate_one": "evaluation",
        "harness_results": "evaluation",
        "kind_of": "evaluation",
    },
)
