"""What a remedy is shown, made up."""

import dataclasses

import torch

from lightning_deadrelu.attribution.result import Attribution
from lightning_deadrelu.model.slices import Slice
from lightning_deadrelu.remedies import LEVELS, InitDistribution, SiteView
from lightning_deadrelu.statistics import SiteReport


def rows(name, role, count, dims=(0,)):
    return Slice(name, role, torch.arange(count), torch.arange(count)[:, None], dims)


def report_of(dead, frozen=None, peak=None):
    units = len(dead)
    frozen = torch.zeros(units, dtype=torch.bool) if frozen is None else frozen
    fields = {field.name: torch.zeros(units, dtype=torch.bool) for field in dataclasses.fields(SiteReport)}
    fields |= {name: torch.zeros(units) for name in ("dormancy", "fired")}
    fields |= {"name": "act", "kind": "relu", "units": units, "samples": 9, "elements": 9}
    fields |= {"trainable": True, "smooth": False, "dead": dead, "silent": dead, "frozen": frozen}
    fields |= {"age": torch.zeros(units, dtype=torch.int64), "blind_fraction": 0.0}
    fields |= {"peak": torch.where(dead, -1.0, 1.0) if peak is None else peak}
    return SiteReport(**fields)


def view_of(attribution, dead, values, laws, frozen=None, quantiles=None, peak=None):
    units = dead if frozen is None else dead | frozen
    if quantiles is None:
        quantiles = torch.full((len(LEVELS), len(dead)), torch.nan, dtype=torch.float64)
    return SiteView(report_of(dead, frozen, peak), units, attribution, values, laws, quantiles)


def layer(units=6, width=4, bias=True, norm=False):
    """Values, laws and attribution of a layer that was trained away from its laws."""
    values = {"fc.weight": torch.full((units, width), 0.3), "head.weight": torch.randn(3, units)}
    laws = {"fc.weight": InitDistribution(0.0, 0.5, True)}
    incoming = [rows("fc.weight", "weight", units)]
    if bias:
        values["fc.bias"], laws["fc.bias"] = torch.full((units,), -9.0), InitDistribution(0.25, 0.0, False)
        incoming.append(rows("fc.bias", "bias", units))
    if norm:
        for name, role in (("weight", "scale"), ("bias", "shift"), ("mean", "mean"), ("var", "variance")):
            values[f"bn.{name}"] = torch.full((units,), -3.0)
            laws[f"bn.{name}"] = InitDistribution(0.0, 0.0, False)
            incoming.append(rows(f"bn.{name}", role, units))
    return values, laws, Attribution(tuple(incoming), (rows("head.weight", "reader", units, (1,)),))


def mask(*flags):
    return torch.tensor(flags, dtype=torch.bool)


DEAD = mask(0, 1, 0, 1, 0, 0)


def normal_quantiles(units, mean, std):
    inside = torch.tensor(LEVELS, dtype=torch.float64).clamp(1e-4, 1 - 1e-4)
    return (mean + std * torch.special.ndtri(inside))[:, None].repeat(1, units)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def site(dead=(), units=10, name="fc", age=10_000, frozen=(), trainable=True, usual_rate=0.5, seen=10**7):
    def mask(numbers):
        return torch.tensor([unit in numbers for unit in range(units)])

    silent, off = mask(dead), mask(())
    masks = dict.fromkeys(("rare", "always_on", "dormant", "nonfinite", "born_dead", "newly_dead"), off)
    masks |= dict.fromkeys(("revived", "redied"), off)
    ages = torch.where(silent, age, 0)
    number = torch.zeros(units, dtype=torch.float64)
    return SiteReport(
        name, "relu", units, 1000, 1000, 0.0, trainable, False, dead=silent & (ages >= 299), silent=silent,
        frozen=mask(frozen), judged=~off, fired=number, peak=number, dormancy=number, age=ages,
        fired_ever=number + usual_rate * seen, seen=number + seen, last_fired=ages, projection=number, **masks,
    )  # fmt: skip
