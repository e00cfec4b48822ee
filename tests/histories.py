"""Runs made up for tests of what shows them: units die, some are reset, and most of those fire again."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from lightning_deadrelu import LivenessReport, SiteReport, UnitLiveness, find_dead_units
from lightning_deadrelu.attribution import Attributions
from lightning_deadrelu.attribution.result import Attribution
from lightning_deadrelu.repair.event import Event
from lightning_deadrelu.report.raster import Raster
from lightning_deadrelu.report.run_report import RunReport

SHORT, LONG = "layer{}.relu", "model.backbone.encoder.stages.{}.residual_branch.activation.relu"


def site_of(name: str, dead: Tensor, before: Tensor | None = None) -> SiteReport:
    """Make a verdict on a site of which some units are dead."""
    liveness = UnitLiveness({name: len(dead)})
    rows = torch.randn(400, len(dead))
    rows[:, ::17] = (rows[:, ::17] - 2.6).clamp(max=0.5)  # rare
    rows[:, dead] = -1.0 - torch.rand(400, int(dead.sum()))
    liveness.update(rows)
    site = liveness.report().sites[0]
    if before is None:
        return site
    return replace(site, newly_dead=site.dead & ~before, revived=~site.dead & before)


def run_of(sites: int, windows: int = 40, units: int = 48, pattern: str = SHORT, every: int = 50) -> RunReport:
    """Make up a run; of the sites one in four loses units, the more the deeper it is."""
    random = torch.Generator().manual_seed(0)
    raster, events = Raster(), []
    names = [pattern.format(number) for number in range(sites)]
    ends = [torch.rand(units, generator=random) * windows * 1.6 for _ in names]
    ends = [end if n % 4 == 1 % sites else torch.full_like(end, 1e9) for n, end in enumerate(ends)]
    dead = [torch.zeros(units, dtype=torch.bool) for _ in names]
    for window in range(windows):
        step, edited, found = (window + 1) * every - 1, {}, []
        for number, (name, end) in enumerate(zip(names, ends, strict=True)):
            found.append(site_of(name, end <= window, dead[number]))
            dead[number] = end <= window
            if number % 8 == 1 % sites and window in (windows // 2, windows * 4 // 5) and dead[number].any():
                edited[name] = dead[number].nonzero().flatten().tolist()
                reason = f"{len(edited[name])} of {units} units are dead"
                events.append(Event(step, name, "edited", "Reset", tuple(edited[name]), reason, 0.3))
                end[edited[name][1:]] = 1e9  # the first is not helped
        report = LivenessReport(tuple(found), step, {"head.relu": "it has not run"})
        raster.add(report, edited)
    no = "feeds are shared by 2 layers: <b>`conv1`</b>"
    known = {name: Attribution(no_incoming=no if number == 0 else "") for number, name in enumerate(names)}
    events.append(Event(step, names[0], "refused", "Reset", reason="its parameters are sharded"))
    return RunReport(report, raster, tuple(events), Attributions(known))


def audit(units=8, name="act"):
    torch.manual_seed(units)
    layer = nn.Linear(2, units)
    found = find_dead_units(nn.Sequential(layer, nn.ReLU()), [torch.rand(300, 2)])
    return replace(found.sites[0], name=name)


NONE = dict.fromkeys(("dead", "silent", "rare", "always_on", "frozen", "dormant", "nonfinite", "judged"), ())


def site(units=8, name="act", **masks):
    """A site report with the units listed in each mask."""
    base, marks = audit(units, name), {}
    for mask, marked in (NONE | {"judged": range(units)} | masks).items():
        marks[mask] = torch.zeros(units, dtype=torch.bool)
        marks[mask][list(marked)] = True
    return replace(base, **marks)


def report(*sites, step=0):
    return LivenessReport(sites, step)


def run(raster, *windows, name="act", units=8):
    """Add windows with the given units dead."""
    base = site(units, name)
    for dead in windows:
        mask = torch.zeros(units, dtype=torch.bool)
        mask[list(dead)] = True
        raster.add(report(replace(base, dead=mask), step=10 * raster.windows + 9))
    return raster
