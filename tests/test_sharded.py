"""Parameters that are split over two ranks, by FSDP2 and by tensor parallelism: watched, repaired, refused."""

import functools
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.utils.checkpoint import checkpoint
from toys import Net, Verdicts, assert_alike, assert_same, batches, fit, reports_of
from two_ranks import ddp_trainer, on_two_ranks, shares

from lightning_deadrelu.remedies import Reset
from lightning_deadrelu.sharding import gathered, reshard_, split_layer
from lightning_deadrelu.writing import tensors_of

pytestmark = [
    pytest.mark.filterwarnings(
        "ignore:.*the Trainer has no logger", "ignore:.*get no gradient", "ignore:.*use of fork", "ignore:.*reentrant"
    ),
    pytest.mark.skipif(not dist.is_available(), reason="this build of torch knows no ranks"),
]


def fsdp_trainer(data=2, tensor=1, **options):
    strategy = ModelParallelStrategy(data, tensor, process_group_backend="gloo", timeout=timedelta(seconds=20))
    return ddp_trainer(strategy=strategy, **options)


def shard_(model, mesh, whole=None):
    """Shard each layer for itself, and what is left with the model."""
    from torch.distributed.fsdp import fully_shard

    for module in model.modules():
        if type(module) in (nn.Linear, nn.Conv2d):  # others belong to attention, which does not call them
            fully_shard(module, mesh=mesh)
    fully_shard(whole or model, mesh=mesh)


def full_state(trainer):
    """All weights and the optimizer's state, put together from all ranks."""
    reshard_(trainer.lightning_module)
    tensors = tensors_of(trainer.lightning_module)
    state = trainer.optimizers[0].state
    return {
        name: [gathered(one), *(gathered(value) for _, value in sorted(state.get(one, {}).items()))]
        for name, one in tensors.items()
    }


# -- watching ------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """An MLP of 4, 7 and 5 features: no number of rows is even; the last layer leaves one rank with nothing."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Linear(4, 7), nn.LayerNorm(7), nn.ReLU())
        self.second = nn.Sequential(nn.Linear(7, 5), nn.ReLU())
        self.last = nn.Linear(5, 1)
        with torch.no_grad():
            self.first[1].bias[:2] = -100.0
            self.second[0].bias[3] = -100.0

    def forward(self, x):
        return self.last(torch.relu(self.run(self.second, self.run(self.first, x)) - 0.5))

    def run(self, part, x):
        return part(x)


class Checkpointed(Block):
    def __init__(self, reentrant):
        super().__init__()
        self.reentrant = reentrant

    def run(self, part, x):
        return checkpoint(part, x, use_reentrant=self.reentrant)


def wrapped():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    block = Block()
    block.first, block.second = checkpoint_wrapper(block.first), checkpoint_wrapper(block.second)
    return block


class Convolutions(nn.Sequential):
    def __init__(self):
        super().__init__(
            nn.Unflatten(1, (1, 2, 2)),
            nn.Conv2d(1, 6, 2, padding=1),
            nn.GroupNorm(3, 6),
            nn.ReLU(),
            nn.Conv2d(6, 4, 3, groups=2),
            nn.ReLU6(),
            nn.Flatten(),
            nn.Linear(4, 1),
        )
        with torch.no_grad():
            self[2].bias[1] = self[4].bias[2] = -100.0


NETS = {
    "plain": Block,
    "convolutions": Convolutions,
    "checkpointed": functools.partial(Checkpointed, False),
    "checkpointed, reentrant": functools.partial(Checkpointed, True),
    "wrapped": wrapped,
    "a transformer": lambda: nn.Sequential(
        nn.Unflatten(1, (2, 2)), nn.Linear(2, 4), nn.TransformerEncoderLayer(4, 2, 7, 0.0, batch_first=True)
    ),
}


class Shares(Net):
    """Adds up the losses of all ranks' shares, or of its own."""

    def __init__(self, case, lr=0.0, sharded=False):
        torch.manual_seed(2)
        super().__init__(NETS[case](), lr)
        self.sharded = sharded

    def configure_model(self):
        if self.sharded:
            shard_(self.net, self.device_mesh["data_parallel"])

    def training_step(self, batch, batch_idx):
        return torch.stack([self(x.requires_grad_()).sum() for x, _ in batch]).sum()


SETTINGS = {"every_n_steps": 1, "window": 4, "min_samples": 30, "remedy": Reset(dry_run=True)}


def plain(items):
    return torch.utils.data.DataLoader(items, batch_size=None, collate_fn=lambda batch: batch)


def watch_shards(rank):
    found = {}
    for case in NETS:
        monitor = Verdicts(**SETTINGS)
        trainer = fsdp_trainer(callbacks=[monitor])
        trainer.fit(Shares(case, sharded=True), plain([[one] for one in shares(rank)]))
        trainable = [site.trainable for report in monitor.reports for site in report.sites]
        found[case] = reports_of(monitor), str(monitor.attribution), [*map(str, monitor.events)], trainable
    return found


def test_shards_are_watched_as_the_whole():
    found = on_two_ranks(watch_shards)
    joined = [list(pair) for pair in zip(shares(0), shares(1), strict=True)]
    for case in NETS:
        alone = Verdicts(**SETTINGS)
        fit(Shares(case), plain(joined), alone)
        expected = reports_of(alone)
        assert expected[-1]["dead_units"] or case == "a transformer"
        assert "refused" not in str(alone.events)
        for reports, attribution, events, trainable in (ranks[case] for ranks in found):
            assert len(reports) == len(expected) == 3
            for report, one in zip(reports, expected, strict=True):
                assert_alike(report, one)
            assert attribution == str(alone.attribution), case
            assert events == [*map(str, alone.events)]
            assert trainable
            assert all(trainable)
