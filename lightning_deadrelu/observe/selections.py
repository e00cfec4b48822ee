"""Find where a model keeps some activations and makes zeros of the others, as sparse autoencoders do.

A selection is no function of torch, but several in a row: ``topk`` and ``scatter`` into zeros, over each sample or over
a whole batch that was laid flat; or a comparison, and the product of a tensor with its own.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_deadrelu.model.rectifiers import Rectifier
from lightning_deadrelu.model.torch_calls import (
    ABOVE,
    CHOICES,
    IDENTITIES,
    RESHAPES,
    Call,
    TensorTable,
    tensors_in,
)
from lightning_deadrelu.observe.provenance import Provenance
from lightning_deadrelu.observe.tensor_origins import TensorOrigins
from lightning_deadrelu.observe.torch_modes import no_caching_modes, plain_tensor, unseen_by_modes

_NEED_A_MASK = IDENTITIES | {"mul"}


class Selected(NamedTuple):
    """A selection that has run.

    Args:
        rectifier: Names its kind.
        x: What was selected from; the output itself where that is gone.
        values: Above zero where a unit put out something other than zero, and how much; elsewhere, how far it was below
            what was selected, or zero where that is not known.
    """

    rectifier: Rectifier
    x: Tensor
    values: Tensor


class _Choice(NamedTuple):
    """What ``topk`` chose from: a tensor, or the one of which that is another shape."""

    x: weakref.ref[Tensor]
    known: Provenance | None
    shape: torch.Size
    dims: tuple[int, ...]
    """Along which the elements compete."""
    flat: torch.Size | None
    """The other shape."""

    @property
    def kind(self) -> str:
        return "batch_topk" if len(self.dims) == len(self.shape) > 1 else "topk"


class _Mask(NamedTuple):
    """Which elements of a tensor are kept: those above a threshold, or where there is none, those that were chosen."""

    x: weakref.ref[Tensor]
    threshold: Tensor | float | None


class Selections:
    """What is known of the selections of a batch.

    Args:
        origins: Knows which tensors hold nothing but zeros.

    Example:
        >>> from torch import nn
        >>> selections, x = Selections(TensorOrigins(nn.ReLU())), torch.tensor([[3.0, -1.0]])
        >>> mask = x > 2
        >>> selections.find("gt", (x, 2), {}, mask)
        >>> found = selections.find("mul", (x, mask), {}, x * mask)
        >>> found.rectifier.kind, found.values
        ('jumprelu', tensor([[ 3., -3.]]))
    """

    def __init__(self, origins: TensorOrigins) -> None:
        self._origins = origins
        self._choices: TensorTable[_Choice] = TensorTable(versions=False)
        self._masks: TensorTable[_Mask] = TensorTable(versions=False)
        self._reshaped: TensorTable[weakref.ref[Tensor]] = TensorTable(versions=False)
        self._rectified: TensorTable[weakref.ref[Tensor]] = TensorTable(versions=False)
        self._masked: TensorTable[bool] = TensorTable(versions=False)

    def forget(self) -> None:
        """Let go of the tensors of a batch."""
        for table in (self._choices, self._masks, self._reshaped, self._rectified, self._masked):
            table.clear()

    def note_rectified(self, x: Tensor, output: Tensor) -> None:
        """Note what a rectifier made of a tensor, which may be the product's factor in its place."""
        self._rectified.put(output, weakref.ref(x))

    def is_chosen(self, x: Tensor) -> bool:
        """Tell whether a tensor was put out by ``topk``: a rectifier of it belongs to the selection."""
        return self._choices.get(x) is not None

    def find(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any], output: Any) -> Selected | None:
        """Take a call that has run, and tell whether a selection ends with it.

        Args:
            name: The function's plain name.
            args: Its positional arguments.
            kwargs: Its keyword arguments.
            output: What it returned.
        """
        if name in _NEED_A_MASK and not self._masks:  # as in most models
            return None
        outputs = tensors_in([output] if isinstance(output, Tensor) else output)
        if not outputs:
            return None
        call = Call(name, args, kwargs, outputs)
        return _RULES[call.name](self, call) if call.operands else None

    # -- topk

    def _note_choice(self, call: Call) -> None:
        """Remember what ``topk`` chose, unless it is the lowest, or among units that were masked: an auxiliary loss."""
        x, dim = call.operands[0], call.argument(2, "dim", -1)
        if not call.argument(3, "largest", True) or self._masked.get(x) or not x.ndim:
            return
        whole = self._whole(x)
        flat = None if whole is x else x.shape
        first = dim % x.ndim - x.ndim if flat is None else x.ndim - whole.ndim - 1
        dims = (first,) if flat is None else tuple(range(first, 0))  # those that are one in the other shape
        known = self._origins.of(whole)
        choice = _Choice(weakref.ref(whole), known, whole.shape, dims, flat)
        for tensor in call.outputs:
            self._choices.put(tensor, choice)

    def _whole(self, x: Tensor) -> Tensor:
        """Find what a tensor is another shape of, if its last dimensions were joined; else the tensor."""
        reference = self._reshaped.get(x)
        whole = reference() if reference else None
        if whole is None or whole.shape[: x.ndim - 1] != x.shape[:-1]:
            return x
        return whole if x.ndim == 1 or x.shape[-1] != whole.shape[-1] else x

    def _scatter(self, call: Call) -> Selected | None:
        index, output = call.argument(2, "index"), call.output
        choice = self._choices.get(index) if isinstance(index, Tensor) else None
        if choice is None or output.shape != (choice.flat or choice.shape) or not self._was_zero(call):
            return None
        dims = choice.dims if choice.flat is None else (-1,)
        if call.argument(1, "dim") % output.ndim - output.ndim != dims[0] or len(dims) > 1:
            return None
        source = call.argument(3, "src", call.kwargs.get("value"))
        if not isinstance(source, Tensor) or not source.is_floating_point():
            if choice.flat is None:
                self._masks.put(output, _Mask(choice.x, None))
            return None
        if choice.flat is None:
            return self._selected(choice, output)
        self._choices.put(output, choice)
        return None

    def _was_zero(self, call: Call) -> bool:
        """Whether what was written into held nothing but zeros before."""
        base = call.operands[0]
        return self._origins.was_zero(base, writes=int(base is call.output))

    def _reshape(self, call: Call) -> Selected | None:
        x = call.operands[0]
        choice = self._choices.get(x)
        if choice is not None and call.output.shape == choice.shape and x.shape == choice.flat:
            return self._selected(choice, call.output)
        if x.ndim > call.output.ndim and call.output is not x:
            self._reshaped.put(call.output, weakref.ref(x))
        return None

    def _selected(self, choice: _Choice, output: Tensor) -> Selected:
        x = choice.x()
        if x is None:
            self._origins.remember(output, choice.known)
            return Selected(Rectifier(choice.kind), output, _values(output, output, choice.dims))
        return Selected(Rectifier(choice.kind), x, _values(x, output, choice.dims))

    # -- comparisons

    def _compare(self, call: Call) -> None:
        """Remember which elements of a tensor are above a threshold, if that is not another tensor of samples."""
        sides = [call.argument(0, "input"), call.argument(1, "other")]
        x, threshold = sides if call.name in ABOVE else sides[::-1]
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.shape != call.output.shape or not x.ndim:
            return
        if not isinstance(threshold, Tensor) or threshold.numel() < x.numel() or threshold.numel() == x.shape[-1]:
            self._masks.put(call.output, _Mask(weakref.ref(x), threshold))

    def _cast(self, call: Call) -> None:
        if mask := self._masks.get(call.operands[0]):
            self._masks.put(call.output, mask)

    def _multiply(self, call: Call) -> Selected | None:
        if len(call.operands) != 2:
            return None
        one, other = call.operands
        return self._gated(one, other, call.output) or self._gated(other, one, call.output)

    def _gated(self, factor: Tensor, gate: Tensor, output: Tensor) -> Selected | None:
        mask = self._masks.get(gate)
        x = mask.x() if mask else None
        if mask is None or x is None or output.shape != x.shape or not self._is_own(factor, x):
            return None
        kind = "topk" if mask.threshold is None else "jumprelu"
        return Selected(Rectifier(kind), x, _values(x, output, (-1,), mask.threshold))

    def _is_own(self, factor: Tensor, x: Tensor) -> bool:
        before = self._rectified.get(factor)
        return factor is x or (before is not None and before() is x)

    def _where(self, call: Call) -> Selected | None:
        """Take ``where(x > threshold, x, 0)`` for a product; what else is masked is noted."""
        mask, kept, rest = (call.argument(*place) for place in ((0, "condition"), (1, "input"), (2, "other")))
        tensors = isinstance(mask, Tensor) and isinstance(kept, Tensor)
        if tensors and (self._origins.is_zero(rest) or (not isinstance(rest, Tensor) and rest == 0)):
            return self._gated(kept, mask, call.output)
        self._note_masked(call)
        return None

    def _note_masked(self, call: Call) -> None:
        self._masked.put(call.output, True)


