"""Parameters go by the names that their model gives them."""

import torch
from torch import nn

from lightning_deadrelu.model.parameters import ParameterNames


def test_a_tied_parameter_has_its_first_name() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    assert ParameterNames(model).find(model[1].weight) == "0.weight"
    assert ParameterNames(model).find(torch.ones(2, 2)) is None
