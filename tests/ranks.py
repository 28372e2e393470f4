"""Runs a function on several ranks of torch.distributed, over gloo on this machine."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from pathlib import Path

# Starts processes that have imported the libraries already, but no threads and no state of the test's process.
_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["torch", "transformers.models.llama.modeling_llama", "qins.hf"])
_SECONDS = 300  # a rank that waits for a lost one would wait forever


def _run(work: str, rank: int, ranks: int, function, arguments) -> None:
    import torch

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    torch.set_num_threads(1)
    try:
        torch.distributed.init_process_group("gloo", init_method=f"file://{work}/store", rank=rank, world_size=ranks)
        result = function(*arguments)
        torch.distributed.barrier()
        Path(work, f"{rank}.result").write_bytes(pickle.dumps(result))
        torch.distributed.destroy_process_group()
    except BaseException:
        Path(work, f"{rank}.error").write_text(traceback.format_exc())
        os._exit(1)


def on_ranks(ranks, function, *arguments):
    """Return what a function of a module, called with these arguments, returns on each rank, in order."""
    with tempfile.TemporaryDirectory() as work:
        processes = [_SERVER.Process(target=_run, args=(work, r, ranks, function, arguments)) for r in range(ranks)]
        for p in processes:
            p.start()
        end = time.monotonic() + _SECONDS
        try:
            while any(p.is_alive() for p in processes) and time.monotonic() < end:
                if any(p.exitcode for p in processes):
                    break
                time.sleep(0.01)
        finally:
            failed = any(p.exitcode != 0 for p in processes)
            for p in processes:
                if p.is_alive():
                    p.terminate()
                p.join()
        errors = [e.read_text() for e in sorted(Path(work).glob("*.error"))]
        if failed:
            raise AssertionError("\n".join(errors) or f"no result after {_SECONDS} s")
        return [pickle.loads(Path(work, f"{r}.result").read_bytes()) for r in range(ranks)]
