"""The card of a quantized model: written by `qins quantize`, and uploaded by push_to_hub."""

from __future__ import annotations

import base64
import copy
import json
import os
import pickle
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import yaml

import qins
from qins.checkpoint import quantize_checkpoint
from qins.hf import write_card

transformers = pytest.importorskip("transformers")
from tiny import make, same_state  # noqa: E402

pytestmark = pytest.mark.once

ORIGINAL = """\
---
license: apache-2.0
language:
- en
- de
tags:
- chat
base_model: some/ancestor
model-index:
- name: broken
---
# Tiny

A model of two layers.
"""


@pytest.fixture
def source(tmp_path):
    make("llama").save_pretrained(tmp_path / "float")
    (tmp_path / "float" / "README.md").write_text(ORIGINAL)
    return tmp_path / "float"


def parts(card):
    _, head, text = card.split("---\n", 2)
    return yaml.safe_load(head), text


def test_beside_codes(source, tmp_path):
    quantize_checkpoint(source, tmp_path / "out", qins.QinsConfig(overrides={"*.down_proj": {"codec": "golden"}}))
    head, text = parts((tmp_path / "out" / "README.md").read_text())
    assert head["license"] == "apache-2.0"
    assert head["language"] == ["en", "de"]
    assert head["tags"] == ["chat", "qins", "8-bit", "cpu"]
    assert (head["base_model"], head["base_model_relation"]) == ("some/ancestor", "quantized")
    assert (head["library_name"], head["pipeline_tag"]) == ("transformers", "text-generation")
    assert 'This needs `pip install "qins[hf]"`' in text[:300]
    assert "| codec | log8, groups of 64 inputs; golden, per-row scales |" in text
    report = qins.inspect(tmp_path / "out")
    weights = sum(layer.shape[0] * layer.shape[1] for layer in report.layers)
    bits = 8 * sum(layer.bytes for layer in report.layers) / weights
    assert f"| bits per weight | {bits:.2f}, of {weights:,} weights in 14 layers |" in text
    assert f"in float32 {report.float32_bytes / 1e6:,.1f} MB" in text
    assert text.endswith("## The original's card\n\n# Tiny\n\nA model of two layers.\n")


@pytest.mark.parametrize(
    ("codec", "tags", "title"), [("log4", ["4-bit"], "in 4-bit"), ("log8", ["5-bit", "8-bit"], "in 5- to 8-bit")]
)
def test_fewer_bits(source, tmp_path, codec, tags, title):
    overrides = {"*.down_proj": {"codec": "log5"}} if codec == "log8" else None
    quantize_checkpoint(source, tmp_path / "out", qins.QinsConfig(codec, overrides=overrides))
    head, text = parts((tmp_path / "out" / "README.md").read_text())
    assert head["tags"] == ["chat", "qins", *tags, "cpu"]
    assert f"{title} logarithmic codes" in text
    assert f"| codec | {codec}, groups of " in text


@pytest.mark.parametrize("original", ["", "no head\n", "---\n- a list\n---\ntext", "---\n{\n---\ntext", "---\n"])
def test_originals_without_a_head(source, tmp_path, original):
    (source / "README.md").write_text(original)
    if not original:
        (source / "README.md").unlink()
    config = json.loads((source / "config.json").read_text()) | {"_name_or_path": "some/tiny"}
    (source / "config.json").write_text(json.dumps(config))
    quantize_checkpoint(source, tmp_path / "out")
    head, text = parts((tmp_path / "out" / "README.md").read_text())
    assert head["base_model"] == "some/tiny"
    assert "# some/tiny in 8-bit logarithmic codes" in text
    assert original.strip() in text


