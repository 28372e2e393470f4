"""qins serve, with OpenAI's client."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
import serving
import torch
import transformers

import qins

openai = pytest.importorskip("openai", reason="NOT RUN, qins[serve] is not installed")
for package in ("fastapi", "uvicorn", "transformers.cli.serving"):
    pytest.importorskip(package, reason=f"NOT RUN, qins[serve] is not installed: no {package}")
import psutil  # noqa: E402
from cases import long_but  # noqa: E402
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from terminal import as_shell  # noqa: E402
from tiny import make  # noqa: E402
from tokens import save_tokenizer  # noqa: E402

from qins.cli import answering, server  # noqa: E402

pytestmark = pytest.mark.once

LIMIT = 4096
TEMPLATE = "{% for m in messages %}{{ {'user': 'w8'}[m.role] }} {{ m.content }} {% endfor %}w7"


@pytest.fixture(scope="module")
def talking(tmp_path_factory):
    """The directory of a small quantized Llama whose answers do not end; its float original is in `float` beside it."""
    path = tmp_path_factory.mktemp("serving")
    made = make("llama")
    made.config.max_position_embeddings = LIMIT
    made.generation_config.eos_token_id = made.config.eos_token_id = None
    made.save_pretrained(path / "float")
    quantized = type(made).from_pretrained(path / "float", quantization_config=qins.QinsConfig())
    for directory in ("float", "model"):
        if directory == "model":
            quantized.save_pretrained(path / directory)
        save_tokenizer(path / directory)
        (path / directory / "chat_template.jinja").write_text(TEMPLATE)
    return path / "model"


class Served:
    """A server process."""

    def __init__(self, model, *options):
        self.process, (self.told, self.url, self.curl) = serving.start(model, *options)
        self.client = openai.OpenAI(base_url=self.url, api_key="none", max_retries=0, timeout=60)

    def chat(self, content, tokens=8, **options):
        return self.client.chat.completions.create(
            model="model", messages=[{"role": "user", "content": content}], max_tokens=tokens, **options
        )

    def complete(self, prompt, tokens=8, **options):
        return self.client.completions.create(model="model", prompt=prompt, max_tokens=tokens, **options)

    def post(self, path, body):
        """Return the status and the text of the answer to any bytes."""
        request = urllib.request.Request(f"{self.url}{path}", body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as e:
            return e.code, e.read().decode()

    def connect(self):
        """Return a connection for requests that no client would send."""
        host, port = self.url.split("/")[2].split(":")
        return socket.create_connection((host, int(port)))

    def busy(self):
        """Return whether it computes, from its processor time during half a second."""
        process = psutil.Process(self.process.pid)
        before = process.cpu_times()
        time.sleep(0.5)
        after = process.cpu_times()
        return after.user + after.system - before.user - before.system > 0.1

    def becomes_idle(self):
        return any(not self.busy() for _ in range(8))

    def close(self):
        self.client.close()
        self.process.stdout.close()


@pytest.fixture(scope="module", params=long_but(["together"], ["together", "one after another"]))
def served(request, talking):
    """A server of the model, which computes requests together, or one after another with a KV cache of codes."""
    made = Served(talking, *([] if request.param == "together" else ["--kv-cache", "log8"]))
    made.coded = request.param != "together"
    yield made
    made.process.terminate()
    assert made.process.wait(20) == 0
    made.close()


@pytest.fixture(scope="module")
def expected(talking):
    """Return a function that continues words as `qins generate` does."""
    model = qins.load(talking).eval()

    def continued(words, tokens=8, *, coded=False, codec="log8"):
        ids = torch.tensor([[int(w[1:]) for w in words.split()]])
        cache = {"past_key_values": qins.QINSCache(model.config, v_codec=codec)} if coded else {}
        out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=tokens, **cache)
        return " ".join(f"w{i}" for i in out[0, ids.shape[1] :].tolist() if i)  # w0 is a special token

    return continued


@pytest.mark.long
def test_caches_of_fewer_bits(talking, expected):
    made = Served(talking, "--kv-cache", "log4")
    try:
        answer = made.complete("w11 w12 w13")
        assert answer.choices[0].text.strip() == expected("w11 w12 w13", coded=True, codec="log4")
    finally:
        made.process.terminate()
        assert made.process.wait(20) == 0
        made.close()


def test_what_it_prints(served):
    assert served.told.startswith("model: ")
    assert f"requests {'one after another' if served.coded else 'together'}" in served.told
    answer = json.loads(subprocess.run(["bash", "-c", f"{served.curl} --silent"], capture_output=True).stdout)
    assert answer["usage"]["completion_tokens"] == 32
    assert [m.id for m in served.client.models.list()] == ["model"]


def test_chat_and_completions(served, expected):
    answer = served.chat("w30 w31")
    assert answer.choices[0].message.content == expected("w8 w30 w31 w7", coded=served.coded)
    assert (answer.choices[0].finish_reason, answer.usage.prompt_tokens, answer.usage.completion_tokens) == (
        "length", 4, 8,
    )  # fmt: skip
    answer = served.complete("w11 w12 w13")
    assert answer.choices[0].text.strip() == expected("w11 w12 w13", coded=served.coded)


def test_streaming(served, expected):
    parts = [c.choices[0] for c in served.chat("w30 w31", stream=True)]
    text = "".join(p.delta.content or "" for p in parts)
    assert text == expected("w8 w30 w31 w7", coded=served.coded)
    assert sum(bool(p.delta.content) for p in parts) == 8
    assert parts[-1].finish_reason == "length"
    text = "".join(c.choices[0].text for c in served.complete("w11 w12", stream=True))
    assert text.strip() == expected("w11 w12", coded=served.coded)


def test_sixteen_clients(served, expected):
    prompts = [" ".join(f"w{20 + i + j}" for j in range(1 + i % 5)) for i in range(16)]
    with ThreadPoolExecutor(16) as pool:
        answers = [*pool.map(lambda p: served.complete(p, 24).choices[0].text.strip(), prompts)]
    assert answers == [expected(p, 24, coded=served.coded) for p in prompts]


def test_sampling_is_each_request_s_own(served, expected):
    """Greedy requests beside ones that sample, and after one that samples."""
    with ThreadPoolExecutor(8) as pool:
        drawn = [pool.submit(served.complete, "w50", 12, temperature=3.0) for _ in range(4)]
        greedy = [pool.submit(served.complete, "w50", 12, temperature=t) for t in (0, openai.omit)]
        only = pool.submit(served.complete, "w50", 12, temperature=3.0, top_p=1e-6)
    texts = {f.result().choices[0].text for f in drawn}
    assert len(texts) > 1
    best = expected("w50", 12, coded=served.coded)
    assert [f.result().choices[0].text.strip() for f in (*greedy, only)] == [best] * 3


def test_stop_strings(served, expected):
    words = expected("w11 w12 w13", coded=served.coded).split()
    stop = ["w999", f"{words[2]} {words[3]}"]
    until = " ".join(words).split(stop[1])[0].strip()
    answer = served.complete("w11 w12 w13", stop=stop)
    assert (answer.choices[0].text.strip(), answer.choices[0].finish_reason) == (until, "stop")
    assert answer.usage.completion_tokens <= 4
    parts = [*served.complete("w11 w12 w13", stop=stop, stream=True)]
    assert "".join(p.choices[0].text for p in parts).strip() == until
    assert parts[-1].choices[0].finish_reason == "stop"
    assert served.chat("w30", stop="w999").choices[0].message.content == expected("w8 w30 w7", coded=served.coded)


def test_generating_ahead_of_a_stop_string():
    """Under load, tokens are there before the text is read in which a stop string is found."""
    from qins.cli.answering import _Stopping

    class Streamer:
        cancelled = False

        def cancel(self):
            self.cancelled = True

    streamer = type("Stopped", (_Stopping, Streamer), {})()
    streamer.ids, streamer.total_tokens = [*range(64)], 64
    streamer.stop(lambda tokens: " ".join(map(str, tokens)), ["99", "3 4"])
    assert streamer.cancelled
    streamer.total_tokens += 1  # one more until generating ends
    assert streamer.total_tokens == 4


def test_logprobs_are_not_there(served):
    """transformers' server ignores the request for them; the documentation says so."""
    assert served.chat("w30", logprobs=True).choices[0].logprobs is None


