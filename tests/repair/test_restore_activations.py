"""Activations that a run exchanged, exchanged again in a fresh model from its checkpoint."""

from __future__ import annotations

import io

import pytest
import torch
from torch import nn
from toys import Net as Trained
from toys import bare, batches, fit

from lightning_deadrelu.repair.activation_swap import records, substitute_
from lightning_deadrelu.repair.restore_activations import apply_record, restore_activations


def mlp(act: nn.Module | None = None) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), act or nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 1))


def treated(act: nn.Module | None = None) -> nn.Sequential:
    model = mlp(act)
    substitute_(model, "1", "leaky_relu", torch.arange(6) / 10)
    substitute_(model, "3", "gelu")
    return model


def checkpoint(model: nn.Module, prefix: str = "") -> dict:
    told = [{**record, "path": prefix + record["path"]} for record in records(model)]
    return {"callbacks": {"DeadReLUMonitor{'name': 'dead_relu'}": {"activations": told}}}


def test_records_are_plain_and_can_be_applied_again():
    model, x = treated(nn.ReLU6(inplace=True)), torch.randn(5, 4)
    file = io.BytesIO()
    torch.save(records(model), file)
    file.seek(0)
    told = torch.load(file, weights_only=True)
    fresh = mlp(nn.ReLU6(inplace=True))
    for _ in range(2):
        for record in told:
            apply_record(fresh, record)
        assert torch.equal(fresh(x), model(x))
    assert [record["path"] for record in records(fresh)] == ["1", "3"]


class Wrapped(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.stem, self.net = nn.Sequential(nn.Linear(4, 4), nn.ReLU()), net


@pytest.mark.parametrize("prefix", ["", "net.", "module.net."])
def test_a_checkpoint_of_a_whole_brings_its_part_back(prefix):
    model, x = treated(), torch.randn(5, 4)
    fresh = mlp()
    for _ in range(2):
        assert restore_activations(fresh, checkpoint(model, prefix)) is fresh
    assert torch.equal(fresh(x), model(x))


def test_a_checkpoint_of_a_part_brings_it_back_in_a_whole():
    model, x = treated(), torch.randn(5, 4)
    whole = restore_activations(Wrapped(mlp()), checkpoint(model))
    assert torch.equal(whole.net(x), model(x))
    assert type(whole.stem[1]) is nn.ReLU
    compiled = torch.compile(mlp(), backend="eager")
    assert torch.equal(restore_activations(compiled, checkpoint(model))._orig_mod(x), model(x))


def test_what_cannot_be_restored():
    told = checkpoint(treated())
    twice = nn.ModuleDict({"a": mlp(), "b": mlp()})
    with pytest.raises(ValueError, match="exchanged `1`, `3`, for which this model has 2 places"):
        restore_activations(twice, told)
    with pytest.raises(ValueError, match=r"this model has no place. Give the model that was trained"):
        restore_activations(nn.Sequential(nn.Linear(2, 2), nn.Tanh()), told)
    with pytest.raises(ValueError, match="this model has no place"):
        restore_activations(mlp(nn.ReLU6()), told)
    with pytest.raises(ValueError, match=r"has no `callbacks`.*without `save_weights_only=True`"):
        restore_activations(mlp(), {"state_dict": {}})
    with pytest.raises(ValueError, match="`leaky_relu` in the place of `1`, a relu, which this model does not have"):
        apply_record(nn.Sequential(nn.Linear(2, 2)), records(treated())[0])


def test_a_checkpoint_that_tells_of_none_changes_nothing():
    for states in (
        {},
        {"DeadReLUMonitor": {}},
        {"DeadReLUMonitor": {"activations": []}},
        {"Other": {"activations": 3}},
    ):
        model = restore_activations(mlp(), {"callbacks": states})
        assert not records(model)


def test_restoring_from_a_file(tmp_path):
    model, x = treated(), torch.randn(5, 4)
    torch.save(checkpoint(model), tmp_path / "last.ckpt")
    assert torch.equal(restore_activations(mlp(), tmp_path / "last.ckpt")(x), model(x))
    assert torch.equal(restore_activations(mlp(), str(tmp_path / "last.ckpt"))(x), model(x))
    torch.save({**checkpoint(model), "hyper_parameters": {"act": nn.ReLU()}}, tmp_path / "odd.ckpt")
    with pytest.raises(ValueError, match=r"try `restore_activations\(model, .*odd.ckpt., weights_only=False\)`"):
        restore_activations(mlp(), tmp_path / "odd.ckpt")
    assert torch.equal(restore_activations(mlp(), tmp_path / "odd.ckpt", weights_only=False)(x), model(x))
    with pytest.raises(ValueError, match=r"`restore_activations\(model, .*gone.ckpt.\)`: there is no such file"):
        restore_activations(mlp(), tmp_path / "gone.ckpt")


def test_a_lightning_checkpoint(tmp_path):
    """A monitor's state is found in what the Trainer saves, and the restored model trains on."""
    from lightning.pytorch import Callback, Trainer

    class DeadReLUMonitorOfMine(Callback):
        def state_dict(self):
            return {"activations": records(self.model)}

        def on_fit_start(self, trainer, pl_module):
            self.model = pl_module
            substitute_(pl_module, "net.1", "leaky_relu", torch.rand(8))

    model = Trained()
    trainer = fit(model, batches(2), DeadReLUMonitorOfMine())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    loaded = Trained()
    loaded.load_state_dict(torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"])
    x = torch.randn(5, 4)
    assert not torch.equal(loaded(x), model(x))
    assert torch.equal(restore_activations(loaded, tmp_path / "a.ckpt")(x), model(x))
    Trainer(**bare()).fit(loaded, batches(1))
