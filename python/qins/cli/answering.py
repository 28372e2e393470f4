"""How `qins serve` generates: transformers' two managers of generation, with what clients of OpenAI's API expect.

The subclasses add to transformers 5.23:

- each request's own sampling: with continuous batching, transformers samples all requests as the first one asks;
- ends before stop strings: with continuous batching, transformers ignores them, otherwise it includes them;
- status 400 for prompts that are too long: with continuous batching, one that exceeds the cache ends all generation;
- an end of the generation when a client goes away; transformers goes on where the whole answer was asked for at once,
  and where a streamed one's first text had not been waited for yet.
"""

from __future__ import annotations

import asyncio
import itertools
from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from fastapi import HTTPException
from transformers import ContinuousBatchingConfig, LogitsProcessorList
from transformers.cli.serving.utils import (
    CBGenerateManager,
    CBStreamer,
    DirectStreamer,
    GenerateManager,
    _GenerationCancelled,
    _StreamError,
)
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessor,
    ContinuousBatchingLogitsProcessorList,
)

from ..hf import QINSCache

Tensor = torch.Tensor

# The streamers of what this context's HTTP request began to generate, to be cancelled when its client goes away.
begun: ContextVar[list[Any] | None] = ContextVar("begun", default=None)


class UntilStop:
    """The queue of a stream of texts that ends before the first stop string.

    Args:
        queue: texts, tool calls or errors, and None for the end.
        stops: stop strings.
        cancel: called when one is found.

    """

    def __init__(self, queue: asyncio.Queue[Any], stops: Sequence[str], cancel: Callable[[], None]) -> None:
        self._queue, self._stops, self._cancel = queue, stops, cancel
        self._held = ""  # the end of the text so far, if a stop string may begin there
        self._ready: deque[Any] = deque()

    async def get(self) -> Any:
        """Return the next item; None is the last."""
        while not self._ready:
            self._take(await self._queue.get())
        return self._ready.popleft()

    def get_nowait(self) -> Any:
        """Return the next item if there is one.

        Raises:
            asyncio.QueueEmpty: there is none yet.

        """
        while not self._ready:
            self._take(self._queue.get_nowait())
        return self._ready.popleft()

    def _take(self, item: Any) -> None:
        if type(item) is not str:  # reasoning is a subclass of str
            self._ready += [self._held, item] if self._held else [item]
            self._held = ""
            return
        text = self._held + item
        found = [text.find(s) for s in self._stops if s in text]
        if found:
            self._ready += [text[: min(found)], None] if min(found) else [None]
            self._cancel()
            return
        begins = {len(text) - n for s in self._stops for n in range(1, len(s)) if text.endswith(s[:n])}
        shown = min(begins, default=len(text))
        self._held = text[shown:]
        if shown:
            self._ready.append(text[:shown])


class _Sampling:
    """How one request's tokens are chosen.

    Raises:
        ValueError: a parameter is out of its range.

    """

    def __init__(self, model: Any, config: Any) -> None:
        self.draws = bool(config.do_sample)
        self.processors: LogitsProcessorList = model._get_logits_processor(config)


