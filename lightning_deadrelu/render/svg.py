"""Curves, bars and rasters as text that a browser draws: SVG, and PNG in data URIs; knows no report."""

from __future__ import annotations

import base64
import html
import math
import struct
import zlib
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

_WIDTH, _LEFT, _RIGHT = 960, 56, 12
_RAMP = ((0.0, (0xE3, 0xEB, 0xF0)), (0.5, (0xE0, 0x7B, 0x2A)), (1.0, (0x5C, 0x24, 0x00)))


def png(pixels: Tensor, palette: Sequence[str]) -> str:
    """Write a picture with few colours as a data URI.

    Args:
        pixels: Indices into the palette, shape ``(height, width)``, uint8.
        palette: Colours as ``#rrggbb``, at most 256.

    Example:
        >>> import torch
        >>> png(torch.zeros(1, 1, dtype=torch.uint8), ["#D55E00"])[:22]
        'data:image/png;base64,'
    """
    height, width = pixels.shape
    rows = b"".join(b"\0" + bytes(row) for row in pixels.tolist())  # each row begins with the number of its filter
    header = struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)
    colours = bytes.fromhex("".join(colour[1:] for colour in palette))
    chunks = (b"IHDR", header), (b"PLTE", colours), (b"IDAT", zlib.compress(rows, 9)), (b"IEND", b"")
    body = b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, data) for kind, data in chunks)
    return "data:image/png;base64," + base64.b64encode(body).decode()


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def curves(lines: Mapping[str, Sequence[float]], steps: Sequence[int], marks: Mapping[int, str], classes: str) -> str:
    """Draw shares over the windows of a run.

    Args:
        lines: Values from 0 to 1 by name, one for each window; drawn with the class ``line <name>``.
        steps: The step at the end of each window.
        marks: What to mark, by window.
        classes: Of the drawing.

    Example:
        >>> curves({"dead": [0.0, 0.5]}, [9, 19], {1: "reset"}, "curves").count("<path")
        2
    """
    height, bottom = 260, 34
    top = min(max([0.05, *(1.1 * value for line in lines.values() for value in line if not math.isnan(value))]), 1.0)
    scale = _axis(top, height, bottom) + _steps(steps, height - bottom, height - 14)
    drawn = [_line(name, values, top, height - bottom, len(steps)) for name, values in lines.items()]
    marked = [_mark(_x(column, len(steps)), height - bottom, text) for column, text in marks.items()]
    return _svg(height, classes, "Shares of the units over the run", scale, *drawn, *marked)


def _line(name: str, values: Sequence[float], top: float, floor: float, count: int) -> str:
    points = [
        f"{_x(column, count):.1f},{floor - value / top * (floor - 10):.1f}"
        for column, value in enumerate(values)
        if not math.isnan(value)
    ]
    if len(points) == 1:  # a line of one point is invisible
        points *= 2
    latest = f"{values[-1]:.1%}" if values else ""
    path = f"M{' L'.join(points)}" if points else ""
    return f'<path class="line {html.escape(name)}" d="{path}"><title>{html.escape(name)}: {latest} now</title></path>'


def _mark(x: float, floor: float, text: str) -> str:
    triangle = f"M{x:.1f},{floor - 9} l5,9 h-10 z"
    line = f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="10" y2="{floor}"/>'
    return f'<g>{line}<path class="mark" d="{triangle}"/><title>{html.escape(text)}</title></g>'


def profile(bars: Sequence[tuple[str, float, float]]) -> str:
    """Draw layers from the input to the output, a bar each, with a tick at the worst.

    Args:
        bars: Name, share now, and largest share; not a number where there is none.

    Example:
        >>> profile([("act", 0.5, math.nan)]).count("<rect")
        1
    """
    names = len(bars) <= 40
    longest = max((len(_short(name)) for name, _, _ in bars), default=0)
    bottom = 16 + min(longest * 4.4, 130) if names else 34
    height = 200 + bottom
    floor, slot = height - bottom, (_WIDTH - _LEFT - _RIGHT) / max(len(bars), 1)
    drawn = [_bar(_LEFT + slot * number, slot, floor, *bar) for number, bar in enumerate(bars)]
    labels = [_slanted(_LEFT + slot * (n + 0.5), floor + 14, bar[0]) for n, bar in enumerate(bars)] if names else []
    ends = f'<text x="{_LEFT}" y="{floor + 20}">input</text>' if not names else ""
    ends += f'<text x="{_WIDTH - _RIGHT}" y="{floor + 20}" text-anchor="end">output</text>' if not names else ""
    return _svg(height, "profile", "Dead share by layer", _axis(1.0, height, bottom), *drawn, *labels, ends)


