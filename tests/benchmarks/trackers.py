"""What other trackers compute, written anew from what they document, as callbacks that time can be taken of.

Each stays at its own defaults, but looks at every step. Where the original does more, it is said; what is
left out would only cost more.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from lightning.pytorch import Callback
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

clock: Callable[[], float] = time.perf_counter
"""What time is taken by; ``time.process_time`` leaves out what other programs take."""


class Tracker(Callback, ABC):
    """Hook the modules that are chosen, while attached, and add up the time spent in the hooks."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.told: dict[str, list[float]] = defaultdict(list)
        self._handles: list[RemovableHandle] = []

    @abstractmethod
    def chosen(self, model: nn.Module) -> Iterable[tuple[str, nn.Module]]:
        """Name the modules to hook."""

    @abstractmethod
    def see(self, name: str, args: tuple[Any, ...], output: Any) -> None:
        """Take a call of one of them."""

    def attach(self, model: nn.Module) -> None:
        self._handles = [module.register_forward_hook(self._hook(name)) for name, module in self.chosen(model)]

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            start = clock()
            self.see(name, args, output)
            self.seconds += clock() - start

        return hook

    def tell(self, name: str, *values: Tensor) -> None:
        self.told[name] = [value.item() for value in values]  # each waits for the device


class ZeroShare(Tracker):
    """The usual hook: the share of zeros in each rectifier's output, as a Python number.

    As gradlens 0.2.0 does (``hooks.py``, an ``.item()`` in each forward), and many a notebook.
    """

    def chosen(self, model: nn.Module) -> Iterable[tuple[str, nn.Module]]:
        return [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ReLU)]

    def see(self, name: str, args: tuple[Any, ...], output: Any) -> None:
        self.tell(name, (output <= 0).float().mean())


class ActivationStats(Tracker):
    """Mean, standard deviation and the share of near zeros of each layer's output.

    fastai's callback of this name (``callback/hook.py``): layers that have parameters, near zero is at most 0.05.
    It also copies inputs and outputs to the host, keeps all numbers, and makes histograms where asked to.
    """

    def chosen(self, model: nn.Module) -> Iterable[tuple[str, nn.Module]]:
        leaves = [(name, module) for name, module in model.named_modules() if not [*module.children()]]
        return [(name, module) for name, module in leaves if [*module.parameters()]]

    def see(self, name: str, args: tuple[Any, ...], output: Any) -> None:
        out = output.detach().float()
        self.tell(name, out.mean(), out.std(), (out <= 0.05).float().mean())


class ActivationMonitor(Tracker):
    """L2 norm, mean, kurtosis and maximum of the inputs and outputs of every module, containers too.

    Composer's callback of this name (``callbacks/activation_monitor.py``): over the last dimension, then the
    mean of these. It takes a tensor that a module returns apart along its first dimension, and tells four numbers for
    each part.
    """

    def chosen(self, model: nn.Module) -> Iterable[tuple[str, nn.Module]]:
        return list(model.named_modules())

    def see(self, name: str, args: tuple[Any, ...], output: Any) -> None:
        outputs = output if isinstance(output, (list, tuple)) else (output,)
        for place, value in enumerate((*args, *outputs)):
            if isinstance(value, Tensor) and value.is_floating_point():
                value = value.detach()
                norm = torch.linalg.vector_norm(value, dim=-1).mean()
                self.tell(f"{name}.{place}", norm, value.mean(), _kurtosis(value), value.amax(-1).mean())


def _kurtosis(x: Tensor) -> Tensor:
    """Fourth central moment over the squared variance, of the last dimension."""
    deviation = x - x.mean(-1, keepdim=True)
    variance = deviation.pow(2).mean(-1)
    return (deviation.pow(4).mean(-1) / variance**2).mean()


TRACKERS = {
    "zero share, .item() per layer": ZeroShare,
    "fastai ActivationStats": ActivationStats,
    "Composer ActivationMonitor": ActivationMonitor,
}