_Rule = Callable[[Selections, Call], Selected | None]
_RULES: dict[str, _Rule] = {
    **dict.fromkeys(RESHAPES, Selections._reshape),
    **dict.fromkeys(IDENTITIES, Selections._cast),
    **dict.fromkeys(CHOICES, Selections._compare),
    "topk": Selections._note_choice,
    "scatter": Selections._scatter,
    "mul": Selections._multiply,
    "where": Selections._where,
    "masked_fill": Selections._note_masked,
}


def _values(x: Tensor, output: Tensor, dims: tuple[int, ...], threshold: Tensor | float | None = None) -> Tensor:
    """Tell who was selected by what it put out, and of the others how far they were from it; see :class:`Selected`.

    Args:
        x: What was selected from.
        output: What was put out.
        dims: The dimensions along which the elements competed.
        threshold: What had to be exceeded; None for the least of those that put out something.
    """
    before, out = plain_tensor(x), plain_tensor(output)
    if before is None or out is None:
        return x
    with torch.no_grad(), unseen_by_modes(), no_caching_modes():
        fires = out != 0
        if threshold is None:
            least = torch.where(fires, before, math.inf).amin(dims, keepdim=True)
            threshold = least.masked_fill(least == math.inf, 0.0)
        return torch.where(fires, out.abs(), (before - threshold).clamp(max=0).to(out.dtype))
