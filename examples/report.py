"""Train the digits' classifier too fast, reset what dies, and write a page about it.

python examples/report.py                                 outputs/report.html and outputs/report.json
python examples/report.py --picture docs/report.png       and what a browser shows of it, where Chromium is installed
"""

from __future__ import annotations

import argparse
import logging
import shutil
import subprocess
import tempfile
import warnings
from pathlib import Path
from typing import Any

from digits import Classifier, Digits
from lightning.pytorch import LightningModule, Trainer, seed_everything

from lightning_deadrelu import DeadReLUMonitor, LivenessReport, Reset
from lightning_deadrelu.report import html_page as page
from lightning_deadrelu.report import summary
from lightning_deadrelu.report.raster import Raster


class Recorder(DeadReLUMonitor):
    """The monitor, with a memory of what became of each unit."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.raster = Raster()
        self.seen = 0

    def on_verdict(self, trainer: Trainer, pl_module: LightningModule, report: LivenessReport) -> None:
        new = self.events[self.seen :]
        self.seen = len(self.events)
        self.raster.add(report, {event.site: event.units for event in new if event.action == "edited"})


def photograph(html: Path, picture: Path) -> None:
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        raise SystemExit(f"--picture {picture}: there is no Chromium. Install it, or open {html} yourself.")
    with tempfile.TemporaryDirectory() as profile:
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={profile}"]
        command = [browser, *flags, "--window-size=1120,1330", f"--screenshot={picture.resolve()}"]
        subprocess.run([*command, html.resolve().as_uri()], check=True, capture_output=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("outputs"), help="folder for the page")
    parser.add_argument("--picture", type=Path, help="a PNG file")
    args = parser.parse_args()
    seed_everything(0, verbose=False)
    monitor = Recorder(every_n_steps=1, window=5, remedy=Reset(start_step=220, cooldown=4, evidence=900))
    trainer = Trainer(
        max_epochs=args.epochs,
        accelerator="cpu",
        callbacks=[monitor],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(Classifier(lr=0.2), Digits())
    assert monitor.report is not None
    print(summary(monitor.report, monitor.raster, monitor.events))
    _, html = page.write(monitor.report, monitor.raster, monitor.events, monitor.attribution, args.out, monitor.deaths)
    print(f"Page: {html}")
    if args.picture:
        photograph(html, args.picture)


if __name__ == "__main__":
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*does not have many workers|.*LeafSpec|.*has no logger|.*more than 10%")
    main()
