"""Ranks as servers of their own behind vllm-router, under load, while they are stopped, killed, started again, added and
removed at random: `python -m ci.checks.chaos [--minutes 30] [--seed 1]`. On CPU; needs the extra `disaggregated`.

A small random checkpoint in FP32; plain vLLM first says what it answers to each prompt. Then a server for each rank and the
router are started, and clients ask one request after the other, of which a quarter streams, while an event happens every
few seconds: SIGSTOP and SIGCONT, SIGKILL or SIGTERM, of a whole server or of one of its processes, also while it starts; its
return; extra ranks that join and leave. At least one rank is up at any time.

A router waits for a server that is stopped as for one that is slow. It gives up after 20 s here (`--request-timeout-secs`)
and asks another server, so that such a request is answered late, and not lost; a stop that is shorter only delays it.

Exit status 1: a request failed that does not stream; a stream was cut off, or failed, while no server was ending and the
router gave none up that was stopped, or more streams than there are clients broke by one of these; an answer is not plain
vLLM's, and one of its tokens is behind plain vLLM's choice by more than 0.001 in logprob; a server failed to start, did not
adopt its experts, ended by itself, or did not end; the router did not add or remove a server; a process grew (memory,
descriptors, threads) while its server lived; the last servers do not see each other; or something was left: a process, a
segment, a folder of a server that had not been killed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import ci.checks.chaos_positions as positions  # also where examples are found

import behind_router  # isort: skip
from servers import Server, Servers, free_ports, run_with_servers, series  # isort: skip
from steady_load import Asked, Load, complete  # isort: skip

from ci.checks.chaos_events import GRACE_S, Chaos, Disturbance
from ci.checks.chaos_load import TOLERANCE, Drawn, Truth, differing, lag, prompts, truth
from ci.checks.chaos_positions import Group, Position, serve
from ci.checks.soak_processes import segments, unused
from ci.root import ROOT
from examples.checkpoints import CheckpointSpec, write_checkpoint
from vllm_dwdp.engine.cores import physical_cores, split_cores

SPEC = CheckpointSpec(num_experts=16, num_layers=3, dtype="float32")
CACHE = ROOT / ".cache" / "chaos"
PROMPTS = 64
REQUEST_LIMIT_S = 20
LEFT_LIMIT_S = 20.0


def say(text: str) -> None:
    """One line of progress, at once."""
    print(f"chaos: {text}", flush=True)


def one_core(ranks: int) -> str:
    """The cores of one rank: plain vLLM's sums are of as many parts there."""
    return ",".join(map(str, split_cores(physical_cores(), ranks)[0]))


def plain_vllm(servers: Servers, model: str, ranks: int) -> Server:
    """A server of plain vLLM, once it is up."""
    server = serve(servers, model, "plain", free_ports(1), [], one_core(ranks))
    servers.wait(positions.START_LIMIT_S)
    return server


def explains(disturbance: Disturbance, answer: Asked) -> bool:
    """Whether a stream may have broken by it. A server that is stopped breaks none.

    The router gives a stream up by a limit that counts from its start, so that a short stop may be what was too much.
    """
    if disturbance.stopped and answer.ended - answer.began < REQUEST_LIMIT_S:
        return False
    return disturbance.begin <= answer.ended <= disturbance.end + GRACE_S


def unexplained(broken: Sequence[Asked], disturbances: Sequence[Disturbance], clients: int) -> list[Asked]:
    """Streams that broke by no disturbance: each breaks one stream of a client at most."""
    room = [disturbance for disturbance in sorted(disturbances, key=lambda each: each.end) for _ in range(clients)]
    found = []
    for answer in sorted(broken, key=lambda each: each.ended):
        first = next((at for at, disturbance in enumerate(room) if explains(disturbance, answer)), None)
        if first is None:
            found.append(answer)
        else:
            del room[first]
    return found


def judge(answers: Sequence[Asked], disturbances: Sequence[Disturbance], clients: int) -> list[str]:
    """What is wrong with requests of `clients`, but for their tokens; says how many there were."""
    whole = [answer for answer in answers if not answer.streamed]
    failed = [answer for answer in whole if answer.trouble]
    cut = [answer for answer in answers if answer.cut]
    unstarted = [answer for answer in answers if answer.streamed and answer.trouble and not answer.cut]
    slowest = max((answer.ended - answer.began for answer in whole), default=0.0)
    say(f"{len(failed)} of {len(whole)} requests failed that do not stream; the slowest took {slowest:.1f} s")
    say(
        f"of {len(answers) - len(whole)} streams {len(cut)} were cut off, {len(unstarted)} failed before their first token"
    )
    lines = [f"a request that does not stream failed: {answer.trouble[:300]}" for answer in failed]
    broken = unexplained([*cut, *unstarted], disturbances, clients)
    return lines + [f"a stream ended, and no server had: {answer.trouble[:300]}" for answer in broken]


def other_tokens(
    servers: Servers, model: str, ranks: int, answers: Sequence[Asked], truths: dict[str, Truth]
) -> list[str]:
    """What is wrong with tokens that are not plain vLLM's: plain vLLM is asked again, with these before it."""
    others = differing(answers, truths)
    say(f"{len(others)} of {len(answers)} answers have other tokens than plain vLLM's")
    if not others:
        return []
    plain, lines = plain_vllm(servers, model, ranks), []
    for answer in others:
        behind = lag(plain.url, answer, truths)
        say(f"  {answer.prompt!r}: {list(answer.tokens)}, {behind:.6f} behind in logprob")
        if behind > TOLERANCE:
            expected = truths[answer.prompt].tokens[: len(answer.tokens)]
            lines.append(
                f"{answer.prompt!r} gave {list(answer.tokens)}, plain vLLM {expected}: {behind:.4f} in logprob"
            )
    servers.stop(plain)
    return lines


