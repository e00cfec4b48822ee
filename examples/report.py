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

from digits import Classifier, Digits
from lightning.pytorch import Trainer, seed_everything

from lightning_deadrelu import DeadReLUMonitor, Reset
from lightning_deadrelu.report import html_page as page


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
    monitor = DeadReLUMonitor(every_n_steps=1, window=5, remedy=Reset(start_step=220, cooldown=4, evidence=900))
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
    _, html = page.write(monitor.run_report, args.out)
    print(f"Page: {html}")
    if args.picture:
        photograph(html, args.picture)


if __name__ == "__main__":
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*does not have many workers|.*LeafSpec|.*has no logger|.*more than 10%")
    main()
