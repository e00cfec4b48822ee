"""Which sites are trained: what an optimizer holds, what has a gradient, and what never gets one."""

import pytest
import torch
from torch import nn

from lightning_deadrelu.model.sites import Site
from lightning_deadrelu.model.trainable import Gradients, trainable_sites


def net() -> nn.ModuleDict:
    return nn.ModuleDict({name: nn.Linear(2, 2) for name in ("student", "teacher")})


def site(*source: str, owner: str = "act", traced: bool = True) -> Site:
    return Site(owner, False, "relu", source, 2, traced=traced)


SITES = [site("student.weight", "student.bias"), site("teacher.weight", "teacher.bias")]


def sgd(*modules: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD([p for module in modules for p in module.parameters()], lr=0.1)


def step(model: nn.ModuleDict, optimizer: torch.optim.Optimizer, gradients: Gradients, *used: str) -> None:
    optimizer.zero_grad()
    sum(model[name](torch.ones(1, 2)).sum() for name in used).backward()
    gradients.note(optimizer)
    optimizer.step()


def test_what_an_optimizer_holds_is_trained():
    model = net()
    assert trainable_sites(SITES, model, [sgd(model["student"])]) == [True, False]
    assert trainable_sites(SITES, model, [sgd(model["student"]), sgd(model["teacher"])]) == [True, True]


def test_what_wants_no_gradient_is_not_trained_whoever_holds_it():
    model = net()
    model["teacher"].requires_grad_(False)
    assert trainable_sites(SITES, model, [sgd(model["student"], model["teacher"])]) == [True, False]
    assert trainable_sites(SITES, model, []) == [True, False]  # of no optimizer nothing else is known


def test_one_trained_producer_is_enough():
    model = net()
    model["student"].weight.requires_grad_(False)
    assert trainable_sites(SITES, model, [sgd(model["student"])]) == [True, False]


def test_shared_parameters_count_under_each_of_their_names():
    model = net()
    model["tied"] = model["student"]
    assert trainable_sites([site("tied.weight")], model, [sgd(model["student"])]) == [True]


@pytest.mark.parametrize("prefix", ["_orig_mod.", "student._checkpoint_wrapped_module."])
def test_wrappers_hide_no_parameter(prefix):
    model = nn.Module()
    place = model
    for part in prefix.rstrip(".").split("."):
        place.add_module(part, nn.Module())
        place = place.get_submodule(part)
    place.fc = nn.Linear(2, 2)
    name = "student.fc.weight" if "student" in prefix else "fc.weight"
    assert trainable_sites([site(name)], model, [sgd(model)]) == [True]


@pytest.mark.parametrize(("owner", "trained"), [("student.act", True), ("teacher.act", False), ("act", True)])
def test_unknown_producers_go_by_the_nearest_module_with_parameters(owner, trained):
    model = net()
    unknown = site("#0", owner=owner, traced=False)
    assert trainable_sites([unknown], model, [sgd(model["student"])]) == [trained]


def test_who_never_got_a_gradient_is_known_and_forgotten_once_it_gets_one():
    model, gradients = net(), Gradients()
    optimizer = sgd(model["student"], model["teacher"])
    assert gradients.never == set()
    for _ in range(2):
        step(model, optimizer, gradients, "student")
        assert gradients.never == {id(p) for p in model["teacher"].parameters()}
        assert trainable_sites(SITES, model, [optimizer], gradients.never) == [True, False]
    step(model, optimizer, gradients, "student", "teacher")
    assert gradients.never == set()
    step(model, optimizer, gradients, "student")  # one step without is no longer never
    assert trainable_sites(SITES, model, [optimizer], gradients.never) == [True, True]


def test_if_nobody_has_a_gradient_it_is_kept_elsewhere_and_says_nothing():
    model, gradients = net(), Gradients()
    optimizer = sgd(model["student"], model["teacher"])
    gradients.note(optimizer)
    assert len(gradients.never) == 4
    assert trainable_sites(SITES, model, [optimizer], gradients.never) == [True, True]


def test_each_optimizer_is_asked_for_its_own():
    model, gradients = net(), Gradients()
    first, second = sgd(model["student"]), sgd(model["teacher"])
    step(model, first, gradients, "student")
    assert gradients.never == set()
    gradients.note(second)
    assert gradients.never == {id(p) for p in model["teacher"].parameters()}


def test_a_resumed_run_goes_on_with_the_names():
    model, gradients = net(), Gradients()
    assert gradients.save(model) is None
    step(model, sgd(model["student"], model["teacher"]), gradients, "student")
    names = gradients.save(model)
    assert names == ["teacher.weight", "teacher.bias"]
    again, resumed = net(), Gradients()
    optimizer = sgd(again["student"], again["teacher"])
    resumed.load(names, again, [optimizer])
    assert resumed.never == {id(p) for p in again["teacher"].parameters()}
    step(again, optimizer, resumed, "student", "teacher")
    assert resumed.never == set()
    empty = Gradients()
    empty.load(None, again, [optimizer])
    assert empty.save(again) is None
