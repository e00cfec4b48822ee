"""Check a model before it is trained for what kills rectified units."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_deadrelu.explain.checkup.examination import CheckRun
from lightning_deadrelu.explain.finding import Finding
from lightning_deadrelu.observe.audit import run
from lightning_deadrelu.observe.watch import Watch

__all__ = ["CheckRun", "checkup"]


def checkup(
    model: nn.Module,
    optimizers: Optimizer | Sequence[Optimizer],
    batch: Any,
    *,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    clipped: bool = False,
    scheduled: bool = False,
) -> tuple[Finding, ...]:
    """Say what in a model and its optimizers is going to kill units, on the evidence of one batch.

    The batch runs once, in the mode the model is in; parameters, buffers, modes, gradients and random numbers are as
    before. Nothing is said without evidence. The figures of the learning rate of SGD need a gradient: let ``forward``
    return the loss. Unless an optimizer has made a step already, weights are taken for freshly drawn.

    Args:
        model: Any module.
        optimizers: What is going to train it, at the learning rate of the first step; may be empty.
        batch: One batch of training data, as for :func:`find_dead_units`; at least 29 samples tell who is dead.
        forward: Called as ``forward(model, batch)``, as for :func:`find_dead_units`; may return a scalar loss.
        clipped: Whether gradients are going to be clipped.
        scheduled: Whether the learning rate has a schedule.

    Returns:
        What was found, the surest first; empty if nothing is wrong.

    Raises:
        RuntimeError: If the batch could not be watched.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 1))
        >>> _ = nn.init.constant_(model[0].bias, -10.0)
        >>> [finding.cause for finding in checkup(model, [], torch.rand(64, 4))]
        ['negative_bias']
    """
    trained = [optimizers] if isinstance(optimizers, Optimizer) else list(optimizers)
    watch, check_run = Watch(model), CheckRun()
    check_run.begin(watch)
    run(watch, model, batch, forward, lambda output: check_run.measure(model, *_gradients(model, output)))
    fresh = not any(optimizer.state for optimizer in trained)
    findings = check_run.conclude(watch, model, trained, clipped=clipped, scheduled=scheduled, fresh=fresh)
    if check_run.error:
        raise RuntimeError("The check-up itself failed; the model ran through.") from check_run.error
    return findings


def _gradients(model: nn.Module, output: Any) -> tuple[list[Tensor], dict[int, Tensor | None] | None]:
    """Take the gradients of a loss, apart from those that the parameters hold."""
    parameters: list[Tensor] = list(model.parameters())
    if not isinstance(output, Tensor) or output.numel() != 1 or not output.requires_grad:
        return parameters, None
    learning = [parameter for parameter in parameters if parameter.requires_grad]
    gradients = torch.autograd.grad(output.sum(), learning, allow_unused=True)
    return parameters, {id(p): gradient for p, gradient in zip(learning, gradients, strict=True)}