def last_look(chaos: Chaos, truths: dict[str, Truth]) -> tuple[list[str], list[Asked]]:
    """Do those that are up at the end see each other, and what does each answer by itself?"""
    up = [position for position in chaos.positions if position.server is not None]
    lines, answers = [], list[Asked]()
    time.sleep(3)
    for position in up:
        assert position.server is not None
        try:
            if (seen := series(position.server, "dwdp:peers_alive")) != len(up) - 1:
                lines.append(f"rank {position.rank} sees {seen:.0f} others at the end, of {len(up) - 1}")
        except OSError as error:
            lines.append(f"rank {position.rank} does not say at the end whom it sees: {error}")
        answers += [complete(position.url, prompt) for prompt in truths]
        chaos.close_life(position)
    lines += [f"at the end, asked directly: {answer.trouble}" for answer in answers if answer.trouble]
    return lines, answers


def end_all(servers: Servers) -> list[int]:
    """Tell all to end, and wait; returns their process groups."""
    groups = [server.process.pid for server in servers.started]
    for server in servers.started:
        server.process.terminate()
    deadline = time.monotonic() + positions.END_LIMIT_S
    while any(server.process.poll() is None for server in servers.started) and time.monotonic() < deadline:
        time.sleep(0.2)
    return groups


def left(groups: Sequence[int], segments_before: set[str], folder: Path) -> list[str]:
    """What the servers have left behind, all of which have ended."""
    deadline = time.monotonic() + LEFT_LIMIT_S
    while True:
        found = [f"process {pid}" for group in groups for pid in positions.members(group)]
        found += [f"segment {name}" for name in unused(segments() - segments_before)]
        found += [f"folder {path.name}" for path in folder.glob("dwdp-*") if path.is_dir() and _is_of_nobody(path)]
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.5)


def _is_of_nobody(path: Path) -> bool:
    """Whether it stayed though its front end could have removed it; that of a killed one goes with the next start."""
    return not (path / "front-end.json").exists()


def run(servers: Servers, args: argparse.Namespace) -> int:
    """0 where all went as it should."""
    model, before = str(write_checkpoint(SPEC, CACHE)), segments()
    (meet := servers.folder / "meet").mkdir()
    group = Group(model, args.ranks, meet)
    asked = prompts(PROMPTS, args.seed)
    say(f"{args.minutes:g} minutes, seed {args.seed}, logs in {servers.folder}")
    plain = plain_vllm(servers, model, args.ranks)
    truths = {prompt: truth(plain.url, prompt) for prompt in asked}
    servers.stop(plain)
    port = positions.quiet_ports(args.ranks + args.extras)
    held = [Position(rank, port + rank) for rank in range(args.ranks + args.extras)]
    for position in held[: args.ranks]:
        position.start(servers, group)
    servers.wait(positions.START_LIMIT_S)
    for position in held[: args.ranks]:
        position.become("up")
    running = [position.server for position in held[: args.ranks] if position.server is not None]
    router = behind_router.start_router(servers, running, ["--request-timeout-secs", str(REQUEST_LIMIT_S)])
    servers.wait(60)
    chaos = Chaos(servers, group, router, held, args.seed, say)
    with Load(router.url, args.clients, Drawn(asked, args.seed)) as load:
        chaos.run(60 * args.minutes)
    wrong, direct = last_look(chaos, truths)
    wrong += left(end_all(servers), before, servers.folder)
    servers.stop()
    wrong = [*chaos.wrong, *judge(load.asked, chaos.disturbances, args.clients), *wrong]
    say(f"in the folder where the group met: {os.listdir(meet) or 'nothing'}")
    wrong += other_tokens(servers, model, args.ranks, [*load.asked, *direct], truths)
    for line in chaos.table:
        say(line)
    say(", ".join(f"{count} {what}" for what, count in sorted(chaos.counted.items())))
    starts = sorted(chaos.starts_s)
    if starts:
        say(f"{len(starts)} starts, of {starts[0]:.0f} to {starts[-1]:.0f} s")
    for line in wrong:
        say(f"wrong: {line}")
    if args.json:
        data = {"counted": chaos.counted, "starts_s": starts, "answers": len(load.asked), "wrong": wrong}
        args.json.write_text(json.dumps(data, indent=1))
    return 1 if wrong else 0


def main() -> int:
    """Run with servers that are stopped however it ends."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30, help="of chaos (%(default)s)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--extras", type=int, default=2, help="positions for extra ranks (%(default)s)")
    parser.add_argument("--clients", type=int, default=4, help="requests at a time (%(default)s)")
    parser.add_argument("--json", type=Path, help="write what was counted here")
    args = parser.parse_args()
    if not (positions.BIN / "vllm-router").exists():
        raise SystemExit("chaos: vllm-router is missing: pip install '.[disaggregated]' in this folder")
    return run_with_servers("chaos", lambda servers: run(servers, args))


if __name__ == "__main__":
    sys.exit(main())
