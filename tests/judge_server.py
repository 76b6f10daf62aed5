"""A real HTTP server on loopback that plays a judge's endpoint, well or badly."""

from __future__ import annotations

import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


def completion(content: str | None, *, model: str = "judge", finish: str = "stop", **message: Any) -> dict[str, Any]:
    """The body of a chat completion."""
    choice = {"message": {"role": "assistant", "content": content, **message}, "finish_reason": finish}
    return {"model": model, "choices": [choice], "usage": {"prompt_tokens": 100, "completion_tokens": 10}}


def preferring(word: str) -> dict[str, Any]:
    return completion(json.dumps({"comparison": "One is better.", "preferred": word}))


def longer(body: dict[str, Any]) -> str:
    """The letter of the longer answer in a question by a packaged template; tie when equally long."""
    text = body["messages"][-1]["content"]
    a, b = (text.split(f"[Answer {letter}]\n")[1].split(f"\n[End of answer {letter}]")[0] for letter in "AB")
    return "A" if len(a) > len(b) else "B" if len(b) > len(a) else "tie"


@dataclass
class Response:
    """What the server does with a request: status, body (dict: JSON), headers."""

    body: dict[str, Any] | bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict[str, str])
    reset: bool = False
    """break the connection instead of answering"""
    drip: float = 0.0
    """seconds between the bytes of the body"""


Play = Callable[[dict[str, Any], int], Response]
"""(request body, how many requests came before) -> response; called on a thread per request"""


class JudgeServer:
    """What came in, and where it is reached."""

    def __init__(self, play: Play) -> None:
        self.play = play
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.busy = self.most_busy = 0
        self.lock = threading.Lock()
        self.url = ""


class _Endpoint(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    owner: JudgeServer

    def do_POST(self) -> None:
        owner = self.owner
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with owner.lock:
            count = len(owner.bodies)
            owner.bodies.append({"path": self.path, **body})
            owner.headers.append(dict(self.headers.items()))
            owner.busy += 1
            owner.most_busy = max(owner.most_busy, owner.busy)
        try:
            response = owner.play(body, count)
        finally:
            with owner.lock:
                owner.busy -= 1
        if response.reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            self.connection.close()
            return
        content = response.body if isinstance(response.body, bytes) else json.dumps(response.body).encode()
        self.send_response(response.status)
        for name, value in {**response.headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        for start in range(len(content)) if response.drip else ():
            self.wfile.write(content[start : start + 1])
            time.sleep(response.drip)
        if not response.drip:
            self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        return


class _Quiet(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def handle_error(self, request: Any, client_address: Any) -> None:
        return  # clients that give up are part of the play


@contextmanager
def serving(play: Play) -> Iterator[JudgeServer]:
    """A server until the end of the block."""
    owner = JudgeServer(play)
    server = _Quiet(("127.0.0.1", 0), type("Endpoint", (_Endpoint,), {"owner": owner}))
    owner.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield owner
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
