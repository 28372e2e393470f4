"""qins eval: what is measured, on models small enough to measure again in plain NumPy; and the page in a browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

import qins
from qins import evaluate, evaluation
from qins.peers import PEERS

transformers = pytest.importorskip("transformers")
from test_hf import make  # noqa: E402
from tokens import save_tokenizer, token_ids  # noqa: E402
from tokens import text as words  # noqa: E402

pytestmark = pytest.mark.once


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A float checkpoint whose next tokens are far from uniform."""
    path = tmp_path_factory.mktemp("model") / "float"
    model = make("llama")
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    model.save_pretrained(path)
    save_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def text_file(source):
    path = source.parent / "text.txt"
    path.write_text(words(2048))
    return path


def settings(text_file, **more):
    return evaluation.Settings(
        **({"text": text_file.read_text(), "tokens": 600, "window": 64, "new_tokens": 12} | more)
    )


def command(*args, code=0):
    run = subprocess.run([sys.executable, "-m", "qins.cli", "eval", *map(str, args)], capture_output=True, text=True)
    assert run.returncode == code, run.stderr
    return run


def by_hand(reference, model, ids):
    """The measures in float64 NumPy, one prediction at a time."""
    rows = []
    for window in torch.split(ids, 64):
        if len(window) < 2:
            continue
        with torch.no_grad():
            logits = [m(window[None]).logits[0].double().numpy() for m in (reference, model)]
        for t in range(len(window) - 1):
            p, q = (np.exp(x[t] - x[t].max()) / np.exp(x[t] - x[t].max()).sum() for x in logits)
            five = [set(np.argsort(-x)[:5].tolist()) for x in (p, q)]
            k = int(window[t + 1])
            same = p.argmax() == q.argmax()
            rows.append(((p * np.log(p / q)).sum(), same, len(five[0] & five[1]) / 5, -np.log(p[k]), -np.log(q[k])))
    return np.array(rows)


def test_figures(source, text_file, tmp_path):
    quantised = transformers.AutoModelForCausalLM.from_pretrained(source, quantization_config=qins.QinsConfig())
    quantised.save_pretrained(tmp_path / "q")
    found = evaluation.evaluate_one(str(tmp_path / "q"), str(source), settings(text_file))
    (m,) = found.measured
    reference = transformers.AutoModelForCausalLM.from_pretrained(source).eval()
    rows = by_hand(reference, quantised.eval(), token_ids(2048)[:600])
    f, n = m.comparison.summary(), len(rows)
    assert f.tokens == n == found.about["predictions"]
    kl, same, five, loss, other = rows.T
    assert f.kl_mean == pytest.approx(kl.mean(), rel=1e-2)
    assert f.kl_mean_error == pytest.approx(kl.std(ddof=1) / n**0.5, rel=1e-2)
    assert f.kl_p99 == pytest.approx(np.quantile(kl, 0.99), rel=2e-2)
    assert f.kl_max == pytest.approx(kl.max(), rel=2e-2)
    assert f.top1 == pytest.approx(same.mean())
    assert f.top5 == pytest.approx(five.mean())
    assert f.reference_perplexity == pytest.approx(np.exp(loss.mean()), rel=1e-5)
    assert f.perplexity == pytest.approx(np.exp(other.mean()), rel=1e-5)
    assert f.log_perplexity_error == pytest.approx(loss.std(ddof=1) / n**0.5, rel=1e-4)
    assert f.log_ratio == pytest.approx((other - loss).mean(), rel=1e-2, abs=1e-6)
    assert f.log_ratio_error == pytest.approx((other - loss).std(ddof=1) / n**0.5, rel=1e-2)
    layers = [x for x in quantised.modules() if isinstance(x, qins.QINSLinear)]
    weights = sum(x.in_features * x.out_features for x in layers)
    assert m.bits == pytest.approx(8 * sum(x.encoded.nbytes for x in layers) / weights)
    assert len(m.layers) == len(layers)
    name = "model.layers.1.mlp.down_proj"
    w, v = reference.get_submodule(name).weight.detach(), quantised.get_submodule(name).weight
    snr = 10 * np.log10(float(w.square().sum() / (w - v).square().sum()))
    assert m.layers[name]["weight_snr_db"] == pytest.approx(snr, abs=1e-3)
    assert 30 < m.layers[name]["output_snr_db"] < 60
    assert m.bytes == evaluate.bytes_by_component(quantised)


