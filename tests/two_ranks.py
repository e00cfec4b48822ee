"""Run a function as two ranks, each a process of its own, as ``torchrun`` would start them."""

import multiprocessing
import os
import socket
import sys
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from toys import Net, bare, mlp

PATIENCE = 60


def on_two_ranks(function: Callable[..., Any], *args: Any) -> list[Any]:
    """Return ``function(rank, *args)`` of both ranks; fail when one fails or hangs."""
    with TemporaryDirectory() as folder:
        context = multiprocessing.get_context("fork")
        port = _free_port()
        ranks = [context.Process(target=_run, args=(rank, port, folder, function, args)) for rank in range(2)]
        try:
            for process in ranks:
                process.start()
            for process in ranks:
                process.join(PATIENCE)
            codes = [process.exitcode for process in ranks]
        finally:
            for process in ranks:
                process.kill()
        errors = [path.read_text() for path in sorted(Path(folder).glob("*.error"))]
        assert codes == [0, 0], f"exit codes {codes} (None: it hung)\n" + "\n".join(errors)
        return [torch.load(f"{folder}/{rank}.pt", weights_only=False) for rank in range(2)]


def _run(rank: int, port: int, folder: str, function: Callable[..., Any], args: Any) -> None:
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "GROUP_RANK": "0",
        "TORCHELASTIC_RUN_ID": "test",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
    }
    code = 0
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(0)
            result = function(rank, *args)
        torch.save(result, f"{folder}/{rank}.pt")
    except BaseException:
        Path(f"{folder}/{rank}.error").write_text(f"rank {rank}:\n{traceback.format_exc()}")
        code = 1
    sys.stdout.flush()
    os._exit(code)


def ddp_trainer(**options: Any) -> Trainer:
    """A Trainer over both ranks that hands every rank its own loader."""
    strategy = DDPStrategy(process_group_backend="gloo", timeout=timedelta(seconds=30), find_unused_parameters=True)
    return Trainer(**bare(**{"devices": 2, "strategy": strategy, "use_distributed_sampler": False, **options}))


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


class Branching(Net):
    """Takes its branches in an order of each rank's own; the third only at some batches of rank 1."""

    def __init__(self, lr=0.0):
        super().__init__(nn.ModuleDict({name: mlp(dead) for name, dead in (("a", 1), ("b", 2), ("c", 3))}), lr)

    def forward(self, batch):
        x, rank, batch_idx = batch
        names = ["b", "a"] if rank else ["a", "b"]
        return sum(self.net[name](x).sum() for name in names + ["c"] * (rank and batch_idx % 5 == 3))

    def training_step(self, batch, batch_idx):
        shares = batch if isinstance(batch, list) else [batch]
        return torch.stack([self((x, rank, batch_idx)) for x, rank in shares]).sum()


def shares(rank):
    """Uneven batches, among them an empty one and one of size 1."""
    generator = torch.Generator().manual_seed(rank)
    sizes = [[5, 4, 3, 5, 1, 6, 5, 4, 5, 3, 2, 7], [2, 7, 0, 3, 9, 1, 4, 4, 0, 8, 2, 2]][rank]
    scales = [10.0] + [1.0] * (len(sizes) - 1)  # the peaks lie in the first batch
    return [(s * torch.randn(size, 4, generator=generator), rank) for s, size in zip(scales, sizes, strict=True)]
