"""qins eval: its measures, on models small enough to measure again in plain NumPy; and its page in a browser."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import terminal
import torch
from cases import long_but

import qins
from qins.fidelity import PEERS, evaluation, metrics
from qins.fidelity.recording import Recording
from qins.fidelity.report import _draw_tokens

transformers = pytest.importorskip("transformers")
from tiny import COMMON, make  # noqa: E402
from tokens import save_tokenizer, sharp_llama, token_ids  # noqa: E402
from tokens import text as words  # noqa: E402

pytestmark = pytest.mark.once


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A float checkpoint whose next-token distributions are far from uniform."""
    path = tmp_path_factory.mktemp("model") / "float"
    sharp_llama().save_pretrained(path)
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
    done = terminal.run("eval", *args)
    assert done.returncode == code, done.stderr
    return done


def by_hand(reference, model, ids):
    """Return the measures, computed in float64 NumPy, one prediction at a time."""
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
    quantized = transformers.AutoModelForCausalLM.from_pretrained(source, quantization_config=qins.QinsConfig())
    quantized.save_pretrained(tmp_path / "q")
    found = evaluation.evaluate_one(str(tmp_path / "q"), str(source), settings(text_file))
    (m,) = found.measured
    assert m.name == "q"
    reference = transformers.AutoModelForCausalLM.from_pretrained(source).eval()
    rows = by_hand(reference, quantized.eval(), token_ids(2048)[:600])
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
    layers = [x for x in quantized.modules() if isinstance(x, qins.QINSLinear)]
    weights = sum(x.in_features * x.out_features for x in layers)
    assert m.bits == pytest.approx(8 * sum(x.encoded.nbytes for x in layers) / weights)
    assert len(m.layers) == len(layers)
    name = "model.layers.1.mlp.down_proj"
    w, v = reference.get_submodule(name).weight.detach(), quantized.get_submodule(name).weight
    snr = 10 * np.log10(float(w.square().sum() / (w - v).square().sum()))
    assert m.layers[name]["weight_snr_db"] == pytest.approx(snr, abs=1e-3)
    assert 30 < m.layers[name]["output_snr_db"] < 60
    assert m.bytes == metrics.bytes_by_component(quantized)


def test_greedy(source, text_file):
    """The float model agrees with itself on everything; a model of noise, on hardly anything."""
    found = evaluation.evaluate_one(str(source), str(source), settings(text_file))
    (m,) = found.measured
    assert m.comparison.summary().kl_mean == 0.0
    assert m.greedy_same == [12, 12, 12, 12]
    assert m.forced == 1.0
    assert m.bits == 32
    assert all(x["output_snr_db"] == float("inf") for x in m.layers.values())


def test_every_codec_and_peer(source, text_file):
    # in layers this small, the per-row scales alone take half a bit per weight
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


@pytest.mark.long
def test_fewer_bits(source, text_file):
    names = ["log8", *evaluation.PACKED, "calibrated to 5.2 bits"]
    found = evaluation.evaluate_all(str(source), names, settings(text_file))
    kl = {m.name: m.comparison.summary().kl_mean for m in found.measured}
    bits = {m.name: m.bits for m in found.measured}
    assert kl["log8"] < kl["log6"] < kl["log5"] < kl["log4"]
    for codec in ("log6", "log5", "log4"):
        assert kl[f"calibrated {codec}"] < kl[codec]
        assert bits[f"calibrated {codec}"] == bits[codec] == pytest.approx(int(codec[3]) + 0.25 + 0.5, abs=0.1)
    assert bits["calibrated to 5.2 bits"] <= 5.2
    assert kl["calibrated to 5.2 bits"] < kl["log4"]


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
    original = Recording.ask

    def failing(recording, model, item):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(recording, model, item)

    monkeypatch.setattr(Recording, "ask", failing)
    with pytest.raises(KeyboardInterrupt):
        evaluation.evaluate_all(str(source), ["log8"], settings(text_file, directory=tmp_path / "b"))
    files = sorted(p.name for p in (tmp_path / "b").iterdir())
    assert files == ["about.json", "window-00000.npy", "window-00001.npy", "window-00002.npy"]
    again = evaluation.evaluate_all(str(source), ["log8"], settings(text_file, directory=tmp_path / "b"))
    assert len(calls) == 4 + 10 - 3
    assert torch.equal(again.measured[0].comparison.kl, whole.measured[0].comparison.kl)
    # the reference's logits are reused, but only for the same text
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
    for arguments in (["--against", source], [source, "--against", source, "--codec", "log8"]):
        assert "against: expected a MODEL to measure, and no --codec" in command(*arguments, code=1).stderr
    other = make("llama")
    other.resize_token_embeddings(150)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="other: expected a vocabulary of 160"):
        evaluation.evaluate_one(str(tmp_path / "other"), str(source), settings(text_file))
    save_tokenizer(tmp_path / "other")
    with pytest.raises(ValueError, match="other: expected a vocabulary of at least 1[56].* got 150"):
        evaluation.evaluate_one(str(source), str(tmp_path / "other"), settings(text_file))
    if "lm_eval" not in sys.modules:
        with pytest.raises(ImportError, match="pip install lm-eval"):
            evaluation.harness_results(str(source), ["x"])


