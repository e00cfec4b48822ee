"""A model in training, as far as its repair is concerned, and why a remedy cannot be applied to a site of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn
from torch.optim import Optimizer

from lightning_deadrelu.attribution.result import Attribution
from lightning_deadrelu.model.optimizer_groups import parameters_of
from lightning_deadrelu.model.parameters import tensors_of
from lightning_deadrelu.model.sites import Site, clean
from lightning_deadrelu.model.trainable import Gradients
from lightning_deadrelu.observe.ranks import Ranks
from lightning_deadrelu.observe.watch import Watch
from lightning_deadrelu.remedies import Remedy
from lightning_deadrelu.repair.activation_swap import no_module
from lightning_deadrelu.repair.writer import why_not

_CALLED = ("forward", "training_step")


@dataclass(frozen=True)
class TrainingContext:
    """A model in training, as far as its repair is concerned.

    Args:
        watch: What watches it.
        model: Whose parameters are edited.
        optimizers: What trains it.
        outer: What the Trainer calls, for instance a compiled model around it.
        gradients: Tells which parameters never get any.
        ranks: The processes that do the same.
    """

    watch: Watch
    model: nn.Module
    optimizers: Sequence[Optimizer]
    outer: nn.Module
    gradients: Gradients
    ranks: Ranks

    @property
    def trained(self) -> set[int]:
        """The ``id`` of each parameter that is trained."""
        held = set(map(id, parameters_of(*self.optimizers)))
        return (held - self.gradients.never) or held

    @property
    def unmet(self) -> frozenset[str]:
        """Names of weights in training that no traced batch has used: they may belong to readers that take turns."""
        weights = {clean(name) for name, p in self.model.named_parameters() if p.requires_grad and p.ndim > 1}
        return frozenset(weights - self.watch.tracer.known.used)

    def number(self, name: str) -> int:
        """Return the number of a site in the layout."""
        return self.watch.layout.number(name)

    def site(self, name: str) -> Site:
        """Return a site by its name."""
        return self.watch.layout.site(name)

    def obstacle(self, remedy: Remedy, site: str, attribution: Attribution) -> str:
        """Say why a remedy cannot be applied to a site; empty if it can."""
        untraced = "" if attribution.incoming else "what feeds it could not be traced"
        reasons = {
            "incoming": attribution.no_incoming or untraced,
            "outgoing": attribution.no_outgoing,
            "outlet": self.no_outlet(attribution),
            "module": self.no_module(site),
        }
        found = [reasons[need] for need in sorted(remedy.needs) if reasons[need]]
        names = edited_names(remedy, attribution)
        return "; ".join(dict.fromkeys(found)) or why_not(
            self.model, self.optimizers, names, self.trained | self._readers_for_nothing(attribution)
        )

    def _readers_for_nothing(self, attribution: Attribution) -> set[int]:
        """Return the ``id`` of each reader that no loss hears of, if others are trained: it may be edited."""
        tensors = tensors_of(self.model)
        readers = {id(tensors[one.name]) for one in attribution.outgoing if one.name in tensors}
        return readers & self.gradients.never if readers & self.trained else set()

    def no_module(self, site: str) -> str:
        """Say why another activation cannot take the place of a site's; empty if one can."""
        return no_module(self.model, self.site(site), self.watch.sites)

    def no_outlet(self, attribution: Attribution) -> str:
        """Say why no term can be added to a site's input; empty if one can."""
        if attribution.no_outlet:
            return attribution.no_outlet
        if attribution.outlet and is_compiled(self.outer, attribution.outlet.path):
            return "the model is compiled, and a compiler does not see a term that is added later"
        return ""


def edited_names(remedy: Remedy, attribution: Attribution) -> list[str]:
    """Name the parameters that a remedy writes to."""
    parts = [need for need in ("incoming", "outgoing") if need in remedy.needs]
    return sorted({one.name for part in parts for one in getattr(attribution, part)})


def is_compiled(model: nn.Module, path: str) -> bool:
    """Tell whether a module is compiled, or part of something that is: a hook that comes late is not seen there.

    Args:
        model: What the Trainer calls, which may be a wrapper around the model.
        path: The module's path, without prefixes of wrappers.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(3, 2), nn.ReLU())
        >>> is_compiled(model, "0"), is_compiled(torch.compile(model), "0")
        (False, True)
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    ends = [name for name in modules if clean(name) in (path, f"module.{path}")]
    above = {".".join(name.split(".")[:depth]) for name in ends for depth in range(len(name.split(".")) + 1)}
    return any(_is_compiled(modules[name]) for name in above)


def _is_compiled(module: nn.Module) -> bool:
    # torch's, then Lightning's
    ways = getattr(module, "_compiled_call_impl", None), getattr(module, "_compiler_ctx", None)
    functions = [getattr(module, name, None) for name in _CALLED]
    compiled = any(hasattr(function, "_torchdynamo_orig_callable") for function in functions)
    return compiled or type(module).__name__ == "OptimizedModule" or any(way is not None for way in ways)
