"""The short form of soak.py, with a tiny model; `make trust-soak` runs an hour."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

SOAK = Path(__file__).parent / "soak.py"
pytestmark = [pytest.mark.once, pytest.mark.skipif(sys.platform != "linux", reason="counts open files as Linux does")]


@pytest.mark.long
def test_short(tmp_path):
    for package in ("openai", "transformers.cli.serving"):
        pytest.importorskip(package, reason=f"NOT RUN, qins[serve] is not installed: no {package}")
    from tiny import make
    from tokens import save_tokenizer

    model = make("llama")
    model.config.max_position_embeddings = 1024
    model.save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    command = [sys.executable, SOAK, "--minutes", "0.2", "--model", tmp_path, "--allowed", "50"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "server: " in done.stdout
    assert "generating: " in done.stdout


def test_what_is_not_given_back(capsys):
    spec = importlib.util.spec_from_file_location("soak", SOAK)
    soak = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(soak)
    flat = [soak.Sample(t, 500 if t < 100 else 1000 + t % 3, 2, 5 + t % 2) for t in range(600)]
    assert soak.judge("flat", flat, 1.0) == []
    grown = [s._replace(rss=s.rss + int(s.seconds) // 20) for s in flat]
    assert soak.judge("grown", grown, 1.0) == ["grown: RSS grew by 1.58 %"]
    assert soak.judge("grown", grown, 2.0) == []
    more = [s._replace(threads=2 + (s.seconds > 500), files=s.files + (s.seconds > 400)) for s in flat]
    assert soak.judge("more", more, 1.0) == ["more: 2 threads became 3", "more: 6 files became 7"]
    assert "more: 600 rounds in 599 s" in capsys.readouterr().out
