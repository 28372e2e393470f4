"""A conversion of 1,000 small shards on a Ray cluster of 2, 4 and 8 workers: time, shards per second, efficiency.

    python benchmarks/cluster.py [--shards 1000] [--seconds 0.8] [--workers 2 4 8] [--json FILE]

Storage is simulated: a shard waits `--seconds` on average (between half and one and a half times as long, the same for
every number of workers), as its reads and writes would, and is then converted for real. So the workers may be more than
the machine's cores, and what is measured is the driver, Ray, and the commits. Workers have started before. From the
first shard's start to the last one's end (span), "waits" is the workers' share of time spent waiting for storage, which
would be 100 % if all else took no time, and "busy" that spent on shards.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file

from qins.checkpoint import quantize_checkpoint
from qins.cli.bench import machine
from qins.cluster import converting, quantize_on_ray


def make_source(path: Path, shards: int) -> None:
    """Write a small model in this many files."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=160, hidden_size=64, intermediate_size=96, num_hidden_layers=shards // 9 + 1, num_attention_heads=4,
        max_position_embeddings=128,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).bfloat16()
    path.mkdir()
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(path)
    state = model.state_dict()
    names = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    parts: dict[str, dict[str, torch.Tensor]] = {n: {} for n in names}
    for i, (key, tensor) in enumerate(state.items()):
        parts[names[i % shards]][key] = tensor.contiguous()
    for name, tensors in parts.items():
        save_file(tensors, path / name, {"format": "pt"})
    weight_map = {key: name for name, tensors in parts.items() for key in tensors}
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def delays(shards: int, seconds: float) -> list[float]:
    """Return how long the storage of each shard takes, the same in every run."""
    generator = random.Random(0)
    return [seconds * generator.uniform(0.5, 1.5) for _ in range(shards)]


def waiting(log: Path, waits: dict[str, float]) -> Any:
    """Return a function that converts a shard after its wait, and notes when it began and ended."""
    original = converting.convert

    def convert(job: Any, file: Path) -> Any:
        begin = time.time()
        time.sleep(waits[file.name])
        made = original(job, file)
        (log / file.name).write_text(f"{begin} {time.time()}")
        return made

    return convert


def start_workers(workers: int, log: Path) -> None:
    """Return when each node has a worker that has imported what it needs."""
    import ray

    def start(i: int) -> None:
        import qins.cluster.work  # noqa: F401

        (log / f"started-{i}").touch()
        while len(list(log.glob("started-*"))) < workers:
            time.sleep(0.05)

    task = ray.remote(num_cpus=1, scheduling_strategy="SPREAD")(start)
    ray.get([task.remote(i) for i in range(workers)])


def run(source: Path, workers: int, waits: dict[str, float], work: Path, expected: dict[str, bytes]) -> dict[str, Any]:
    """Convert on this many workers, each a machine of its own to Ray."""
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, "dashboard_port": 0}
    )
    for _ in range(workers):
        cluster.add_node(num_cpus=1, memory=2 << 30, object_store_memory=100 << 20)
    ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.WARNING)
    log, out, original = work / f"log{workers}", work / f"out{workers}", converting.convert
    log.mkdir()
    converting.convert = waiting(log, waits)
    begin = time.time()
    start_workers(workers, log)
    started = time.time() - begin
    try:
        cost = quantize_on_ray(source, out, show_progress=False)["cost"]
    finally:
        converting.convert = original
        ray.shutdown()
        cluster.shutdown()
    whole = time.time() - begin - started
    same = {p.name: p.read_bytes() for p in out.iterdir()} == expected
    times = [[float(t) for t in p.read_text().split()] for p in log.glob("*.safetensors")]
    span = max(t[1] for t in times) - min(t[0] for t in times)
    busy = sum(t[1] - t[0] for t in times)
    shutil.rmtree(out)
    return {
        "workers": workers, "seconds": whole, "span": span, "per_second": len(times) / span,
        "started": started, "waits": sum(waits.values()) / (workers * span), "busy": busy / (workers * span),
        "attempts": cost["attempts"], "same_bytes": same,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=0.8)
    parser.add_argument("--workers", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    print(machine())
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        make_source(work / "float", args.shards)
        files = sorted(p.name for p in (work / "float").glob("*.safetensors"))
        waits = dict(zip(files, delays(len(files), args.seconds), strict=True))
        begin = time.time()
        quantize_checkpoint(work / "float", work / "one", show_progress=False)
        alone = time.time() - begin
        expected = {p.name: p.read_bytes() for p in (work / "one").iterdir()}
        print(f"{len(files)} shards; one process without the waits: {alone:.1f} s; waits: {sum(waits.values()):.1f} s")
        print(f"{'workers':>7} {'seconds':>8} {'span':>8} {'shards/s':>9} {'waits':>7} {'busy':>6}  bytes")
        results = []
        for workers in args.workers:
            r = run(work / "float", workers, waits, work, expected)
            results.append(r)
            print(
                f"{workers:>7} {r['seconds']:>8.1f} {r['span']:>8.1f} {r['per_second']:>9.2f} {r['waits']:>7.1%} "
                f"{r['busy']:>6.1%}  {'the same' if r['same_bytes'] else 'DIFFERENT'}",
                flush=True,
            )
    if args.json:
        args.json.write_text(json.dumps({"machine": machine(), "one_process": alone, "runs": results}, indent=2))


if __name__ == "__main__":
    main()