def test_long_prompts(served):
    for ask in (served.complete, served.chat):
        for stream in (False, True):
            with pytest.raises(openai.BadRequestError, match=f"prompt: expected 1 to {LIMIT - 1} tokens, got 50"):
                ask("w9 " * 5000, stream=stream)
    answer = served.complete("w9 " * (LIMIT - 6), 100)  # what fits is answered
    assert (answer.choices[0].finish_reason, answer.usage.completion_tokens) == ("length", 6)
    with pytest.raises(openai.BadRequestError, match="prompt: expected 1 to"):
        served.complete("")


@pytest.mark.parametrize(
    ("path", "body", "status", "said"),
    [
        ("/chat/completions", b'{"messages": [', 422, "JSON decode error"),
        ("/chat/completions", b"[1]", 422, "dictionary"),
        ("/chat/completions", b'{"max_tokens": 4}', 400, "messages: expected a list of objects"),
        ("/chat/completions", b'{"messages": [{"content": "w9"}]}', 400, "expected a field 'role'"),
        ("/chat/completions", b'{"messages": [{"role": "user", "content": "w9"}], "max_tokens": "many"}', 400, "many"),
        ("/completions", b'{"prompt": "w9", "max_tokens": 0}', 400, "max_tokens: expected a positive integer, got 0"),
        ("/completions", b'{"prompt": "w9", "temperature": -1}', 400, "-1"),
        ("/completions", b'{"prompt": "w9", "stop": [4]}', 400, "stop: expected a text or a list of texts, got [4]"),
        ("/completions", b'{"prompt": "w9", "nonsense": 1}', 422, "nonsense"),
        (
            "/completions",
            b'{"prompt": "w9", "max_tokens": true}',
            400,
            "max_tokens: expected a positive integer, got True",
        ),
        (
            "/completions",
            b'{"prompt": "w9", "max_tokens": 1.5}',
            400,
            "max_tokens: expected a positive integer, got 1.5",
        ),
        ("/completions", b'{"prompt": "w9", "model": "\\ud800"}', 400, "requested"),
        (
            "/chat/completions",
            b'{"messages": [{"role": "user", "content": "w9"}], "logit_bias": "w9"}',
            400,
            "logit_bias: expected an object of numbers, got 'w9'",
        ),
        (
            "/responses",
            b'{"input": "w9", "parallel_tool_calls": "yes"}',
            400,
            "parallel_tool_calls: expected a boolean, got 'yes'",
        ),
        ("/embeddings", b'{"input": "w9"}', 404, "Not Found"),
        ("/completions", b'{"prompt": "w9", "model": "other"}', 400, "pinned to 'model'; requested 'other'"),
    ],
)
def test_malformed_requests(served, path, body, status, said):
    got, text = served.post(path, body)
    assert (got, said in json.loads(text)["error"]["message"]) == (status, True), text
    assert served.complete("w9", 2).usage.completion_tokens == 2


