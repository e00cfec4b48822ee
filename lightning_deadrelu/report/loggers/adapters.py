"""How each tracker takes scalars, pictures, tables and firing rates.

A tracker is known by the name of its class, so that ``lightning``'s and ``pytorch_lightning``'s loggers and their
subclasses are served alike, and no tracker has to be installed. What is unknown gets scalars.
"""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from lightning.pytorch.utilities import rank_zero_only

from lightning_deadrelu.guarded import guarded
from lightning_deadrelu.render.names import cut_name
from lightning_deadrelu.render.table import Column, markdown_table
from lightning_deadrelu.report.latents import SECTION
from lightning_deadrelu.report.loggers.media import LEGEND, Media
from lightning_deadrelu.report.loggers.private_lightning import read_private
from lightning_deadrelu.report.raster import Picture
from lightning_deadrelu.warn import warn

_MLFLOW_BARS = "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"
_LONGEST_FILE = 150  # characters of a name that a file's is made of: systems take 255, trackers add some 80
_BINS = np.linspace(0, 1, 65)
_LOG_BINS = np.linspace(-10, 0, 41)
_SECTIONS = ("", "_details", "_sites", "_dormant", "_rates", f"_{SECTION}")
_MARKDOWN = (
    Column("site", "layer"),
    Column("units", "units"),
    Column("dead", "dead"),
    Column("dead_fraction", "share", percent=1),
    Column("rare", "rare"),
    Column("always_on", "always on"),
)


class Adapter:
    """Serve one logger with scalars, which any logger takes; what fails is not tried again.

    Args:
        logger: The logger.
        name: Prefix of the keys.
    """

    illegal: ClassVar[re.Pattern[str] | None] = None
    """What the tracker does not take in names."""
    longest: ClassVar[int] = 10_000
    """How many characters the tracker takes in a name."""
    takes_media: ClassVar[bool] = False
    takes_alerts: ClassVar[bool] = False

    def __init__(self, logger: Any, name: str) -> None:
        self.logger, self.name = logger, name
        self._broken: set[str] = set()

    def attempt(self, what: str, act: Callable[[], None]) -> None:
        """Do something, unless it failed before; a failure is warned of, and leaves the logger out of the like.

        Args:
            what: ``"metrics"``, without which nothing else is tried, or ``"media"`` or ``"alert"``.
            act: What to do.
        """

        def fail(error: Exception) -> None:
            self._broken.add(what)
            rank_zero_only(warn)(f"{self.name}: {type(self.logger).__name__} took no {what} and is left out: {error!r}")

        if not self._broken & {"metrics", what}:
            with guarded(fail):
                act()

    def prepare(self) -> None:
        """Do what has to be done once, before the first scalars; on rank 0 alone."""

    def log(self, metrics: Mapping[str, float], step: int, is_global_zero: bool = True) -> None:
        """Log scalars in one call."""
        names = self.names_of(metrics)
        if is_global_zero:
            self.map_names(names)
        self.logger.log_metrics(metrics={name: metrics[key] for name, key in names.items()}, step=step)

    def map_names(self, names: Mapping[str, str]) -> None:
        """Tell the tracker which key is behind which name; on rank 0 alone."""

    def show(self, media: Media) -> None:
        """Send pictures, tables and firing rates; on rank 0 alone."""
        raise NotImplementedError  # nobody asks where `takes_media` is False, and where it is True this is overridden

    def alert(self, title: str, text: str) -> None:
        """Send an alert; on rank 0 alone."""
        raise NotImplementedError  # likewise, by `takes_alerts`

    def names_of(self, keys: Iterable[str]) -> dict[str, str]:
        """Map names that the tracker takes to keys: no two alike, and the key itself where it may stay."""
        names: dict[str, str] = {}
        for key in keys:
            name = cut_name(self.illegal.sub("_", key) if self.illegal else key, self.longest)
            while name in names:
                name += "_"
            names[name] = key
        return names

    def _by_site(self, section: str, sites: Mapping[str, Any]) -> dict[str, Any]:
        """Name what belongs to sites ``<section>/<site>``, as the tracker takes it."""
        keys = {f"{self.name}_{section}/{site}": value for site, value in sites.items()}
        return {name: keys[key] for name, key in self.names_of(keys).items()}

    def _pictures(self, media: Media) -> dict[str, Picture]:
        overview = {} if media.overview is None else {f"{self.name}_overview/sites": media.overview}
        return self._by_site("raster", media.rasters) | overview

    def _prefixed(self, key: str) -> str:
        """Put the logger's own prefix before a key, as it does itself with scalars."""
        prefix = read_private(self.logger, "_prefix", "")
        return f"{prefix}-{key}" if prefix else key


