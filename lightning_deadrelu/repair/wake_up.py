"""Push dead units upward in the backward pass alone, where nothing is known of a site but its rectifier's calls."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_deadrelu.model.rectifiers import SELECTIONS, Rectifier
from lightning_deadrelu.model.sites import Site
from lightning_deadrelu.observe.probe import Probe
from lightning_deadrelu.observe.subscribers import RectifierCallTaker
from lightning_deadrelu.remedies import Push
from lightning_deadrelu.repair.scheduled_edit import ScheduledEdit


@dataclass(kw_only=True, eq=False)
class ScheduledPush(ScheduledEdit):
    """A site whose dead units are being pushed upward.

    Args:
        push: What is pushed, and how hard.
        place: The site.
    """

    push: Push
    place: Site

    undone: ClassVar[str] = "its push was stopped"

    def has_woken(self, firing_rate: Tensor) -> bool:
        """Tell whether all its units fire on more than half of the share that is asked for.

        Args:
            firing_rate: Of the site's units over a window, shape ``(units,)``.
        """
        return float(firing_rate[self.push.units].min()) > self.push.firing_rate / 2


class PushProbe(RectifierCallTaker):
    """Finds the rectifiers' calls in training batches, and has their backward push dead units upward.

    It hangs a hook on each call's node of the autograd graph, which adds to the gradient of the rectifier's input. No
    forward is changed, nothing is written, and what the push does passes through the optimizer like any other
    gradient. Compiled code runs eagerly meanwhile.
    """

    def __init__(
        self,
        model: nn.Module,
        unit_dims: Mapping[str, int] = MappingProxyType({}),
        observes: Callable[[], bool] = lambda: True,
    ) -> None:
        self._probe = Probe(model, lambda *call: None, unit_dims)
        self._probe.router.observes = observes
        self._pushes: dict[Site, Push] = {}
        self._looks = False  # from a batch's begin to its end

    def arm(self, pushes: Iterable[ScheduledPush]) -> None:
        """Look for the sites' calls, before a training batch."""
        self._pushes = {one.place: one.push for one in pushes}
        if self._pushes:
            self._probe.router.subscribe_calls(self)
            self._probe.arm()
            self._looks = True

    def pause(self) -> None:
        """Look no more, once the forward is over; compiled code goes on running eagerly for its backward."""
        self._probe.pause()

    def disarm(self) -> None:
        """Look no more; harmless when nothing is being looked for."""
        if self._looks:
            self._probe.disarm()
            self._looks = False

    def check(self) -> None:
        """Raise what has kept the probe from finding calls.

        Raises:
            RuntimeError: The calls of rectifiers could not be followed.
        """
        if self._pushes and (error := self._probe.failure):
            raise RuntimeError(f"the calls of rectifiers could not be followed: {error!r}") from error

    @override
    def take(self, site: Site, rectifier: Rectifier, dims: tuple[int, ...], x: Tensor, output: Tensor) -> None:
        if site in self._pushes:
            push_(self._pushes[site], x, output, dims, None if rectifier.kind in SELECTIONS else rectifier.hinge)


def push_(push: Push, x: Tensor, output: Tensor, dims: tuple[int, ...], hinge: float | None = 0.0) -> None:
    """Have a rectifier's backward add an upward gradient to the inputs of units that fire too seldom.

    The gradient is the same for all inputs of a unit. Their sum is that of a typical unit, before the rectifier cuts it
    off: the median over the site's units of the sum of the output gradient's absolute values; where units are selected,
    the mean over those that were, of what they get. So it goes along with whatever scales the loss (accumulation, loss
    scaling), and with how much there is left to learn.

    Args:
        push: Which units, until they fire on which share of a batch, and how hard.
        x: The rectifier's input.
        output: What it put out, with a graph.
        dims: The dimensions of the input that hold the units, counted from the end.
        hinge: What an input has to exceed to fire; None where units are selected, and fire if they put out something.
    """
    if not (x.requires_grad if hinge is None else output.grad_fn):
        return
    others = [dim for dim in range(-x.ndim, 0) if dim not in dims]
    with torch.no_grad():
        fires = output.detach() != 0 if hinge is None else x.detach() > hinge  # of an output written in place the same
        rate = fires.float().mean(others, keepdim=True) if others else fires.float()
        asleep = (rate < push.firing_rate) & push.units.to(x.device).view(rate.shape)
    each = push.strength * rate.numel() / x.numel()

    def pushed(own: Tensor, typical: Tensor) -> Tensor:
        return own - asleep * (each * typical).to(own.dtype)

    def sizes(gradient: Tensor) -> Tensor:
        return gradient.abs().sum(others) if others else gradient.abs()

    def push_selected(own: Tensor) -> Tensor:
        size = sizes(own)
        return pushed(own, size.sum() / (size > 0).sum().clamp(min=1))

    if hinge is None:  # several calls lead from one to the other
        x.register_hook(push_selected)
    else:
        _hook_node(output.grad_fn, lambda own, above: pushed(own, sizes(above).median()))


def _hook_node(node: Any, change: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Have the gradient of a function's first input changed, given that and the output's; nothing where it has none."""
    if not node.next_functions:
        return
    place = next((number for number, (behind, _) in enumerate(node.next_functions) if behind is not None), 0)

    def hook(inputs: tuple[Tensor | None, ...], outputs: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...] | None:
        own, above = inputs[place], outputs[0]
        if own is None or above is None or own.shape != above.shape:
            return None
        return (*inputs[:place], change(own, above), *inputs[place + 1 :])

    node.register_hook(hook)