def test_logit_bias(served):
    """OpenAI's clients send whole numbers."""
    plain = served.chat("w40", 1).choices[0].message.content
    banned = served.chat("w40", 1, logit_bias={plain[1:]: -100}).choices[0].message.content
    assert banned != plain
    assert served.chat("w40", 1, logit_bias={}).choices[0].message.content == plain


@pytest.mark.long
def test_a_second_signal_ends_at_once(talking):
    """A client that never sends the rest of its request would keep the server forever."""
    served = Served(talking, "--no-verify")
    with served.connect() as stalled:
        head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        stalled.sendall(head + b"Content-Length: 1000\r\n\r\n{")
        time.sleep(0.5)
        served.process.send_signal(signal.SIGTERM)
        with pytest.raises(subprocess.TimeoutExpired):
            served.process.wait(1)
        served.process.send_signal(signal.SIGTERM)
        assert served.process.wait(20) == 0
    served.close()


def test_unknown_model(served):
    with pytest.raises(openai.BadRequestError, match="requested 'gpt'"):
        served.client.completions.create(model="gpt", prompt="w9")


def test_no_request_loads_or_unloads_models(served):
    assert served.post("/../reset", b"{}")[0] == served.post("/../load_model", b'{"model": "any/model"}')[0] == 404


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_goes_away(served, stream):
    """Its generation ends; it would take several seconds more."""
    assert served.becomes_idle()
    if stream:
        answer = served.complete("w40 w41", LIMIT, stream=True)
        for _, _ in zip(range(5), answer, strict=False):
            pass
        assert served.busy()
        answer.close()
    else:
        with pytest.raises(openai.APITimeoutError):
            served.client.with_options(timeout=0.5).completions.create(
                model="model", prompt="w40 w41", max_tokens=LIMIT
            )
    assert served.becomes_idle()
    assert served.complete("w9", 2).usage.completion_tokens == 2


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_goes_away_at_once(served, stream):
    """Nobody waits for the first token yet when its generation has begun."""
    asked = {"model": "model", "prompt": "w40 w41", "max_tokens": LIMIT, "stream": stream}
    body = json.dumps(asked).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    for moment in range(40):
        with served.connect() as gone:
            gone.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            time.sleep(moment / 4000)
    assert served.becomes_idle()


