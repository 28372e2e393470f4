"""Fuzzing of what reads files and arguments: readers.py TARGET RUNS [--engine blind]. See docs/security.md.

An input is a list of edits of a valid file, so that damage gets beyond the first check; or, with an odd first byte, the
file itself. Whatever it is, a reader either reads it or raises an error that the command line shows as one line; memory
stays bounded, nothing is written elsewhere, and no code runs. With atheris installed, its coverage guides the inputs;
without, they are pseudo-random.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import copy
import io
import json
import os
import random
import resource
import shutil
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
CORPUS = Path(__file__).parent / "corpus"
MIB = 1 << 20
# What a run may add to the memory of the process. Files have at most 64 KiB here.
MOST_MEMORY = 256 * MIB
MOST_SECONDS = 20
# the errors that cli/app.py shows as one line
EXPECTED = (ImportError, OSError, RuntimeError, TypeError, ValueError)
HOSTILE: list[Any] = [
    None, True, False, 0, -1, 1, 2, 3, 31, 32, 64, 255, 256, 65536, 2**31 - 1, 2**31, 2**40, 2**63 - 1, 2**63, 2**64,
    10**400, 0.0, -0.0, -0.5, 1e-320, 1e308, -1e308, float("nan"), float("inf"), "", ".", "..", "../harm", "/harm",
    "a/b", "\0", "\ud800", "log8", "log4", "golden", "rational", "U8", "F32", "F64", "BF16", "I64", "BOOL", "F4", "fp8",
    "mxfp4", "compressed-tensors", "re:(a+)+$", "re:(", "re:.*", "channel", "block", "tensor", "group", "linear",
    "llama3", "sliding_attention", "gemma", "phi3", "olmo2", "harm.py", "transformers.Trainer", [], [[]], {}, [0], [-1],
    [0, 0], [2**40, 0], [1, 2, 3], ["log8", 32], ["log4", None], ["golden", -5], [None] * 9, {"a": {}}, "9" * 5000,
]  # fmt: skip


class Input:
    """Bytes that are read from the front; zeros after the end."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def number(self, below: int) -> int:
        size = 1 if below <= 256 else 2 if below <= 65536 else 4
        part = self.data[self.at : self.at + size]
        self.at += size
        return int.from_bytes(part, "little") % max(below, 1)

    def left(self) -> bool:
        return self.at < len(self.data)


def places(document: Any) -> list[tuple[Any, Any]]:
    """Return every (container, key) in a JSON document."""
    found: list[tuple[Any, Any]] = []
    waiting = [document]
    while waiting:
        value = waiting.pop()
        keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else []
        for key in keys:
            found.append((value, key))
            waiting.append(value[key])
    return found


def edited(document: Any, source: Input) -> Any:
    """Return a JSON document with up to 4 values replaced, removed, doubled or moved."""
    document = copy.deepcopy(document)
    for _ in range(source.number(5)):
        found = places(document)
        if not found:
            break
        where, key = found[source.number(len(found))]
        how = source.number(8)
        if how < 4:
            where[key] = copy.deepcopy(HOSTILE[source.number(len(HOSTILE))])
        elif how == 4:
            del where[key]
        elif how == 5:
            other, place = found[source.number(len(found))]
            with contextlib.suppress(LookupError, TypeError):
                where[key] = copy.deepcopy(other[place])
        elif how == 6 and type(where[key]) in (int, float):
            where[key] = where[key] * (source.number(5) - 1) + source.number(256) - 128
        elif isinstance(where, dict):
            where[str(key) + "x" if source.number(2) else str(HOSTILE[source.number(len(HOSTILE))])] = where.pop(key)
        else:
            where[key] = {"a": where[key]}
    return document


def as_json(document: Any, source: Input) -> bytes:
    text = json.dumps(edited(document, source)).encode()
    if source.number(16) == 15:  # nested beyond what parsers recurse
        text = b'{"a":' * 3000 + text + b"}" * 3000
    return text


def damaged(data: bytes, source: Input) -> bytes:
    """Return bytes with some of them changed, or cut."""
    broken = bytearray(data)
    for _ in range(source.number(6)):
        if not broken:
            break
        at = source.number(len(broken)) if source.number(2) else source.number(min(len(broken), 64))
        broken[at] = (0, 255, broken[at] ^ (1 << source.number(8)), source.number(256))[source.number(4)]
    return bytes(broken[: source.number(len(broken) + 1)]) if source.number(8) == 7 else bytes(broken)


