"""qins quantize: conversion of checkpoints on disk."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress

import pytest
import terminal
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import qins
from qins.checkpoint import quantize_checkpoint
from qins.files import ShardWriter, Target, fingerprint
from qins.system import locked

transformers = pytest.importorskip("transformers")
from gguf_files import write_gguf  # noqa: E402
from peak import peak_memory  # noqa: E402
from tiny import COMMON, MODELS, make, outputs, same_state  # noqa: E402
from tiny_experts import MODELS as MOE  # noqa: E402
from tiny_experts import V5  # noqa: E402
from tiny_experts import make as moe  # noqa: E402
from tokens import save_tokenizer  # noqa: E402
from tokens import text as words  # noqa: E402

pytestmark = pytest.mark.once


def tree(path):
    return {p.name: p.read_bytes() for p in sorted(path.iterdir())}


def same_files(one, other, name):
    """Check that the file equals that of save_pretrained byte for byte."""
    if name == "bert" and transformers.__version__.startswith("5.0"):  # it saves BERT's norms as gamma and beta
        return
    assert (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
    configs = [json.loads((d / "config.json").read_text()) for d in (one, other)]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("codec", ["log8", "log9", "log4"])
def test_as_in_process(tmp_path, name, codec):
    model = make(name)
    model.save_pretrained(tmp_path / "float")
    result = quantize_checkpoint(tmp_path / "float", tmp_path / "out", qins.QinsConfig(codec))
    quantized = type(model).from_pretrained(tmp_path / "float", quantization_config=qins.QinsConfig(codec))
    loaded = qins.load(tmp_path / "out")
    assert result["layers"] == sum(isinstance(m, qins.QINSLinear) for m in quantized.modules())
    assert same_state(loaded, quantized)
    assert torch.equal(outputs(loaded), outputs(type(model).from_pretrained(tmp_path / "out")))
    quantized.save_pretrained(tmp_path / "process")
    same_files(tmp_path / "out", tmp_path / "process", name)


def test_layers_that_cannot_be_packed_get_log8(tmp_path):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**COMMON | {"intermediate_size": 100})
    result = same_as_in_process(tmp_path, transformers.LlamaForCausalLM(config), {"codec": "log4"})
    assert result["notes"] == [
        f"model.layers.{i}.mlp.down_proj: log8 instead of log4: 100 inputs are not a multiple of 8" for i in range(2)
    ]


def same_as_in_process(tmp_path, model, config):
    model.save_pretrained(tmp_path / "float")
    result = quantize_checkpoint(tmp_path / "float", tmp_path / "out", qins.QinsConfig(**config))
    quantized = type(model).from_pretrained(tmp_path / "float", quantization_config=qins.QinsConfig(**config))
    quantized.save_pretrained(tmp_path / "process")
    same_files(tmp_path / "out", tmp_path / "process", model.config.model_type)
    assert same_state(qins.load(tmp_path / "out"), quantized)
    return result


@pytest.mark.parametrize("name", MOE)
@pytest.mark.parametrize("codec", ["log8", "golden", "log5"])
def test_experts(tmp_path, name, codec):
    """Experts stored one by one, stacked, or stacked and transposed."""
    result = same_as_in_process(tmp_path, moe(name), {"codec": codec})
    assert result["layers"] == {"mixtral": 2 * 6, "qwen2_moe": 2 * 9, "gpt_oss": 2 * 6, "llama4": 2 * 9}[name]


@pytest.mark.skipif(not V5, reason="transformers 4 has these experts as linear layers")
def test_experts_over_several_files(tmp_path):
    model = moe("mixtral")
    model.save_pretrained(tmp_path / "float", max_shard_size="40KB")
    quantize_checkpoint(tmp_path / "float", tmp_path / "out")
    expected = type(model).from_pretrained(tmp_path / "float", quantization_config=qins.QinsConfig())
    assert same_state(qins.load(tmp_path / "out"), expected)
    # a missing expert
    shard = next(p for p in (tmp_path / "float").glob("*.safetensors") if any("w1" in k for k in load_file(p)))
    index = tmp_path / "float" / "model.safetensors.index.json"
    told, state = json.loads(index.read_text()), load_file(shard)
    key = next(k for k in state if "w1" in k)
    del state[key], told["weight_map"][key]
    save_file(state, shard, {"format": "pt"})
    index.write_text(json.dumps(told))
    with pytest.raises(ValueError, match=r"experts\.gate_up_proj: expected 49,152 weights, got 43,008 in 7 tensors"):
        quantize_checkpoint(tmp_path / "float", tmp_path / "short")


@pytest.mark.skipif(not V5, reason="transformers 4 has the names that the checkpoint has")
def test_weights_that_are_split_while_loading(tmp_path):
    torch.manual_seed(0)
    config = transformers.Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14, use_swiglu_ffn=True
    )
    model = transformers.Dinov2Model(config)
    for key, p in model.named_parameters():
        if key.endswith("bias"):
            nn.init.normal_(p, std=0.02)
    result = same_as_in_process(tmp_path, model, {})
    assert result["layers"] == sum(type(m) is nn.Linear for m in model.modules())


@pytest.mark.parametrize("name", ["llama", "llama tied", "gpt2", "bert", "t5", "modernbert"])
@pytest.mark.parametrize("embeddings", [False, True])
def test_embeddings(tmp_path, name, embeddings):
    if name == "t5" and not V5:
        pytest.skip("needs transformers 5, and says so")
    same_as_in_process(tmp_path, make(name), {"lm_head": True, "embeddings": embeddings})


def test_a_tied_weight_that_is_stored_twice(tmp_path):
    model = make("llama tied")
    model.save_pretrained(tmp_path / "float")
    state = load_file(tmp_path / "float" / "model.safetensors")
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    save_file(state, tmp_path / "float" / "model.safetensors", {"format": "pt"})
    config = qins.QinsConfig(lm_head=True, embeddings=True)
    quantize_checkpoint(tmp_path / "float", tmp_path / "out", config)
    assert not any("lm_head" in k for k in load_file(tmp_path / "out" / "model.safetensors"))
    assert isinstance(qins.load(tmp_path / "out").lm_head, qins.QINSLinear)
    state["lm_head.weight"][3, 3] += 1
    save_file(state, tmp_path / "float" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="ties it"):
        quantize_checkpoint(tmp_path / "float", tmp_path / "other", qins.QinsConfig(lm_head=True))


@pytest.mark.parametrize("how", ["on disk", "while loading", "in place"])
def test_checksums(tmp_path, how):
    model = make("llama")
    model.save_pretrained(tmp_path / "float")
    out = tmp_path / "out"
    if how == "on disk":
        quantize_checkpoint(tmp_path / "float", out)
    elif how == "while loading":
        config = qins.QinsConfig()
        transformers.LlamaForCausalLM.from_pretrained(tmp_path / "float", quantization_config=config).save_pretrained(
            out
        )
    else:
        qins.convert(model)
        model.save_pretrained(out)
    state = load_file(out / "model.safetensors")
    report = qins.inspect(out)
    assert report.verified == len(state)
    assert not report.problems
    told = json.loads((out / "config.json").read_text())["quantization_config"]
    assert told["source"] == (None if how == "in place" else fingerprint([tmp_path / "float" / "model.safetensors"]))
    # flip one bit of a code, and one of a norm: the file stays well-formed, and only the checksums detect it
    for key in ("model.layers.1.mlp.up_proj.codes", "model.norm.weight"):
        damaged = {k: t.clone() for k, t in state.items()}
        damaged[key].view(torch.uint8)[3] ^= 16
        save_file(damaged, out / "model.safetensors", {"format": "pt"})
        problems = qins.inspect(out).problems
        assert len(problems) == 1
        assert f"model.safetensors: {key}: expected checksum" in problems[0]
    save_file(state, out / "model.safetensors", {"format": "pt"})
    # a changed model is saved with new checksums
    changed = qins.load(out)
    changed.model.norm.weight.data += 1
    changed.save_pretrained(tmp_path / "changed")
    assert not qins.inspect(tmp_path / "changed").problems
    assert (
        json.loads((tmp_path / "changed" / "config.json").read_text())["quantization_config"]["source"]
        == told["source"]
    )


def test_fingerprint(tmp_path):
    for name, content in (("a", b"x" * 3_000_000), ("b", b""), ("c", b"123")):
        (tmp_path / name).write_bytes(content)
    paths = [tmp_path / n for n in "abc"]
    one = fingerprint(paths)
    assert fingerprint(reversed(paths)) == one
    (tmp_path / "a").write_bytes(b"x" * 2_999_999 + b"y")
    assert fingerprint(paths) != one


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0"])
def test_gguf(tmp_path, kind):
    gguf = pytest.importorskip("gguf")
    model = make("llama")
    write_gguf(tmp_path / "model.gguf", model, gguf.GGMLQuantizationType[kind])
    (tmp_path / "another.gguf").write_bytes(b"GGUF")  # files beside it do not matter
    quantize_checkpoint(tmp_path / "model.gguf", tmp_path / "out")
    loaded = qins.load(tmp_path / "out")
    assert isinstance(loaded, transformers.LlamaForCausalLM)
    # the same codes as from the float model that transformers loads from the file
    original = transformers.LlamaForCausalLM.from_pretrained(
        tmp_path, gguf_file="model.gguf", dtype=torch.float32, attn_implementation="sdpa"
    )
    original.hf_quantizer = None
    if hasattr(original.config, "quantization_config"):
        del original.config.quantization_config
    least = {"F32": 0.0, "F16": 1e-3, "BF16": 1e-2, "Q8_0": 2e-2}[kind]
    error = float((outputs(original) - outputs(model)).norm() / outputs(model).norm())
    assert error <= least + 1e-6
    original.save_pretrained(tmp_path / "float")
    expected = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "float", quantization_config=qins.QinsConfig())
    assert same_state(loaded, expected)
    assert qins.inspect(tmp_path / "out").verified
    (tmp_path / "cut.gguf").write_bytes((tmp_path / "model.gguf").read_bytes()[:-4000])
    with pytest.raises(ValueError, match=r"cut\.gguf: not a readable GGUF file"):
        quantize_checkpoint(tmp_path / "cut.gguf", tmp_path / "cut")
    assert not (tmp_path / "cut").exists()


@pytest.fixture
def source(tmp_path):
    """A sharded checkpoint with a tokenizer file."""
    path = tmp_path / "float"
    make("llama").save_pretrained(path, max_shard_size="60KB")
    (path / "tokenizer.json").write_text("{}")
    assert len(list(path.glob("*.safetensors"))) > 3
    return path


def test_sharded(source, tmp_path):
    quantize_checkpoint(source, tmp_path / "out")
    out = tree(tmp_path / "out")
    assert out["tokenizer.json"] == b"{}"
    assert "model.safetensors.index.json" in out
    assert "qins-progress.json" not in out
    assert not any(n.endswith(".tmp") for n in out)
    assert len([n for n in out if n.endswith(".safetensors")]) == len(list(source.glob("*.safetensors")))
    model = transformers.LlamaForCausalLM.from_pretrained(source, quantization_config=qins.QinsConfig())
    assert same_state(qins.load(tmp_path / "out"), model)
    report = qins.inspect(tmp_path / "out", against=source)
    assert len(report.layers) == 14
    assert not report.problems
    assert min(e.snr_db for e in report.errors) > 40


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes(tmp_path, dtype):
    make("llama").to(dtype).save_pretrained(tmp_path / "half")
    quantize_checkpoint(tmp_path / "half", tmp_path / "out")
    model = transformers.LlamaForCausalLM.from_pretrained(
        tmp_path / "half", quantization_config=qins.QinsConfig(), dtype=dtype
    )
    assert same_state(qins.load(tmp_path / "out", dtype=dtype), model)


def test_torch_files(tmp_path):
    model = make("llama")
    model.save_pretrained(tmp_path / "float")
    (tmp_path / "float" / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "float" / "pytorch_model.bin")
    quantize_checkpoint(tmp_path / "float", tmp_path / "out")
    qins.convert(model)
    assert same_state(qins.load(tmp_path / "out"), model)


def test_headless(tmp_path):
    make("llama").model.save_pretrained(tmp_path / "base")
    quantize_checkpoint(tmp_path / "base", tmp_path / "out")
    model = transformers.LlamaModel.from_pretrained(tmp_path / "base", quantization_config=qins.QinsConfig())
    assert same_state(transformers.LlamaModel.from_pretrained(tmp_path / "out"), model)


def test_settings(source, tmp_path, capsys):
    config = qins.QinsConfig(group_size=32, exclude=["*.self_attn.*"], overrides={"*.up_proj": {"codec": "golden"}})
    result = quantize_checkpoint(source, tmp_path / "out", config, show_progress=True)
    assert result["layers"] == 6
    assert "encoding to golden, log8" in capsys.readouterr().err
    layer = qins.load(tmp_path / "out").model.layers[0]
    assert layer.mlp.up_proj.codec == "golden"
    assert layer.mlp.down_proj.group_size == 32
    assert type(layer.self_attn.q_proj) is nn.Linear


def test_refusals(source, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("precious")
    with pytest.raises(FileExistsError, match="not empty"):
        quantize_checkpoint(source, out)
    assert tree(out) == {"mine.txt": b"precious"}
    with pytest.raises(FileExistsError, match="got a file"):
        quantize_checkpoint(source, out / "mine.txt")
    with pytest.raises(FileNotFoundError, match="neither a directory"):
        quantize_checkpoint("no/such-model-anywhere", tmp_path / "x")
    quantize_checkpoint(source, tmp_path / "done")
    with pytest.raises(ValueError, match="quantized already"):
        quantize_checkpoint(tmp_path / "done", tmp_path / "twice")
    assert not (tmp_path / "twice").exists()
    (source / "config.json").unlink()
    with pytest.raises(ValueError, match=r"config\.json"):
        quantize_checkpoint(source, tmp_path / "y")


def test_disk_is_checked_first(source, tmp_path, monkeypatch):
    usage = type("usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(OSError, match="needs .* bytes, the disk has 1,000 free"):
        quantize_checkpoint(source, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_memory_is_checked_first(source, tmp_path, monkeypatch):
    monkeypatch.setattr("qins.system.machine.available_bytes", lambda swap: 1000)
    with pytest.raises(MemoryError, match=r": .*\.weight: needs [\d,]+ bytes of memory, 1,000 are available"):
        quantize_checkpoint(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("fault", ["nan", "truncated", "missing", "shape"])
def test_faults_leave_no_half_written_shard(source, tmp_path, fault):
    before = tree(source)
    shard = sorted(source.glob("*.safetensors"))[-2]
    state = load_file(shard)
    key = next(k for k in state if "proj" in k)
    if fault == "nan":
        state[key][1, 1] = float("inf")
        save_file(state, shard, {"format": "pt"})
    elif fault == "truncated":
        shard.write_bytes(shard.read_bytes()[:-10])
    elif fault == "missing":
        shard.unlink()
    else:
        state[key] = state[key][:-1].clone()
        save_file(state, shard, {"format": "pt"})
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        quantize_checkpoint(source, tmp_path / "out")
    assert shard.name in str(error.value) or key.removesuffix(".weight") in str(error.value)
    names = list(tree(tmp_path / "out")) if (tmp_path / "out").exists() else []
    assert not any(n.endswith(".tmp") for n in names)
    assert "config.json" not in names
    # after a repair the conversion resumes, with the result of an undisturbed run
    shard.write_bytes(before[shard.name])
    if fault == "nan":  # the source has changed since the conversion began
        with pytest.raises(FileExistsError, match="another source"):
            quantize_checkpoint(source, tmp_path / "out")
    quantize_checkpoint(source, tmp_path / "again")
    assert same_state(qins.load(tmp_path / "again"), qins.load(tmp_path / "again"))


_SLOW = """
import sys, time, qins.checkpoint.quantizing as c
original = c.ShardWriter.write
def slowly(self, name, tensor, part=None):
    time.sleep(0.004)
    original(self, name, tensor, part)
