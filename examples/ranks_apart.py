"""A server for each rank, behind vllm-router, under load: one is killed and returns, an extra one joins and leaves.

    python examples/ranks_apart.py [--model PATH] [--ranks 3] [--clients 6] [--picture FILE.svg]

Starts the ranks and the router, sends steady load, of which a quarter streams, kills a whole server by SIGKILL and starts it
again, has an extra rank join and leave, and prints for each part of the story how many requests were answered, failed or
were cut off, and the slowest. Stops everything. On CPU; needs the extra `disaggregated`.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import behind_router
from devices import as_arguments
from servers import BIN, Server, Servers, free_ports, run_with_servers, small_checkpoint
from steady_load import Asked, Load, over

START_LIMIT_S = 500
#: How long the load goes on between two events.
QUIET_S = 15.0


class Group(NamedTuple):
    """What all ranks of a group share. meet: the folder in which they meet."""

    model: str
    ranks: int
    meet: Path
    name: str = "example"


class Mark(NamedTuple):
    """Something that happened at a time of time.monotonic(); `then`: what the load sees until the next one."""

    at: float
    what: str
    then: str


@dataclass
class Story:
    """What happened, in order."""

    began: float = field(default_factory=time.monotonic)
    marks: list[Mark] = field(default_factory=list)

    def mark(self, what: str, then: str = "") -> None:
        """Note, and tell, what happens now."""
        self.marks.append(Mark(time.monotonic(), what, then))
        say(f"{self.marks[-1].at - self.began:5.0f} s: {what}")


def say(text: str) -> None:
    """One line of progress, at once."""
    print(f"ranks_apart: {text}", flush=True)


def start_rank(servers: Servers, group: Group, rank: int, port: int = 0) -> Server:
    """`vllm serve` for one rank, at `port` or a free one; a rank from `ranks` on is an extra one."""
    port = port or free_ports(1)
    settings = {"group": group.name, "rank": rank, "ranks": group.ranks, "meet": str(group.meet), "timeout_s": 400}
    options = {"max_model_len": 512, "served_model_name": "demo", "api_server_count": 1}
    options |= {"distributed_executor_backend": "dwdp", "additional_config": {"dwdp": settings}}
    command = [str(BIN / "vllm"), "serve", group.model, "--port", str(port), "--enforce-eager", *as_arguments(options)]
    # A server that is killed leaves its sockets where they are.
    return servers.start(f"{group.name}-{rank}", port, command, {"TMPDIR": str(servers.folder)})


def last_way(server: Server) -> str:
    """How the latest life of a rank came by its experts, as its log tells."""
    told = [line[line.index("dwdp rank") :] for line in server.log.read_text().splitlines() if "of loading" in line]
    return (told or ["its log does not say how it came by its experts"])[-1]


def tell(servers: Servers, router: Server, ranks: list[Server], group: Group, story: Story) -> None:
    """All that happens under load."""
    time.sleep(QUIET_S)
    killed = ranks.pop()
    story.mark(f"rank {group.ranks - 1}: SIGKILL to all of its server", "it is dead")
    servers.strike(killed)
    say(f"         the router takes it out {behind_router.wait_for(router, killed, there=False):.1f} s later")
    servers.stop(killed)
    time.sleep(QUIET_S)
    story.mark(f"rank {group.ranks - 1}: started again, as it was", "it starts, on the cores of the others")
    ranks.append(start_rank(servers, group, group.ranks - 1, int(killed.url.rsplit(":", 1)[1])))
    servers.wait(START_LIMIT_S)
    story.mark(f"rank {group.ranks - 1}: answers again", "all ranks are there")
    say(f"         {last_way(ranks[-1])}")
    time.sleep(QUIET_S)
    story.mark(f"rank {group.ranks}, an extra one: started", "an extra rank starts")
    extra = start_rank(servers, group, group.ranks)
    servers.wait(START_LIMIT_S)
    behind_router.add(router, extra)
    story.mark(f"rank {group.ranks}: joins", "an extra rank is there")
    say(f"         {last_way(extra)}")
    time.sleep(QUIET_S)
    story.mark(f"rank {group.ranks}: leaves", "it has left")
    behind_router.leave(servers, router, extra)
    time.sleep(QUIET_S)
    story.mark("end")


def report(asked: Sequence[Asked], marks: Sequence[Mark]) -> list[str]:
    """Lines of the figures: a table by part of the story, and what holds for all of it."""
    whole = over(asked, marks[0].at, float("inf"))
    lines = [f"{'':40}{'s':>5}{'answers':>9}{'per s':>7}{'failed':>8}{'cut':>5}{'slowest':>9}"]
    ends = [mark.at for mark in marks[1:]]
    # What is still on its way at the end counts to the last part.
    for mark, end, last in zip(marks, ends, [*ends[:-1], float("inf")], strict=False):
        part = over(asked, mark.at, last)
        seconds = end - mark.at
        lines.append(
            f"{mark.then:40}{seconds:5.0f}{part.answers:9}{part.answers / seconds:7.1f}"
            f"{part.failed + part.failed_streams:8}{part.cut:5}{part.slowest_s:7.1f} s"
        )
    streams = sum(each.streamed for each in asked)
    lines.append(f"{len(asked)} requests, {streams} of them streams; the slowest took {whole.slowest_s:.1f} s")
    lines.append(f"{whole.failed} of {len(asked) - streams} requests that do not stream failed")
    lines.append(
        f"{whole.cut} of {streams} streams were cut off, those that the killed server had begun"
        f"; {whole.failed_streams} failed before their first token"
    )
    return lines


def run(servers: Servers, args: argparse.Namespace, draw: Callable[..., None] | None) -> int:
    """The story; 0 where no request failed that does not stream."""
    if args.ranks < 2:
        raise SystemExit(f"--ranks {args.ranks}: DWDP takes 2 or more")
    if args.clients < 1:
        raise SystemExit(f"--clients {args.clients}: without one there is no load; write 1 or more")
    (meet := servers.folder / "meet").mkdir()
    group = Group(args.model or small_checkpoint(), args.ranks, meet)
    say(f"starting {group.ranks} servers, a rank each; logs in {servers.folder}")
    began = time.monotonic()
    ranks = [start_rank(servers, group, rank) for rank in range(group.ranks)]
    servers.wait(START_LIMIT_S)
    router = behind_router.start_router(servers, ranks)
    servers.wait(60)
    say(f"up after {time.monotonic() - began:.0f} s: router {router.url}, ranks {', '.join(s.url for s in ranks)}")
    with Load(router.url, args.clients) as load:
        story = Story()
        story.mark(f"load begins, {args.clients} requests at a time", "all ranks are there")
        tell(servers, router, ranks, group, story)
    for line in report(load.asked, story.marks):
        say(line)
    for streamed, kind in ((False, "does not stream"), (True, "streams")):
        for trouble in load.troubles(streamed):
            say(f"  a request that {kind}: {trouble}")
    if draw:
        draw(load.asked, story.marks, args.picture)
        say(f"picture: {args.picture}")
    return 1 if any(each.failed and not each.streamed for each in load.asked) else 0


def main() -> int:
    """Run with servers that are stopped however it ends."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--ranks", type=int, default=3)
    parser.add_argument("--clients", type=int, default=6, help="requests at a time")
    parser.add_argument("--picture", metavar="FILE", help="draw answers per second over time (.svg, .png)")
    args = parser.parse_args()
    if not (BIN / "vllm-router").exists():
        raise SystemExit("ranks_apart: vllm-router is missing: pip install '.[disaggregated]' in this folder")
    draw = None
    if args.picture:
        from ranks_apart_picture import check, draw

        check(args.picture)
    return run_with_servers("ranks_apart", functools.partial(run, args=args, draw=draw))


if __name__ == "__main__":
    sys.exit(main())