# -- all kinds of models ----------------------------------------------------------------------------


def bart():
    config = transformers.BartConfig(
        vocab_size=160, d_model=64, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=96, decoder_ffn_dim=96, max_position_embeddings=128, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=None, init_std=0.2,
    )  # fmt: skip
    return transformers.BartForConditionalGeneration(config)


OTHERS = {
    "llama": lambda: make("llama"),
    "t5": lambda: make("t5"),
    "bart": bart,
    "bert": lambda: make("bert"),
    "roberta": lambda: transformers.RobertaForMaskedLM(transformers.RobertaConfig(**(COMMON | {"pad_token_id": 1}))),
    "bert encoder": lambda: transformers.BertModel(transformers.BertConfig(**COMMON)),
    "bert classifier": lambda: transformers.BertForSequenceClassification(transformers.BertConfig(**COMMON)),
    "llama encoder": lambda: make("llama").model,
    "t5 encoder": lambda: transformers.T5EncoderModel(make("t5").config),
    "gpt2": lambda: make("gpt2"),
    "qwen2_vl": lambda: make("qwen2_vl"),
}


def save(path, model, **tokens):
    model.eval().save_pretrained(path)
    save_tokenizer(path, before="w1", after="w2", **tokens)
    return path


def both(path, name):
    """Return a float model and its quantized copy; save both."""
    torch.manual_seed(0)
    model = OTHERS[name]()
    save(path / "float", model, mask_token="w159")
    config = qins.QinsConfig()
    quantized = type(model).from_pretrained(path / "float", quantization_config=config).eval()
    quantized.save_pretrained(path / "codes")
    return model.eval(), quantized


@pytest.mark.parametrize("name", long_but(["llama", "t5", "bert encoder", "gpt2"], OTHERS))
def test_kinds(text_file, tmp_path, name):
    """Every kind of text model is measured, in windows that fit it; the page and the table are written."""
    both(tmp_path, name)
    # most of these models have at most 128 positions, fewer than the default window of 512 tokens
    given = settings(text_file, window=512, new_tokens=6)
    found = evaluation.evaluate_one(str(tmp_path / "codes"), str(tmp_path / "float"), given)
    (m,) = found.measured
    kind = found.about["kind"]
    kinds = {"t5": "encoder-decoder", "bart": "encoder-decoder", "bert": "masked language model", "llama": "decoder",
             "roberta": "masked language model", "gpt2": "decoder", "qwen2_vl": "decoder"}  # fmt: skip
    assert kind == kinds.get(name, "encoder")
    if name not in ("t5", "t5 encoder"):
        assert found.about["window"] <= 128
    assert 0 < float(m.distances.mean()) < 1e-2
    assert (m.comparison is None) == (kind == "encoder")
    assert (m.similarity is not None) == (kind in ("encoder", "masked language model"))
    assert bool(m.greedy_same) == (kind in ("decoder", "encoder-decoder"))
    assert len(m.layers) > 5 or name == "gpt2"  # GPT-2's layers are Conv1D
    assert all(x["output_snr_db"] > 20 for x in m.layers.values())
    json.dumps(found.to_dict())
    itself = evaluation.evaluate_one(str(tmp_path / "float"), str(tmp_path / "float"), given).measured[0]
    assert float(itself.distances.max()) == 0.0
    assert itself.forced in (1.0, None)
    assert all(n == 6 for n in itself.greedy_same)