def test_greedy(source, text_file):
    """The float model against itself: everything is the same; a model of noise: hardly anything."""
    found = evaluation.evaluate_one(str(source), str(source), settings(text_file))
    (m,) = found.measured
    assert m.comparison.summary().kl_mean == 0.0
    assert m.greedy_same == [12, 12, 12, 12]
    assert m.forced == 1.0
    assert m.bits == 32
    assert all(x["output_snr_db"] == float("inf") for x in m.layers.values())


def test_every_codec_and_peer(source, text_file):
    # a row's scale alone takes half a bit of these small layers' weights
    codecs = ["calibrated to 8.7 bits" if c == "calibrated to 8.13 bits" else c for c in evaluation.CODECS]
    names = [*codecs, *PEERS, evaluation.WHOLE_BF16]
    found = evaluation.evaluate_all(str(source), names, settings(text_file))
    kl = {m.name: m.comparison.summary().kl_mean for m in found.measured}
    assert list(kl) == names
    assert kl["log9"] == pytest.approx(kl["golden"], rel=1e-3)
    assert kl["bf16 weights"] < kl["log8"] < kl["int8 per row"] < kl["fp8 e4m3 per row"]
    assert kl["calibrated"] < kl["log8"]
    bits = {m.name: m.bits for m in found.measured}
    assert bits["bf16 weights"] == bits["bf16 model"] == bits["golden"] // 1 == 16
    assert bits["Q8_0"] == 8.5
    assert bits["calibrated to 8.7 bits"] <= 8.7
    assert {m.name for m in found.measured if m.tokens_per_second is None} == set(PEERS)
    assert found.levels["levels"][-1] == pytest.approx(1.0)
    assert sum(found.levels["counts"]) == 64 * 64
    json.dumps(found.to_dict())


@pytest.mark.parametrize("cols", [1, 31, 32, 100])
def test_peers(rng, cols):
    w = torch.from_numpy(rng.normal(0, 0.02, (7, cols)).astype(np.float32))
    w[3] = 0
    for name, peer in PEERS.items():
        q = peer.decoded(w)
        assert q.shape == w.shape
        assert q.dtype == torch.float32
        assert not q[3].any()
        assert (q - w).norm() < 0.05 * w.norm(), name
        assert peer.bits(cols) >= 8
    exact = torch.arange(-127, 128).float()[None] / 127
    torch.testing.assert_close(PEERS["int8 per row"].decoded(exact), exact)
    assert PEERS["Q8_0"].bits(64) == 8.5


def test_goes_on_where_it_stopped(source, text_file, tmp_path, monkeypatch):
    whole = evaluation.evaluate_all(str(source), ["log8"], settings(text_file, directory=tmp_path / "a"))
    calls = []
    original = evaluate.log_probabilities

    def failing(model, ids):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(model, ids)

    monkeypatch.setattr("qins.recording.log_probabilities", failing)
    with pytest.raises(KeyboardInterrupt):
        evaluation.evaluate_all(str(source), ["log8"], settings(text_file, directory=tmp_path / "b"))
    files = sorted(p.name for p in (tmp_path / "b").iterdir())
    assert files == ["about.json", "window-00000.npy", "window-00001.npy", "window-00002.npy"]
    again = evaluation.evaluate_all(str(source), ["log8"], settings(text_file, directory=tmp_path / "b"))
    assert len(calls) == 4 + 10 - 3
    assert torch.equal(again.measured[0].comparison.kl, whole.measured[0].comparison.kl)
    # the reference's answers serve again, and only for the same text
    evaluation.evaluate_all(str(source), ["log8"], settings(text_file, directory=tmp_path / "b"))
    assert len(calls) == 11
    with pytest.raises(FileExistsError, match="another model or to another text"):
        evaluation.evaluate_all(str(source), ["log8"], settings(text_file, directory=tmp_path / "b", tokens=500))
    assert json.loads((tmp_path / "b" / "measured.json").read_text())["models"][0]["name"] == "log8"


