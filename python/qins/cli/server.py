"""transformers' server, for one model on the CPU: what `qins serve` checks, loads and starts."""

from __future__ import annotations

import asyncio
import json
import shlex
import signal
import socket
import warnings
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, cast

import torch
import typer
import uvicorn
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from jinja2 import TemplateError
from starlette.exceptions import HTTPException

from ..files import open_checkpoint
from ..hf import QinsConfig, find_source, load_tokenizer, loading, require_causal_lm, require_transformers
from ..nn import cache_row_bytes
from ..system import available_bytes

transformers = require_transformers()
try:
    from transformers import ContinuousBatchingConfig
    from transformers.cli.serving.chat_completion import ChatCompletionHandler
    from transformers.cli.serving.completion import CompletionHandler
    from transformers.cli.serving.model_manager import ModelManager
    from transformers.cli.serving.response import ResponseHandler
    from transformers.cli.serving.server import build_server
    from transformers.cli.serving.utils import GenerationState

    from .answering import OneByOne, Together, begun
except ImportError as e:
    raise ImportError(f"qins serve needs transformers 5.23 or newer, got {transformers.__version__}: {e}") from e

_PAGE = 256  # tokens of a block of the cache
_BATCH = 512  # maximum number of tokens of a step; a longer prompt takes several
_REQUESTS = 64  # maximum number of requests of a step
_ROOM = 32768  # default room of the cache: 16 requests of 2048 tokens
# Routes of transformers' server that would load or unload models, or that answer other kinds of requests.
_OMITTED = ("/load_model", "/reset", "/v1/audio/transcriptions", "/v1/systemone")


class _OneModel(ModelManager):
    """Has one model, under one name, for as long as the process runs."""

    def __init__(self, name: str, model: Any, tokenizer: Any) -> None:
        super().__init__(device="cpu")
        self.force_model = name
        self._loaded = model, tokenizer

    def load_model_and_processor(self, *args: Any, **kwargs: Any) -> Any:
        return self._loaded

    def get_gen_models(self, cache_dir: str | None = None) -> list[dict[str, Any]]:  # type: ignore[override]
        return [{"id": self.force_model, "object": "model", "created": 0, "owned_by": "qins"}]


class _OneManager(GenerationState):
    """Has one manager of generation."""

    def __init__(self, manager: OneByOne | Together) -> None:
        super().__init__(continuous_batching=isinstance(manager, Together))
        self.manager: Any = manager

    def get_manager(self, model_id: str, use_cb: bool = False) -> Any:
        return self.manager

    def is_cb_alive(self) -> bool:
        return not isinstance(self.manager, Together) or self.manager.is_alive()

    def shutdown(self) -> None:
        self.manager.stop()


