"""Make the pictures of the README: a real run, its raster, and what TensorBoard shows of it.

Run ``python docs/pictures.py``. The screenshot needs ``tensorboard`` and a ``chromium`` on the path; without, only
the raster is made.
"""

from __future__ import annotations

import itertools
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_deadrelu import DeadReLUMonitor

DOCS = Path(__file__).parent
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


def train(folder: Path) -> DeadReLUMonitor:
    """Fit with TensorBoard's logger."""
    seed_everything(1, verbose=False)
    label = torch.randint(10, (4096,))
    data = TensorDataset(torch.randn(10, 20)[label] * 2 + torch.randn(4096, 20), label)
    monitor = DeadReLUMonitor(every_n_steps=2, window=5, threshold=0.02, remedy="reset")
    quiet: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    logger = TensorBoardLogger(folder, name="", version="dead_relu")
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
            page = [f"--screenshot={path}", "--virtual-time-budget=40000", f"--window-size=1400,{height}"]
            command = [
                "chromium",
                "--headless=new",
                "--no-sandbox",
                "--hide-scrollbars",
                "--use-angle=swiftshader",
                *page,
            ]
            url = f"http://127.0.0.1:{port}/?darkMode=false#{tab}"
            subprocess.run([*command, url], check=True, stderr=subprocess.DEVNULL, timeout=120)
        finally:
            server.terminate()
    Image.open(path).convert("RGB").quantize(128).save(path, optimize=True)


def _wait_for(url: str, seconds: int = 60) -> None:
    for _ in range(seconds):
        try:
            urlopen(url).close()
        except OSError:
            time.sleep(1)
        else:
            return
    raise TimeoutError(f"{url} did not answer for {seconds} s")


def main() -> None:
    """Make both."""
    with tempfile.TemporaryDirectory() as temporary:
        monitor = train(Path(temporary))
        monitor.plot()[0].savefig(DOCS / "raster.png")
        if shutil.which("chromium"):
            save_screen(Path(temporary), DOCS / "tensorboard.png", "images")


if __name__ == "__main__":
    main()
