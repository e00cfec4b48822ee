import logging
import os
import random
import signal
import sys

import numpy as np
import pytest
import torch
from hypothesis import settings

settings.load_profile(
    "ci"
)  # the same examples each time, however slow the machine; others: --hypothesis-profile=default

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read once, when triton is first imported, by whichever test


@pytest.fixture(autouse=True)
def _wide_terminal(monkeypatch):
    """Print tables alike, in whichever process a test runs."""
    monkeypatch.setenv("COLUMNS", "120")


@pytest.fixture(autouse=True)
def _quiet_and_reproducible():
    """Give every test the same random numbers, one thread, and no banners; close W&B runs behind it."""
    threads, on_interrupt = torch.get_num_threads(), signal.getsignal(signal.SIGINT)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    for package in ("lightning.pytorch", "pytorch_lightning", "lightning.fabric", "lightning_fabric"):
        logging.getLogger(package).setLevel(logging.ERROR)
    yield
    torch.set_num_threads(threads)
    signal.signal(signal.SIGINT, on_interrupt)  # which Lightning ignores from an interrupted fit on
    wandb = sys.modules.get("wandb")
    if wandb is not None and wandb.run is not None:
        wandb.finish()