def _bar(x: float, slot: float, floor: float, name: str, now: float, worst: float) -> str:
    width = min(slot * 0.8, 48)
    x += (slot - width) / 2
    size = (floor - 10) * (0 if math.isnan(now) else now)
    told = f"{html.escape(name)}: {now:.1%} dead now" + ("" if math.isnan(worst) else f", {worst:.1%} at worst")
    bar = f'<rect class="dead" x="{x:.1f}" y="{floor - size:.1f}" width="{width:.1f}" height="{size:.1f}"/>'
    if not math.isnan(worst) and worst > 0:
        y = floor - (floor - 10) * worst
        bar += f'<line class="worst" x1="{x:.1f}" x2="{x + width:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>'
    catch = f'<path class="catch" d="M{x:.1f},10 h{width:.1f} V{floor} h-{width:.1f} z"/>'
    return f"<g>{bar}{catch}<title>{told}</title></g>"


def _slanted(x: float, y: float, name: str) -> str:
    return f'<text x="{x:.1f}" y="{y}" transform="rotate(-35 {x:.1f} {y})" text-anchor="end">{_short(name)}</text>'


def _short(name: str) -> str:
    return html.escape(name if len(name) <= 28 else f"{name[:8]}…{name[-19:]}")


def heat(picture: str, names: Sequence[str], steps: Sequence[int]) -> str:
    """Lay a picture out with a row for each layer and a column for each window.

    Args:
        picture: The data URI of one pixel for each.
        names: Of the rows; written where they have room.
        steps: The step at the end of each window.

    Example:
        >>> heat("data:,", ["first", "second"], [9]).count("<text")
        3
    """
    left, row = 200, max(min(16.0, 480 / max(len(names), 1)), 2.0)
    floor, width = row * len(names), _WIDTH - 200 - _RIGHT
    image = f'<image href="{picture}" x="{left}" width="{width}" height="{floor:.1f}" preserveAspectRatio="none"/>'
    every = math.ceil(14 / row)
    labels = "".join(
        f'<text x="{left - 8}" y="{(number + 0.5) * row + 4:.1f}" text-anchor="end">{_short(names[number])}</text>'
        for number in range(0, len(names), every)
    )
    return _svg(
        floor + 24, "heat", "Dead share by layer and window", image, labels, _steps(steps, floor, floor + 18, left)
    )


def _axis(top: float, height: float, bottom: float) -> str:
    """Rule shares from 0 to ``top``."""
    floor, step = height - bottom, next(step for step in (0.01, 0.02, 0.05, 0.1, 0.25) if top / step <= 6)
    shares = [step * number for number in range(int(top / step + 1e-9) + 1)]
    places = [(share, floor - share / top * (floor - 10)) for share in shares]
    return "".join(
        f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{share:.0%}</text>'
        for share, y in places
    )


def _steps(steps: Sequence[int], floor: float, y: float, left: float = _LEFT) -> str:
    every = max(math.ceil(len(steps) / 8), 1)
    places = [(steps[n], _x(n, len(steps), left)) for n in range(0, len(steps), every)]
    return "".join(
        f'<line class="tick" x1="{x:.1f}" x2="{x:.1f}" y1="{floor:.1f}" y2="{floor + 4:.1f}"/>'
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="middle">{step:,}</text>'
        for step, x in places
    )


def _x(column: int, count: int, left: float = _LEFT) -> float:
    """Place a window: in the middle of its share of the width, as in a raster."""
    return left + (column + 0.5) / max(count, 1) * (_WIDTH - left - _RIGHT)


def _svg(height: float, classes: str, title: str, *parts: str) -> str:
    return (
        f'<svg class="{html.escape(classes)}" viewBox="0 0 {_WIDTH} {height:.0f}" role="img"'
        f' aria-label="{html.escape(title)}">{"".join(parts)}</svg>'
    )


def key(names: Iterable[tuple[str, str]]) -> str:
    """Explain colours.

    Args:
        names: Label and colour of each.

    Example:
        >>> key([("dead", "#D55E00")])
        '<ul class="key"><li><i style="background:#D55E00"></i>dead</li></ul>'
    """
    items = (f'<li><i style="background:{colour}"></i>{html.escape(label)}</li>' for label, colour in names)
    return f'<ul class="key">{"".join(items)}</ul>'


def ramp(share: float) -> str:
    """Colour a share; the larger, the darker, so that those see it too who tell few colours apart.

    Args:
        share: From 0 to 1.

    Example:
        >>> ramp(0.0), ramp(0.5), ramp(1.0)
        ('#e3ebf0', '#e07b2a', '#5c2400')
    """
    (low, start), (high, end) = (_RAMP[0], _RAMP[1]) if share <= 0.5 else (_RAMP[1], _RAMP[2])
    part = (share - low) / (high - low)
    return "#" + "".join(f"{round(a + part * (b - a)):02x}" for a, b in zip(start, end, strict=True))
