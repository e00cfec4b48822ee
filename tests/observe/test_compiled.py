"""Compiled code is observed as compiled code, and counts what eager code would."""

import copy
import gc
import warnings
from contextlib import nullcontext
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint
from toys import Loader, Net, assert_alike, batches, fit, inner, mlp
from two_ranks import ddp_trainer, on_two_ranks

from lightning_deadrelu import DeadReLUMonitor
from lightning_deadrelu.observe.compiled import Observing, _moved
from lightning_deadrelu.observe.compiled_limits import Room
from lightning_deadrelu.observe.watch import Watch
from lightning_deadrelu.statistics import Rules, UnitHistory, judge


@pytest.fixture(autouse=True)
def _afresh():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    torch.compiler.reset()
    counters.clear()
    yield
    stance = torch._dynamo.eval_frame._stance
    torch.compiler.reset()
    assert (stance.stance, stance.backend) == ("default", None)


class Compiler:
    """Counts the graphs it compiles."""

    def __init__(self, backend="aot_eager"):
        self.backend, self.graphs = backend, 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return torch._dynamo.lookup_backend(self.backend)(graph, inputs)


class Block(nn.Module):
    """One rectifier called behind two layers, with a way around the second."""

    def __init__(self, inplace):
        super().__init__()
        self.conv1, self.norm, self.conv2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)
        self.relu = nn.ReLU(inplace=inplace)

    def forward(self, x):
        return self.relu(self.conv2(self.relu(self.norm(self.conv1(x)))) + x)


class ResNet(nn.Module):
    """Rectifiers as modules, functions and methods, in place and not."""

    def __init__(self, inplace=False):
        super().__init__()
        self.blocks = nn.Sequential(Block(inplace), Block(inplace))
        self.fc1, self.fc2, self.inplace = nn.Linear(4, 6), nn.Linear(6, 5), inplace
        with torch.no_grad():
            self.blocks[0].norm.bias[0] = self.fc1.bias[1] = -100.0

    def forward(self, x):
        x = F.relu(self.fc1(self.blocks(x).mean((2, 3))), inplace=self.inplace)
        return self.fc2(x).clamp(min=0)