class _Answering:
    """What both managers share.

    Args:
        limit: maximum number of tokens of a prompt and its answer.

    """

    _numbers = itertools.count()

    def __init__(self, limit: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.limit = limit

    @abstractmethod
    def _begin(
        self, model: Any, processor: Any, inputs: Any, config: Any, request_id: str, parser: Any, sampling: _Sampling
    ) -> Any:
        """Begin to generate; return the queue of texts and the streamer, which records the tokens in `ids`."""

    def generate_streaming(
        self,
        model: Any,
        processor: Any,
        inputs: Any,
        gen_config: Any,
        request_id: str,
        response_parser: Any = None,
    ) -> Any:
        """Return the queue of a request's texts and its streamer."""
        ids = inputs["input_ids"]
        prompt = len(ids) if isinstance(ids, list) else ids.shape[-1]
        if not 1 <= prompt < self.limit:
            raise HTTPException(400, f"prompt: expected 1 to {self.limit - 1} tokens, got {prompt}")
        wanted, room = gen_config.max_new_tokens, self.limit - prompt
        if wanted is not None and wanted < 1:
            raise HTTPException(400, f"max_tokens: expected a positive integer, got {wanted}")
        gen_config.max_new_tokens = room if wanted is None else min(wanted, room)
        stops = [gen_config.stop_strings] if isinstance(gen_config.stop_strings, str) else gen_config.stop_strings or []
        if not isinstance(stops, list) or not all(isinstance(s, str) and s for s in stops):
            raise HTTPException(400, f"stop: expected a text or a list of texts, got {stops!r}")
        gen_config.stop_strings = None
        request_id = f"{request_id}-{next(self._numbers)}"  # clients may choose ids, even one for several requests
        sampling = _Sampling(model, gen_config)
        queue, streamer = self._begin(model, processor, inputs, gen_config, request_id, response_parser, sampling)
        if (streamers := begun.get()) is not None:
            streamers.append(streamer)
        return UntilStop(queue, stops, lambda: streamer.stop(processor.decode, stops)), streamer

    async def generate_non_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, request_id: str
    ) -> tuple[str, int, list[int]]:
        """Return the text of an answer, the number of the prompt's tokens, and the answer's tokens."""
        queue, streamer = self.generate_streaming(model, processor, inputs, gen_config, request_id)
        text = ""
        while (item := await queue.get()) is not None:
            if isinstance(item, _StreamError):
                raise RuntimeError(item.msg)
            text += item
        tokens, ids = streamer.ids[: streamer.total_tokens], inputs["input_ids"]
        return text, len(ids) if isinstance(ids, list) else ids.shape[-1], tokens


class _Stopping:
    """A streamer that can be stopped; transformers reads off `total_tokens` whether the limit ended an answer.

    Attributes:
        ids: the tokens so far. After a stop there may be more: generating may be ahead of the text that is read.

    """

    ids: list[int]
    _total = 0
    _stopped: int | None = None

    @property
    def total_tokens(self) -> int:
        """Number of the answer's tokens."""
        return self._total if self._stopped is None else self._stopped

    @total_tokens.setter
    def total_tokens(self, n: int) -> None:
        self._total = n

    def stop(self, decode: Callable[[list[int]], str], stops: Sequence[str]) -> None:
        """Generate no more, and count only the tokens before a stop string."""
        self.cancel()
        tokens = list(self.ids)
        while tokens and any(s in decode(tokens) for s in stops):
            tokens.pop()
        self._stopped = len(tokens)

    def cancel(self) -> None:
        """Generate no more."""
        super().cancel()  # type: ignore[misc]  # of transformers' streamer


class _DirectStreamer(_Stopping, DirectStreamer):
    def put(self, value: Tensor) -> None:
        if self._first:
            self.ids = []
        else:
            self.ids += value.tolist()
        super().put(value)


class OneByOne(_Answering, GenerateManager):  # type: ignore[misc]  # tokens are a list, not a tensor
    """Answers one request after another, with `model.generate`.

    Args:
        limit: maximum number of tokens of a prompt and its answer.
        kv_cache: codec of the KV cache's values; None for transformers' cache.

    """

    def __init__(self, limit: int, kv_cache: str | None = None) -> None:
        super().__init__(limit)
        self.kv_cache = kv_cache

    def _begin(
        self, model: Any, processor: Any, inputs: Any, config: Any, request_id: str, parser: Any, sampling: _Sampling
    ) -> Any:
        loop, queue = asyncio.get_running_loop(), asyncio.Queue[Any]()
        streamer = _DirectStreamer(processor._tokenizer, loop, queue, parser)
        given = {**inputs, "streamer": streamer, "generation_config": config}
        if self.kv_cache is not None:
            given["past_key_values"] = QINSCache(model.config, v_codec=self.kv_cache)

        def run() -> None:
            try:
                model.generate(**given)
            except _GenerationCancelled:
                pass
            except Exception as e:
                loop.call_soon_threadsafe(queue.put_nowait, _StreamError(str(e)))

        self.submit(run)
        return queue, streamer