def safetensors(data: bytes, source: Input, change: Callable[[Any], Any] | None = None) -> bytes:
    """Return a safetensors file with its header edited; the data's bytes are damaged sometimes."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    text = as_json(header if change is None else change(header), source)
    length = len(text) if source.number(16) else (0, 7, 2**27, 2**40, 2**64 - 1)[source.number(5)]
    rest = data[8 + size :]
    return length.to_bytes(8, "little") + text + (damaged(rest, source) if source.number(4) == 0 else rest)


# -- seeds ---------------------------------------------------------------------------------------------


def make_seeds(where: Path) -> None:
    """Write small valid files: what the edits begin with."""
    import numpy as np
    import torch
    from safetensors.torch import save_file

    import qins
    from qins.checkpoint import quantize_checkpoint

    torch.manual_seed(0)
    layer = torch.nn.Linear(64, 8)
    codes = {}
    for codec in ("log8", "log4", "golden", "log9", "rational"):
        made = qins.QINSLinear.from_linear(layer, codec)
        codes |= {f"{codec}.{k}": v for k, v in made.state_dict().items() if k != "bias"}
    save_file(codes, where / "codes.safetensors", {"format": "pt"})
    torch.save({k: v for k, v in codes.items() if k[:4] in ("log8", "gold")}, where / "codes.pt")
    torch.save({"a": torch.ones(3)}, where / "old.pt", _use_new_zipfile_serialization=False)
    model = where / "model"
    make_llama(model)
    from qins.hf import QinsConfig

    quantize_checkpoint(model, where / "exact", QinsConfig("log8", embeddings=True), exact=True, show_progress=False)
    scaled(where)
    gguf_file(where / "tiny.gguf", np)


def make_llama(model: Path) -> None:
    import torch
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=16, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(model)


def scaled(where: Path) -> None:
    """Write FP8, MXFP4 and compressed-tensors checkpoints of one matrix."""
    import torch
    from safetensors.torch import save_file

    fp8 = torch.zeros(8, 8).to(torch.float8_e4m3fn)
    kinds: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "fp8": (
            {"quant_method": "fp8", "weight_block_size": [4, 4]},
            {"a.weight": fp8, "a.weight_scale_inv": torch.ones(2, 2)},
        ),
        "mxfp4": (
            {"quant_method": "mxfp4"},
            {"a_blocks": torch.zeros(2, 2, 2, 16, dtype=torch.uint8), "a_scales": torch.full((2, 2, 2), 127).byte()},
        ),
        "compressed": (
            {
                "quant_method": "compressed-tensors", "format": "pack-quantized",
                "config_groups": {"g": {"targets": ["re:.*a", "Linear"], "weights": {
                    "num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": 8}}},
            },
            {
                "a.weight_packed": torch.zeros(8, 2, dtype=torch.int32), "a.weight_scale": torch.ones(8, 2),
                "a.weight_zero_point": torch.zeros(1, 2, dtype=torch.int32),
                "a.weight_shape": torch.tensor([8, 16]),
            },
        ),
    }  # fmt: skip
    for name, (told, tensors) in kinds.items():
        directory = where / name
        directory.mkdir()
        save_file(tensors, directory / "model.safetensors", {"format": "pt"})
        (directory / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": told}))


def gguf_file(path: Path, np: Any) -> None:
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_array("tokenizer.ggml.tokens", ["a", "b"])
    writer.add_tensor("token_embd.weight", np.ones((4, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# -- targets -------------------------------------------------------------------------------------------


class Targets:
    """Each method takes an input; `read` checks what the reader does."""

    def __init__(self) -> None:
        self.work = Path(tempfile.mkdtemp(prefix="qins-fuzz-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None))
        self.seeds = self.work / "seeds"
        self.seeds.mkdir()
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            make_seeds(self.seeds)
        self.room = self.work / "room"
        self.room.mkdir()
        files = [p for p in self.seeds.rglob("*") if p.is_file()]
        self.bytes = {p.relative_to(self.seeds).as_posix(): p.read_bytes() for p in files}
        self.outcomes = {"read": 0, "refused": 0}

    def close(self) -> None:
        shutil.rmtree(self.work, ignore_errors=True)

    def read(self, reader: Callable[[], object]) -> None:
        try:
            reader()
        except EXPECTED as e:
            self.outcomes["refused"] += 1
            str(e)
        else:
            self.outcomes["read"] += 1

    def write(self, name: str, data: bytes) -> Path:
        path = self.room / name
        path.write_bytes(data)
        return path

    def safetensors(self, data: bytes) -> None:
        from qins.files import inspect

        source = Input(data)
        raw = source.number(2)
        path = self.write("m.safetensors", data[1:] if raw else safetensors(self.bytes["codes.safetensors"], source))
        self.read(lambda: str(inspect(path, histograms=True)))

    def torch(self, data: bytes) -> None:
        from qins.files import inspect

        source = Input(data)
        raw = source.number(2)
        seed = self.bytes[("codes.pt", "old.pt")[source.number(2)]]
        path = self.write("m.pt", data[1:] if raw else damaged(damaged(seed, source), source))
        self.read(lambda: str(inspect(path)))

    def gguf(self, data: bytes) -> None:
        from qins.files import inspect

        source = Input(data)
        raw = source.number(2)
        path = self.write("m.gguf", data[1:] if raw else damaged(damaged(self.bytes["tiny.gguf"], source), source))
        self.read(lambda: str(inspect(path)))

    def config(self, data: bytes) -> None:
        """config.json and header of a converted model, for the decoder without torch and for inspect."""
        from qins.decoder import Decoder
        from qins.files import inspect

        source = Input(data)
        raw = source.number(2)
        config = json.loads(self.bytes["exact/config.json"])
        self.write("config.json", data[1:] if raw else as_json(config, source))
        weights = self.bytes["exact/model.safetensors"]
        self.write("model.safetensors", weights if raw or source.number(2) else safetensors(weights, source))

        def run() -> None:
            decoder = Decoder.open(self.room)
            decoder.logits([1, 2, 3])
            decoder.logits([4])

        self.read(run)
        self.read(lambda: str(inspect(self.room)))

    def index(self, data: bytes) -> None:
        """The index of a sharded model: nothing beside it is read."""
        from qins.decoder.tensors import Tensors
        from qins.files import open_checkpoint

        source = Input(data)
        raw = source.number(2)
        document = {"metadata": {}, "weight_map": {"a": "a.safetensors", "b": "b.safetensors"}}
        self.write("model.safetensors.index.json", data[1:] if raw else as_json(document, source))
        self.write("config.json", b'{"quantization_config": {"quant_method": "qins", "modules": {}}}')
        for name in "ab":
            header = json.dumps({name: {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}).encode()
            self.write(f"{name}.safetensors", len(header).to_bytes(8, "little") + header + b"\1")

        def run() -> None:
            found = open_checkpoint(self.room)
            assert all(p.parent == self.room for p in found.files), found.files

        self.read(run)
        self.read(lambda: Tensors(self.room))

    def scaled(self, data: bytes) -> None:
        """Checkpoints of other tools: their config.json and the header of their file."""
        from qins.files import open_checkpoint, open_scaled

        source = Input(data)
        kind = ("fp8", "mxfp4", "compressed")[source.number(3)]
        config = json.loads(self.bytes[f"{kind}/config.json"])
        self.write("config.json", as_json(config, source))
        weights = self.bytes[f"{kind}/model.safetensors"]
        self.write("model.safetensors", weights if source.number(2) else safetensors(weights, source))

        def run() -> None:
            found = open_scaled(open_checkpoint(self.room))
            for name in found.tensors:
                found.load(name)

        self.read(run)

    def exact(self, data: bytes) -> None:
        """What restores an original: metadata, the original's stored header, streams."""
        from qins.files import RestoredCheckpoint, restore_checkpoint

        source = Input(data)
        which = source.number(4)

        def metadata(header: Any) -> Any:
            about = json.loads(header["__metadata__"]["qins_exact"])
            if which == 0:
                about = edited(about, source)
            elif which == 1:
                stored = zlib.decompress(base64.b64decode(about["header"]))
                about["header"] = base64.b64encode(zlib.compress(safetensors(stored, source))).decode()
            header["__metadata__"]["qins_exact"] = json.dumps(about)
            return header

        exact = self.bytes["exact/exact-model.safetensors"]
        quiet = Input(b"")  # leaves the file's own header as it is
        made = safetensors(exact, Input(b"\0\0\1\1") if which < 2 else quiet, metadata)
        if which == 2:
            made = safetensors(exact, source)
        elif which == 3:
            size = 8 + int.from_bytes(exact[:8], "little")
            made = exact[:size] + damaged(exact[size:], source)
        for name in ("config.json", "model.safetensors"):
            self.write(name, self.bytes[f"exact/{name}"])
        self.write("exact-model.safetensors", made)
        out = self.work / "restored"
        self.read(lambda: restore_checkpoint(self.room, out, show_progress=False))
        if out.is_dir():
            shutil.rmtree(out)

        def load() -> None:
            found = RestoredCheckpoint(self.room)
            for name in found.tensors:
                found.load(name)

        self.read(load)

    def arguments(self, data: bytes) -> None:
        """The command line's arguments. Values that name a model name none, so that nothing long begins."""
        from qins import cli

        source = Input(data)
        words = ["inspect", "quantize", "restore", "eval", "generate", "chat", "bench", "serve", "/none", "--codec",
                 "--group-size", "--json", "--exact", "-p", "--target-bits", "--calibrate", "-q", "-v", "--", "-",
                 "--histogram", "--against", "--include", "--max-new-tokens", "--temperature", "--port", "--help",
                 "log8", "log4", "nan", "-1", "1e400", "0", "99999999999999999999", "", "\x00", "[red]", "=", "--=",
                 "é", "\ud800"]  # fmt: skip
        command = words[source.number(8)]
        count = source.number(6)
        rest = [words[8 + source.number(len(words) - 8)] for _ in range(count)]
        if source.left() and source.number(3) == 0:
            rest.append(source.data[source.at : source.at + 40].decode("latin-1"))
        if command == "bench" and "--help" not in rest:
            rest.append("--nonsense")
        arguments = ["qins", command, "/none", *rest]
        before = sys.argv
        sys.argv = arguments
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                cli.main()
        except SystemExit as e:
            self.outcomes["read" if not e.code else "refused"] += 1
            if e.code not in (None, 0, 1, 2):
                raise ValueError(f"exit code {e.code} of {arguments}") from None
        finally:
            sys.argv = before


