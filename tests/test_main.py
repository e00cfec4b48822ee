"""The command line: what it finds, writes, restores and refuses."""

import json
import pickle
import random
import re
import subprocess
import sys
import zipfile
from importlib import import_module

import pytest
import torch
from torch import nn

from lightning_deadrelu.__main__ import main
from lightning_deadrelu.repair.activation_swap import records, substitute_

CODE = """
import torch
from torch import nn

class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))

def broken():
    net = Net()
    nn.init.constant_(net[0].bias, 5.0)
    nn.init.constant_(net[0].bias[:2], -100.0)
    return net

def whole():
    holder = nn.Module()
    holder.net = Net()
    return holder

def other():
    return nn.Linear(2, 2)

def with_width(width):
    return Net()

data = [torch.rand(200, 4) for _ in range(3)]
def batches():
    return iter(data)
def nothing():
    return None
def narrow():
    return [torch.rand(300, 3)]
"""


@pytest.fixture(autouse=True)
def _project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    (tmp_path / "nets.py").write_text(CODE)


def audit(model: str, *options: str, data: str = "nets:batches") -> int:
    return main(["audit", model, "--data", data, *options])


def refusal(capsys, *arguments: str, **options: str) -> str:
    with pytest.raises(SystemExit) as stop:
        audit(*arguments, **options)
    assert stop.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("place", ["nets", "nets.py", "./nets.py"])
def test_it_prints_what_is_dead(place, capsys):
    assert audit(f"{place}:broken", data=f"{place}:data") == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("2 of 8 units are dead (25.0%), all in `1`")
    assert printed[3].split()[:4] == ["1", "relu", "8", "2"]


def test_a_file_of_the_name_of_a_loaded_module_runs_beside_it(tmp_path, capsys):
    (tmp_path / "nets.py").rename(tmp_path / "random.py")
    assert main(["audit", "random.py:broken", "--data", "random.py:batches"]) == 0
    assert "2 of 8 units are dead" in capsys.readouterr().out
    assert not hasattr(random, "broken")


