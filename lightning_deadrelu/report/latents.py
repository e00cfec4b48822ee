"""What is told of latents, under the names that are usual for sparse autoencoders. Pure."""

from __future__ import annotations

import torch

from lightning_deadrelu.model.rectifiers import SELECTIONS, WATCHPOINT
from lightning_deadrelu.statistics import LivenessReport, SiteReport

SECTION = "sae"
_RARER_THAN = (1e-5, 1e-6)


def latents_of(report: LivenessReport) -> tuple[SiteReport, ...]:
    """List the sites that are selected or watched as latents; where there are none, all rectifiers."""
    hard = tuple(site for site in report.sites if not site.smooth)
    return tuple(site for site in hard if site.kind in SELECTIONS or site.kind == WATCHPOINT) or hard


def latent_metrics(report: LivenessReport, name: str = "dead_relu") -> dict[str, float]:
    """Turn a report into the scalars that SAELens logs and model cards of sparse autoencoders print.

    ``l0``, ``dead_features``, ``mean_log10_feature_sparsity``, ``below_1e-5``, ``below_1e-6`` and
    ``mean_passes_since_fired``. Densities are of the window. A latent that was silent in it is below a density only
    once it has been silent for as many samples as it takes to expect one firing: else a short window would make all
    seem rare. Passes are training batches, and as exact as ``every_n_steps``.

    Source: SAELens, ``sae_lens/training/sae_trainer.py``.
    """
    found: dict[str, float] = {}
    for site in latents_of(report):
        if site.elements:
            told = {"l0": site.l0, "dead_features": float(site.dead.sum())}
            told["mean_log10_feature_sparsity"] = float(site.log_density.mean())
            told |= {f"below_{share:.0e}".replace("e-0", "e-"): _below(site, share) for share in _RARER_THAN}
            told["mean_passes_since_fired"] = float((report.step - site.last_fired.double()).mean())
            found |= {f"{name}_{SECTION}/{site.name}/{key}": value for key, value in told.items()}
    return found


def _below(site: SiteReport, density: float) -> float:
    """Count the latents that fire on a smaller share of the samples, as far as that is known."""
    seldom = torch.where(site.fired > 0, site.firing_rate < density, site.age >= 1 / density)
    return float(seldom.sum())
