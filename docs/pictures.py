"""Make the pictures of the site, and run the notebook.

Run ``python docs/pictures.py``, or name some of them: ``raster``, ``tensorboard``, ``leet``, ``notebook``.

All are made of real runs. TensorBoard and the terminal are photographed in a headless ``chromium``, the terminal by
``tmux``; both have to be on the path.
"""

from __future__ import annotations

import html
import itertools
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import nbformat
import torch
import wandb
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from nbclient import NotebookClient
from PIL import Image
from rich.console import Console
from rich.segment import Segment
from rich.style import Style
from rich.terminal_theme import MONOKAI
from rich.text import Text
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_deadrelu import DeadReLUMonitor

DOCS = Path(__file__).parent
NOTEBOOK = DOCS.parent / "examples" / "tour.ipynb"
CHROMIUM = ("chromium", "--headless=new", "--no-sandbox", "--hide-scrollbars", "--use-angle=swiftshader")
WINDOWS = 60


class Deep(LightningModule):
    """An MLP on blobs, with a learning rate that is too high at first: units die, and are repaired."""

    def __init__(self) -> None:
        super().__init__()
        widths = [20, 96, 96, 96]
        layers = [part for a, b in itertools.pairwise(widths) for part in (nn.Linear(a, b), nn.ReLU())]
        self.net = nn.Sequential(*layers, nn.Linear(widths[-1], 10))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Fit the label."""
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        """Start far too fast."""
        optimizer = torch.optim.Adam(self.parameters(), lr=0.05)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 if step < 150 else 0.1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def train(logger: Logger) -> DeadReLUMonitor:
    """Fit the model."""
    seed_everything(1, verbose=False)
    label = torch.randint(10, (4096,))
    data = TensorDataset(torch.randn(10, 20)[label] * 2 + torch.randn(4096, 20), label)
    monitor = DeadReLUMonitor(every_n_steps=2, window=5, threshold=0.02, remedy="reset")
    quiet: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = Trainer(max_steps=10 * WINDOWS, logger=logger, callbacks=[monitor], log_every_n_steps=10, **quiet)
    trainer.fit(Deep(), DataLoader(data, batch_size=64, shuffle=True))
    return monitor


def save_screen(folder: Path, path: Path, tab: str, height: int = 1000) -> None:
    """Photograph a page of TensorBoard in a headless Chromium."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--logdir", ".", "--port", str(port), "--samples_per_plugin", "images=100", "--load_fast=false"]
    command = [sys.executable, "-m", "tensorboard.main", *options]
    with subprocess.Popen(command, cwd=folder, stderr=subprocess.DEVNULL) as server:
        try:
            _wait_for(f"http://127.0.0.1:{port}")
            time.sleep(5)  # until it has read the run
            url = f"http://127.0.0.1:{port}/?darkMode=false#{tab}"
            photograph(url, path, 1400, height)
        finally:
            server.terminate()


def photograph(url: str, path: Path, width: int, height: int) -> None:
    """Photograph a page, in few colours."""
    page = [f"--screenshot={path}", "--virtual-time-budget=40000", f"--window-size={width},{height}"]
    subprocess.run([*CHROMIUM, *page, url], check=True, stderr=subprocess.DEVNULL, timeout=120)
    Image.open(path).convert("RGB").quantize(128).save(path, optimize=True)


def save_terminal(run: Path, path: Path, columns: int = 110, lines: int = 25) -> None:
    """Photograph what ``wandb leet`` shows of an offline run."""
    tmux = ["tmux", "-L", f"pictures-{os.getpid()}"]
    program = Path(sys.executable).with_name("wandb")
    size = ["-x", str(columns), "-y", str(lines)]
    subprocess.run([*tmux, "new-session", "-d", *size, f"WANDB_CONFIG_DIR={run} {program} leet run {run}"], check=True)
    try:
        time.sleep(20)  # until it has read the run
        for key in "[]":  # hide what stands beside the curves
            subprocess.run([*tmux, "send-keys", key], check=True)
            time.sleep(3)
        shown = subprocess.run([*tmux, "capture-pane", "-e", "-p"], check=True, capture_output=True, text=True).stdout
    finally:
        subprocess.run([*tmux, "kill-server"], check=False)
    cells = [_cell(char, segment.style) for segment in _segments(shown, columns) for char in segment.text]
    page = path.with_suffix(".html")
    page.write_text(f"{TERMINAL}<pre>{''.join(cells)}</pre>", encoding="utf-8")
    photograph(page.as_uri(), path, 10 * columns, 21 * (lines - 1))  # without the last, the status
    page.unlink()


TERMINAL = """<meta charset="utf-8"><style>body { margin: 0; background: #0c0c0c; color: #d9d9d9; }
pre { margin: 0; font: 16px/21px "DejaVu Sans Mono", monospace; }
i { display: inline-block; width: 10px; height: 21px; font-style: normal; vertical-align: top; }</style>"""


def _segments(shown: str, columns: int) -> list[Segment]:
    return list(Console(width=columns).render(Text.from_ansi(shown)))


def _cell(char: str, style: Style | None) -> str:
    """Write a character in a box of its own, so that what another font supplies is as wide as the others."""
    if char == "\n":
        return char
    look = style.get_html_style(MONOKAI) if style else ""
    return f'<i style="{look}">{html.escape(char)}</i>'


def run_notebook() -> None:
    """Run the notebook, and keep what it shows, without what differs from machine to machine."""
    book = nbformat.read(NOTEBOOK, 4)
    with tempfile.TemporaryDirectory() as temporary:
        NotebookClient(book, resources={"metadata": {"path": temporary}}).execute()
    for cell in book.cells:
        cell.metadata.clear()  # times
        for output in cell.get("outputs", []):
            if output.output_type == "stream":
                output.text = re.sub(r"\S+/ipykernel_\d+/\d+\.py:", "this cell, line ", output.text)
    nbformat.write(book, NOTEBOOK)


def _wait_for(url: str, seconds: int = 60) -> None:
    for _ in range(seconds):
        try:
            urlopen(url).close()
        except OSError:
            time.sleep(1)
        else:
            return
    raise TimeoutError(f"{url} did not answer for {seconds} s")


def main(wanted: set[str]) -> None:
    """Make what is wanted."""
    if "notebook" in wanted:
        run_notebook()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if wanted & {"raster", "tensorboard"}:
            monitor = train(TensorBoardLogger(folder, name="", version="dead_relu"))
        if "raster" in wanted:
            monitor.plot()[0].savefig(DOCS / "raster.png")
        if "tensorboard" in wanted:
            save_screen(folder, DOCS / "tensorboard.png", "images")
        if "leet" in wanted:
            train(WandbLogger(project="dead-relu", save_dir=folder, offline=True))
            wandb.finish()
            save_terminal(next(folder.glob("wandb/offline-run-*")), DOCS / "leet.png")


if __name__ == "__main__":
    main(set(sys.argv[1:]) or {"raster", "tensorboard", "leet", "notebook"})
