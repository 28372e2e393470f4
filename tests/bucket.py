"""A local object store, behind a proxy that injects failures and slow answers."""

from __future__ import annotations

import http.client
import itertools
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import fsspec
from moto.server import ThreadedMotoServer

_HOP = ("connection", "transfer-encoding", "expect")  # headers that are not passed on
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}


class Store:
    """moto's server of S3 and its proxy.

    Attributes:
        every: one of as many requests of objects fails; 0 for none. In turn, it gets an error 503, half an answer, and
            a connection that breaks before the answer.
        delay: seconds that each answer waits.
        failed: number of failures injected.

    """

    def __init__(self):
        self.every, self.delay, self.failed = 0, 0.0, 0
        self._count, self._kinds = itertools.count(1), itertools.count()
        self._moto = ThreadedMotoServer("127.0.0.1", 0)
        self._moto.start()
        self._behind = "http://{}:{}".format(*self._moto.get_host_and_port())
        store = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_one(self):
                store._answer(self)

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = handle_one  # noqa: N815

            def log_message(self, *_):
                pass

        self._proxy = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._proxy.daemon_threads = True
        threading.Thread(target=self._proxy.serve_forever, daemon=True).start()
        self.url = "http://{}:{}".format(*self._proxy.server_address)

    def make(self, bucket):
        """Make a bucket."""
        self.filesystem().call_s3("create_bucket", Bucket=bucket)

    def environment(self):
        """Return the variables with which s3fs finds the store."""
        return CREDENTIALS | {"AWS_ENDPOINT_URL": self.url}

    def filesystem(self):
        """Return the store's file system without the proxy."""
        return fsspec.filesystem(
            "s3", key="test", secret="test", client_kwargs={"endpoint_url": self._behind, "region_name": "us-east-1"},
            skip_instance_cache=True,
        )  # fmt: skip

    def _answer(self, handler):
        body = self._body(handler)
        time.sleep(self.delay)
        fault = None
        if self.every and handler.path.count("/") > 1 and next(self._count) % self.every == 0:
            self.failed += 1
            fault = ("error", "middle", "before")[next(self._kinds) % 3]
        if fault == "before":
            handler.close_connection = True
            return
        if fault == "error":
            self._send(handler, 503, {}, b"")
            return
        headers = {k: v for k, v in handler.headers.items() if k.lower() not in _HOP}
        connection = http.client.HTTPConnection(*self._moto.get_host_and_port())
        connection.request(handler.command, handler.path, body, headers)
        answer = connection.getresponse()
        status, told, data = answer.status, dict(answer.headers), answer.read()
        connection.close()
        self._send(handler, status, told, data, half=fault == "middle")

    @staticmethod
    def _body(handler):
        if "chunked" in handler.headers.get("Transfer-Encoding", ""):
            parts = []
            while size := int(handler.rfile.readline().split(b";")[0], 16):
                parts.append(handler.rfile.read(size))
                handler.rfile.readline()
            handler.rfile.readline()
            return b"".join(parts)
        return handler.rfile.read(int(handler.headers.get("Content-Length", 0)))

    @staticmethod
    def _send(handler, status, told, data, half=False):
        handler.send_response_only(status)
        for name, value in told.items():
            if name.lower() not in ("connection", "content-length", "transfer-encoding"):
                handler.send_header(name, value)
        length = told.get("Content-Length", len(data)) if handler.command == "HEAD" else len(data)
        handler.send_header("Content-Length", str(length))
        handler.end_headers()
        if handler.command != "HEAD":
            handler.wfile.write(data[: len(data) // 2] if half else data)
        if half:
            handler.close_connection = True

    def stop(self):
        """End both servers."""
        self._proxy.shutdown()
        self._proxy.server_close()
        self._moto.stop()