class _CBStreamer(_Stopping, CBStreamer):
    def put(self, output: Any) -> None:
        self.ids = output.generated_tokens
        super().put(output)

    def cancel(self) -> None:
        super().cancel()
        # transformers never forgets the handler of a canceled request; steps that have begun still call it
        handlers = self._cb.output_router.result_handlers
        asyncio.get_running_loop().call_later(60, handlers.pop, self._request_id, None)


class _PerRequest(ContinuousBatchingLogitsProcessor):
    """Applies to each request's logits what `generate` would.

    transformers then draws from every row, so a greedy request's row keeps its best token alone.
    """

    supported_kwargs: dict[str, type] = {"sampling": _Sampling}  # noqa: RUF012 - as in transformers
    ignored_kwargs = ()

    def __init__(self) -> None:
        self._rows: list[tuple[_Sampling | None, list[int]]] = []

    def fill_defaults(self, int32_tensor: Tensor) -> None:
        int32_tensor.zero_()

    def prepare_tensor_args(self, requests_with_new_token: list[Any]) -> Tensor:
        states = [r.state for r in requests_with_new_token]
        self._rows = [(s.logit_processor_kwargs.get("sampling"), s.initial_tokens + s.generated_tokens) for s in states]
        return torch.zeros(len(states), dtype=torch.int32)

    def __call__(self, scores: Tensor, tensor_arg: Tensor) -> Tensor:
        for i, (sampling, tokens) in enumerate(self._rows):
            row = scores[i : i + 1]
            if sampling is not None and sampling.processors:
                row = sampling.processors(torch.tensor([tokens]), row)  # type: ignore[arg-type]
            if sampling is None or not sampling.draws:
                best = row.argmax()
                row = torch.full_like(row, -torch.inf)
                row[0, best] = 0.0
            scores[i] = row[0]
        return scores


class Together(_Answering, CBGenerateManager):
    """Answers requests together, with continuous batching: each step reads the weights once for all of them.

    Args:
        model: the model.
        limit: maximum number of tokens of a prompt and its answer.
        config: sizes of the cache and of batches.

    Raises:
        RuntimeError: transformers cannot batch this model's requests.

    """

    def __init__(self, model: Any, limit: int, config: ContinuousBatchingConfig) -> None:
        super().__init__(limit, cb_config=config)
        shared = type(model.generation_config)(do_sample=True, eos_token_id=-1)
        cb: Any = model.init_continuous_batching(generation_config=shared, continuous_batching_config=config)
        cb.logit_processor = ContinuousBatchingLogitsProcessorList(LogitsProcessorList([_PerRequest()]))
        cb.logit_processor.tensors_required = 1
        cb.start()
        self._cb: Any = cb
        first = cb.add_request([0], max_new_tokens=1)  # what cannot work fails here
        result = None
        while result is None and cb.is_running():
            result = cb.get_result(first, timeout=1)
        error = cb.background_thread_status.fatal_error if result is None else result.error
        if error is not None:
            cb.stop()  # restores the model's attention
            raise RuntimeError(str(error))

    def _begin(
        self, model: Any, processor: Any, inputs: Any, config: Any, request_id: str, parser: Any, sampling: _Sampling
    ) -> Any:
        self._check_alive(request_id)
        queue = asyncio.Queue[Any]()
        streamer = _CBStreamer(self._cb, request_id, processor._tokenizer, asyncio.get_running_loop(), queue, parser)

        def take(output: Any) -> None:
            if output.error is not None:
                queue.put_nowait(_StreamError(output.error))
                return
            streamer.put(output)
            if output.is_finished():
                streamer.end()

        self._cb.register_result_handler(request_id, take)
        self._cb.add_request(
            inputs["input_ids"], request_id=request_id, streaming=True, max_new_tokens=config.max_new_tokens,
            eos_token_id=config.eos_token_id, sampling=sampling,
        )  # fmt: skip
        return queue, streamer