@pytest.mark.long
@pytest.mark.parametrize("name", ["t5", "bert", "bert encoder"])
def test_other_kinds_made_in_one_run(text_file, tmp_path, name):
    both(tmp_path, name)
    reference = str(tmp_path / "float")
    names = ["log8", "calibrated", "calibrated to 8.7 bits", "Q8_0", evaluation.WHOLE_BF16]
    found = evaluation.evaluate_all(reference, names, settings(text_file, window=120))
    assert [m.name for m in found.measured] == names
    by_name = {m.name: float(m.distances.mean()) for m in found.measured}
    assert 0 < by_name["calibrated"] < by_name["log8"] < 1e-2
    # the output embedding is not among the layers
    assert not any("lm_head" in n or "decoder" in n.split(".")[-1] for m in found.measured for n in m.layers)
    pytest.importorskip("matplotlib")
    from qins.fidelity import write_report

    page = tmp_path / "page.html"
    write_report(found, page, transformers.AutoTokenizer.from_pretrained(reference))
    html = page.read_text()
    assert ("Largest divergences" in html) == (name != "bert encoder")
    assert ("cosine" in html) == (name != "t5")
    assert ("KL divergence" in html) == (name != "bert encoder")


def probabilities(logits):
    e = np.exp(logits - logits.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def test_encoder_decoder_by_hand(text_file, tmp_path):
    """The encoder reads a piece of text; the decoder predicts the next piece, teacher-forced."""
    models = both(tmp_path, "bart")
    found = evaluation.evaluate_one(str(tmp_path / "codes"), str(tmp_path / "float"), settings(text_file))
    pieces = [[1, *p.tolist(), 2] for p in torch.split(token_ids(2048)[:600], 64)]
    kl, losses = [], []
    for source, target in pairwise(pieces):
        ids, before = torch.tensor([source]), torch.tensor([[2, *target[:-1]]])
        with torch.no_grad():
            p, q = (probabilities(m(ids, decoder_input_ids=before).logits[0].double().numpy()) for m in models)
        kl.append((p * np.log(p / q)).sum(-1))
        losses.append([-np.log(x[range(len(target)), target]) for x in (p, q)])
    f = found.measured[0].comparison.summary()
    kl, losses = np.concatenate(kl), np.concatenate(losses, axis=1)
    assert f.tokens == len(kl) == found.about["predictions"]
    assert f.kl_mean == pytest.approx(kl.mean(), rel=1e-2)
    assert f.reference_perplexity == pytest.approx(np.exp(losses[0].mean()), rel=1e-5)
    assert f.perplexity == pytest.approx(np.exp(losses[1].mean()), rel=1e-5)


def test_masked_and_states_by_hand(text_file, tmp_path):
    """One token in seven is masked and predicted; the hidden states of all tokens are compared."""
    models = both(tmp_path, "bert")
    found = evaluation.evaluate_one(str(tmp_path / "codes"), str(tmp_path / "float"), settings(text_file))
    losses, cosines, means = [], [], []
    for piece in torch.split(token_ids(2048)[:600], 64):
        ids = torch.tensor([1, *piece.tolist(), 2])
        at = torch.arange(4, len(ids) - 1, 7)
        hidden = ids.index_fill(0, at, 159)[None]
        with torch.no_grad():
            outs = [m(hidden, output_hidden_states=True) for m in models]
        p, q = (probabilities(o.logits[0, at].double().numpy()) for o in outs)
        losses.append([-np.log(x[range(len(at)), ids[at]]) for x in (p, q)])
        a, b = (o.hidden_states[-1][0].double() for o in outs)
        cosines.append(torch.cosine_similarity(a, b))
        means.append(torch.cosine_similarity(a.mean(0), b.mean(0), dim=0))
    (m,) = found.measured
    f, losses = m.comparison.summary(), np.concatenate(losses, axis=1)
    assert f.tokens == losses.shape[1] == found.about["predictions"]
    assert f.reference_perplexity == pytest.approx(np.exp(losses[0].mean()), rel=1e-5)
    assert f.perplexity == pytest.approx(np.exp(losses[1].mean()), rel=1e-5)
    s = m.similarity.summary()
    assert s["tokens"] == 600 + 2 * 10
    assert s["distance_mean"] == pytest.approx(1 - float(torch.cat(cosines).mean()), rel=1e-3)
    assert s["embedding_distance_max"] == pytest.approx(1 - float(torch.stack(means).min()), rel=1e-3)


def vit():
    return transformers.ViTModel(transformers.ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2))