@pytest.mark.long
def test_sigterm_finishes_requests(talking):
    """Requests in flight, with streaming and without, get all of their answer; then the process ends with code 0.

    The model is in float and has another name, as `qins chat` and clients may have it.
    """
    served = Served(talking.parent / "float", "--name", "model", "--no-verify")
    with ThreadPoolExecutor(2) as pool:
        whole = pool.submit(served.complete, "w40", 300)
        stream = served.complete("w41", 300, stream=True)
        next(stream)
        time.sleep(0.3)  # the other request has arrived, too
        assert not whole.done()
        served.process.send_signal(signal.SIGTERM)
        last = [*stream][-1]
        assert (last.choices[0].finish_reason, last.usage.completion_tokens) == ("length", 300)
        assert whole.result().usage.completion_tokens == 300
    assert served.process.wait(20) == 0
    with pytest.raises(openai.APIConnectionError):
        served.complete("w9")
    served.close()


def test_requests_that_do_not_fit_together_wait(talking, expected):
    """A cache with room for one request at a time answers six, each as if it were alone."""
    model, tokenizer = qins.load(talking).eval(), transformers.AutoTokenizer.from_pretrained(talking)
    sizes = transformers.ContinuousBatchingConfig(
        page_size=256, num_blocks=2, max_batch_tokens=128, max_requests_per_batch=8, max_memory_percent=1.0
    )
    manager = answering.Together(model, 512, sizes)
    prompts = [[20 + i] * (300 + i) for i in range(6)]

    async def all_of_them():
        def ask(ids, tokens):
            config = transformers.GenerationConfig(max_new_tokens=tokens, do_sample=False, eos_token_id=-1)
            return manager.generate_non_streaming(model, tokenizer, {"input_ids": ids}, config, "the same id")

        longest = await ask([9] * 500, 100)
        return len(longest[2]), [a[0] for a in await asyncio.gather(*(ask(p, 8) for p in prompts))]

    try:
        longest, answers = asyncio.run(all_of_them())
    finally:
        manager.stop()
    assert longest == 12
    assert answers == [expected(" ".join(f"w{i}" for i in p)) for p in prompts]


