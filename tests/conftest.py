import logging
import random
import sys

import numpy as np
import pytest
import torch


@pytest.fixture(autouse=True)
def _quiet_and_reproducible():
    """Give every test the same random numbers, one thread, and no banners; close W&B runs behind it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    for package in ("lightning.pytorch", "pytorch_lightning", "lightning.fabric"):
        logging.getLogger(package).setLevel(logging.ERROR)
    yield
    torch.set_num_threads(threads)
    wandb = sys.modules.get("wandb")
    if wandb is not None and wandb.run is not None:
        wandb.finish()
