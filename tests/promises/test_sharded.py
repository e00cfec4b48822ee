"""Parameters that are split over two ranks, by FSDP2 and by tensor parallelism: watched, repaired, refused."""

import functools
import warnings
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from toys import Loader, Net, Verdicts, assert_alike, assert_same, batches, fit, mlp, reports_of
from two_ranks import ddp_trainer, on_two_ranks, shares

from lightning_deadrelu.model.parameters import tensors_of
from lightning_deadrelu.model.sharding import gathered, reshard_, split_layer
from lightning_deadrelu.model.slices import Slice
from lightning_deadrelu.observe.watch import Watch
from lightning_deadrelu.remedies import BiasWarming, Reset, Write
from lightning_deadrelu.repair.writer import check_writes, init_distributions, write_
from lightning_deadrelu.statistics import Rules, UnitHistory, judge

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*reentrant"),
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


def state_of(model, optimizer):
    """All weights and the optimizer's state, put together from all ranks."""
    reshard_(model)
    known = {name: (one, optimizer.state.get(one, {})) for name, one in tensors_of(model).items()}
    return {
        name: [gathered(one), *(gathered(value) for _, value in sorted(held.items()) if isinstance(value, Tensor))]
        for name, (one, held) in known.items()
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


@pytest.mark.ranks
@pytest.mark.filterwarnings("ignore:.*Reset refused")
def test_shards_are_watched_as_the_whole():
    found = on_two_ranks(watch_shards)
    joined = [list(pair) for pair in zip(shares(0), shares(1), strict=True)]
    for case in NETS:
        alone = Verdicts(**SETTINGS)
        fit(Shares(case), plain(joined), alone)
        expected = reports_of(alone)
        assert expected[-1]["dead_units"] or case == "a transformer"
        assert "shard" not in str(alone.events)  # what is refused, is so for the same reason everywhere
        for reports, attribution, events, trainable in (ranks[case] for ranks in found):
            assert len(reports) == len(expected) == 3
            for report, one in zip(reports, expected, strict=True):
                assert_alike(report, one)
            assert attribution == str(alone.attribution), case
            assert events == [*map(str, alone.events)]
            assert trainable
            assert all(trainable)


# -- writing -------------------------------------------------------------------------------------------------------


def rows(name, role, index, dims=(0,), shape=()):
    places = torch.tensor(index)
    return Slice(name, role, torch.arange(len(places)), places.reshape(len(places), -1), dims, shape)


def layers():
    torch.manual_seed(4)
    return nn.Sequential(nn.Linear(4, 7), nn.ReLU(), nn.Linear(7, 1), nn.Unflatten(1, (1, 1, 1)), nn.Conv2d(1, 4, 1))


WRITES = [
    Write(rows("0.weight", "weight", [1, 6]), torch.arange(8.0).view(2, 4)),
    Write(rows("0.bias", "bias", [6]), -3.0),
    Write(rows("2.weight", "reader", [0, 5], (1,)), 0.0),
    Write(rows("2.bias", "bias", [0]), torch.tensor([7.0])),
    Write(rows("4.weight", "weight", [[1, 0]], (0, 1), (2, 2, 1, 1, 1)), 5.0),
]
OPTIMIZERS = {
    "adam": functools.partial(torch.optim.AdamW, amsgrad=True, foreach=True),
    "sgd": functools.partial(torch.optim.SGD, momentum=0.9),
    "asgd": torch.optim.ASGD,
}


def trained(optimizer, mesh=None):
    net = layers()
    if mesh is not None:
        shard_(net, mesh)
    stepping = OPTIMIZERS[optimizer](net.parameters(), lr=0.1)
    for x in torch.randn(3, 16, 4, generator=torch.Generator().manual_seed(6)):
        stepping.zero_grad()
        net(x).square().sum().backward()
        stepping.step()
    return net, stepping


def write_to_shards(rank):
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo", rank=rank, world_size=2, timeout=timedelta(seconds=20))
    mesh = init_device_mesh("cpu", (2,))
    found = {}
    for name in OPTIMIZERS:
        net, stepping = trained(name, mesh)
        parts = [one.to_local().shape[0] for one in net.parameters()]
        net(torch.randn(3, 4))  # without a backward, the model's own parameters stay gathered
        reshard_(net)
        before = state_of(net, stepping)
        assert check_writes(WRITES, net, [stepping]) == ""
        assert init_distributions(net) == init_distributions(trained(name)[0])
        write_(WRITES, net, [stepping])
        with torch.no_grad():
            found[name] = before, state_of(net, stepping), net(torch.ones(2, 4)), parts
    beyond = Write(rows("0.weight", "weight", [7]), 0.0)
    return found, check_writes([beyond], net, [])


@pytest.mark.ranks
def test_writing_to_shards_is_writing_to_the_whole():
    for rank, (found, beyond) in enumerate(on_two_ranks(write_to_shards)):
        assert beyond.startswith("`Write` to `0.weight`: index 7 is out of bounds")
        for name, (before, after, output, parts) in found.items():
            net, stepping = trained(name)
            assert_same(before, state_of(net, stepping))
            write_(WRITES, net, [stepping])
            assert_same(after, state_of(net, stepping))
            assert not torch.equal(before["2.bias"][0], after["2.bias"][0])
            assert torch.equal(output, net(torch.ones(2, 4)))
            assert parts == [[4, 4, 1, 1, 2, 2], [3, 3, 0, 0, 2, 2]][rank]


def ways_of_sharding():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy
    from torch.distributed.tensor import Shard

    line = init_device_mesh("cpu", (2,))
    names = ("replicate", "shard")
    return {
        "in half precision": {"mesh": line, "mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16)},
        "kept after forward": {"mesh": line, "reshard_after_forward": False},
        "replicated": {"mesh": init_device_mesh("cpu", (2, 1), mesh_dim_names=names)},
        "kept in part": {"mesh": init_device_mesh("cpu", (1, 2), mesh_dim_names=names), "reshard_after_forward": 2},
        "offloaded": {"mesh": line, "offload_policy": CPUOffloadPolicy(pin_memory=False)},
        "by columns": {"mesh": line, "shard_placement_fn": lambda p: Shard(1) if p.shape[1:] == (4,) else None},
    }


def shard_in_all_ways(rank):
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", rank=rank, world_size=2, timeout=timedelta(seconds=20))
    reader = rows("second.0.weight", "reader", [6], (1,))
    writes = [Write(rows("first.0.weight", "weight", [6]), 3.0), Write(reader, 0.0)]
    found = {}
    for case, way in {"not at all": None, **ways_of_sharding()}.items():
        torch.manual_seed(2)
        net = Block()
        for module in (*net.first, *net.second, net.last, net) if way else ():
            fully_shard(module, **way)
        watch, optimizer = Watch(net), torch.optim.Adam(net.parameters(), 0.0)
        watch.trace()
        with watch.probe:
            loss = net(torch.randn(5, 4)).sum()
        loss.backward()
        optimizer.step()
        assert split_layer(net) == ""
        write_(writes, net, [optimizer])
        net(torch.randn(5, 4)).sum().backward()
        weights = {name: parts[0] for name, parts in state_of(net, optimizer).items()}
        found[case] = str(watch.attributions), weights
    return found


@pytest.mark.ranks
def test_all_ways_of_sharding_are_followed_and_written_to():
    for found in on_two_ranks(shard_in_all_ways):
        attribution, weights = found.pop("not at all")
        assert "first.1.weight" in attribution
        assert (weights["first.0.weight"][6] == 3).all()
        for case, (same, values) in found.items():
            assert same == attribution, case
            assert_same(values, weights)


# -- repairing -----------------------------------------------------------------------------------------------------


class Ailing(Net):
    """Learns from a share of its own on each rank, and validates in between."""

    def __init__(self, sharded, net=Block):
        torch.manual_seed(2)
        super().__init__(net(), 0.01)
        self.sharded = sharded

    def configure_model(self):
        if self.sharded:
            shard_(self.net, self.device_mesh["data_parallel"])


REMEDIES = {
    "reset": "reset",
    "kick": "thermal_kick",
    "leaky": "leaky",
    "wake_up": "wake_up",
    "ladder": [BiasWarming(steps=3, cooldown=1, attempts=1), Reset(cooldown=1, tries=1), "gelu"],
}


def repair(rank, sharded):
    found = {}
    for case in REMEDIES:
        monitor = Verdicts(every_n_steps=1, window=3, min_samples=1, threshold=0.0, remedy=REMEDIES[case])
        trainer = (fsdp_trainer if sharded else ddp_trainer)(callbacks=[monitor], max_epochs=2)
        model = Ailing(sharded, mlp if case == "reset" else Block)  # new units are chosen behind linear layers alone
        trainer.fit(model, batches(9, 16 + rank, seed=rank), batches(1))
        state = state_of(model, trainer.optimizers[0])
        found[case] = [*map(str, monitor.events)], state, reports_of(monitor), str(monitor.attribution)
    return found


@pytest.mark.ranks
def test_shards_are_repaired_as_the_whole():
    sharded, whole = on_two_ranks(repair, True), on_two_ranks(repair, False)
    for case in REMEDIES:
        for rank in range(2):
            assert sharded[rank][case][0] == whole[rank][case][0], case
            assert_same(sharded[rank][case], whole[rank][case])
        assert_same(sharded[0][case][1], sharded[1][case][1])
        assert any("refused" not in event for event in whole[0][case][0]), case


class Save(Callback):
    def __init__(self, folder, steps):
        self.folder, self.steps = folder, steps

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step in self.steps:
            trainer.save_checkpoint(self.folder / f"{trainer.global_step}.ckpt")


def interrupt_and_resume(rank, folder, steps):
    runs = []
    items = list(torch.randn(9, 16 + rank, 4, generator=torch.Generator().manual_seed(rank)))
    for step in (None, *steps):
        monitor = Verdicts(every_n_steps=1, window=3, min_samples=1, threshold=0.0, remedy=REMEDIES["ladder"])
        callbacks = [monitor, *([] if step else [Save(folder, steps)])]
        trainer, model = fsdp_trainer(callbacks=callbacks, max_epochs=2), Ailing(True)
        trainer.fit(model, Loader(items), ckpt_path=step and folder / f"{step}.ckpt")
        runs.append(([*map(str, monitor.events)], state_of(model, trainer.optimizers[0]), reports_of(monitor)[-1]))
    return runs


@pytest.mark.ranks
def test_a_resumed_run_goes_on_in_mid_window_and_mid_anneal(tmp_path):
    for whole, *resumed in on_two_ranks(interrupt_and_resume, tmp_path, (2, 5, 10, 11)):
        assert sum(" repaired " in event for event in whole[0]) >= 3
        for one in resumed:
            assert one[0] == whole[0]
            assert_same(one, whole)


def train_shards(rank, watched):
    """Train with an odd forward that has no backward, so that all weights are still gathered when the batch ends."""

    class Peeking(Ailing):
        def configure_model(self):
            from torch.distributed.fsdp import fully_shard

            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.manual_backward(loss)
            self.optimizers().step()
            self.optimizers().zero_grad()
            with torch.no_grad():
                self(batch)
            return loss.detach()

    model = Peeking(True)
    model.automatic_optimization = False
    monitor = Verdicts(every_n_steps=1, window=3, min_samples=1, threshold=0.0, remedy=REMEDIES["kick"])
    monitors = {"": [], "watched": [Verdicts(every_n_steps=1, window=3)], "repaired": [monitor]}
    trainer = fsdp_trainer(callbacks=monitors[watched])
    trainer.fit(model, batches(9, 16 + rank, seed=rank))
    trainable = [site.trainable for one in monitors[watched] for site in one.report.sites]
    return state_of(model, trainer.optimizers[0]), torch.stack(model.losses), torch.get_rng_state(), trainable


@pytest.mark.ranks
def test_watching_changes_nothing_and_repairing_lasts_where_weights_stay_gathered():
    alone, watched, repaired = (on_two_ranks(train_shards, case) for case in ("", "watched", "repaired"))
    for rank in range(2):
        assert_same(alone[rank][:3], watched[rank][:3])
        assert watched[rank][3] == repaired[rank][3] == [True] * 3
        assert torch.equal(alone[rank][1][:4], repaired[rank][1][:4])
        assert not torch.equal(alone[rank][1][4:], repaired[rank][1][4:])
    assert_same(repaired[0][0], repaired[1][0])


# -- what is refused -----------------------------------------------------------------------------------------------


class Split(Net):
    """The first layer's units are split over both ranks; some or all of the rest is sharded."""

    def __init__(self, sharded):
        super().__init__()
        self.sharded = sharded

    def configure_model(self):
        from torch.distributed.fsdp import fully_shard
        from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

        plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
        parallelize_module(self.net, self.device_mesh["tensor_parallel"], plan)
        if self.sharded:
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])


