"""Promises 1, 2 and 6 beside what else Lightning offers: nothing changes, ages are exact, and nothing is left."""

from functools import partial

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    BatchSizeFinder,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelPruning,
    StochasticWeightAveraging,
)
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from toys import Net, assert_same, bare, batches, inner, left_behind, mlp

from lightning_deadrelu import DeadReLUMonitor

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:dead_relu"),
    pytest.mark.filterwarnings("ignore:`training_step` returned `None`"),
]


class TwoOptimizers(LightningModule):
    """A generator, trained on every other batch, and a discriminator."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.made = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
        self.judged = mlp()

    def _step(self, optimizer, loss):
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()

    def training_step(self, batch, batch_idx):
        generator, discriminator = self.optimizers()
        self.toggle_optimizer(discriminator)
        made = self.made(torch.randn_like(batch)).detach()
        self._step(discriminator, (self.judged(batch) - 1).square().mean() + self.judged(made).square().mean())
        self.untoggle_optimizer(discriminator)
        if batch_idx % 2 == 0:
            self.toggle_optimizer(generator)
            self._step(generator, (self.judged(self.made(torch.randn_like(batch))) - 1).square().mean())
            self.untoggle_optimizer(generator)

    def configure_optimizers(self):
        return torch.optim.Adam(self.made.parameters(), 0.01), torch.optim.SGD(self.judged.parameters(), 0.01)


class Stream(IterableDataset):
    """Batches of unknown number."""

    def __iter__(self):
        generator = torch.Generator().manual_seed(3)
        return (torch.randn(5, 4, generator=generator) for _ in range(23))


class Tuned(Net):
    def __init__(self):
        super().__init__()
        self.batch_size = 4

    def train_dataloader(self):
        generator = torch.Generator().manual_seed(2)
        return DataLoader(torch.randn(200, 4, generator=generator), batch_size=self.batch_size)

    val_dataloader = train_dataloader


class Skipping(Net):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return None if batch_idx % 3 == 1 else loss


class Repeating(Net):
    """Its optimizer asks for the loss several times."""

    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=4)


class Evaluating(Net):
    """Looks at how it does within a training step."""

    def training_step(self, batch, batch_idx):
        self.eval()
        with torch.no_grad():
            self(torch.randn(9, 4))
        self.train()
        return super().training_step(batch, batch_idx)


class Thawing(BaseFinetuning):
    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.net[0])

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.net[0], optimizer)


def normed():
    return Net(nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1)))


def stream():
    return DataLoader(Stream(), batch_size=None)


twenty = partial(batches, 20)
averaging = partial(StochasticWeightAveraging, 1e-2, swa_epoch_start=1)
pruning = partial(ModelPruning, "l1_unstructured", amount=0.3)
CASES = {
    "two optimizers": (TwoOptimizers, twenty, {"max_epochs": 2}, []),
    "accumulation by epoch": (Net, twenty, {"max_epochs": 3}, [partial(GradientAccumulationScheduler, {0: 2, 1: 3})]),
    "averaged weights": (normed, twenty, {"max_epochs": 4}, [averaging]),
    "a moving average": (Net, twenty, {"max_epochs": 3}, [partial(EMAWeightAveraging, decay=0.9)]),
    "a search for the learning rate": (Tuned, None, {}, [partial(LearningRateFinder, num_training_steps=15)]),
    "a search for the batch size": (Tuned, None, {}, [partial(BatchSizeFinder, max_trials=2, steps_per_trial=2)]),
    "few batches again and again": (Net, twenty, {"overfit_batches": 3, "max_epochs": 4}, []),
    "a stream": (Net, stream, {"max_epochs": 2}, []),
    "a stream that accumulates": (Net, stream, {"max_epochs": 2, "accumulate_grad_batches": 4}, []),
    "validation within an epoch": (Net, stream, {"max_epochs": 2, "val_check_interval": 7}, []),
    "barebones": (Net, twenty, {"barebones": True}, []),
    "a fast run": (Net, twenty, {"fast_dev_run": 4}, []),
    "batches without a loss": (Skipping, twenty, {"accumulate_grad_batches": 2}, []),
    "a loss asked for again": (Repeating, twenty, {}, []),
    "an evaluation within a step": (Evaluating, twenty, {}, []),
    "layers that thaw": (Net, twenty, {"max_epochs": 3}, [Thawing]),
    "pruning": (Net, twenty, {"max_epochs": 6}, [pruning]),
    "half precision": (Net, twenty, {"precision": "bf16-mixed", "gradient_clip_val": 0.1}, []),
    "a part of the batches": (Net, twenty, {"limit_train_batches": 0.3, "max_epochs": 5}, []),
}


def trained(case, *callbacks):
    build, loader, options, others = CASES[case]
    torch.manual_seed(3)
    model = build()
    options = {"accelerator": "cpu", "max_epochs": 1, **options} if "barebones" in options else bare(**options)
    trainer = Trainer(**options, callbacks=[*(make() for make in others), *callbacks])
    trainer.fit(model, loader and loader(), batches(3) if loader is stream else None)
    return model, trainer, torch.get_rng_state()


class Ages(Callback):
    """Counts, by module and unit, the samples of training steps since the last batch in which it fired."""

    def on_train_start(self, trainer, pl_module):
        self.ages, self.now = {}, {}
        for name, module in pl_module.named_modules():
            if isinstance(module, nn.ReLU):
                module.register_forward_hook(partial(self._note, pl_module, name))

    def _note(self, pl_module, name, module, args, output):
        if pl_module._current_fx_name == "training_step" and module.training and torch.is_grad_enabled():
            self.now.setdefault(name, []).append(args[0].detach() > 0)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if (batch_idx + 1) % trainer.accumulate_grad_batches and not trainer.is_last_batch:
            return
        for name, calls in self.now.items():
            fired = torch.cat(calls)
            before = self.ages.get(name, torch.zeros(fired.shape[1], dtype=torch.long))
            self.ages[name] = torch.where(fired.any(0), 0, before + len(fired))
        self.now = {}


REWRITTEN = {"averaged weights"}  # its last epoch measures batch norms, and is no training
ASKED_AGAIN = {"a loss asked for again"}  # the first forward of a batch alone is at the weights of its start


@pytest.mark.parametrize("case", CASES)
def test_nothing_changes_and_ages_are_exact(case):
    ages, monitor = Ages(), DeadReLUMonitor(every_n_steps=1, window=3, min_samples=20)
    plain, trainer, state = trained(case, ages)
    beside, watched, state_beside = trained(case, monitor)
    assert_same(plain.state_dict(), beside.state_dict())
    assert torch.equal(state, state_beside)
    assert trainer.global_step == watched.global_step
    assert inner(monitor).guard.failure is None
    assert left_behind(beside) == left_behind(mlp())
    if case not in REWRITTEN | ASKED_AGAIN:
        assert {site.name: site.age.tolist() for site in monitor.report.sites} == {
            name: age.tolist() for name, age in ages.ages.items()
        }


@pytest.mark.parametrize("case", CASES)
def test_remedies_work_beside_it(case):
    monitor = DeadReLUMonitor(every_n_steps=1, window=3, min_samples=10, threshold=0.0, remedy="auto")
    model, *_ = trained(case, monitor)
    assert inner(monitor).guard.failure is None
    assert left_behind(model) == left_behind(mlp())
    assert case in REWRITTEN or "edited" in {event.action for event in monitor.events}