@pytest.mark.slow
def test_it_runs_as_a_module(tmp_path):
    command = [sys.executable, "-m", "lightning_deadrelu", "audit", "nets:broken", "--data", "nets:batches"]
    done = subprocess.run([*command, "--fail-above", "0.1"], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert done.stderr == "note: no `--checkpoint`, so the weights are those that `nets:broken` makes.\n"
    assert "2 of 8 units are dead" in done.stdout


def test_the_status_tells_whether_too_much_is_dead():
    assert audit("nets:broken", "--fail-above", "0.1") == 1
    assert audit("nets:broken", "--fail-above", "0.25") == 0


def test_it_writes_files(tmp_path):
    audit("nets:broken", "--json", "out/report.json", "--html", "out/report.html")
    assert json.loads((tmp_path / "out/report.json").read_text())["dead_units"] == 2
    assert "2 of 8 units are dead" in (tmp_path / "out/report.html").read_text()


def test_few_samples_do_not_suffice(capsys):
    audit("nets:broken", "--max-batches", "1")
    assert "not judged yet" in capsys.readouterr().out
    audit("nets:broken", "--max-batches", "1", "--min-samples", "100")
    assert "2 of 8 units are dead" in capsys.readouterr().out


def test_include_and_exclude(capsys):
    assert "matches no" in refusal(capsys, "nets:broken", "--include", "conv*")
    assert "1" in refusal(capsys, "nets:broken", "--exclude", "conv*")


def saved(tmp_path, dead: int = 3, prefix: str = "", **more: object) -> str:
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    nn.init.constant_(net[0].bias, 5.0)
    nn.init.constant_(net[0].bias[:dead], -100.0)
    state = {prefix + key: value for key, value in net.state_dict().items()}
    path = tmp_path / "last.ckpt"
    torch.save({"state_dict": state, **more} if more else state, path)
    return str(path)


@pytest.mark.parametrize("prefix", ["", "net.", "model.net."])
@pytest.mark.parametrize("more", [{}, {"epoch": 1, "callbacks": {}}])
def test_weights_come_from_a_checkpoint(prefix, more, tmp_path, capsys):
    audit("nets:Net", "--checkpoint", saved(tmp_path, prefix=prefix, **more))
    assert "3 of 8 units are dead" in capsys.readouterr().out


def test_another_model_is_refused(tmp_path, capsys):
    told = refusal(capsys, "nets:whole", "--checkpoint", saved(tmp_path))
    assert "does not fit the model: it lacks `net.0.weight`, `net.0.bias`, `net.2.weight` and 1 more" in told


def test_what_was_exchanged_may_be_unknown(tmp_path):
    with pytest.warns(UserWarning, match="does not tell which activations were exchanged"):
        audit("nets:Net", "--checkpoint", saved(tmp_path, epoch=1))


def test_what_the_model_has_not_is_said(tmp_path):
    path = saved(tmp_path)
    torch.save(torch.load(path) | {"teacher.weight": torch.zeros(2)}, path)
    with pytest.warns(UserWarning, match="holds what the model has not: `teacher.weight`"):
        audit("nets:Net", "--checkpoint", path)


def test_a_model_held_twice_is_refused(tmp_path, capsys):
    path = saved(tmp_path, prefix="net.")
    state = torch.load(path)
    torch.save(state | {"ema." + key[4:]: value for key, value in state.items()}, path)
    assert "holds the model 2 times, as `net.`, `ema.`" in refusal(capsys, "nets:Net", "--checkpoint", path)


def test_swapped_activations_come_back(tmp_path, capsys):
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    substitute_(net, "1", "gelu")
    monitor = {"DeadReLUMonitor": {"activations": records(net)}}
    path = saved(tmp_path, callbacks=monitor)
    assert audit("nets:Net", "--checkpoint", path, "--include", "gelu") == 0
    assert "gelu" in capsys.readouterr().out


def test_a_checkpoint_that_could_run_code_has_to_be_trusted(tmp_path, capsys):
    path = saved(tmp_path, model=nn.Linear(1, 1), callbacks={})
    assert "add `--trust`" in refusal(capsys, "nets:Net", "--checkpoint", path)
    assert audit("nets:Net", "--checkpoint", path, "--trust") == 0


def _truncated(path):
    torch.save(nn.Linear(4, 8).state_dict(), path)
    path.write_bytes(path.read_bytes()[:-200])


def _other_archive(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "nothing")


NO_CHECKPOINT = {
    "missing": (lambda path: None, "there is no such file"),
    "empty": (lambda path: path.touch(), "the file is empty"),
    "folder": (lambda path: path.mkdir(), "it is a folder"),
    "garbage": (lambda path: path.write_bytes(bytes(range(256)) * 9), "it is no checkpoint"),
    "text": (lambda path: path.write_text("epoch,loss\n0,1.0\n"), "it is no checkpoint"),
    "pickle": (lambda path: path.write_bytes(pickle.dumps({"state_dict": {}})), "it is no checkpoint"),
    "other archive": (_other_archive, "it is no checkpoint"),
    "truncated": (_truncated, "only the beginning of one"),
    "a list": (lambda path: torch.save([1, 2], path), "it holds a `list`. Save `model.state_dict()`"),
}


@pytest.mark.parametrize("trust", [(), ("--trust",)], ids=["", "trusted"])
@pytest.mark.parametrize("kind", NO_CHECKPOINT)
def test_what_is_no_checkpoint_is_refused_in_one_line(kind, trust, tmp_path, capsys):
    make, why = NO_CHECKPOINT[kind]
    make(tmp_path / "last.ckpt")
    told = refusal(capsys, "nets:Net", "--checkpoint", str(tmp_path / "last.ckpt"), *trust)
    assert why in told
    assert told.count("\n") == 1
    assert "--trust" not in told


class Gone:
    """Is of a package that is not installed here."""

    def __reduce__(self):
        return import_module, ("gone",)


def test_a_trusted_file_may_need_what_is_not_installed(tmp_path, capsys):
    torch.save({"config": Gone()}, tmp_path / "last.ckpt")
    told = refusal(capsys, "nets:Net", "--checkpoint", str(tmp_path / "last.ckpt"), "--trust")
    assert "torch cannot read it (ModuleNotFoundError: No module named 'gone')" in told


def test_files_from_before_torch_wrote_archives_are_read(tmp_path, capsys):
    path = saved(tmp_path)
    torch.save(torch.load(path), path, _use_new_zipfile_serialization=False)
    audit("nets:Net", "--checkpoint", path)
    assert "3 of 8 units are dead" in capsys.readouterr().out


@pytest.mark.parametrize("device", ["cuda:99", "gpu", "cpu:x", ""])
def test_a_device_that_is_not_there_is_refused_in_one_line(device, capsys):
    told = refusal(capsys, "nets:Net", "--device", device)
    assert told.startswith(f"error: `--device {device}`: there is no such device here (")
    assert told.endswith("). Try `--device cpu`.\n")
    assert told.count("\n") == 1


def test_whose_weights_are_audited_is_said(tmp_path, capsys):
    audit("nets:broken")
    assert capsys.readouterr().err == "note: no `--checkpoint`, so the weights are those that `nets:broken` makes.\n"
    audit("nets:broken", "--checkpoint", saved(tmp_path))
    assert capsys.readouterr().err == ""


def test_versions_are_told_in_one_line(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    told = capsys.readouterr().out
    assert told.startswith("lightning-deadrelu ")
    assert all(f", {name} " in told for name in ("torch", "lightning", "python"))
    assert told.count("\n") == 1


REFUSED = {
    "nets": r"`nets`: the name is missing. Try `nets:make_model`",
    "nets:": r"`nets:`: the name is missing. Try `nets:make_model`",
    "nots:Net": r"`nots` cannot be imported: No module named 'nots'",
    "nots.py:Net": r"there is no such file",
    "nets:Nix": r"there is no `Nix` in `nets`. It has `Net`, `broken`, `whole`",
    "nets:with_width": r"could not be called without arguments: .*width",
    "nets:nothing": r"made a `NoneType`, not a module",
}


@pytest.mark.parametrize("spec", REFUSED)
def test_what_is_written_wrongly_is_refused(spec, capsys):
    assert re.search(REFUSED[spec], refusal(capsys, spec))


def test_data_without_batches_are_refused(capsys):
    assert "made a `NoneType`, which has no batches. Return a `DataLoader`" in refusal(
        capsys, "nets:Net", data="nets:nothing"
    )


def test_a_fraction_is_no_percentage(capsys):
    assert "a fraction lies between 0 and 1" in refusal(capsys, "nets:Net", "--fail-above", "10")


def test_a_model_that_fails_is_not_taken_for_one_that_is_too_dead(capsys):
    assert audit("nets:Net", "--fail-above", "0.5", data="nets:narrow") == 2
    assert "mat1 and mat2" in capsys.readouterr().err


# -- autopsy ---------------------------------------------------------------------------------------------

TRAINED = """
import torch
from torch import nn

from lightning_deadrelu import decay_groups

def plain():
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))

class Module(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = plain()

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(decay_groups(self, 0.01))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": None}}

class Needy(Module):
    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), self.trainer.max_steps)
"""


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """Write a checkpoint of a model of which two units died 60 steps ago; return the function that does."""
    (tmp_path / "trained.py").write_text(TRAINED)
    monkeypatch.syspath_prepend(tmp_path)

    def save(name="Module", key="optimizer_states"):
        torch.manual_seed(0)
        module = import_module("trained")
        model = getattr(module, name)()
        net = getattr(model, "net", model)
        try:
            optimizer = model.configure_optimizers()["optimizer"]
        except AttributeError:
            optimizer = torch.optim.AdamW(model.parameters())
        for step in range(160):
            if step == 100:
                net[0].bias.data[:2] = -100.0
            optimizer.zero_grad()
            (net(torch.randn(16, 4)) - torch.randn(16, 2)).square().mean().backward()
            optimizer.step()
        state = optimizer.state_dict()
        torch.save({"state_dict": model.state_dict(), key: [state] if key.endswith("states") else state}, "last.ckpt")

    return save


def autopsied(capsys, *arguments: str) -> str:
    assert main(["autopsy", "last.ckpt", *arguments]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "key"),
    [("Module", "optimizer_states"), ("plain", "optimizer_state_dict"), ("plain", "optimizer"), ("Needy", "optimizer")],
)
def test_autopsy_dates_deaths_from_a_checkpoint_alone(name, key, trained, capsys):
    trained(name, key)
    printed = autopsied(capsys, "--model", f"trained.py:{name}")
    assert printed.startswith("2 of 10 units have had no gradient for long")


def test_autopsy_writes_json(trained, tmp_path, capsys):
    trained()
    autopsied(capsys, "--model", "trained.py:Module", "--json", "out/dates.json")
    first, _ = json.loads((tmp_path / "out/dates.json").read_text())["layers"]
    assert first["name"] == "net.0"
    assert first["ages"][:2] == pytest.approx([60, 60], abs=12)
    assert first["ages"][2:] == [0] * 6


def autopsy_refusal(capsys, model: str) -> str:
    with pytest.raises(SystemExit) as stop:
        main(["autopsy", "last.ckpt", "--model", model])
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_autopsy_refuses_parameters_in_another_order(trained, capsys):
    trained("Module")
    told = autopsy_refusal(capsys, "trained.py:plain")
    assert "with these in another order. Let `--model` name the LightningModule that was trained" in told


def test_autopsy_refuses_another_model(trained, capsys):
    trained("plain")
    assert "holds the optimizer of a model with other parameters" in autopsy_refusal(capsys, "nets.py:other")


def test_autopsy_needs_an_optimizers_state(trained, tmp_path, capsys):
    saved(tmp_path, epoch=1)
    told = autopsy_refusal(capsys, "nets.py:Net")
    assert "`last.ckpt` holds no state of an optimizer, which tells the dates. Give a checkpoint that a Trainer" in told
