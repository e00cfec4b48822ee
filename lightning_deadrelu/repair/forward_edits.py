"""What enters the forward for a time.

It is there during training batches alone, between :meth:`ForwardEdits.begin` and :meth:`ForwardEdits.end`.
What is copied, validated, averaged or exported between two batches is the model itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn

from lightning_deadrelu.model.rectifiers import Rectifier
from lightning_deadrelu.model.sites import clean
from lightning_deadrelu.repair.ongoing import BiasOffset, OffsetState, OngoingEdit, RampState, SlopeRamp

if TYPE_CHECKING:
    from lightning_deadrelu.attribution.result import Outlet
    from lightning_deadrelu.remedies.base import Warmth

_CALLED = ("forward", "training_step")


@dataclass
class ForwardEditsState:
    """What is under way, by kind."""

    offsets: list[OffsetState]
    ramps: list[RampState]


class ForwardEdits:
    """What enters a model's forward in training batches, and fades.

    Values change in :meth:`advance` alone, so that a forward recomputed in backward sees what the first one saw. They
    are computed from the number of batches that have passed, so that a resumed run goes on to the last bit. A site has
    one such edit at a time; a new one takes the place of the old.

    Example:
        >>> import torch
        >>> from lightning_deadrelu.remedies.base import Warmth
        >>> from lightning_deadrelu.attribution.result import Outlet
        >>> model, edits = nn.Sequential(nn.Linear(3, 2), nn.ReLU()), ForwardEdits()
        >>> edits.warm(model, "1", Outlet("0", torch.arange(2), -1), Warmth(torch.tensor([0.0, 5.0]), 2))
        >>> edits.begin(); edits.offset("1"); edits.end(); edits.advance()
        tensor([0., 5.])
        []
        >>> edits.offset("1"), edits.advance()
        (tensor([0.0000, 2.5000]), ['1'])
    """

    def __init__(self) -> None:
        self._edits: dict[str, OngoingEdit] = {}

    @property
    def sites(self) -> list[str]:
        """The names of the sites that have one."""
        return list(self._edits)

    @property
    def rectifiers(self) -> dict[str, Rectifier]:
        """By path, what the modules stand for that pass for rectifiers in training batches."""
        ramps = [edit for edit in self._edits.values() if isinstance(edit, SlopeRamp)]
        return {ramp.state.path: ramp.substitute.original.rectifier for ramp in ramps}

    def warm(self, model: nn.Module, site: str, outlet: Outlet, warmth: Warmth) -> None:
        """Add a constant to units' inputs from the next batch on: gamma times ``1 - k / steps`` in batch ``k``.

        Bias warming: the term is in the forward alone, where no optimizer, decay or average takes it up.

        Args:
            model: The model.
            site: The site's name.
            outlet: Where to add it.
            warmth: Gamma of each unit, shape ``(units,)``, and the training batches until it is gone.

        Raises:
            ValueError: If the model has no such module.
        """
        gamma, channels = _on_cpu(warmth.gamma), _on_cpu(outlet.channels)
        self.add(BiasOffset(OffsetState(site, outlet.path, gamma, warmth.steps, channels, outlet.dim), model))

    def ramp(self, model: nn.Module, site: str, path: str, slopes: Tensor, dims: Sequence[int], steps: int) -> None:
        """Give units a slope below the hinge from the next batch on, that rises to its value and falls back to 0.

        Args:
            model: The model.
            site: The site's name.
            path: Of the rectifier module.
            slopes: For each unit, shape ``(units,)``.
            dims: The dimensions of its input that hold the units, counted from the end.
            steps: Training batches until the rectifier is as it was.

        Raises:
            ValueError: If the model has no such module, or it is no rectifier of torch's.
        """
        self.add(SlopeRamp(RampState(site, path, _on_cpu(slopes), steps, tuple(dims)), model))

    def add(self, edit: OngoingEdit) -> None:
        """Take an edit up, in place of the one that its site may have."""
        self.drop([edit.state.site])
        self._edits[edit.state.site] = edit

    def begin(self) -> None:
        """Let the edits into the forward; to be called before each training batch."""
        for edit in self._edits.values():
            edit.enter()

    def end(self) -> None:
        """Take them out; to be called after each training batch. Harmless when they are out."""
        for edit in self._edits.values():
            edit.leave()

    def advance(self) -> list[str]:
        """Go on by one training batch.

        Returns:
            The names of the sites whose edit is over.
        """
        for edit in self._edits.values():
            edit.advance()
        return self.drop([site for site, edit in self._edits.items() if edit.is_over])

    def offset(self, site: str) -> Tensor | None:
        """Give the constant that is added to each unit's input now, shape ``(units,)``; None if there is none."""
        return self.offsets[site].value if site in self.offsets else None

    @property
    def offsets(self) -> dict[str, BiasOffset]:
        """The constants, by site."""
        return {site: edit for site, edit in self._edits.items() if isinstance(edit, BiasOffset)}

    def drop(self, sites: Iterable[str]) -> list[str]:
        """Drop the edits of some sites, and leave the model as it was; harmless where there are none.

        Returns:
            The names of the sites that had one.
        """
        dropped = [site for site in sites if site in self._edits]
        for site in dropped:
            self._edits.pop(site).leave()
        return dropped

    @property
    def state(self) -> ForwardEditsState:
        """What is under way."""
        states = [edit.state for edit in self._edits.values()]
        offsets = [state for state in states if isinstance(state, OffsetState)]
        return ForwardEditsState(offsets, [state for state in states if isinstance(state, RampState)])

    def restore(self, state: ForwardEditsState, model: nn.Module) -> None:
        """Go on where :attr:`state` was read.

        Args:
            state: What it was.
            model: The model.

        Raises:
            ValueError: If the model lacks a module that an edit goes to.
        """
        self.drop(self.sites)
        edits = [BiasOffset(one, model) for one in state.offsets] + [SlopeRamp(one, model) for one in state.ramps]
        for edit in edits:
            self.add(edit)


def _on_cpu(values: Tensor) -> Tensor:
    return values.detach().cpu().clone()


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
