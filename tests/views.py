"""What a remedy is shown, made up."""

import dataclasses

import torch

from lightning_deadrelu.model.slices import Slice
from lightning_deadrelu.remedies import LEVELS, SiteView
from lightning_deadrelu.statistics import SiteReport


def rows(name, role, count, dims=(0,)):
    return Slice(name, role, torch.arange(count), torch.arange(count)[:, None], dims)


def report_of(dead, frozen=None, peak=None):
    units = len(dead)
    frozen = torch.zeros(units, dtype=torch.bool) if frozen is None else frozen
    fields = {field.name: torch.zeros(units, dtype=torch.bool) for field in dataclasses.fields(SiteReport)}
    fields |= {name: torch.zeros(units) for name in ("firing_rate", "dormancy")}
    fields |= {"name": "act", "kind": "relu", "units": units, "samples": 9, "elements": 9}
    fields |= {"trainable": True, "smooth": False, "dead": dead, "silent": dead, "frozen": frozen}
    fields |= {"age": torch.zeros(units, dtype=torch.int64)}
    fields |= {"peak": torch.where(dead, -1.0, 1.0) if peak is None else peak}
    return SiteReport(**fields)


def view_of(attribution, dead, values, laws, frozen=None, quantiles=None, peak=None):
    units = dead if frozen is None else dead | frozen
    if quantiles is None:
        quantiles = torch.full((len(LEVELS), len(dead)), torch.nan, dtype=torch.float64)
    return SiteView(report_of(dead, frozen, peak), units, attribution, values, laws, quantiles)
