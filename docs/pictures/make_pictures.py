"""Draws how-it-works.svg and .png beside this file.

matplotlib is no dependency of the package: install it somewhere (`pip install matplotlib`), then run

    python docs/pictures/make_pictures.py
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

HERE = Path(__file__).resolve().parent
RANKS = 4
EXPERTS = 8  # of a layer, two per rank
OWNER = ("#3b6fb6", "#e08e3c", "#4f9d69", "#a55aa8")  # one colour per rank: whose experts these are
INK, GREY, PALE, BUSY, LINE = "#222222", "#5f5f5f", "#eeeeee", "#d4d4d4", "#bdbdbd"

plt.rcParams.update(
    {
        "font.family": "DejaVu Sans",
        "font.size": 14,
        "text.color": INK,
        "svg.fonttype": "path",
        "svg.hashsalt": "vllm-dwdp",
    }
)


def box(ax: Axes, x: float, y: float, w: float, h: float, face: str, edge: str = LINE, **more: float) -> None:
    """A box with slightly round corners."""
    style = "round,pad=0,rounding_size=0.08"
    ax.add_patch(FancyBboxPatch((x, y), w, h, boxstyle=style, facecolor=face, edgecolor=edge, linewidth=1.2, **more))


def cells(ax: Axes, x: float, y: float, w: float, h: float, owners: list[int]) -> None:
    """A row of experts, coloured by the rank that holds them."""
    step = w / len(owners)
    for i, owner in enumerate(owners):
        ax.add_patch(Rectangle((x + i * step, y), step, h, facecolor=OWNER[owner], edgecolor="white", linewidth=1.5))


def arrow(
    ax: Axes, start: tuple[float, float], end: tuple[float, float], colour: str, bend: float = 0.0, z: int = 4
) -> None:
    """An arrow between two points."""
    ax.add_patch(
        FancyArrowPatch(
            start,
            end,
            connectionstyle=f"arc3,rad={bend}",
            arrowstyle="-|>",
            mutation_scale=17,
            linewidth=2.4,
            color=colour,
            shrinkA=0,
            shrinkB=0,
            zorder=z,
        )
    )


CARD_W, CARD_GAP, CARD_Y, CARD_H = 3.3, 0.7, 5.0, 3.55
INNER = CARD_W - 0.4
CELL = INNER / EXPERTS
SLOT_Y, SHARE_Y = (1.88, 1.42), 0.22  # lower edges, from the card's


def card_x(rank: int) -> float:
    """Left edge of a rank."""
    return 0.35 + rank * (CARD_W + CARD_GAP)


def draw_rank(ax: Axes, rank: int) -> None:
    """One rank: what it has whole, its slots, its share."""
    x = card_x(rank)
    left = x + 0.2
    box(ax, x, CARD_Y, CARD_W, CARD_H, "white", OWNER[rank])
    ax.text(left, CARD_Y + CARD_H - 0.32, f"rank {rank}", fontsize=16, weight="bold", color=OWNER[rank], va="center")
    ax.text(left + INNER, CARD_Y + CARD_H - 0.32, "own requests", fontsize=13, color=GREY, va="center", ha="right")
    box(ax, left, CARD_Y + 2.62, INNER, 0.42, PALE)
    ax.text(left + INNER / 2, CARD_Y + 2.83, "attention: full copy", ha="center", va="center")
    ax.text(left, CARD_Y + 2.43, "2 slots of one layer each", va="center", color=GREY, fontsize=13)
    everyone = [i * RANKS // EXPERTS for i in range(EXPERTS)]
    for y in SLOT_Y:
        cells(ax, left, CARD_Y + y, INNER, 0.38, everyone)
    share = left + 2 * rank * CELL
    cells(ax, share, CARD_Y + SHARE_Y, 2 * CELL, 0.5, [rank] * 2)
    ax.text(share + CELL, CARD_Y + SHARE_Y + 0.67, "share", va="center", ha="center", color=GREY, fontsize=13)


def draw_pulls(ax: Axes) -> None:
    """From the shares of ranks 1 to 3 into a slot of rank 0, below the cards."""
    for peer in range(1, RANKS):
        level = CARD_Y - 0.05 - 0.18 * peer
        source = card_x(peer) + 0.2 + CELL * (2 * peer + 1)
        target = card_x(0) + 0.2 + CELL * (2 * peer + 1)
        path = ([source, source, target, target], [CARD_Y + SHARE_Y, level, level, CARD_Y + 1.2])
        ax.plot(*path, color=OWNER[peer], linewidth=2.6, zorder=4, solid_joinstyle="round")
        arrow(ax, (target, CARD_Y + 1.1), (target, CARD_Y + SLOT_Y[1] + 0.02), OWNER[peer])


T0, PERIOD, ATTENTION = 1.75, 4.63, 1.75
MOE = PERIOD - ATTENTION
LANES = (2.45, 1.45, 0.68)  # compute, slot 0, slot 1
HEIGHT = 0.6
FIRST = 4  # the first layer that is drawn; even, so that it lives in slot 0


def draw_timeline(ax: Axes) -> None:
    """Compute and both slots of rank 0, three layers long."""
    for y, name in zip(LANES, ("compute", "slot 0", "slot 1"), strict=True):
        ax.text(T0 - 0.2, y + HEIGHT / 2, name, ha="right", va="center", weight="bold")

    def block(lane: int, x: float, length: float, text: str, face: str, **font: str) -> None:
        box(ax, x + 0.02, LANES[lane], length - 0.04, HEIGHT, face)
        ax.text(x + length / 2, LANES[lane] + HEIGHT / 2, text, ha="center", va="center", **font)

    def pull(lane: int, begin: float, layer: int) -> None:
        length, slices = 0.84 * PERIOD, 18
        step = length / slices
        for i in range(slices):
            x = begin + 0.03 + i * step
            colour = OWNER[1 + i % (RANKS - 1)]
            ax.add_patch(Rectangle((x, LANES[lane]), step, HEIGHT, facecolor=colour, edgecolor="white", linewidth=1))
        label = {"facecolor": "white", "edgecolor": "none", "boxstyle": "round,pad=0.25"}
        middle = begin + length / 2, LANES[lane] + HEIGHT / 2
        ax.text(*middle, f"pull layer {layer}", ha="center", va="center", weight="bold", bbox=label)

    pull(2, T0, FIRST + 1)
    for i in range(3):
        x, layer, lane = T0 + i * PERIOD, FIRST + i, 1 + i % 2
        block(0, x, ATTENTION, f"attention {layer}", PALE)
        block(0, x + ATTENTION, MOE, f"experts {layer}", BUSY, weight="bold")
        block(lane, x + ATTENTION, MOE, f"layer {layer} in use", BUSY)
        if i < 2:
            end = x + PERIOD
            pull(lane, end, layer + 2)
            ax.plot(
                [end, end],
                [LANES[lane], LANES[0] + HEIGHT + 0.22],
                color=INK,
                linewidth=1.4,
                linestyle=(0, (2, 2)),
                zorder=5,
            )
            ax.text(
                end,
                LANES[0] + HEIGHT + 0.36,
                f"slot {lane - 1} is released: its next pull begins",
                ha="center",
                va="center",
                fontsize=13,
                color=GREY,
            )
    ax.text(T0, LANES[2] - 0.3, "slices of the three peers take turns", va="center", fontsize=13, color=GREY)


def main() -> None:
    """Draw and save."""
    figure, ax = plt.subplots(figsize=(16, 9.2))
    ax.set_xlim(0, 16)
    ax.set_ylim(0.1, 9.3)
    ax.axis("off")
    ax.text(
        0.35,
        8.93,
        "No rank waits for another: the experts it lacks arrive while it computes",
        fontsize=21,
        weight="bold",
        va="center",
    )
    for rank in range(RANKS):
        draw_rank(ax, rank)
    draw_pulls(ax)
    ax.text(0.35, 3.92, "rank 0 over time", fontsize=16, weight="bold", color=OWNER[0], va="center")
    draw_timeline(ax)
    figure.subplots_adjust(0, 0, 1, 1)
    for suffix in ("svg", "png"):
        metadata = {"Date": None} if suffix == "svg" else None
        figure.savefig(HERE / f"how-it-works.{suffix}", dpi=110, facecolor="white", metadata=metadata)


if __name__ == "__main__":
    main()
