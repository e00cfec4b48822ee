"""Shares and pixels as figures, with matplotlib, which is imported when something is drawn."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_deadrelu.render.scale import round_ticks

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 160
_TALLEST = 12.0  # inches; what has more bars gets thinner ones and fewer names
_MOST_BARS_APART = 60
_POINTS_PER_NAME = 11
_POINTS_PER_KEY = 80
_POINTS_PER_LETTER = 5.5


def pyplot() -> Any:
    """Import ``matplotlib.pyplot``.

    Raises:
        ModuleNotFoundError: Without matplotlib; says how to install it.
    """
    try:
        from matplotlib import pyplot
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("Plots need matplotlib. Try `pip install lightning-deadrelu[plot]`.") from error
    return pyplot


def share_bars(
    names: Sequence[str], bars: Mapping[tuple[str, str], Sequence[float]], title: str, ax: Axes | None = None
) -> tuple[Figure, Axes]:
    """Draw a bar for each name, of shares one behind the other.

    Args:
        names: Of the bars, from the top.
        bars: For each label and colour, its share of each bar, 0 to 1.
        title: Above it.
        ax: Where to draw; a new figure by default.
    """
    height = 0.8 if len(names) <= _MOST_BARS_APART else 1.0
    ax = ax or _new_axes(len(names))
    left = np.zeros(len(names))
    for (label, colour), shares in bars.items():
        if any(shares):
            ax.barh(range(len(names)), shares, left=left, color=colour, label=label, height=height, linewidth=0)
            left += shares
    _label_bars(ax, names, title)
    figure = ax.get_figure(root=True)
    assert figure is not None
    return figure, ax


def _new_axes(bars: int) -> Axes:
    size = (8, min(1.4 + 0.28 * max(bars, 2), _TALLEST))
    return pyplot().subplots(figsize=size, dpi=DPI, layout="constrained")[1]  # type: ignore[no-any-return]


def _label_bars(ax: Axes, names: Sequence[str], title: str) -> None:
    """Put title and key above, where they keep clear of the bars whatever the size, and names as far as they fit."""
    width, height = _size_in_points(ax)
    keys, keys_per_row = len(ax.get_legend_handles_labels()[1]), max(int(width / _POINTS_PER_KEY), 1)
    head = 8 + 15 * math.ceil(keys / keys_per_row)
    every = math.ceil(_POINTS_PER_NAME * max(len(names), 1) / max(height - head, _POINTS_PER_NAME))
    ax.set_yticks(range(0, len(names), every), names[::every], fontsize="small")
    ax.set(xlim=(0, 1), ylim=(max(len(names), 1) - 0.5, -0.5), xlabel="share of units")
    ax.xaxis.set_major_formatter("{x:.0%}")
    ax.tick_params(axis="y", length=0 if every == 1 else 3)
    ax.spines[["top", "right", "left"]].set_visible(False)
    if keys:
        ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=keys_per_row, fontsize="small", frameon=False)
    title = textwrap.fill(title.replace("`", ""), max(int(width / _POINTS_PER_LETTER), 20))
    ax.set_title(title, loc="left", fontsize="medium", pad=head)


def _size_in_points(ax: Axes) -> tuple[float, float]:
    figure = ax.get_figure(root=True)
    assert figure is not None
    box = ax.get_window_extent()
    return max(box.width / figure.dpi * 72, 1.0), max(box.height / figure.dpi * 72, 1.0)


def draw_pixels(ax: Axes, pixels: np.ndarray[Any, Any], title: str) -> None:
    """Fill axes with a picture, a title above it."""
    ax.imshow(pixels, aspect="auto", interpolation="nearest")
    ax.set_title(title, loc="left", fontsize="small")
    ax.set_yticks([])


def label_steps(ax: Axes, steps: Sequence[int], last: bool) -> None:
    """Mark round steps along columns of even width; name them where nothing stands below."""
    ticks = round_ticks(steps[0], steps[-1]) if steps else []
    names = [f"{tick:,.0f}" for tick in ticks] if last else [""] * len(ticks)
    ax.set_xticks(np.interp(ticks, steps, range(len(steps))) if steps else [], names, fontsize="small")
    ax.set(xlim=(-0.5, max(len(steps), 1) - 0.5))
    ax.spines[["top", "right"]].set_visible(False)
    if last:
        ax.set_xlabel("training batch")
