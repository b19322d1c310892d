"""One engine's scheduler as vLLM's: running requests decode first, then waiting prompts fill the step, in chunks."""

from __future__ import annotations

from array import array
from collections import deque
from dataclasses import dataclass, field

from vllm_dwdp.predict.sim.costs import Chunk
from vllm_dwdp.predict.sim.requests import Request


@dataclass
class Log:
    """What happened. ttft: seconds; tokens: (seconds between tokens, how many tokens had them). Times in seconds.

    handed: three numbers for each prompt whose KV cache went to another engine: when it came, when the last of it was sent,
    and its tokens.
    """

    ttft: list[float] = field(default_factory=list)
    tokens: list[tuple[float, int]] = field(default_factory=list)
    prompt_tokens: int = 0
    output_tokens: int = 0
    finished: int = 0
    lost: int = 0
    busy: float = 0.0
    exposed: float = 0.0
    waited: float = 0.0
    steps: int = 0
    handed: array[float] = field(default_factory=lambda: array("d"))

    def add(self, other: Log) -> None:
        """Take over another log's figures."""
        self.ttft += other.ttft
        self.tokens += other.tokens
        self.handed += other.handed
        for name in (
            "prompt_tokens",
            "output_tokens",
            "finished",
            "lost",
            "busy",
            "exposed",
            "waited",
            "steps",
        ):
            setattr(self, name, getattr(self, name) + getattr(other, name))


class Live:
    """A request in the engine: `done` tokens of its prompt computed, `made` tokens generated."""

    __slots__ = ("context", "done", "made", "request")

    def __init__(self, request: Request) -> None:
        self.request = request
        self.done = 0
        self.made = 0
        self.context = request.cached


class Engine:
    """Requests of one engine. windows: those of the model's attention layers, for counting pairs. transfer_s: of a token's
    KV cache to where it is decoded, one prompt after the other; None where the engine decodes itself."""

    def __init__(
        self,
        stream: list[Request],
        tokens_per_step: int,
        max_sequences: int,
        windows: tuple[int | None, ...],
        transfer_s: float | None = None,
    ) -> None:
        self._stream = stream
        self._next = 0
        self._budget = tokens_per_step
        self._most = max_sequences
        self._windows = windows
        self._transfer_s = transfer_s
        self._sent = 0.0
        self.waiting: deque[Live] = deque()
        self.running: list[Live] = []
        self.log = Log()
        self._planned: list[tuple[Live, int]] = []

    def next_arrival(self) -> float:
        """Seconds; infinity after the last."""
        return self._stream[self._next].arrival if self._next < len(self._stream) else float("inf")

    def admit(self, now: float) -> None:
        """Let in what has arrived by `now`."""
        while self._next < len(self._stream) and self._stream[self._next].arrival <= now:
            self.waiting.append(Live(self._stream[self._next]))
            self._next += 1

    @property
    def has_work(self) -> bool:
        """Whether a step would compute anything."""
        return bool(self.waiting or self.running)

    def plan(self) -> Chunk:
        """Choose the tokens of the next step."""
        decoding = self.running
        tokens = len(decoding)
        decode_context = float(sum(live.context for live in decoding))
        pairs = [0.0] * len(self._windows)
        sequences = len(decoding)
        room = self._budget - tokens
        self._planned = []
        for live in self.waiting:
            if room <= 0 or sequences >= self._most:
                break
            new = min(room, live.request.new - live.done)
            for i, window in enumerate(self._windows):
                if window is None:
                    pairs[i] += new * (live.context + new / 2)
                else:
                    growing = min(max(window - live.context, 0), new)
                    pairs[i] += growing * (live.context + growing / 2) + (new - growing) * window
            self._planned.append((live, new))
            room -= new
            tokens += new
            sequences += 1
        return Chunk(tokens, tuple(pairs), sequences, decode_context)

    def finish(self, started: float, ended: float) -> None:
        """Book the planned step."""
        log, running = self.log, self.running
        if running:
            log.tokens.append((ended - started, len(running)))
            log.output_tokens += len(running)
            over = False
            for live in running:
                live.made += 1
                live.context += 1
                over = over or live.made >= live.request.out
            if over:
                log.finished += sum(live.made >= live.request.out for live in running)
                self.running = running = [live for live in running if live.made < live.request.out]
        for live, new in self._planned:
            live.done += new
            live.context += new
            log.prompt_tokens += new
            if live.done >= live.request.new:
                self.waiting.popleft()
                if self._transfer_s is not None:
                    self._hand_over(live, ended, self._transfer_s)
                    continue
                live.made = 1
                log.output_tokens += 1
                log.ttft.append(ended - live.request.arrival)
                if live.made >= live.request.out:
                    log.finished += 1
                else:
                    running.append(live)
        self._planned = []

    def _hand_over(self, live: Live, ended: float, transfer_s: float) -> None:
        self._sent = max(self._sent, ended) + live.context * transfer_s
        self.log.handed.extend((live.request.arrival, self._sent, live.context))

    def unfinished(self, now: float) -> list[Request]:
        """What a dead engine leaves to others: requests in it, to be computed anew from `now`, and those to come."""
        left = [live.request for live in (*self.running, *self.waiting)]
        again = [r._replace(arrival=now, out=r.out) for r in left]
        return again + self._stream[self._next :]
