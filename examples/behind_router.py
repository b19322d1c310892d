"""vllm-router in front of servers that may die and return, and that come and go."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from urllib.parse import quote
from urllib.request import Request, urlopen

from servers import BIN, Server, Servers, free_ports, series

#: Retries are the router's own: up to five, the first after 50 ms. In turn, so that a retry meets another server.
WORDS = ["--policy", "round_robin", "--retry-max-retries", "5"]
#: After two requests that failed, none for 5 s (by default after ten, for 60 s, however well the server is meanwhile).
WORDS += ["--cb-failure-threshold", "2", "--cb-success-threshold", "1", "--cb-timeout-duration-secs", "5"]
#: Looked at every second: one look takes a server out, or back in (by default three, or two, looks 60 s apart).
WORDS += ["--health-check-interval-secs", "1", "--health-failure-threshold", "1", "--health-success-threshold", "1"]
WORDS += ["--health-check-timeout-secs", "5"]


def start_router(servers: Servers, behind: Sequence[Server], more: Sequence[str] = ()) -> Server:
    """vllm-router in front of these. more: words of its command."""
    port, metrics = free_ports(1), free_ports(1)
    command = [str(BIN / "vllm-router"), "--port", str(port), "--prometheus-port", str(metrics)]
    command += ["--worker-startup-check-interval", "1", *WORDS, *more]
    command += ["--worker-urls", *(server.url for server in behind)]
    return servers.start("router", port, command, {})


def add(router: Server, server: Server) -> None:
    """It gets requests from now on; the router first waits until it is healthy."""
    _post(f"{router.url}/add_worker?url={quote(server.url, safe='')}")


def remove(router: Server, server: Server) -> None:
    """It gets no more requests; those that it has go on."""
    _post(f"{router.url}/remove_worker?url={quote(server.url, safe='')}")


def leave(servers: Servers, router: Server, server: Server, limit_s: float = 60) -> None:
    """Take a server out of the router, wait until it has answered what it has, and stop it."""
    remove(router, server)
    deadline, quiet = time.monotonic() + limit_s, 0
    # Twice: one that the router chose it for just now may still be on its way.
    while quiet < 2:
        time.sleep(1)
        busy = sum(series(server, f"vllm:num_requests_{state}") for state in ("running", "waiting"))
        quiet = 0 if busy else quiet + 1
        if time.monotonic() > deadline:
            raise SystemExit(f"{server.name} still has {busy:.0f} requests {limit_s:.0f} s after it left the router")
    servers.stop(server)


def _post(url: str) -> None:
    urlopen(Request(url, b""), timeout=60).close()


def healthy(router: Server) -> set[str]:
    """Addresses to which it sends requests."""
    with urlopen(f"{router.url}/workers", timeout=5) as reply:
        return {worker["url"] for worker in json.load(reply)["workers"] if worker["is_healthy"]}


def wait_for(router: Server, server: Server, there: bool, limit_s: float = 30) -> float:
    """Seconds until the router sees that a server is there, or gone; raises SystemExit where it does not."""
    began = time.monotonic()
    while (server.url in healthy(router)) != there:
        if time.monotonic() - began > limit_s:
            raise SystemExit(
                f"after {limit_s:.0f} s the router still holds {server.name} {'gone' if there else 'there'}"
            )
        time.sleep(0.1)
    return time.monotonic() - began
