"""Push dead units upward in the backward pass alone, where nothing is known of a site but its rectifier's calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_deadrelu.model.rectifiers import SELECTIONS, Rectifier
from lightning_deadrelu.model.sites import Site
from lightning_deadrelu.observe.probe import Probe
from lightning_deadrelu.observe.subscribers import RectifierCallTaker
from lightning_deadrelu.remedies import Push


@dataclass
class Waking:
    """One site's push, and how far it has come.

    Args:
        push: What is pushed, and how hard.
        step: Training batches since it began.
    """

    push: Push
    step: int = 0


class WakeUps:
    """The sites whose dead units are being pushed upward.

    In training batches a second probe finds the rectifiers' calls, and hangs a hook on each one's node of the autograd
    graph: it adds to the gradient of the rectifier's input. No forward is changed, nothing is written, and what the
    push does passes through the optimizer like any other gradient. Compiled code runs eagerly meanwhile.

    Args:
        model: The model.
        unit_dims: See :class:`~lightning_deadrelu.observe.probe.Probe`.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model, site = nn.Sequential(nn.Linear(3, 2), nn.ReLU()), Site("1", False, "relu", ("0.bias", "0.weight"), 2)
        >>> _ = nn.init.constant_(model[0].bias, -9.0)
        >>> wake_ups = WakeUps(model, {})
        >>> wake_ups.add("1", Push(torch.tensor([True, False]), steps=1))
        >>> wake_ups.begin({site: "1"})
        >>> loss = model(torch.ones(5, 3)).mean()
        >>> wake_ups.end()
        >>> loss.backward()
        >>> model[0].bias.grad
        tensor([-0.5000,  0.0000])
        >>> wake_ups.advance()
        ['1']
    """

    def __init__(self, model: nn.Module, unit_dims: Mapping[str, int]) -> None:
        self._probe = Probe(model, _nothing, unit_dims)
        self._wakings: dict[str, Waking] = {}
        self._looks = False  # from a batch's begin to its end

    @property
    def sites(self) -> list[str]:
        """The names of the sites whose units are being pushed."""
        return list(self._wakings)

    def add(self, site: str, push: Push) -> None:
        """Push units of a site from the next batch on, in place of what was pushed before."""
        self._wakings[site] = Waking(push)

    def begin(self, names: Mapping[Site, str]) -> None:
        """Look for the sites' calls; to be called before each training batch.

        Args:
            names: Of the sites.
        """
        if self._wakings:
            self._probe.router.subscribe_calls(_Pusher(self._wakings, names))
            self._probe.arm()
            self._looks = True

    def pause(self) -> None:
        """Look no more, once the forward is over; compiled code goes on running eagerly for its backward."""
        self._probe.pause()

    def end(self) -> None:
        """Look no more; harmless when nothing is being looked for."""
        if self._looks:
            self._probe.disarm()
            self._looks = False

    def advance(self) -> list[str]:
        """Go on by one training batch.

        Returns:
            The names of the sites that are pushed no longer.

        Raises:
            RuntimeError: The calls of rectifiers could not be followed.
        """
        if self._wakings and (error := self._probe.failure):
            raise RuntimeError(f"the calls of rectifiers could not be followed: {error!r}") from error
        for waking in self._wakings.values():
            waking.step += 1
        return self.drop([site for site, waking in self._wakings.items() if waking.step >= waking.push.steps])

    def settle(self, firing_rates: Mapping[str, Tensor]) -> list[str]:
        """Stop to push sites of which all units fire on more than half of the share that is asked for.

        Args:
            firing_rates: Of sites' units, shape ``(units,)``, over a window.

        Returns:
            The names of the sites that are pushed no longer.
        """
        pushes = {site: self._wakings[site].push for site in firing_rates}
        slowest = {site: float(firing_rates[site][push.units].min()) for site, push in pushes.items()}
        return self.drop([site for site, push in pushes.items() if slowest[site] > push.firing_rate / 2])

    def drop(self, sites: list[str]) -> list[str]:
        """Stop to push some sites.

        Returns:
            The names of those that were pushed.
        """
        return [site for site in sites if self._wakings.pop(site, None)]

    @property
    def state(self) -> dict[str, Waking]:
        """What is under way."""
        return dict(self._wakings)

    def restore(self, state: Mapping[str, Waking]) -> None:
        """Go on where :attr:`state` was read."""
        self._wakings = dict(state)


class _Pusher(RectifierCallTaker):
    def __init__(self, wakings: Mapping[str, Waking], names: Mapping[Site, str]) -> None:
        self._pushes = {site: wakings[name].push for site, name in names.items() if name in wakings}

    def take(self, site: Site, rectifier: Rectifier, dims: tuple[int, ...], x: Tensor, output: Tensor) -> None:
        if site in self._pushes:
            push_(self._pushes[site], x, output, dims, None if rectifier.kind in SELECTIONS else rectifier.hinge)


def push_(push: Push, x: Tensor, output: Tensor, dims: tuple[int, ...], hinge: float | None = 0.0) -> None:
    """Have a rectifier's backward add an upward gradient to the inputs of units that fire too seldom.

    The gradient is the same for all inputs of a unit. Their sum is that of a typical unit, before the rectifier cuts it
    off: the median over the site's units of the sum of the output gradient's absolute values; where units are selected,
    the mean over those that were, of what they get. So it goes along with
    whatever scales the loss (accumulation, loss scaling), and with how much there is left to learn.

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


def _nothing(site: Site, rectifier: Rectifier, x: Tensor, out: Tensor, dims: tuple[int, ...]) -> None:
    """Count nothing."""