def whisper():
    config = transformers.WhisperConfig(
        vocab_size=160, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    return transformers.WhisperForConditionalGeneration(config)


def clip():
    tower = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.CLIPConfig(text_config=tower | {"vocab_size": 160}, vision_config=tower)
    return transformers.CLIPModel(config)


@pytest.mark.parametrize("make_model", [vit, whisper, clip, lambda: transformers.T5Model(make("t5").config)])
def test_what_is_not_evaluated(tmp_path, make_model):
    model = make_model()
    save(tmp_path / "model", model)
    with pytest.raises(ValueError, match=f"expected a text model: a decoder, .*; got {type(model).__name__}"):
        evaluation.evaluate_all(str(tmp_path / "model"), ["log8"], evaluation.Settings())


# -- the report ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def report(source, text_file):
    pytest.importorskip("matplotlib")
    page = source.parent / "report" / "new" / "out.html"  # directories that do not exist yet
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


@pytest.fixture(scope="module")
def pages(report, source, text_file):
    """A page of several models, and one page for each kind of model."""
    from qins.fidelity import write_report

    made = {"several": report}
    for name in ("llama", "t5", "bert", "bert encoder"):
        path = source.parent / f"a {name} model with a rather long name"
        both(path, name)
        found = evaluation.evaluate_one(str(path / "codes"), str(path / "float"), settings(text_file, window=100))
        made[name] = source.parent / f"{name}.html"
        write_report(found, made[name], transformers.AutoTokenizer.from_pretrained(path / "float"))
    return made


@pytest.mark.long
def test_columns_say_what_they_are(pages):
    heads = {
        name: re.findall(r'<th scope="col">([^<]*)</th>', page.read_text().split("Largest")[0])
        for name, page in pages.items()
    }
    predictions = ["KL divergence, mean", "median", "99th percentile", "maximum", "same top token",
                   "same top five tokens", "perplexity", "perplexity change"]  # fmt: skip
    states = ["cosine of token states, mean", "99th percentile", "lowest", "cosine of embeddings, mean", "lowest"]
    costs = ["model", "bits per weight", "size in memory, MB", "peak memory, MB", "tokens per second",
             "greedy tokens still most likely", "greedy tokens before the first difference"]  # fmt: skip
    assert heads["several"] == heads["llama"] == heads["t5"] == ["model", *predictions, *costs]
    assert heads["bert"] == ["model", *predictions, "model", *states, *costs[:4]]
    assert heads["bert encoder"] == ["model", *states, *costs[:4]]


def test_known_figures_have_room_for_their_names():
    figure = pytest.importorskip("matplotlib.figure").Figure()
    model = SimpleNamespace(name="log8", distances=torch.linspace(0.1, 1.0, 50))
    e = evaluation.Evaluation({"kind": "decoder"}, [model])
    _draw_tokens(figure, e, {"Q8_0": (0.0, 0.0, 2.0)})
    assert figure.axes[0].get_xlim()[1] >= 5 * 2.0


@pytest.mark.long
def test_known_figures_stand_beside_one_model(pages):
    """They equal those of docs/measurements.md, and the page names their model and text."""
    from qins.fidelity.report import KNOWN, KNOWN_ENCODER, KNOWN_ENCODER_ON, KNOWN_ON

    for name, page in pages.items():
        html = page.read_text()
        on = KNOWN_ENCODER_ON if name == "bert encoder" else KNOWN_ON
        assert (f"measured on {on}; not on this model and text" in html) == (name != "several")
        image = re.search(r'src="data:image/svg\+xml;base64,([^"]+)"', html)
        drawn = base64.b64decode(image[1]).decode()
        figures = KNOWN_ENCODER if name == "bert encoder" else KNOWN
        assert name == "several" or all(f"{known}, {bits:.2f} bits" in drawn for known, (bits, *_) in figures.items())
    docs = Path(__file__).parent.parent.parent / "docs" / "measurements.md"
    if not docs.exists():
        pytest.skip("the documentation is not here")
    text = docs.read_text("utf-8")
    assert "2,044 predictions of\nEnglish (the text that ships with the package)" in text
    assert "embeddings of 53 queries and as many passages" in text
    for name, (bits, mean, p99) in KNOWN.items():
        row = next(r for r in text.splitlines() if r.startswith(f"| {name} |"))
        cells = [c.strip() for c in row.split("|")[2:]]
        assert [float(cells[0]), float(cells[2].split()[0]), float(cells[3])] == [bits, mean, p99]
    for name, (bits, mean) in KNOWN_ENCODER.items():
        row = next(r for r in text.splitlines() if r.startswith(f"| {name} |") and "| 1 - " in r)
        cells = [c.strip() for c in row.split("|")[2:]]
        assert [float(cells[0]), float(cells[1].removeprefix("1 - "))] == [bits, mean]


def in_a_browser(page, tmp_path, width, dark=False):
    """Return what the browser measures of a page in a window of this width."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no Chromium is installed")
    check = tmp_path / "check.html"
    script = """<script>addEventListener("load", () => {
      const images = [...document.images], style = getComputedStyle(document.body);
      document.title = JSON.stringify({drawn: images.every(i => i.naturalWidth > 100), images: images.length,
        window: innerWidth, wide: document.documentElement.scrollWidth > innerWidth,
        scrolling: [...document.querySelectorAll("main *")].filter(e => e.scrollWidth > e.clientWidth + 1
          && getComputedStyle(e).overflowX != "visible").length,
        rows: document.querySelectorAll("tbody tr").length, ink: style.color, paper: style.backgroundColor}); });
      </script>"""
    check.write_text(page.read_text().replace("</body>", script + "</body>"))
    run = subprocess.run(
        [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--dump-dom",
         f"--window-size={width},900", f"--user-data-dir={tmp_path / 'profile'}",
         f"--blink-settings=preferredColorScheme={0 if dark else 1}", check.as_uri()],
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    title = re.search(r"<title>(\{.*?\})</title>", run.stdout)
    assert title, run.stderr[-2000:]
    return json.loads(title.group(1).replace("&quot;", '"'))


@pytest.mark.parametrize("dark", [True, False])
def test_report_in_a_browser(report, tmp_path, dark):
    """Every figure is drawn, nothing is wider than a phone's screen, and the dark and light themes apply."""
    seen = in_a_browser(report, tmp_path, 400, dark)
    assert seen["drawn"]
    assert seen["images"] == 5
    assert seen["rows"] == 2 * 8 + 2 * 12
    assert not seen["wide"]
    ink, paper = (sum(map(int, re.findall(r"\d+", seen[k])[:3])) / 765 for k in ("ink", "paper"))
    assert (paper < 0.2 < 0.8 < ink) if dark else (ink < 0.2 < 0.8 < paper)


@pytest.mark.long
def test_nothing_scrolls_sideways(pages, tmp_path):
    """No table of any page overflows in a window of 1,200 pixels."""
    for name, page in pages.items():
        seen = in_a_browser(page, tmp_path, 1200)
        assert seen["window"] == 1200
        assert (name, seen["wide"], seen["scrolling"]) == (name, False, 0)