def test_memory_of_a_cache_of_codes(talking):
    config = transformers.AutoConfig.from_pretrained(talking)
    heads = config.num_hidden_layers * config.num_key_value_heads
    floats, codes = (server.Room(str(talking), 2048, False, codec).cache for codec in (None, "log4"))
    kept = qins.QINSKVCache(1, 2048 * 3 // 2, heads, config.head_dim, v_codec="log4").memory_savings()
    assert codes == kept["total_bytes"] < floats == 4 * 2 * 2048 * heads * config.head_dim


def test_available_memory():
    there = server.available_bytes()
    if there is None:
        pytest.skip("NOT RUN, the system does not tell its memory")
    assert 0 < there <= psutil.virtual_memory().total


def test_models_that_transformers_cannot_batch(tmp_path):
    config = transformers.MambaConfig(vocab_size=160, hidden_size=64, num_hidden_layers=2, state_size=4)
    transformers.MambaForCausalLM(config).save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    given = dict(name=None, threads=torch.get_num_threads(), kv_cache=None, cache_tokens=None, verify=True)
    with pytest.warns(UserWarning, match="requests run one after another"):
        service = server.Service(str(tmp_path), continuous_batching=None, **given)
    assert isinstance(service.state.manager, answering.OneByOne)
    with pytest.raises(RuntimeError, match="transformers cannot compute its requests together"):
        server.Service(str(tmp_path), continuous_batching=True, **given)


@given(st.text("ab", max_size=12), st.lists(st.text("ab", min_size=1, max_size=3), max_size=3), st.data())
@settings(max_examples=200, deadline=None)
def test_streams_end_before_stop_strings(text, stops, data):
    """However the text is cut into pieces, what is shown is the text before the first stop string."""
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=4)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    cancelled = []

    async def shown():
        queue = asyncio.Queue()
        for item in (*pieces, None):
            queue.put_nowait(item)
        until = answering.UntilStop(queue, stops, lambda: cancelled.append(1))
        got = []
        while (item := await until.get()) is not None:
            got.append(item)
        return "".join(got), bool(cancelled)

    ends = [text.find(s) for s in stops if s in text]
    got, stopped = asyncio.run(shown())
    assert (stopped, len(cancelled)) == (bool(ends), bool(ends))
    assert not any(s in got for s in stops)
    # of several, the first to be complete counts, which depends on the pieces
    assert got in ([text[:end] for end in ends] if ends else [text])


def test_port_in_use(talking, monkeypatch, capfd):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, out, err = as_shell(monkeypatch, capfd, "serve", talking, "--port", port)
    assert (code, out) == (1, "")
    reason = os.strerror(errno.EADDRINUSE)
    assert err == f"error: host, port: expected a free address of this machine, got 127.0.0.1:{port}: {reason}\n"


def test_what_it_refuses(talking, tmp_path, monkeypatch, capfd):
    def said(*arguments):
        code, out, err = as_shell(monkeypatch, capfd, "serve", *arguments, "--port", 0)
        assert (code, out, err.count("\n")) == (1, "", 1), err
        return err

    assert "neither a directory nor an available model" in said(tmp_path / "nothing")
    make("bert").save_pretrained(tmp_path / "bert")
    assert "expected a causal language model" in said(tmp_path / "bert")
    assert "omit --continuous-batching" in said(talking, "--kv-cache", "log8", "--continuous-batching")
    shutil.copytree(talking, tmp_path / "damaged")
    file = tmp_path / "damaged" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-9] ^= 1
    file.write_bytes(content)
    assert "the file is damaged" in said(tmp_path / "damaged")
    monkeypatch.setattr(server, "available_bytes", lambda: 400_000)
    told = said(talking, "--cache-tokens", 2048)
    assert "of available memory" in told
    assert "KV cache for 2,048 tokens), got 0 MB" in told