NAMES = ("safetensors", "torch", "gguf", "config", "index", "scaled", "exact", "arguments")


def memory() -> int:
    """Return the most memory that the process has used, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def watched(targets: Targets, name: str) -> Callable[[bytes], None]:
    """Return a target that also checks memory, time, and what was written."""
    run = getattr(targets, name)
    outside = {targets.work: {"seeds", "room"}}
    before = memory()
    os.chdir(targets.room)

    def once(data: bytes) -> None:
        nonlocal before
        for path in list(targets.room.iterdir()):
            path.unlink()
        began = time.process_time()
        run(data)
        assert time.process_time() - began < MOST_SECONDS, "time"
        assert memory() - before < MOST_MEMORY, f"memory: {(memory() - before) // MIB} MiB more"
        assert {p.name for p in targets.work.iterdir()} == outside[targets.work], "files outside the directory"
        assert not any("harm" in p.name for p in targets.room.iterdir()), "a file named by a file"

    return once


def blind_inputs(runs: int, seed: int) -> Iterator[bytes]:
    random_ = random.Random(seed)
    for _ in range(runs):
        yield random_.randbytes(random_.choice((4, 8, 16, 32, 64, 300)))


def corpus_of(name: str) -> list[bytes]:
    return [p.read_bytes() for p in sorted((CORPUS / f"read_{name}").glob("*"))]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("target", choices=NAMES)
    parser.add_argument("runs", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=int, default=0, help="stop after this time; 0: do not")
    parser.add_argument("--engine", choices=("atheris", "blind"), default="atheris")
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    sys.path.insert(0, str(ROOT / "python"))
    atheris = None
    if options.engine == "atheris":
        with contextlib.suppress(ImportError):
            import atheris
    import warnings

    warnings.simplefilter("ignore")
    if atheris is not None:
        with atheris.instrument_imports(include=["qins", "gguf"]):
            targets = Targets()
    else:
        targets = Targets()
    once = watched(targets, options.target)
    began = time.time()
    for _ in range(2):  # imports and caches
        for data in (b"", *corpus_of(options.target), *blind_inputs(20, 1)):
            getattr(targets, options.target)(data)
    once = watched(targets, options.target)
    failing = b""
    done = 0

    def counted(data: bytes) -> None:
        nonlocal failing, done
        failing = data
        done += 1
        once(data)
        if atheris is not None and (done >= options.runs or 0 < options.seconds < time.time() - began):
            finish(targets, options.target, done, began, memory())
            os._exit(0)

    try:
        if atheris is None:
            for data in (*corpus_of(options.target), *blind_inputs(options.runs, options.seed)):
                if options.seconds and time.time() - began > options.seconds:
                    break
                counted(data)
        else:
            # `counted` ends the process, since Fuzz() does so without running what is registered
            arguments = [sys.argv[0], "-max_len=4096", "-rss_limit_mb=0", "-verbosity=0", f"-seed={options.seed + 1}"]
            corpus = CORPUS / f"read_{options.target}"
            arguments += [str(corpus)] * corpus.is_dir()
            atheris.Setup(arguments, counted)
            atheris.Fuzz()
    except BaseException as e:
        if not isinstance(e, SystemExit):
            print(f"failing input of {options.target}: {failing.hex()}", file=sys.stderr)
        raise
    finish(targets, options.target, done, began, memory())


def finish(targets: Targets, name: str, done: int, began: float, most: int) -> None:
    engine = "atheris" if "atheris" in sys.modules else "blind"
    print(f"{name}: {done:,} runs ({engine}), {targets.outcomes['read']:,} read and "
          f"{targets.outcomes['refused']:,} refused in {time.time() - began:.0f} s, "
          f"{most // MIB} MiB at most", flush=True)  # fmt: skip
    os.chdir("/")
    targets.close()


if __name__ == "__main__":
    main()