def _histograms(media: Media) -> dict[str, tuple[dict[str, Any], Any]]:
    """List by section the values of each site that a tracker bins, and the bins."""
    sections = {"rates": (media.rates, _BINS), "log_density": (media.log_densities, _LOG_BINS)}
    return {
        section: ({site: one.clamp(bins[0], bins[-1]).numpy() for site, one in sites.items()}, bins)
        for section, (sites, bins) in sections.items()
    }


class WandbAdapter(Adapter):
    """Weights & Biases: all media of a window are one row of the history."""

    illegal = re.compile(r"\.")  # it reads dots as nesting
    longest = _LONGEST_FILE
    takes_media = takes_alerts = True
    _mapped: Mapping[str, str] | None = None

    def prepare(self) -> None:
        """Make ``trainer/global_step`` the x-axis, also of runs that the logger did not start."""
        for section in _SECTIONS:
            self.logger.experiment.define_metric(f"{self.name}{section}/*", step_metric="trainer/global_step")

    def map_names(self, names: Mapping[str, str]) -> None:
        """Put the names of sites into the run's configuration."""
        others = f"{self.name}/", f"{self.name}_details/", f"{self.name}_{SECTION}/"
        sites = {name: key.split("/", 1)[1] for name, key in names.items() if not key.startswith(others)}
        if sites != self._mapped:
            self.logger.experiment.config.update({f"{self.name}_sites": sites}, allow_val_change=True)
            self._mapped = sites

    def show(self, media: Media) -> None:
        """Send a table, histograms and pictures, and the summary of the run."""
        import wandb

        table = wandb.Table(columns=[*media.columns], data=[list(row.values()) for row in media.rows])
        row: dict[str, Any] = {f"{self.name}_table/sites": table}
        for section, (sites, bins) in _histograms(media).items():
            for key, values in self._by_site(section, sites).items():
                row[key] = wandb.Histogram(np_histogram=np.histogram(values, bins=bins))
        for key, picture in self._pictures(media).items():
            row[key] = wandb.Image(picture, caption=_caption(media) if key.endswith("_overview/sites") else None)
        self.logger.log_metrics(metrics=row, step=media.step)
        summary = {f"{self.name}_summary/{key}": value for key, value in media.summary.items()}
        self.logger.experiment.summary.update(summary)

    def alert(self, title: str, text: str) -> None:
        """Send an alert."""
        self.logger.experiment.alert(title=title, text=text, level="WARN")


def _caption(media: Media) -> str:
    more = f" {media.left_out:,} layers with fewer dead units have no raster of their own." if media.left_out else ""
    return LEGEND + more


