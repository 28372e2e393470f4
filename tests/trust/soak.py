"""Serves and generates for an hour, and looks for memory, threads and descriptors that are never given back.

    python tests/trust/soak.py [--minutes 60] [--model DIRECTORY | HUB NAME] [--allowed 1] [--json FILE]

A server answers requests of random lengths from several clients at once, some of whom leave early. Beside it, a process
loads the model again and again, generates with caches of each kind that grow, shrink and are dropped, and converts a
small model. After each round of either, its memory in use (RSS), its threads and its open files are noted. The first
sixth of the time is for warming up. Of what remains, the medians of the first and the last third are compared: exits
with 1 if memory grew by more than --allowed percent, or threads or files at all.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import psutil

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
MB = 1e6
WORDS = ["the", "people", "of", "a", "free", "state", "may", "change", "their", "laws", "when", "most", "agree"]


class Sample(NamedTuple):
    seconds: float
    rss: int
    threads: int
    files: int


class Watched:
    """A process, and what it used after each of its rounds."""

    def __init__(self, process: subprocess.Popen[str], began: float) -> None:
        self.process, self.began = process, began
        self.samples: list[Sample] = []

    def note(self) -> None:
        p = psutil.Process(self.process.pid)
        with p.oneshot():
            self.samples.append(
                Sample(time.monotonic() - self.began, p.memory_info().rss, p.num_threads(), p.num_fds())
            )

    def end(self) -> None:
        self.process.terminate()
        self.process.wait(60)


# -- the server and its clients ----------------------------------------------------------------------


def ask(address: str, name: str, seed: int) -> None:
    """One request; every fourth client leaves while it is answered."""
    import openai

    rng = random.Random(seed)
    prompt = " ".join(rng.choices(WORDS, k=rng.choice([3, 20, 100, 300])))
    client = openai.OpenAI(base_url=address, api_key="none", max_retries=0, timeout=3600)
    with client:
        made = {"model": name, "max_tokens": rng.randint(1, 100), "temperature": rng.choice([0.0, 1.0])}
        if rng.random() < 0.5:
            answer = client.completions.create(prompt=prompt, stream=True, **made)
        else:
            answer = client.chat.completions.create(messages=[{"role": "user", "content": prompt}], stream=True, **made)
        leaves = rng.randint(1, 10) if rng.random() < 0.25 else 0
        with answer:
            for i, _ in enumerate(answer, 1):
                if i == leaves:
                    return


def keep_asking(watched: Watched, address: str, name: str, until: float) -> None:
    rounds = 0
    with ThreadPoolExecutor(6) as pool:
        while time.monotonic() < until:
            clients = 1 + rounds % 6
            list(pool.map(lambda s: ask(address, name, s), range(6 * rounds, 6 * rounds + clients)))
            rounds += 1
            time.sleep(0.5)  # requests of those who left end
            watched.note()


# -- the other process -------------------------------------------------------------------------------


def generate_once(directory: str, seed: int) -> None:
    """Load the model, generate with each kind of cache, and drop everything."""
    import numpy as np
    import torch
    import transformers
    from tiny import make

    import qins

    rng = random.Random(seed)
    model = qins.load(directory)
    vocabulary = model.config.vocab_size
    options = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    for kind in ("float", "log8", "log4", "static", "beams"):
        ids = torch.randint(3, vocabulary, (rng.randint(1, 3), rng.choice([1, 30, 200])))
        more: dict[str, object] = {"max_new_tokens": rng.randint(2, 40)}
        if kind == "beams":
            more["num_beams"] = 2
        elif kind == "static":
            more["cache_implementation"] = "static"
        elif kind == "float":
            more["past_key_values"] = transformers.DynamicCache(config=model.config)
        else:
            more["past_key_values"] = qins.QINSCache(model.config, k_codec=kind, v_codec=kind)
        with torch.no_grad():
            model.generate(ids, attention_mask=torch.ones_like(ids), **options, **more)
        cache = more.get("past_key_values")
        if cache is not None:
            cache.crop(-cache.get_seq_length() // 2)
            with torch.no_grad():
                model(ids[:, :1], past_key_values=cache)
    del model, cache, more
    decoder = qins.Decoder.open(directory)
    for token in decoder.generate([1, 2, 3], rng.randint(1, 40)):
        assert token >= 0
    del decoder
    qins.convert(make(rng.choice(["llama", "gpt2", "t5"])))
    w = np.random.default_rng(seed).standard_normal((rng.randint(1, 300), 64)).astype(np.float32)
    for codec in ("log8", "log6", "log5", "log4", "log9", "golden"):
        e = qins.encode(w, codec)
        qins.matmul(w[: rng.randint(1, 100)], e)
        e.decode()


def work(directory: str) -> None:
    """Rounds until standard input ends, each announced on standard output."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for seed, _ in enumerate(sys.stdin):
        generate_once(directory, seed)
        gc.collect()
        print(seed, flush=True)


