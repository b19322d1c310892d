"""A small server that answers as vLLM does, for tests of what stands in front: `python -m tests.unit.answering NAME PORT`.

The prompt says what happens: a stream of `cut` ends early, one of `error` with an error, one of `slow` takes 3 s; `broken`
gets HTTP 500.
"""

from __future__ import annotations

import json
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKENS = 16
running: list[object] = []
answered: list[str] = []


class Handler(BaseHTTPRequestHandler):
    """Completions of 16 tokens in a tenth of a second, or a stream of them; `text` is this server's name."""

    def do_GET(self) -> None:
        if self.path == "/metrics":
            figures = {"num_requests_running": len(running), "num_requests_waiting": 0, "answered": len(answered)}
            return self._send(
                "".join(f'vllm:{name}{{engine="0"}} {value}\n' for name, value in figures.items()).encode()
            )
        return self._send(json.dumps({"data": [{"id": "demo"}]}).encode())

    def do_POST(self) -> None:
        running.append(self)
        try:
            self._answer()
        finally:
            running.remove(self)
        answered.append(self.path)

    def _answer(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if body["prompt"] == "broken":
            return self._send(b'{"error": "on purpose"}', 500)
        if not body["stream"]:
            time.sleep(0.1)
            return self._send(json.dumps(self._part(range(TOKENS))).encode())
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        for token in range(3 if body["prompt"] == "cut" else TOKENS):
            self.wfile.write(b"data: " + json.dumps(self._part([token])).encode() + b"\n\n")
            time.sleep(0.2 if body["prompt"] == "slow" else 0.01)
        if body["prompt"] == "error":
            self.wfile.write(b'data: {"error": {"message": "engine is dead"}}\n\n')

    def _part(self, tokens: object) -> dict[str, object]:
        return {"choices": [{"text": sys.argv[1], "token_ids": list(tokens)}]}  # type: ignore[call-overload]

    def _send(self, body: bytes, status: int = 200) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nothing."""


if __name__ == "__main__":
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[2])), Handler).serve_forever()
