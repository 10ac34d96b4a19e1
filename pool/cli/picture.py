"""The demo's picture: held-out scans with what the server read, and the batches it made of the requests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pool.cli.digits import Digits

COLUMNS, ROWS = 12, 8
INK, PAPER, FAINT, RIGHT, WRONG = "#1f2430", "#ffffff", "#8a90a0", "#2f6f9f", "#c8372d"


def draw(
    file: Path,
    data: Digits,
    probabilities: npt.NDArray[np.float32],
    batch_sizes: dict[int, int],
    headline: str,
) -> None:
    """Write the picture as PNG. Needs matplotlib.

    Args:
        file: Where to.
        data: The scans.
        probabilities: What the server answered, [scan, digit].
        batch_sizes: Number of batches by their rows.
        headline: One sentence above everything.
    """
    import matplotlib as mpl

    mpl.use("Agg")  # draws into memory: there may be no screen
    from matplotlib.figure import Figure

    with mpl.rc_context({"font.family": "DejaVu Sans", "text.color": INK, "axes.edgecolor": FAINT}):
        figure = Figure(figsize=(14, 7.6), dpi=120, facecolor=PAPER)
        figure.text(0.03, 0.95, "pool demo: handwritten digits", fontsize=18, fontweight="bold")
        figure.text(0.03, 0.912, headline, fontsize=11, color=FAINT)
        left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=[1.75, 1])[0]
        _draw_scans(left, data, probabilities)
        _draw_batches(right, batch_sizes)
        figure.savefig(file, format="png")


def _draw_scans(figure: Any, data: Digits, probabilities: npt.NDArray[np.float32]) -> None:
    read = probabilities.argmax(axis=1)
    held_out = np.flatnonzero(data.held_out)
    is_wrong = read[held_out] != data.digits[held_out]
    # Every mistake is shown, among scans read right that are spread over the data set, in its order.
    wrong, right = held_out[is_wrong], held_out[~is_wrong]
    places = max(COLUMNS * ROWS - len(wrong), 0)
    spread = np.unique(np.linspace(0, len(right) - 1, min(places, len(right))).astype(int))
    shown = np.sort(np.concatenate([wrong, right[spread]])[: COLUMNS * ROWS])
    figure.text(
        0.055,
        0.855,
        f"{len(shown)} of {len(held_out)} scans that training never saw, and what was read; "
        f"{int(is_wrong.sum())} mistakes framed",
        fontsize=10,
    )
    grid = figure.subplots(
        ROWS,
        COLUMNS,
        squeeze=False,
        gridspec_kw={
            "left": 0.05,
            "right": 0.98,
            "bottom": 0.04,
            "top": 0.81,
            "hspace": 0.55,
            "wspace": 0.15,
        },
    )
    for axes in grid.flat:
        axes.axis("off")
    for axes, scan in zip(grid.flat, shown, strict=False):
        is_right = read[scan] == data.digits[scan]
        axes.axis("on")
        axes.set(xticks=[], yticks=[])
        axes.imshow(data.images[scan, :, :, 0], cmap="gray_r", vmin=0, vmax=1)
        for spine in axes.spines.values():
            spine.set(color="#e3e5ea" if is_right else WRONG, linewidth=1 if is_right else 2.5)
        caption = f"{read[scan]}" if is_right else f"{read[scan]}, is {data.digits[scan]}"
        axes.set_title(caption, fontsize=9, pad=3, color=RIGHT if is_right else WRONG, fontweight="bold")


def _draw_batches(figure: Any, batch_sizes: dict[int, int]) -> None:
    figure.text(0.12, 0.855, "rows that ran together (batches of each size)", fontsize=10)
    axes = figure.subplots(gridspec_kw={"left": 0.12, "right": 0.95, "bottom": 0.09, "top": 0.81})
    sizes = sorted(batch_sizes)
    axes.bar(sizes, [batch_sizes[size] for size in sizes], width=0.9, color=RIGHT)
    axes.set_xlabel("rows in the batch", color=INK)
    axes.set_ylabel("batches", color=INK)
    axes.set_xlim(0, max(sizes, default=0) + 1)
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.tick_params(colors=FAINT)
    axes.grid(axis="y", color="#e3e5ea")
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