def keep_working(watched: Watched, until: float) -> None:
    p = watched.process
    assert p.stdin is not None
    assert p.stdout is not None
    while time.monotonic() < until:
        p.stdin.write("\n")
        p.stdin.flush()
        if not p.stdout.readline():
            raise RuntimeError(f"the generating process ended with {p.wait()}")
        watched.note()


# -- judging -----------------------------------------------------------------------------------------


def judge(name: str, samples: list[Sample], allowed: float) -> list[str]:
    """Print what a process used; return what it did not give back."""
    warm = [s for s in samples if s.seconds >= samples[-1].seconds / 6]
    third = max(len(warm) // 3, 1)
    early, late = warm[:third], warm[-third:]
    before, after = (statistics.median(s.rss for s in some) for some in (early, late))
    grown = 100 * (after / before - 1)
    print(
        f"{name}: {len(samples)} rounds in {samples[-1].seconds:.0f} s; RSS {before / MB:.1f} -> {after / MB:.1f} MB "
        f"({grown:+.2f} %), at most {max(s.rss for s in samples) / MB:.1f}; "
        f"threads {max(s.threads for s in early)} -> {max(s.threads for s in late)}, "
        f"files {max(s.files for s in early)} -> {max(s.files for s in late)}"
    )
    problems = [f"{name}: RSS grew by {grown:.2f} %"] if grown > allowed else []
    for what in ("threads", "files"):
        one, other = (max(getattr(s, what) for s in some) for some in (early, late))
        if other > one:
            problems.append(f"{name}: {one} {what} became {other}")
    return problems


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--model", help="default: SmolLM2, as in the demo")
    parser.add_argument("--allowed", type=float, default=1.0, help="percent")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        work(arguments.work)
        return 0
    import serving

    from qins.checkpoint import quantize_checkpoint
    from qins.hf import find_model

    with tempfile.TemporaryDirectory() as place:
        codes = Path(place) / "model"
        quantize_checkpoint(find_model(arguments.model), codes)
        server, (_, address, _) = serving.start(codes)
        began = time.monotonic()
        until = began + 60 * arguments.minutes
        command = [sys.executable, __file__, "--work", str(codes)]
        worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        watched = {"server": Watched(server, began), "generating": Watched(worker, began)}
        failures: list[BaseException] = []

        def run(function, *args) -> None:
            try:
                function(*args, until)
            except BaseException as e:
                failures.append(e)

        threads = [
            threading.Thread(target=run, args=(keep_asking, watched["server"], address, codes.name)),
            threading.Thread(target=run, args=(keep_working, watched["generating"])),
        ]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        for w in watched.values():
            w.end()
    if arguments.json:
        arguments.json.write_text(json.dumps({n: [s._asdict() for s in w.samples] for n, w in watched.items()}))
    for e in failures:
        raise e
    problems = [p for name, w in watched.items() for p in judge(name, w.samples, arguments.allowed)]
    print(*problems, sep="\n")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
