"""How each tracker takes scalars, pictures, tables and firing rates.

A tracker is known by the name of its class, so that ``lightning``'s and ``pytorch_lightning``'s loggers and their
subclasses are served alike, and no tracker has to be installed. What is unknown gets scalars.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from lightning_deadrelu.report.loggers.images import Picture
from lightning_deadrelu.report.loggers.media import Media

_BINS = np.linspace(0, 1, 65)


def kind_of(logger: object) -> str:
    """Name the class that says how to serve a logger; empty if none does.

    Example:
        >>> class WandbLogger: ...
        >>> class Mine(WandbLogger): ...
        >>> kind_of(Mine()), kind_of("a string")
        ('WandbLogger', '')
    """
    return next((kind.__name__ for kind in type(logger).__mro__ if kind.__name__ in TRACKERS), "")


def names_of(logger: object, keys: Iterable[str]) -> dict[str, str]:
    """Map names that a tracker takes to keys: no two alike, and the key itself where it may stay.

    Args:
        logger: The tracker.
        keys: What is to be named.
    """
    illegal = _ILLEGAL.get(kind_of(logger))
    names: dict[str, str] = {}
    for key in keys:
        name = illegal.sub("_", key) if illegal else key
        while name in names:
            name += "_"
        names[name] = key
    return names


# W&B reads dots as nesting; MLflow's logger would drop what MLflow refuses, and two keys could become one
_ILLEGAL = {"WandbLogger": re.compile(r"\."), "MLFlowLogger": re.compile(r"[^a-zA-Z0-9_/. -]")}


def _legal(logger: object, section: str, sites: Mapping[str, Any]) -> dict[str, Any]:
    """Name what belongs to sites ``<section>/<site>``, as the logger takes it."""
    keys = {f"{section}/{site}": value for site, value in sites.items()}
    return {name: keys[key] for name, key in names_of(logger, keys).items()}


def _prefixed(logger: Any, key: str) -> str:
    """Put the logger's own prefix before a key, as it does itself with scalars."""
    prefix = getattr(logger, "_prefix", "")
    return f"{prefix}-{key}" if prefix else key


# -- Weights & Biases ------------------------------------------------------------------------------------


def _to_wandb(logger: Any, media: Media, name: str) -> None:
    """All in one call, so that it is one row of the history."""
    import wandb

    row: dict[str, Any] = {f"{name}_table/sites": _wandb_table(wandb, media)}
    for key, rates in _legal(logger, f"{name}_rates", media.rates).items():
        row[key] = wandb.Histogram(np_histogram=_histogram(rates))
    for key, card in _legal(logger, f"{name}_raster", media.cards).items():
        row[key] = wandb.Image(card)
    if media.overview is not None:
        row[f"{name}_overview/sites"] = wandb.Image(media.overview, caption=_caption(media))
    logger.log_metrics(metrics=row, step=media.step)
    logger.experiment.summary.update({f"{name}_summary/{key}": value for key, value in media.summary.items()})


def _wandb_table(wandb: Any, media: Media) -> Any:
    return wandb.Table(columns=media.columns, data=[list(row.values()) for row in media.rows])


def _histogram(rates: Tensor) -> tuple[Any, Any]:
    return np.histogram(rates.clamp(0, 1).numpy(), bins=_BINS)


def _caption(media: Media) -> str | None:
    return f"{media.left_out:,} sites with fewer dead units have no raster of their own" if media.left_out else None


# -- TensorBoard -----------------------------------------------------------------------------------------


def _to_tensorboard(logger: Any, media: Media, name: str) -> None:
    writer, step = logger.experiment, media.step
    for site, rates in media.rates.items():
        tag = _prefixed(logger, f"{name}_rates/{site}")
        writer.add_histogram(tag, rates.clamp(0, 1).numpy(), step, bins=_BINS.tolist())
    for site, card in media.cards.items():
        writer.add_image(_prefixed(logger, f"{name}_raster/{site}"), card, step, dataformats="HWC")
    if media.overview is not None:
        writer.add_image(_prefixed(logger, f"{name}_overview/sites"), media.overview, step, dataformats="HWC")
    writer.add_text(_prefixed(logger, f"{name}_table/sites"), _markdown(media), step)
    writer.flush()


def _markdown(media: Media) -> str:
    head = [media.columns, ["---"] * len(media.columns)]
    body = [[_short(cell) for cell in row.values()] for row in media.rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in [*head, *body])


def _short(cell: object) -> str:
    return "-" if cell is None else f"{cell:.4g}" if isinstance(cell, float) else str(cell)


def lay_out(logger: Any, name: str) -> None:
    """Give TensorBoard's tab of custom scalars one chart that overlays the sites, and one of the headlines.

    A run has one layout; where the user wrote one before, that stays.

    Args:
        logger: A TensorBoard logger.
        name: Prefix of the keys.
    """
    own = re.escape(_prefixed(logger, name))
    shares = "|".join(("dead", "rare", "always_on", "frozen"))
    charts = {"dead fraction of each site": ["Multiline", [f"^{own}_sites/.*"]]}
    charts["whole model"] = ["Multiline", [f"^{own}/({shares})_fraction$"]]
    charts["units"] = ["Multiline", [f"^{own}/.*_units$"]]
    logger.experiment.add_custom_scalars({"Dead ReLU": charts})


# -- MLflow ----------------------------------------------------------------------------------------------


def _to_mlflow(logger: Any, media: Media, name: str) -> None:
    client, run = logger.experiment, logger.run_id
    pictures = _legal(logger, f"{name}_raster", media.cards)
    if media.overview is not None:
        pictures[f"{name}_overview/sites"] = media.overview
    for key, picture in pictures.items():
        client.log_image(run, picture, key=_prefixed(logger, key), step=media.step)
    if find_spec("pandas"):  # it appends to what is there
        columns = {key: [row[key] for row in media.rows] for key in media.columns}
        client.log_table(run, {"step": [media.step] * len(media.rows), **columns}, f"{name}/sites.json")
    else:
        client.log_dict(run, {"step": media.step, "sites": list(media.rows)}, f"{name}/sites_{media.step}.json")


# -- CSV -------------------------------------------------------------------------------------------------


def _to_files(logger: Any, media: Media, name: str) -> None:
    """Beside ``metrics.csv``: the latest pictures, and a table that grows."""
    if "://" in str(logger.log_dir):  # a remote store, of which plain files know nothing
        return
    folder = Path(logger.log_dir) / name
    folder.mkdir(parents=True, exist_ok=True)
    for site, card in media.cards.items():
        _save(card, folder / f"raster_{re.sub(r'[^a-zA-Z0-9_.-]', '_', site)}.png")
    if media.overview is not None:
        _save(media.overview, folder / "overview.png")
    file = folder / "sites.csv"
    fresh = not file.exists()
    with file.open("a", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, ["step", *media.columns])
        if fresh:
            writer.writeheader()
        writer.writerows({"step": media.step, **row} for row in media.rows)


def _save(picture: Picture, path: Path) -> None:
    from PIL import Image

    Image.fromarray(picture).save(path)


TRACKERS: Mapping[str, Callable[[Any, Media, str], None]] = {
    "WandbLogger": _to_wandb,
    "TensorBoardLogger": _to_tensorboard,
    "MLFlowLogger": _to_mlflow,
    "CSVLogger": _to_files,
}
