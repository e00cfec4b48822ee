"""Rasters with a title, a key and axes, as arrays that every tracker takes; needs Pillow and nothing else."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_deadrelu.report.raster import SiteRaster, State, image_of
from lightning_deadrelu.statistics import SiteReport

if TYPE_CHECKING:
    from PIL.ImageDraw import ImageDraw

Picture = np.ndarray[Any, np.dtype[np.uint8]]

_INK, _FAINT = (26, 26, 26), (90, 90, 90)
_TITLE, _SMALL, _MARGIN, _LINE = 17, 13, 10, 20
_TALLEST, _THICKEST, _WIDEST = 720, 26, 768  # pixels of the overview, of one of its rows, and of pictures across
_LONGEST_NAME = 40
_UNKNOWN = (140, 140, 140)
# dead fraction to colour; any dead unit at all is told from none
_SHARES = (0.0, 1e-9, 0.1, 0.5, 1.0)
_COLOURS = ((226, 237, 243), (251, 224, 189), (244, 178, 106), (213, 94, 0), (94, 30, 0))


def can_draw() -> bool:
    """Tell whether Pillow is installed.

    Example:
        >>> can_draw() in (True, False)
        True
    """
    return find_spec("PIL") is not None


@dataclass(frozen=True)
class _Frame:
    """What stands around a picture.

    Args:
        title: First line.
        subtitle: Second line.
        key: Colours and what they mean.
        names: What stands left of the picture, by pixel from its top.
        steps: The step of each column.
    """

    title: str
    subtitle: str
    key: Sequence[tuple[str, str]]
    names: Mapping[int, str]
    steps: Sequence[int]


# -- one site --------------------------------------------------------------------------------------------


def card_of(site: SiteRaster, verdict: SiteReport | None = None) -> Picture:
    """Draw the history of a site with what a reader needs to know.

    Args:
        site: The history.
        verdict: How the site stands now.

    Returns:
        Shape ``(height, width, 3)``, uint8.
    """
    picture = image_of(site, least=(192, _WIDEST))
    height, last = len(picture), site.units - 1
    names = {0: "unit 0", height - _LINE: f"{last:,}"} if last else {height // 2 - _LINE // 2: "unit 0"}
    return _framed(
        picture, _Frame(f"{site.name} ({site.kind})", _standing(site, verdict), _key(site), names, site.steps)
    )


def _standing(site: SiteRaster, verdict: SiteReport | None) -> str:
    line = f"{site.units:,} units"
    if verdict is not None and verdict.smooth:
        line = f"{int(verdict.dormant.sum()):,} of {line} dormant now"
    elif verdict is not None:
        line = f"{int(verdict.dead.sum()):,} of {line} dead now ({verdict.dead_fraction:.1%})"
    return line if len(site.rows) == site.units else f"{line}; {len(site.rows)} of them shown"


def _key(site: SiteRaster) -> list[tuple[str, str]]:
    seen = set(site.states.unique().tolist())
    return [(state.colour, state.label) for state in reversed(State) if state in seen]


# -- all sites -------------------------------------------------------------------------------------------


def overview_of(curves: Mapping[str, Sequence[float]], steps: Sequence[int], title: str) -> Picture:
    """Draw the dead fraction of all sites, in the order of execution down and windows across.

    Args:
        curves: The dead fraction by site, a value for each column.
        steps: The step of each column.
        title: Above it.

    Returns:
        Shape ``(height, width, 3)``, uint8.
    """
    picture = shades_of(np.array(list(curves.values()), dtype=float))
    height = max(min(_TALLEST // len(picture), _THICKEST), 1)
    picture = picture.repeat(height, 0).repeat(max(_WIDEST // max(len(steps), 1), 1), 1)
    if height >= 12:
        picture[height - 1 : -1 : height] = 255
    every = math.ceil((_SMALL + 3) / height)
    names = {i * height + (height - _LINE) // 2: name for i, name in enumerate(curves) if i % every == 0}
    shares = {0.0: "no unit dead", 1e-9: "any", 0.1: "10%", 0.5: "50%", 1.0: "all"}
    key = [(f"#{shades_of(np.array([share])).tobytes().hex()}", text) for share, text in shares.items()]
    subtitle = f"dead fraction of {len(curves):,} sites, first executed on top"
    return _framed(picture, _Frame(title, subtitle, key, names, steps))


def shades_of(shares: np.ndarray[Any, Any]) -> Picture:
    """Turn dead fractions into colours, grey where not a number.

    Example:
        >>> shades_of(np.array([0.0, 0.5, np.nan])).tolist()
        [[226, 237, 243], [213, 94, 0], [140, 140, 140]]
    """
    known = np.nan_to_num(shares)
    channels = [np.interp(known, _SHARES, [colour[i] for colour in _COLOURS]) for i in range(3)]
    shades: Picture = np.stack(channels, -1).round().astype(np.uint8)
    shades[np.isnan(shares)] = _UNKNOWN
    return shades


# -- what stands around ----------------------------------------------------------------------------------


def _framed(picture: Picture, frame: _Frame) -> Picture:
    from PIL import Image, ImageDraw

    names = {at: _plain(name) for at, name in frame.names.items()}
    ruler = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    left = _MARGIN * 2 + math.ceil(max((ruler.textlength(n, font=_font(_SMALL)) for n in names.values()), default=0))
    top, (height, width) = _MARGIN + _LINE * 3 + 6, picture.shape[:2]
    sheet = Image.new("RGB", (left + width + _MARGIN, top + height + _LINE + _MARGIN), "white")
    sheet.paste(Image.fromarray(picture), (left, top))
    draw = ImageDraw.Draw(sheet)
    draw.text((_MARGIN, _MARGIN - 2), _plain(frame.title, 80), fill=_INK, font=_font(_TITLE))
    draw.text((_MARGIN, _MARGIN + _LINE), frame.subtitle, fill=_FAINT, font=_font(_SMALL))
    _draw_key(draw, frame.key, _MARGIN + 2 * _LINE)
    for at, name in names.items():
        draw.text((left - _MARGIN, top + at + 2), name, fill=_FAINT, font=_font(_SMALL), anchor="ra")
    _draw_steps(draw, frame.steps, left, left + width, top + height + 3)
    return np.array(sheet)


def _draw_key(draw: ImageDraw, key: Sequence[tuple[str, str]], y: int) -> None:
    x: float = _MARGIN
    for colour, text in key:
        draw.rectangle((x, y + 3, x + 12, y + 14), fill=colour, outline="#888888")
        draw.text((x + 17, y), text, fill=_INK, font=_font(_SMALL))
        x += 17 + draw.textlength(text, font=_font(_SMALL)) + 14


def _draw_steps(draw: ImageDraw, steps: Sequence[int], left: int, right: int, y: int) -> None:
    """Name the first and the last step; columns are even, so the eye can tell the others."""
    if steps:
        draw.text((left, y), f"step {steps[0]:,}", fill=_FAINT, font=_font(_SMALL))
    if len(steps) > 1:
        draw.text((right, y), f"step {steps[-1]:,}", fill=_FAINT, font=_font(_SMALL), anchor="ra")


def _plain(text: str, longest: int = _LONGEST_NAME) -> str:
    """Keep to letters that Pillow's font has, and cut the middle of what is too long.

    Example:
        >>> _plain("a.ü.relu"), _plain("x" * 100, 9)
        ('a.?.relu', 'xxx...xxx')
    """
    text, half = text.encode("ascii", "replace").decode(), (longest - 3) // 2
    return text if len(text) <= longest else f"{text[:half]}...{text[-half:]}"


@lru_cache
def _font(size: int) -> Any:
    from PIL import ImageFont

    return ImageFont.load_default(size)
