"""A chat completions server on this machine that answers as a script says, and remembers what it was asked."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Script = Callable[[dict[str, Any], int], "Answer | dict[str, Any]"]
"""From the request's body and its number (from 0) to what is sent."""


class Answer:
    """A reply: status, headers, bytes; `cut_off` promises more bytes than come, `hangs` sends nothing for so long."""

    def __init__(
        self,
        body: Any = b"",
        status: int = 200,
        headers: dict[str, str] | None = None,
        *,
        cut_off: bool = False,
        hangs: float = 0,
    ):
        self.data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.status, self.headers, self.cut_off, self.hangs = status, headers or {}, cut_off, hangs


def completion(content: str | None, **message: Any) -> dict[str, Any]:
    """A chat completion's JSON."""
    finish = message.pop("finish_reason", "stop")
    return {
        "id": "r-1",
        "model": "teacher-v2",
        "choices": [{"message": {"role": "assistant", "content": content, **message}, "finish_reason": finish}],
        "usage": {"completion_tokens": 7},
    }


class Server:
    """What the tests see of the server."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.times: list[float] = []
        self.lock = threading.Lock()
        self.now = self.most_at_once = 0
        self.url = ""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    seen: Server

    def do_POST(self) -> None:
        server = self.seen
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            number = len(server.bodies)
            server.bodies.append(body)
            server.headers.append(dict(self.headers))
            server.times.append(time.monotonic())
            server.now += 1
            server.most_at_once = max(server.now, server.most_at_once)
        answer = server.script(body, number)
        answer = answer if isinstance(answer, Answer) else Answer(answer)
        try:
            time.sleep(answer.hangs)
            with server.lock:
                server.now -= 1
            self.send_response(answer.status)
            for name, value in answer.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(answer.data) + 100 * answer.cut_off))
            self.end_headers()
            self.wfile.write(answer.data)
            if answer.cut_off:
                self.close_connection = True
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:
        """Silent."""


@contextmanager
def running(script: Script) -> Iterator[Server]:
    """The server on a free port, in threads that end with the process."""
    seen = Server(script)
    handler = type("Handler", (_Handler,), {"seen": seen})
    http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    http.daemon_threads = True
    seen.url = f"http://127.0.0.1:{http.server_address[1]}/v1"
    thread = threading.Thread(target=http.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        http.shutdown()
        http.server_close()