class TensorBoardAdapter(Adapter):
    """TensorBoard, with a tab that overlays the curves of all sites."""

    takes_media = True
    _laid_out = False

    def show(self, media: Media) -> None:
        """Send histograms, pictures and a table."""
        writer, step = self.logger.experiment, media.step
        if not self._laid_out:
            self._lay_out(writer)
        for section, (sites, bins) in _histograms(media).items():
            for site, values in sites.items():
                writer.add_histogram(self._prefixed(f"{self.name}_{section}/{site}"), values, step, bins=bins.tolist())
        for key, picture in self._pictures(media).items():
            writer.add_image(self._prefixed(key), picture, step, dataformats="HWC")
        text = f"{markdown_table(_MARKDOWN, media.rows)}\n\n{LEGEND}"
        writer.add_text(self._prefixed(f"{self.name}_table/sites"), text, step)
        writer.flush()

    def _lay_out(self, writer: Any) -> None:
        """Fill the tab of custom scalars; a run has one layout, and one that the user wrote before stays."""
        self._laid_out = True
        own = re.escape(self._prefixed(self.name))
        shares = "|".join(("dead", "rare", "always_on", "frozen"))
        charts = {"dead share of each layer": ["Multiline", [f"^{own}_sites/.*"]]}
        charts["whole model"] = ["Multiline", [f"^{own}(_details)?/({shares})_fraction$"]]
        charts["units"] = ["Multiline", [f"^{own}(_details)?/.*_units$"]]
        writer.add_custom_scalars({"Dead ReLU": charts})


class MLFlowAdapter(Adapter):
    """MLflow, whose logger would drop the names that MLflow refuses."""

    illegal = re.compile(r"[^a-zA-Z0-9_/. -]")
    longest = _LONGEST_FILE  # of pictures; of metrics it takes 250
    takes_media = True

    def show(self, media: Media) -> None:
        """Send pictures, and a table that grows."""
        client, run = self.logger.experiment, self.logger.run_id
        for key, picture in self._pictures(media).items():
            client.log_image(run, picture, key=self._prefixed(key), step=media.step)
        if find_spec("pandas"):  # it appends to what is there
            columns = {key: [row[key] for row in media.rows] for key in media.columns}
            with _no_progress_bars():
                client.log_table(run, {"step": [media.step] * len(media.rows), **columns}, f"{self.name}/sites.json")
        else:
            content = {"step": media.step, "sites": list(media.rows)}
            client.log_dict(run, content, f"{self.name}/sites_{media.step}.json")


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Keep MLflow, which reads a table back before it appends, from showing a bar each time."""
    before = os.environ.get(_MLFLOW_BARS)
    os.environ[_MLFLOW_BARS] = "false"
    try:
        yield
    finally:
        del os.environ[_MLFLOW_BARS]
        os.environ.update({_MLFLOW_BARS: before} if before is not None else {})


class CSVAdapter(Adapter):
    """Files beside ``metrics.csv``: the latest pictures, and a table that grows."""

    takes_media = True

    def show(self, media: Media) -> None:
        """Write them, unless the folder is a remote store, of which plain files know nothing."""
        from PIL import Image

        if "://" in str(self.logger.log_dir):
            return
        folder = Path(self.logger.log_dir) / self.name
        folder.mkdir(parents=True, exist_ok=True)
        sites = {cut_name(re.sub(r"[^a-zA-Z0-9_.-]", "_", site), _LONGEST_FILE): site for site in media.rasters}
        pictures = {f"raster_{name}": media.rasters[site] for name, site in sites.items()}
        for name, picture in (pictures | ({} if media.overview is None else {"overview": media.overview})).items():
            Image.fromarray(picture).save(folder / f"{name}.png")
        file = folder / "sites.csv"
        fresh = not file.exists()
        with file.open("a", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, ["step", *media.columns])
            if fresh:
                writer.writeheader()
            writer.writerows({"step": media.step, **row} for row in media.rows)


_ADAPTERS: Mapping[str, type[Adapter]] = {
    "WandbLogger": WandbAdapter,
    "TensorBoardLogger": TensorBoardAdapter,
    "MLFlowLogger": MLFlowAdapter,
    "CSVLogger": CSVAdapter,
}


def adapter_of(logger: object, name: str = "dead_relu") -> Adapter:
    """Choose how to serve a logger, by the names of its class and of those it descends from.

    Example:
        >>> class WandbLogger: ...
        >>> class Mine(WandbLogger): ...
        >>> type(adapter_of(Mine())).__name__, adapter_of("a string").takes_media
        ('WandbAdapter', False)
    """
    kinds = (_ADAPTERS.get(kind.__name__) for kind in type(logger).__mro__)
    return next(filter(None, kinds), Adapter)(logger, name)