def test_tampered_model_is_told_apart(source, text_file, tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(source, quantization_config=qins.QinsConfig())
    model.save_pretrained(tmp_path / "good")
    codes = model.model.layers[1].mlp.up_proj.codes
    codes.copy_(codes[torch.randperm(len(codes), generator=torch.Generator().manual_seed(0))])
    model.save_pretrained(tmp_path / "bad")
    limit = ("--against", source, "--text", text_file, "--tokens", 600, "--window", 64, "--max-kld", 1e-2, "--json")
    good = json.loads(command(tmp_path / "good", *limit).stdout)
    run = command(tmp_path / "bad", *limit, code=1)
    assert "is above 0.01" in run.stderr
    bad = json.loads(run.stdout)
    name = "model.layers.1.mlp.up_proj"
    assert good["models"][0]["layers"][name]["output_snr_db"] > 30 > bad["models"][0]["layers"][name]["output_snr_db"]


def test_errors(source, text_file, tmp_path):
    with pytest.raises(ValueError, match="codec: expected one of log8, calibrated,.*got 'int4'"):
        evaluation.evaluate_all(str(source), ["int4"], settings(text_file))
    with pytest.raises(ValueError, match="text: expected at least 32 tokens, got 3"):
        evaluation.evaluate_all(str(source), ["log8"], evaluation.Settings(text="w1 w2 w3"))
    with pytest.raises(ValueError, match="calibration: expected at least 256 tokens"):
        evaluation.evaluate_all(str(source), ["calibrated"], settings(text_file, tokens=2040))
    assert "expected a MODEL to measure" in command("--against", source, code=1).stderr
    other = make("llama")
    other.resize_token_embeddings(150)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="other: expected a vocabulary of 160"):
        evaluation.evaluate_one(str(tmp_path / "other"), str(source), settings(text_file))
    if "lm_eval" not in sys.modules:
        with pytest.raises(ImportError, match="pip install lm-eval"):
            evaluation.harness_results(str(source), ["x"])


# -- the report ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def report(source, text_file):
    pytest.importorskip("matplotlib")
    page = source.parent / "report" / "out.html"
    command(source, "--codec", "log8", "--codec", "calibrated", "--text", text_file, "--tokens", 600, "--window", 64,
            "--report", page)  # fmt: skip
    return page


def test_report_needs_nothing_else(report):
    html = report.read_text()
    links = re.findall(r"(?:src|href)=\"([^\"]{1,40})", html) + re.findall(r"url\(([^)]{1,40})", html)
    assert links
    assert all(link.startswith("data:") for link in links)
    assert "<script" not in html
    assert {p.name for p in report.parent.glob("*.png")} == {
        f"out-{n}.png" for n in ("size", "tokens", "layers", "speed", "levels")
    }
    assert all(p.read_bytes()[:4] == b"\x89PNG" for p in report.parent.glob("*.png"))
    for name in ("log8", "calibrated", "Q8_0", "fp8 e4m3 per row"):
        assert f'<th scope="row">{name}</th>' in html
    assert len(re.findall(r"<img [^>]*alt=\"[^\"]{30,}\"", html)) == html.count("<img") == 5


def test_report_in_a_browser(report, tmp_path):
    """Every picture is drawn, nothing is wider than a phone's page, and dark and light are dark and light."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no Chromium is installed")
    check = tmp_path / "check.html"
    script = """<script>addEventListener("load", () => {
      const images = [...document.images], style = getComputedStyle(document.body);
      document.title = JSON.stringify({drawn: images.every(i => i.naturalWidth > 100), images: images.length,
        wide: document.documentElement.scrollWidth > innerWidth, rows: document.querySelectorAll("tbody tr").length,
        ink: style.color, paper: style.backgroundColor}); });</script>"""
    check.write_text(report.read_text().replace("</body>", script + "</body>"))
    for dark in (True, False):
        run = subprocess.run(
            [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--dump-dom",
             "--window-size=400,900", f"--user-data-dir={tmp_path / str(dark)}",
             f"--blink-settings=preferredColorScheme={0 if dark else 1}",
             check.as_uri()],
            capture_output=True, text=True, timeout=240,
        )  # fmt: skip
        title = re.search(r"<title>(\{.*?\})</title>", run.stdout)
        assert title, run.stderr[-2000:]
        seen = json.loads(title.group(1).replace("&quot;", '"'))
        assert seen["drawn"]
        assert seen["images"] == 5
        assert seen["rows"] == 8 + 2 * 12
        assert not seen["wide"]
        ink, paper = (sum(map(int, re.findall(r"\d+", seen[k])[:3])) / 765 for k in ("ink", "paper"))
        assert (paper < 0.2 < 0.8 < ink) if dark else (ink < 0.2 < 0.8 < paper)