def split_units(rank):
    found = []
    for sharded in (False, True):
        model, monitor = Split(sharded), Verdicts(every_n_steps=1, window=2, min_samples=1, remedy="reset")
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            fsdp_trainer(1, 2, callbacks=[monitor]).fit(model, batches(6, seed=1))
        why = {str(one.message) for one in told if "watching goes on" in str(one.message)}
        found.append((len(model.losses), [site.units for site in monitor.report.sites], monitor.report.unwatched, why))
        found[-1] += (len(monitor.reports), monitor.events)
    return found


@pytest.mark.ranks
def test_units_that_are_split_over_ranks_are_not_judged():
    why = "tensor parallelism splits `net.0.weight`, so that each rank has other units"
    for rank, found in enumerate(on_two_ranks(split_units)):
        for losses, units, unwatched, told, reports, events in found:
            assert (losses, reports, events) == (6, 3, ())
            assert not any(units)
            assert unwatched["net.1"] == why
            assert set(unwatched) == {"net.1", "net.3"}
            assert len(told) == (rank == 0)
            assert all(why in one for one in told)


def watch_flat_parameters(rank):
    """Watch FSDP1, whose parameters are flat pieces; Lightning's strategy for it takes no CPU."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    def flat(module):
        return FullyShardedDataParallel(module, use_orig_params=original, device_id=torch.device("cpu"))

    dist.init_process_group("gloo", rank=rank, world_size=2, timeout=timedelta(seconds=20))
    found = []
    for original in (None, False, True):
        torch.manual_seed(2)
        net = Block()
        if original is not None:
            net.first, net.second = flat(net.first), flat(net.second)
            net = flat(net)
        watch = Watch(net)
        watch.trace()
        for x, _ in shares(rank)[:3]:
            with watch.probe:
                net(x.clone().requires_grad_()).sum().backward()
        assert watch.probe.failure is None
        report, _ = judge(watch.liveness.totals().to_host(), UnitHistory.empty(), watch.layout, Rules(1))
        found.append(
            [{"name": site.name, "age": site.age, "dead": site.dead, "peak": site.peak} for site in report.sites]
        )
    return found


@pytest.mark.ranks
def test_flat_parameters_are_watched():
    for whole, *flat in on_two_ranks(watch_flat_parameters):
        for one in flat:
            assert_same(one, whole)
