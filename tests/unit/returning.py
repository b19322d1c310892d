"""What returns.py sees of `vllm serve`, without an engine: `python -m tests.unit.returning NAME PORT PEER_PORTS FAULT`.

Completions stream and count; `peers_alive` says how many of PEER_PORTS (with commas) are served, without itself. A
NAME with `again` is a rank that has returned. `plain` has a process that is called as the engine of rank 1, and ends with
it. FAULT is what goes wrong:

    other-bytes  it tells another digest                            read   a rank that has returned has read its experts
    falls-over   while a peer is gone, requests get HTTP 500        stalls they wait for 1.5 s
    blind        all peers are always there                         down   nothing is served, the process ends with 3
    lonely       one peer is never there                            late   requests get HTTP 500 from the start
    deaf         SIGTERM does not end it                            leaves a child of its own outlives it
    slow         requests take longer than any part                 falls  SIGTERM ends it with 4

With `@NAME` behind it only that server has it.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

NAME, PORT, PEERS, FAULT = (*sys.argv[1:], "", "0", "0", "")[:4]
FAULT = FAULT.partition("@")[0] if FAULT.partition("@")[2] in ("", NAME) else ""
SECONDS = 0.02
stalled: list[float] = []


def peers_gone() -> int:
    gone = 0
    for port in () if FAULT == "blind" else PEERS.split(","):
        try:
            socket.create_connection(("127.0.0.1", int(port)), timeout=1).close()
        except OSError:
            gone += 1
    return max(gone, int(FAULT == "lonely"))


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._send(f'dwdp:peers_alive{{engine="0"}} {len(PEERS.split(",")) - peers_gone()}\n'.encode())

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/collective_rpc":
            told = "0b" if FAULT == "other-bytes" else "0a"
            (Path(body["args"][0]) / "rank-0.json").write_text(json.dumps({"digest": told}))
            return self._send(b"{}")
        time.sleep(3.0 if FAULT == "slow" else SECONDS)
        if FAULT == "late":
            return self._send(b"not yet", 500)
        if FAULT in ("falls-over", "stalls") and "again" not in NAME and peers_gone():
            if FAULT == "falls-over":
                return self._send(b"engine is dead", 500)
            if not stalled:
                stalled.append(time.sleep(1.5) or 0.0)
        usage = {"usage": {"completion_tokens": body["max_tokens"]}}
        self._send(f"data: {json.dumps(usage)}\n\ndata: [DONE]\n\n".encode())

    def _send(self, body: bytes, status: int = 200) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nothing."""


def end_with_engine() -> None:
    engine = subprocess.Popen([sys.executable, "-c", "input()", "VLLM::EngineCore_DP1"], stdin=subprocess.PIPE)
    engine.wait()
    os._exit(1)


if __name__ == "__main__":
    if FAULT == "down":
        print("ValueError: on purpose", flush=True)
        sys.exit(3)
    code = 4 if FAULT == "falls" else 0
    signal.signal(signal.SIGTERM, signal.SIG_IGN if FAULT == "deaf" else lambda *_: os._exit(code))
    if FAULT == "leaves":
        child = subprocess.Popen(["sleep", "60"])
    if NAME == "plain":
        threading.Thread(target=end_with_engine, daemon=True).start()
    way = "adopted" if "again" in NAME and FAULT != "read" else "read from the checkpoint"
    print(f"dwdp rank {NAME[5:6]}: experts {way}, in 0.1 s of loading", flush=True)
    ThreadingHTTPServer(("127.0.0.1", int(PORT)), Handler).serve_forever()