c.ShardWriter.write = slowly
print("ready", flush=True)
c.quantize_checkpoint(sys.argv[1], sys.argv[2])
"""


@pytest.mark.long
def test_kill_and_resume(source, tmp_path):
    """Killed at six points: files under their final names are complete, and are not written again."""
    quantize_checkpoint(source, tmp_path / "undisturbed")
    expected = tree(tmp_path / "undisturbed")
    out = tmp_path / "out"
    done: dict[str, tuple[bytes, int]] = {}
    for i in range(6):
        command = [sys.executable, "-c", _SLOW, str(source), str(out)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
            process.stdout.readline()
            time.sleep(0.02 + 0.1 * i)
            process.send_signal(signal.SIGKILL)
        for path in out.glob("*.safetensors") if out.exists() else ():
            content = path.read_bytes(), path.stat().st_mtime_ns
            assert content[0] == expected[path.name]
            assert done.setdefault(path.name, content) == content
        if out.exists() and tree(out) == expected:
            return
    quantize_checkpoint(source, out)
    assert tree(out) == expected


def test_killed_before_the_first_file(source, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "qins-progress.json.tmp").write_text('{"finger')
    quantize_checkpoint(source, out)
    assert "config.json" in tree(out)
    assert not list(out.glob("*progress*"))


def test_killed_before_the_lock_is_deleted(source, tmp_path, monkeypatch):
    """Everything is complete then, but for the file that says that it may not be."""
    out, unlink = tmp_path / "out", os.unlink
    quantize_checkpoint(source, tmp_path / "undisturbed")

    def failing(path, *args, **kwargs):
        if str(path).endswith("qins.lock"):
            raise OSError(errno.EIO, "Input/output error", str(path))
        unlink(path, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(OSError, match=r"Input/output error: '.*qins\.lock'"):
        patch.setattr("os.unlink", failing)
        quantize_checkpoint(source, out)
    quantize_checkpoint(source, out)
    assert tree(out) == tree(tmp_path / "undisturbed")


@pytest.mark.long
def test_two_at_once(source, tmp_path):
    """The second process gets an error, the first is not disturbed, and the lock of a killed one does not block."""
    quantize_checkpoint(source, tmp_path / "undisturbed")
    out = tmp_path / "out"
    # each write waits for a line of input
    command = [sys.executable, "-c", _SLOW.replace("time.sleep(0.004)", "sys.stdin.readline()"), str(source), str(out)]

    def started():
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
        while not (out / "qins-progress.json").exists():
            assert process.poll() is None
            time.sleep(0.01)
        return process

    process = started()
    with process:  # closes its input at the end, so that it goes on
        with pytest.raises(BlockingIOError, match=r"out: another process is converting into it"):
            quantize_checkpoint(source, out)
        assert list(out.glob("*.safetensors")) == []
    assert process.returncode == 0
    assert tree(out) == tree(tmp_path / "undisturbed")
    shutil.rmtree(out)
    process = started()
    with process:
        process.kill()
    assert (out / "qins.lock").exists()
    quantize_checkpoint(source, out)
    assert tree(out) == tree(tmp_path / "undisturbed")


def test_a_lock_whose_file_goes(tmp_path):
    """Only one of many threads holds the lock at a time, although each removes the file when it is done."""
    held, most = [], []

    def hold(i):
        for _ in range(50):
            with suppress(BlockingIOError), locked(tmp_path / "lock", "held"):
                held.append(i)
                time.sleep(0.0005)
                most.append(len(held))
                held.remove(i)

    threads = [threading.Thread(target=hold, args=(i,)) for i in range(6)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert max(most) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("put", [None, "another"])
def test_a_lock_whose_file_goes_before_it_is_looked_at(tmp_path, monkeypatch, put):
    lock, fstat, looked = tmp_path / "lock", os.fstat, []

    def look(file):
        if not looked:
            lock.unlink()
            if put:
                lock.write_text(put)
        looked.append(file)
        return fstat(file)

    monkeypatch.setattr(os, "fstat", look)
    with locked(lock, "held"):
        assert len(looked) == 2
        with pytest.raises(BlockingIOError, match="held"), locked(lock, "held"):
            pass
    assert not lock.exists()


def test_another_conversion_is_not_resumed(source, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "qins-progress.json").write_text('{"fingerprint": "other"}')
    with pytest.raises(FileExistsError, match="unfinished conversion"):
        quantize_checkpoint(source, out)


def test_layout_is_the_librarys(tmp_path):
    tensors = {
        "z": torch.arange(6, dtype=torch.uint8).reshape(2, 3), "a": torch.randn(5), "m": torch.tensor(2.5),
        "b": torch.randn(3, 2).bfloat16(), "h": torch.randn(3).half(), "s": torch.ones(7, dtype=torch.int8),
        "l": torch.arange(4), "empty": torch.zeros(0, 4), "d": torch.randn(2).double(),
        "t": torch.tensor([True, False]),
        "ä.weight": torch.zeros(1), "i": torch.arange(3, dtype=torch.int32), "j": torch.arange(3, dtype=torch.int16),
    }  # fmt: skip
    save_file(tensors, tmp_path / "a", {"format": "pt"})
    targets = [Target(n, str(t.dtype)[6:], tuple(t.shape)) for n, t in tensors.items()]
    writer = ShardWriter(tmp_path / "b", targets, {"format": "pt"})
    for name in reversed(tensors):
        writer.write(name, tensors[name])
    with pytest.raises(ValueError, match="expected"):
        writer.write("a", torch.zeros(4))
    writer.close()
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    incomplete = ShardWriter(tmp_path / "c", targets, {"format": "pt"})
    with pytest.raises(ValueError, match="not written"):
        incomplete.close()


_WARM_UP = """
import qins.checkpoint.quantizing as c
from transformers import LlamaConfig, LlamaForCausalLM