def test_of_the_hub(source, tmp_path, monkeypatch):
    """The base model is the requested one, not the base model in the original's card."""
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **_: str(source))
    quantize_checkpoint("some/tiny", tmp_path / "out")
    head, text = parts((tmp_path / "out" / "README.md").read_text())
    assert head["base_model"] == "some/tiny"
    assert head["license"] == "apache-2.0"
    assert "# some/tiny in 8-bit logarithmic codes" in text
    assert "## Fidelity" not in text
    write_card(tmp_path / "out", "some/tiny", source, "Mean KL divergence 1e-3.")
    assert "\n## Fidelity\n\nMean KL divergence 1e-3.\n\n## The" in (tmp_path / "out" / "README.md").read_text()


def test_a_card_that_somebody_wrote_stays(source, tmp_path):
    out = tmp_path / "out"
    quantize_checkpoint(source, out)
    ours = (out / "README.md").read_text()
    for there, stays in (("# Mine\n", True), (ORIGINAL, False), ("---\nlicense: mit\n---\n" + ours, False)):
        (out / "README.md").write_text(there)
        write_card(out, None, source)
        assert ((out / "README.md").read_text() == there) == stays
    assert (out / "README.md").read_text() == ours


class Hub(BaseHTTPRequestHandler):
    """A minimal hub for uploads of small files; it keeps what it receives."""

    protocol_version = "HTTP/1.1"

    def answer(self, value, status=200, **headers):
        body = json.dumps(value).encode()
        self.send_response(status)
        for name, header in headers.items():
            self.send_header(name.replace("_", "-"), header)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self):
        if self.path.endswith("/README.md"):
            self.answer({}, 404, X_Error_Code="EntryNotFound")
        else:
            self.answer({"id": "me/tiny", "sha": "0" * 40, "siblings": []})

    def do_HEAD(self):
        self.do_GET()

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.path == "/api/repos/create":
            name = "me/" + json.loads(body)["name"]
            self.answer({"url": f"{self.server.address}/{name}", "name": name})
        elif "/preupload/" in self.path:
            files = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                     for f in json.loads(body)["files"]]  # fmt: skip
            self.answer({"files": files})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    self.server.files.setdefault(self.path.split("/")[4], {})[line["value"]["path"]] = content
            url = f"{self.server.address}/me/tiny/commit/" + "1" * 40
            self.answer({"success": True, "commitOid": "1" * 40, "commitUrl": url})
        else:
            self.answer({"errors": [], "warnings": []})

    def log_message(self, *_):
        pass


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.address, server.files = f"http://127.0.0.1:{server.server_port}", {}
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


PUSH = """
import qins, transformers

source, out = {!r}, {!r}
of_codes = qins.load(out)
while_loading = transformers.LlamaForCausalLM.from_pretrained(source, quantization_config=qins.QinsConfig())
in_place = transformers.LlamaForCausalLM.from_pretrained(source)
qins.convert(in_place)
dequantized = qins.load(out).dequantize()
for name in ("of_codes", "while_loading", "in_place", "dequantized"):
    globals()[name].push_to_hub(f"me/{{name}}", token="hf_x", tags=["small"])
"""


def test_push_to_hub(source, tmp_path, hub):
    out = tmp_path / "out"
    quantize_checkpoint(source, out)
    environment = {**os.environ, "HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0",
                   "HF_HUB_DISABLE_XET": "1"}  # fmt: skip
    command = [sys.executable, "-c", PUSH.format(str(source), str(out))]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert [*hub.files] == ["of_codes", "while_loading", "in_place", "dequantized"]
    head, text = parts(hub.files.pop("dequantized")["README.md"].decode())
    assert "small" in head["tags"]
    assert "codes" not in text
    for name, files in hub.files.items():
        head, text = parts(files["README.md"].decode())
        assert head["license"] == "apache-2.0"
        assert {"small", "qins", "chat"} <= set(head["tags"])
        assert 'This needs `pip install "qins[hf]"`' in text[:300]
        assert text.count("# Tiny") == 1
        (tmp_path / name).mkdir()
        for file, content in files.items():
            (tmp_path / name / file).write_bytes(content)
        pushed = qins.load(tmp_path / name, verify=True)
        assert same_state(pushed, qins.load(out))
        assert same_state(pickle.loads(pickle.dumps(copy.deepcopy(pushed))), pushed)