class Mixed(nn.Module):
    """Two sites on one layer, a negation, a threshold, a capped half, an einsum, and one rectifier for all."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.relu = nn.Linear(4, 6), nn.Linear(6, 6), nn.ReLU()
        self.weight = nn.Parameter(torch.randn(6, 3))

    def forward(self, x):
        one = self.relu(self.b(self.relu(self.a(x))))
        two = F.threshold(self.a(1 - x), 0.1, 0.0)
        three = F.relu6(-self.b(two).chunk(2, -1)[1])
        four = torch.maximum(torch.einsum("bf,fo->bo", one, self.weight), torch.zeros(()))
        return one.sum() + three.sum() + four.sum() + self.a.weight.relu().sum()


class Cast(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = mlp()

    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.net(x).float()


def images(count=5, size=3):
    return list(torch.randn(count, size, 4, 5, 5, generator=torch.Generator().manual_seed(1)))


def rows(sizes=(5, 5, 5, 5)):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(size, 4, generator=generator) for size in sizes]


def train(model, run, data, watch=None):
    """Take a step on each of ``data`` under observation, and one more without."""
    watch = watch or Watch(model, rules=Rules(1), window=len(data))
    try:
        _train(watch, model, run, data)
    finally:
        watch.probe.disarm()
    assert watch.probe.failure is None
    return watch


def _train(watch, model, run, data):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for number, x in enumerate(data):
        watch.liveness.observation = number
        for observed in (True, False):
            if observed:
                watch.probe.arm()
            loss = run(x).square().mean()
            watch.probe.pause()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            watch.probe.disarm()


def report(watch):
    return judge(watch.liveness.totals().to_host(), UnitHistory.empty(), watch.layout, Rules(1))[0].to_dict()


def expected(model, data):
    """What is counted eagerly, and the weights in the end."""
    model = copy.deepcopy(model)
    return report(train(model, model, data)), model.state_dict()


def assert_seen_compiled(watch):
    assert watch.compiled.refusal == ""
    assert watch.compiled._proven
    assert not counters["graph_break"]


def whole(model, **options):
    return torch.compile(model, **options)


def in_place(model, **options):
    model.compile(**options)
    return model


def forward(model, **options):
    model.forward = torch.compile(model.forward, **options)
    return model


def step(model, **options):
    return torch.compile(lambda x: model(x), **options)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("way", [whole, in_place, forward, step])
def test_every_way_to_compile_counts_as_eager_code_does(way, inplace):
    model = ResNet(inplace)
    known, weights = expected(model, images())
    compiler = Compiler()
    watch = train(model, way(model, backend=compiler, fullgraph=True), images())
    assert_seen_compiled(watch)
    assert compiler.graphs == 2
    assert_alike(report(watch), known)
    assert sum(len(site["dead"]) for site in known["sites"]) >= 2
    assert all(torch.equal(model.state_dict()[name], value) for name, value in weights.items())


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize(
    "make", [Mixed, Cast, lambda: nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)]
)
def test_sites_of_many_kinds(make, backend):
    model = make()
    data = [x[:, None] for x in rows()] if isinstance(model, nn.TransformerEncoderLayer) else rows()
    known, weights = expected(model, data)
    compiler = Compiler(backend)
    watch = train(model, torch.compile(model, backend=compiler), data)
    assert_seen_compiled(watch)
    assert compiler.graphs == 2
    assert_alike(report(watch), known)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in weights.items())


def test_batches_of_any_size():
    sizes = (5, 5, 6, 7, 9, 4)
    model = mlp()
    known, _ = expected(model, rows(sizes))
    compiler = Compiler()
    watch = train(model, torch.compile(model, backend=compiler), rows(sizes))
    assert_seen_compiled(watch)
    assert compiler.graphs == 4  # two without the watch: one for the first size, one for all sizes
    assert_alike(report(watch), known)
    assert known["sites"][0]["samples"] == sum(sizes)


def test_inductor_counts_too():
    model = ResNet()
    known, _ = expected(model, images())
    watch = train(model, torch.compile(model), images())
    assert_seen_compiled(watch)
    assert [site["dead"] for site in report(watch)["sites"]] == [site["dead"] for site in known["sites"]]
    assert [site["age"] for site in report(watch)["sites"]] == [site["age"] for site in known["sites"]]


def test_code_that_ran_compiled_before_is_observed():
    model = ResNet()
    compiler = Compiler()
    run = torch.compile(model, backend=compiler)
    run(images()[0])
    known, _ = expected(model, images())
    watch = train(model, run, images())
    assert_seen_compiled(watch)
    assert compiler.graphs == 2
    assert_alike(report(watch), known)


def test_modules_that_share_a_graph_are_told_by_their_parameters():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([Block(False), Block(False)])
            with torch.no_grad():
                self.blocks[1].norm.bias[0] = -100.0

        def forward(self, x):
            for block in self.blocks:
                x = block(x.detach().requires_grad_())
            return x

    model = Pair()
    known, _ = expected(model, images())
    compiler = Compiler()
    for block in model.blocks:
        block.compile(backend=compiler)
    watch = train(model, model, images())
    assert_seen_compiled(watch)
    assert compiler.graphs == 2
    assert_alike(report(watch), known)


def test_a_module_in_place_of_another_is_told_by_the_names_of_its_parameters():
    assert _moved(["a.0.w", None, "a.0.b"], ["a.1.w", None, "a.1.b"]) == ("a.0", "a.1")
    assert _moved(["a.0.w", "a.0.b"], ["a.1.w", "a.2.b"]) is None
    assert _moved(["a.0.w"], [None]) is None
    assert _moved([None], [None]) is None


def test_a_second_watch_takes_over_the_graphs_of_the_first():
    compiler = Compiler()
    for seed in range(3):
        torch.manual_seed(seed)
        model = ResNet()
        known, _ = expected(model, images())
        watch = train(model, torch.compile(model, backend=compiler), images())
        assert_seen_compiled(watch)
        assert_alike(report(watch), known)
    assert compiler.graphs == 2


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = mlp(), nn.Sequential(nn.Linear(1, 4), nn.ReLU())

    def forward(self, x):
        return self.b(checkpoint(self.a, x, use_reentrant=False))


class Breaking(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        x = self.a(x).relu()
        torch._dynamo.graph_break()
        return self.b(x).relu()


class Partly(nn.Module):
    def __init__(self):
        super().__init__()
        self.net, self.head = Cast(), nn.Linear(1, 3)
        self.net.compile(backend="aot_eager")

    def forward(self, x):
        return self.head(self.net(x)).relu()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # the compiler's own, behind a break
@pytest.mark.parametrize("make", [Checkpointed, Breaking, Partly])
def test_what_a_graph_does_not_show_is_observed_in_some_way(make):
    model = make()
    plain = copy.deepcopy(model)
    if make is Partly:
        plain.net = Cast()
        plain.load_state_dict(model.state_dict())
    known, _ = expected(plain, rows())
    run = model if make is Partly else torch.compile(model, backend="aot_eager")
    assert_alike(report(train(model, run, rows())), known)


def test_a_compiled_block_is_checkpointed_from_outside():
    class Outside(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = Cast()

        def forward(self, x):
            return checkpoint(self.block, x, use_reentrant=False)

    model = Outside()
    known, _ = expected(model, rows())
    model.block.compile(backend="aot_eager")
    watch = train(model, model, rows())
    assert_seen_compiled(watch)
    assert_alike(report(watch), known)


def test_a_padding_mask_needs_eager_code():
    model = mlp()
    watch = Watch(model, rules=Rules(1), window=4)
    compiler = Compiler()
    run = torch.compile(model, backend=compiler)
    for number, x in enumerate(rows()):
        watch.liveness.observation = number
        watch.valid = torch.arange(5) < 3
        with watch.probe:
            run(x)
    assert compiler.graphs == 0
    assert report(watch)["sites"][0]["samples"] == 12


def test_two_watches_at_once_both_see_all():
    model = ResNet()
    known, _ = expected(model, images())
    first, second = (Watch(model, rules=Rules(1), window=5) for _ in range(2))
    run = torch.compile(model, backend="aot_eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for number, x in enumerate(images()):
        for observed in (True, False):
            if observed:
                first.liveness.observation = second.liveness.observation = number
                first.probe.arm()
                if number != 1:  # alone for once
                    second.probe.arm()
            run(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            first.probe.disarm()
            second.probe.disarm()
    assert_alike(report(first), known)
    assert report(second)["sites"][0]["samples"] == 12


def test_an_error_of_the_model_leaves_the_compiler_as_it_was():
    class Failing(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            return self.fc(x).relu() + torch.zeros(x.shape[0] - 4 if x.shape[0] > 5 else 1, 1)

    model = Failing()
    run = torch.compile(model, backend="aot_eager")
    watch = train(model, run, rows())
    with pytest.raises(Exception, match=r"size|shape|broadcast"), watch.probe:
        run(torch.zeros(7, 4))
    assert not watch.probe.armed


def test_users_stance_is_kept():
    model = mlp()
    compiler = Compiler()
    with torch.compiler.set_stance("force_eager"):
        watch = train(model, torch.compile(model, backend=compiler), rows())
    assert compiler.graphs == 0
    assert report(watch)["sites"][0]["samples"] == 20


def test_a_compiler_that_fails_on_more_outputs_compiles_the_graph_as_it_was():
    def fussy(graph, inputs):
        if len(graph.graph.output_node().args[0]) > 1:
            raise RuntimeError("one output, please")
        return graph.forward

    model = ResNet()
    known, weights = expected(model, images())
    watch = train(model, torch.compile(model, backend=fussy), images())
    assert "one output, please" in watch.compiled.refusal
    assert report(watch)["sites"][0]["samples"] == known["sites"][0]["samples"] - 3  # the batch that found it out
    assert all(torch.equal(model.state_dict()[name], value) for name, value in weights.items())


def test_a_site_that_is_lost_later_is_told_loudly():
    model = mlp()
    run = torch.compile(model, backend="aot_eager")
    watch = train(model, run, rows())
    with torch._dynamo.config.patch(recompile_limit=-99), watch.probe:
        run(torch.randn(4, 4).double().float()[:, :].requires_grad_())  # what would need another graph runs eagerly
    assert "nothing was counted" in watch.compiled.refusal
    with pytest.warns(UserWarning, match=r"nothing was counted of `1`, `3`.*recompile_limit"), watch.probe:
        run(rows()[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with watch.probe:
            run(rows()[0])


def test_backends_are_equal_if_their_compilers_are():
    compiler = Compiler()
    assert Observing(compiler) == Observing(compiler)
    assert Observing(compiler) != Observing(Compiler())
    assert Observing(torch._TorchCompileInductorWrapper(None, None, None)) == Observing(
        torch._TorchCompileInductorWrapper(None, None, None)
    )


# -- in Lightning ------------------------------------------------------------------------------------------


class Plain(Net):
    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return (self(batch) - 1).pow(2).mean()


def nothing(model, compiler):
    return model


def lightning_whole(model, compiler):
    return torch.compile(model, backend=compiler)


def lightning_in_place(model, compiler):
    model.compile(backend=compiler)
    return model


def lightning_part(model, compiler):
    model.net = torch.compile(model.net, backend=compiler)
    return model


def fitted(way, **options):
    torch.manual_seed(0)
    model, compiler = Plain(mlp(3)), Compiler()
    monitor = DeadReLUMonitor(every_n_steps=2, window=2, min_samples=1)
    fit(way(model, compiler), batches(8), monitor, **options)
    return monitor, list(model.parameters()), compiler.graphs


@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize("way", [lightning_whole, lightning_in_place, lightning_part])
def test_a_trainer_observes_compiled_models(way, accumulated):
    known, weights, _ = fitted(nothing, accumulate_grad_batches=accumulated)
    monitor, others, graphs = fitted(way, accumulate_grad_batches=accumulated)
    assert_seen_compiled(inner(monitor).watch)
    assert graphs == 2
    assert_alike(monitor.report.to_dict(), known.report.to_dict())
    assert all(map(torch.equal, weights, others))


def distributed(rank, way, **options):
    torch.manual_seed(0)
    model, compiler = Plain(mlp(3)), Compiler()
    monitor = DeadReLUMonitor(every_n_steps=2, window=2, min_samples=1)
    trainer = ddp_trainer(callbacks=[monitor], **options)
    trainer.fit(way(model, compiler), batches(8, seed=rank))
    compiled = inner(monitor).watch.compiled
    return monitor.report.to_dict(), compiled.refusal, compiled._proven, compiler.graphs


@pytest.mark.ranks
def test_ranks_observe_compiled_models():
    known = on_two_ranks(partial(distributed, way=nothing))
    seen = on_two_ranks(partial(distributed, way=lightning_whole))
    assert_alike(seen[0][0], known[0][0])
    assert [one[1:] for one in seen] == [("", True, 2)] * 2


@pytest.mark.ranks
def test_what_ddp_splits_is_observed_in_some_way(monkeypatch):
    monkeypatch.setattr("torch.distributed._DEFAULT_FIRST_BUCKET_BYTES", 1)
    small = DDPStrategy(process_group_backend="gloo", bucket_cap_mb=1e-5)
    known = on_two_ranks(partial(distributed, way=nothing))
    seen = on_two_ranks(partial(distributed, way=lightning_whole, strategy=small))
    assert seen[0][0]["sites"][0]["dead"] == known[0][0]["sites"][0]["dead"]


# -- what must not be lost, nor lose -----------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("limit", [None, 5])
def test_the_users_limit_of_graphs_is_for_the_users_graphs(limit):
    def train_on_five_sizes(*watching):
        torch.manual_seed(0)
        options = {} if limit is None else {"recompile_limit": limit}
        model = Plain(torch.compile(mlp(3), backend="aot_eager", dynamic=False, fullgraph=True, **options))
        fit(model, Loader(rows([2 + n % 5 for n in range(20)])), *watching)
        return list(model.parameters())

    with torch._dynamo.config.patch(recompile_limit=5):
        weights = train_on_five_sizes()
        torch._dynamo.reset()
        monitor = DeadReLUMonitor(every_n_steps=2, window=2, min_samples=1)
        others = train_on_five_sizes(monitor)
    assert monitor.report.sites[0].samples
    assert all(map(torch.equal, weights, others))


@pytest.mark.parametrize("stop", [None, KeyboardInterrupt, ValueError])
def test_no_raised_limit_and_no_graph_of_ours_is_left_after_a_fit(stop):
    class Stop(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if stop and batch_idx == 9:
                raise stop

    gc.collect()  # watches of other tests, which were never closed
    module = Plain(torch.compile(mlp(3), backend="aot_eager", dynamic=False, fullgraph=True))
    monitor = DeadReLUMonitor(every_n_steps=2, window=2, min_samples=1)
    with torch._dynamo.config.patch(recompile_limit=3, accumulated_recompile_limit=7):
        with pytest.raises((ValueError, SystemExit)) if stop else nullcontext():
            fit(module, Loader(rows([2 + n % 2 for n in range(12)])), monitor, Stop())
        assert torch._dynamo.config.recompile_limit == 3
        assert torch._dynamo.config.accumulated_recompile_limit == 7
        for size in (2, 3, 4):  # as many graphs as the limit allows, none of which is ours
            module(torch.randn(size, 4))
    assert monitor.report.sites[0].samples


def test_a_limit_that_goes_by_another_name_is_left_alone(monkeypatch):
    monkeypatch.setitem(Room.limits, "a_limit_of_old", (0, 0))
    model = mlp()
    assert_seen_compiled(train(model, torch.compile(model, backend="aot_eager"), rows()))


class Trunk(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.relu = nn.Linear(4, 8), nn.ReLU()

    def forward(self, x):
        return self.relu(self.fc(x))


class Branched(Net):
    """Its trunk is compiled, and a head that is not runs in some batches alone."""

    def __init__(self, turns):
        super().__init__(nn.ModuleDict({"trunk": Trunk(), "head": nn.Sequential(nn.Linear(8, 5), nn.ReLU())}))
        self.turns = turns
        self.net["trunk"].compile(backend="aot_eager")

    def training_step(self, batch, batch_idx):
        h = self.net["trunk"](batch)
        return (self.net["head"](h) if batch_idx in self.turns else h).square().mean()


@pytest.mark.parametrize("turns", [{0, 2, 4, 6}, {1, 3, 5, 7}, {4, 5, 6, 7}])
def test_what_runs_at_times_outside_of_compiled_code_is_seen(turns):
    monitor = DeadReLUMonitor(every_n_steps=1, window=8, min_samples=1)
    fit(Branched(turns), Loader(rows([5] * 8)), monitor)
    assert [site.samples for site in monitor.report.sites] in ([40, 20], [20, 40])