class _Checked:
    """Comes before a handler of transformers, which answers malformed requests with status 500."""

    async def handle_request(self, body: dict[str, Any], request_id: str) -> Any:
        for name in ("max_tokens", "max_completion_tokens", "max_output_tokens"):
            if type(body.get(name)) not in (int, type(None)):
                raise HTTPException(400, f"{name}: expected a positive integer, got {body[name]!r}")
        if type(body.get("parallel_tool_calls")) not in (bool, type(None)):
            raise HTTPException(400, f"parallel_tool_calls: expected a boolean, got {body['parallel_tool_calls']!r}")
        try:
            return await super().handle_request(body, request_id)  # type: ignore[misc]
        except KeyError as e:
            raise HTTPException(400, f"expected a field {e} in the request or its messages, got none") from e
        except (TypeError, ValueError, AttributeError, OverflowError, TemplateError) as e:
            raise HTTPException(400, str(e)) from e

    def _build_generation_config(self, body: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        bias = body.get("logit_bias")
        body = {k: v for k, v in body.items() if k != "logit_bias"}  # transformers expects floats
        config = super()._build_generation_config(body, *args, **kwargs)  # type: ignore[misc]
        if bias:
            try:
                config.sequence_bias = {(int(token),): float(number) for token, number in bias.items()}
            except (AttributeError, TypeError, ValueError):
                raise HTTPException(400, f"logit_bias: expected an object of numbers, got {bias!r}") from None
        if body.get("temperature"):
            config.do_sample = True  # transformers leaves that to generation_config.json
        return config


class _Chats(_Checked, ChatCompletionHandler):
    async def handle_request(self, body: dict[str, Any], request_id: str) -> Any:
        messages = body.get("messages")
        if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
            raise HTTPException(400, f"messages: expected a list of objects with role and content, got {messages!r}")
        return await super().handle_request(body, request_id)


class _Completions(_Checked, CompletionHandler):
    pass


class _Responses(_Checked, ResponseHandler):
    pass


def _refused(status: int, message: str) -> JSONResponse:
    """Return an error in OpenAI's form; its clients do not show FastAPI's."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    told = message.encode("utf-8", "backslashreplace").decode()  # a request may have half a surrogate pair
    return JSONResponse({"error": {"message": told, "type": kind}}, status)


async def _of_exception(_: Any, error: Any) -> JSONResponse:
    return _refused(error.status_code, str(error.detail))


async def _of_fault(_: Any, error: Any) -> JSONResponse:
    return _refused(500, f"{type(error).__name__}: {error}")


async def _of_body(_: Any, error: Any) -> JSONResponse:
    told = [f"{e['msg']}: {(e.get('ctx') or {}).get('error', '')}".strip(": ") for e in error.errors()]
    return _refused(422, "; ".join(told))


class _Abandoning:
    """Cancels a request when its client goes away; uvicorn computes the answer to the end."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(
        self, scope: dict[str, Any], receive: Callable[[], Awaitable[Any]], send: Callable[[Any], Awaitable[None]]
    ) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        messages: asyncio.Queue[Any] = asyncio.Queue()
        streamers: list[Any] = []
        begun.set(streamers)  # before the task that answers copies the context

        async def listen() -> None:
            while True:
                message = await receive()
                messages.put_nowait(message)
                if message["type"] == "http.disconnect":
                    return

        answering, listening = (asyncio.ensure_future(f) for f in (self.app(scope, messages.get, send), listen()))
        try:
            await asyncio.wait({answering, listening}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            left = not answering.done()
            answering.cancel()
            listening.cancel()
            await asyncio.wait({answering, listening})
            for streamer in streamers:  # an answer that ends early may not have waited for its text yet
                streamer.cancel()
        if not left:
            answering.result()


class _Server(uvicorn.Server):
    """Ends at once on a second signal, even if a client sends its request no further."""

    def handle_exit(self, sig: int, frame: Any) -> None:
        self.force_exit = self.should_exit
        super().handle_exit(sig, frame)


def reserve(host: str, port: int) -> socket.socket:
    """Return a socket that is bound to an address, on which nothing listens yet.

    Raises:
        OSError: the address is in use, or not one of this machine.

    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # else a restart waits for old connections
            bound.bind(address)
        except OSError:
            bound.close()
            raise
    except OSError as e:
        raise OSError(f"host, port: expected a free address of this machine, got {host}:{port}: {e.strerror}") from e
    return bound


def _size(n: float) -> str:
    return f"{n / 1e9:,.2f} GB" if n >= 1e9 else f"{n / 1e6:,.0f} MB"


class Room:
    """The memory that a model and its KV cache need, from headers alone.

    Args:
        model: directory or hub name.
        cache_tokens: tokens that the cache has room for; None chooses.
        together: whether requests are computed together.
        kv_cache: codec of the cache's values; None for floats.

    Attributes:
        weights: bytes of the checkpoint's tensors.
        tokens: tokens that the cache has room for.
        cache: bytes of the cache.
        limit: maximum number of tokens of a prompt and its answer.

    Raises:
        ValueError: the machine does not have that much memory, or heads do not suit the codec.

    """

    def __init__(self, model: str, cache_tokens: int | None, together: bool, kv_cache: str | None) -> None:
        with loading("the config.json of a causal language model", model):
            config = transformers.AutoConfig.from_pretrained(model, trust_remote_code=False)
            config = config.get_text_config(decoder=True)
        queries = getattr(config, "num_attention_heads", None) or 0  # none in Mamba, whose state is small
        heads = getattr(config, "num_key_value_heads", None) or queries
        width = getattr(config, "head_dim", None) or config.hidden_size // max(queries, 1)
        itemsize = (config.dtype or torch.float32).itemsize
        rows = config.num_hidden_layers * heads
        if kv_cache is None:  # keys and values, and the token's column of the mask of a step
            per_token = (2 * rows * width + _BATCH * together) * itemsize
        else:  # a cache of codes has room for half as many tokens more than there were when it grew
            each = cache_row_bytes("keys", "float16", width) + cache_row_bytes("--kv-cache", kv_cache, width)
            per_token = rows * each * 3 // 2
        positions = getattr(config, "max_position_embeddings", None)
        self.weights = open_checkpoint(find_source(model)).file_bytes
        there = available_bytes()
        left = float("inf") if there is None else there - self.weights
        self.tokens = cache_tokens or min(_ROOM, max(_PAGE, int(left / 2 / max(per_token, 1))))
        if together:
            self.tokens = -(-self.tokens // _PAGE) * _PAGE
        elif positions is not None:
            self.tokens = min(self.tokens, positions)
        self.limit = min(self.tokens, positions or self.tokens)
        self.cache = self.tokens * per_token
        if self.cache > left:
            raise ValueError(
                f"{model}: expected {_size(self.weights + self.cache)} of available memory ({_size(self.weights)} of "
                f"weights, {_size(self.cache)} of KV cache for {self.tokens:,} tokens), got {_size(there or 0)}"
            )


def _load(model: str, verify: bool) -> Any:
    about = transformers.PretrainedConfig.get_config_dict(model)[0].get("quantization_config")
    coded = isinstance(about, dict) and about.get("quant_method") == "qins"
    given = {"quantization_config": QinsConfig(verify=True)} if verify and coded else {}
    with loading("the checkpoint of a causal language model", model):
        return transformers.AutoModelForCausalLM.from_pretrained(model, trust_remote_code=False, **given).eval()


def _together(model: Any, room: Room) -> Together:
    sizes = ContinuousBatchingConfig(
        page_size=_PAGE, num_blocks=room.tokens // _PAGE, max_batch_tokens=_BATCH, max_requests_per_batch=_REQUESTS,
        max_memory_percent=1.0,  # Room has checked
    )  # fmt: skip
    return Together(model, room.limit, sizes)


class Service:
    """A loaded model and transformers' server for it.

    Args:
        model: directory or hub name.
        name: what requests call the model; None for its directory's or hub name.
        threads: number of threads.
        continuous_batching: whether to compute requests together; None does where transformers can.
        kv_cache: codec of the KV cache's values, one request after another; None for floats.
        cache_tokens: tokens that the KV cache has room for; None chooses.
        verify: whether to compare codes with their checksums.

    Raises:
        FileNotFoundError: there is no such model.
        RuntimeError: transformers cannot compute this model's requests together, but shall.
        ValueError: it is not a causal language model, is damaged, or needs more memory than there is.

    """

    def __init__(
        self,
        model: str,
        *,
        name: str | None,
        threads: int,
        continuous_batching: bool | None,
        kv_cache: str | None,
        cache_tokens: int | None,
        verify: bool,
    ) -> None:
        require_causal_lm(model)
        together = kv_cache is None and continuous_batching is not False
        self.threads, self.room = threads, Room(model, cache_tokens, together, kv_cache)
        self.name = name or (Path(model).resolve().name if Path(model).exists() else model)
        torch.set_num_threads(threads)
        self.tokenizer, loaded = load_tokenizer(model), _load(model, verify)
        manager: OneByOne | Together = OneByOne(self.room.limit, kv_cache)
        if together:
            try:
                manager = _together(loaded, self.room)
            except (AttributeError, RuntimeError, ValueError) as e:
                if continuous_batching:
                    raise RuntimeError(f"{model}: transformers cannot compute its requests together: {e}") from e
                warnings.warn(f"{model}: requests run one after another: {e}", stacklevel=2)
        models, self.state = _OneModel(self.name, loaded, self.tokenizer), _OneManager(manager)
        given, omitted = (models, self.state), cast(Any, None)
        self.app = build_server(
            models, _Chats(*given), _Completions(*given), _Responses(*given), omitted, omitted, self.state
        )
        self.app.add_exception_handler(HTTPException, _of_exception)
        self.app.add_exception_handler(RequestValidationError, _of_body)
        self.app.add_exception_handler(Exception, _of_fault)
        routes = self.app.router.routes
        routes[:] = [r for r in routes if getattr(r, "path", None) not in _OMITTED]

    def about(self, address: str) -> str:
        """Return what to print when the server listens."""
        chats = bool(getattr(self.tokenizer, "chat_template", None))
        hello = {"messages": [{"role": "user", "content": "Hello"}]} if chats else {"prompt": "Hello"}
        body = json.dumps({"model": self.name, **hello, "max_tokens": 32})
        way = "together" if isinstance(self.state.manager, Together) else "one after another"
        cache = f"KV cache for {self.room.tokens:,} tokens ({_size(self.room.cache)})"
        return (
            f"{self.name}: {_size(self.room.weights)}, {self.threads} threads, requests {way}, {cache}\n"
            f"{address}/v1\n"
            f"curl {address}/v1/{'chat/' * chats}completions -H 'Content-Type: application/json' "
            f"-d {shlex.quote(body)}\n"
            "Ctrl-C or SIGTERM stops it, after the requests in flight."
        )

    def run(self, bound: socket.socket, host: str) -> None:
        """Serve until Ctrl-C or SIGTERM; finish the requests in flight."""
        address = f"http://{f'[{host}]' if ':' in host else host}:{bound.getsockname()[1]}"
        server = _Server(uvicorn.Config(_Abandoning(self.app), log_level="warning", access_log=False))
        # uvicorn repeats the signal when it is done, which would end this process by it
        before = signal.signal(signal.SIGTERM, lambda *_: setattr(server, "should_exit", True))
        try:
            bound.listen(2048)
            typer.echo(self.about(address))
            server.run([bound])
        except KeyboardInterrupt:
            pass
        finally:
            signal.signal(signal.SIGTERM, before)
            self.state.shutdown()  # else the thread of continuous batching keeps the process