LlamaForCausalLM(LlamaConfig(vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                             num_attention_heads=2))
"""
_CONVERSION = """
text = c.Calibration(open(sys.argv[3]).read(), 512) if len(sys.argv) > 3 else None
c.quantize_checkpoint(sys.argv[1], sys.argv[2], calibration=text)
tensors = []
"""


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("calibrated", [False, True])
def test_peak_memory(tmp_path, calibrated):
    """400 MB of float32 in one file: the peak is a few tensors; with calibration, a few layers' statistics.

    The statistics of down_proj are 2048 x 2048, 17 MB in float32.
    """
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=1024, intermediate_size=2048, num_hidden_layers=10, num_attention_heads=8
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "float")
    save_tokenizer(tmp_path / "float", 256)
    (tmp_path / "text.txt").write_text(words(1024))
    size = (tmp_path / "float" / "model.safetensors").stat().st_size
    assert size > 390e6
    arguments = [str(tmp_path / n) for n in ["float", "out", *["text.txt"] * calibrated]]
    peak, _ = peak_memory(_WARM_UP, _CONVERSION, *arguments)
    print(f"{size / 1e6:.0f} MB of floats converted")
    assert peak < (380e6 if calibrated else 120e6)


def test_command_line(source, tmp_path):
    done = terminal.run(
        "quantize", source, tmp_path / "out", "--exclude", "*.k_proj", "--lm-head", "--embeddings", "--json"
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["layers"] == 12 + 2
    assert result["bytes_after"] < result["bytes_before"]
    assert {s["name"] for s in result["skipped"]} >= {"model.layers.0.self_attn.k_proj"}
    done = terminal.run("quantize", source, tmp_path / "out")
    assert done.returncode == 1
    assert "not empty" in done.stderr.replace("\n", " ")
    assert "Traceback" not in done.stderr
    done = terminal.run("quantize", source, tmp_path / "x", "--codec", "log7")
    assert done.returncode == 1
    assert "expected one of" in done.stderr


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("swapped", "no tensor .* which model.safetensors.index.json says is there"),
        ("renamed", "named in model.safetensors.index.json, but not there"),
        ("no index", "expected one model, got .* and no index"),
        ("integers", "expected one of .*, got torch.int32|weights: expected"),
        ("header", "model-00002-of-"),
    ],
)
def test_faults_of_the_source(source, tmp_path, fault, message):
    """Each fault has its error; the source is unchanged, and no half-written file or config.json is left."""
    shards = sorted(source.glob("*.safetensors"))
    if fault == "swapped":
        shards[0].rename(source / "x")
        shards[1].rename(shards[0])
        (source / "x").rename(shards[1])
    elif fault == "renamed":
        shards[1].rename(source / "model-2.safetensors")
    elif fault == "no index":
        (source / "model.safetensors.index.json").unlink()
    elif fault == "integers":
        state = load_file(shards[1])
        key = next(k for k in state if "proj" in k)
        state[key] = state[key].to(torch.int32)
        save_file(state, shards[1], {"format": "pt"})
    else:
        content = bytearray(shards[1].read_bytes())
        content[9] ^= 0x10  # a character of the header
        shards[1].write_bytes(content)
    before = tree(source)
    with pytest.raises((ValueError, TypeError, FileNotFoundError), match=message):
        quantize_checkpoint(source, tmp_path / "out")
    assert tree(source) == before
    left = tree(tmp_path / "out") if (tmp_path / "out").exists() else {}
    assert "config.json" not in left
    assert not any(n.endswith(".tmp") for n in left)


@pytest.fixture
def small_disk(tmp_path):
    """The directory of a small file system, and a function that remounts it with other options."""
    path = tmp_path / "disk"
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(path)]
    if sys.platform != "linux" or os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("cannot mount a file system here")
    yield path, lambda options: subprocess.run(["mount", "-o", f"remount,{options}", str(path)], check=True)
    subprocess.run(["umount", str(path)], check=True)


def test_full_disk(source, tmp_path, small_disk, monkeypatch):
    disk, remount = small_disk
    (disk / "mine.txt").write_text("precious")
    with pytest.raises(OSError, match="needs .* bytes, the disk has"):
        quantize_checkpoint(source, disk / "out")
    # the disk fills up after the check of its free space
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda _: type("usage", (), {"free": 1 << 40}))
        with pytest.raises(OSError, match="No space left on device"):
            quantize_checkpoint(source, disk / "out")
    names = [p.name for p in (disk / "out").iterdir()]
    assert not any(n.endswith(".tmp") or n == "config.json" for n in names)
    assert (disk / "mine.txt").read_text() == "precious"
    remount("size=8m")
    quantize_checkpoint(source, disk / "out")  # resumes
    quantize_checkpoint(source, tmp_path / "undisturbed")
    assert tree(disk / "out") == tree(tmp_path / "undisturbed")


def test_read_only_target(source, small_disk):
    disk, remount = small_disk
    (disk / "mine.txt").write_text("precious")
    remount("ro")
    with pytest.raises(OSError, match="Read-only file system"):
        quantize_checkpoint(source, disk / "out")
    assert [p.name for p in disk.iterdir()] == ["mine.txt"]


def test_convolutions_are_called_so(tmp_path):
    """A patch embedding is a convolution: its weight has four dimensions but is no stack of experts."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4}
    vit = transformers.ViTModel(transformers.ViTConfig(**sizes, image_size=32, patch_size=8)).eval()
    vit.save_pretrained(tmp_path / "float")
    result = quantize_checkpoint(tmp_path / "float", tmp_path / "codes")
    loaded = transformers.ViTModel.from_pretrained(tmp_path / "float", quantization_config=qins.QinsConfig())
    again = transformers.ViTModel.from_pretrained(tmp_path / "codes")
    qins.convert(vit)
    name = "embeddings.patch_embeddings.projection"
    skipped = [vars(s) for m in (loaded, again, vit) for s in m.hf_quantizer.report.skipped] + result["skipped"]
    assert [s for s in skipped if s["name"].startswith(name)] == [
        {"name": name, "kind": "Conv2d", "reason": "a convolution"}
    ] * 4
    assert not [s for s in skipped if "experts" in s["reason"]]


