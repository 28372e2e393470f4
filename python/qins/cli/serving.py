"""`qins serve`."""

from __future__ import annotations

import enum
from typing import Annotated

import typer


class CachedValues(str, enum.Enum):
    """Codec of a KV cache's values."""

    log8 = "log8"
    log6 = "log6"
    log5 = "log5"
    log4 = "log4"
    golden = "golden"


def serve(
    model: Annotated[str, typer.Argument(help="Directory or hub name, quantized by qins or not.")],
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 serves other machines, too.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")] = 8000,
    name: Annotated[
        str | None, typer.Option(help="What requests call the model; default: its directory's or hub name.")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, max=512, help="Default: the CPUs that this process may use.")
    ] = None,
    continuous_batching: Annotated[
        bool | None,
        typer.Option(help="Compute requests together; the default, except with --kv-cache."),
    ] = None,
    kv_cache: Annotated[
        CachedValues | None, typer.Option(help="Keep attention's values as codes; one request after another.")
    ] = None,
    cache_tokens: Annotated[
        int | None, typer.Option(min=256, help="Tokens that the KV cache has room for; the default depends on memory.")
    ] = None,
    verify: Annotated[bool, typer.Option(help="Compare the codes with their checksums first.")] = True,
) -> None:
    """Serve a model to OpenAI's clients, with transformers' server; Ctrl-C and SIGTERM finish requests in flight."""
    from ..system import get_num_threads, require

    require("transformers", "fastapi", "uvicorn", "openai", "pydantic")
    if kv_cache is not None and continuous_batching:
        raise ValueError("kv-cache: continuous batching has a cache of its own; omit --continuous-batching")
    threads = threads or get_num_threads()  # before torch is imported, whose default ignores control groups
    from .server import Service, reserve

    with reserve(host, port) as bound:
        service = Service(
            model, name=name, threads=threads, continuous_batching=continuous_batching,
            kv_cache=None if kv_cache is None else kv_cache.value, cache_tokens=cache_tokens, verify=verify,
        )  # fmt: skip
        service.run(bound, host)