def test_conv1d_in_place_is_reported():
    report = qins.convert(make("gpt2"))
    kinds = {s.kind: s.reason for s in report.skipped if s.name != "lm_head"}
    assert kinds == {"Conv1D": "a linear layer with a transposed weight, which QinsConfig and qins quantize accept"}
    assert len(report.skipped) == 9


@pytest.mark.long
def test_hostile_quantization_config(tmp_path):
    """For any value of any field, the model loads, or the error names the field."""
    make("llama tied").save_pretrained(tmp_path / "float")
    out = tmp_path / "out"
    settings = {"overrides": {"*.down_proj": {"group_size": 64}}, "lm_head": True, "embeddings": True}
    quantize_checkpoint(tmp_path / "float", out, qins.QinsConfig(**settings))
    good = json.loads((out / "config.json").read_text())
    values = [None, [], [1], {}, {"a": 1}, True, 10**30, 1e300, "x", -1]
    changes = [((f,), v) for f in ("quantization_config", "architectures") for v in values]
    about = good["quantization_config"]
    changes += [(("quantization_config", f), v) for f in about for v in values]
    entry = [*values, ["log8"], ["nope", 128], ["log8", -1], ["log8", "x"], ["log8", 128, 7], [7, 128], ["log8", True]]
    changes += [(("quantization_config", "modules", "lm_head"), v) for v in entry]
    changes += [(("quantization_config", "overrides", "*.down_proj"), v) for v in values]
    unnamed = []
    for path, value in changes:
        config = json.loads(json.dumps(good))
        holder = config
        for key in path[:-1]:
            holder = holder[key]
        holder[path[-1]] = value
        (out / "config.json").write_text(json.dumps(config))
        for read in (qins.load, qins.inspect):
            try:
                read(out)
            except (ValueError, TypeError, OSError, RuntimeError) as e:
                if path[-1] not in str(e) and path != ("quantization_config",):
                    unnamed.append((path, value, str(e)))
    assert not unnamed


def test_errors_of_conv1d_layers(tmp_path):
    """Floats of Conv1D are (in_features, out_features); some are square."""
    make("gpt2").save_pretrained(tmp_path / "float")
    quantize_checkpoint(tmp_path / "float", tmp_path / "out")
    errors = qins.inspect(tmp_path / "out", tmp_path / "float").errors
    layers = [e for e in errors if ".attn." in e.name or ".mlp." in e.name]
    assert len(layers) == 8
    assert all(e.snr_db > 35 for e in layers)
    other_way = qins.inspect(tmp_path / "float", tmp_path / "out").errors
    assert all(e.snr_db > 35 for e in other_way if e.name in {e.name for e in layers})
