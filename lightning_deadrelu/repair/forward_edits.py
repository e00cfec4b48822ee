"""What enters the forward for a time: constants added to units' inputs, and slopes that come and go.

Both are there during training batches alone, between :meth:`ForwardEdits.begin` and :meth:`ForwardEdits.end`.
What is copied, validated, averaged or exported between two batches is the model itself.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_deadrelu.model.rectifiers import Rectifier
from lightning_deadrelu.model.sites import clean
from lightning_deadrelu.repair.activation_swap import find_module, places_of, take_over
from lightning_deadrelu.repair.substitute_modules import LeakyUnits, original_of

if TYPE_CHECKING:
    from lightning_deadrelu.attribution.result import Outlet
    from lightning_deadrelu.remedies.base import Warmth

_CALLED = ("forward", "training_step")


def warmth_left(step: int, steps: int) -> float:
    """Tell the share of a term that is left: it falls linearly to 0.

    Args:
        step: Training batches since it began.
        steps: Training batches in which it is there.

    Example:
        >>> [warmth_left(step, 4) for step in range(5)]
        [1.0, 0.75, 0.5, 0.25, 0.0]
    """
    return max(0.0, 1.0 - step / steps)


def ramp_height(step: int, steps: int) -> float:
    """Tell the share of a slope that is there: it rises linearly in the first half, and falls in the second.

    Args:
        step: Training batches since it began.
        steps: Training batches in which it is there.

    Example:
        >>> [ramp_height(step, 4) for step in range(5)]
        [0.5, 1.0, 1.0, 0.5, 0.0]
    """
    return max(0, min(step + 1, steps - step)) / math.ceil(steps / 2)


def _nothing(module: nn.Module, args: Any, output: Any) -> None:
    """Leave a forward as it is."""


def _copied_hook() -> Callable[..., None]:
    return _nothing


class _Adds:
    """A forward hook that adds a constant to some channels. A copy of it, or what is pickled of it, does nothing."""

    def __init__(self, channels: Tensor, dim: int, value: Tensor) -> None:
        self._channels, self._dim = channels, dim
        self.value = value

    def set(self, value: Tensor) -> None:
        """Add another value from now on, shape ``(units,)``."""
        self.value = value

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Tensor | None:
        if not isinstance(output, Tensor):
            return None
        value = self.value.to(output.device, output.dtype)  # autocast would widen the output
        whole = value.new_zeros(output.shape[self._dim]).index_copy(0, self._channels.to(output.device), value)
        return output + whole.view(-1, *[1] * (-1 - self._dim))

    def __deepcopy__(self, memo: Any) -> Callable[..., None]:
        return _nothing

    def __reduce__(self) -> tuple[Any, ...]:
        return _copied_hook, ()


def _same(module: nn.Module) -> nn.Module:
    return module


class _Passing(LeakyUnits):
    """A leaky rectifier for a time. A copy of it, or what is pickled of it, is the module that it stands for."""

    def __init__(self, module: nn.Module, slope: Tensor, dims: Sequence[int]) -> None:
        original = original_of(module)
        assert original is not None
        super().__init__(slope, dims, original)
        self.stands_for = (module,)  # in a tuple, so that it is no submodule

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        return copy.deepcopy(self.stands_for[0], memo)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _same, self.stands_for


class _Term(ABC):
    """One site's term: what it is, and how far it has come."""

    def __init__(self, what: dict[str, Any], model: nn.Module) -> None:
        self.what = what
        module = find_module(model, what["path"])
        if module is None:
            raise ValueError(
                f"A term of `{what['site']}` goes to the module `{what['path']}`, which this model does not have. Give"
                " the model that was trained, or drop the checkpoint's callback states."
            )
        self.module = module
        first = next(model.parameters(), torch.empty(0))
        self._device = next(module.parameters(), first).device
        self._double = first.dtype == torch.float64

    @property
    def over(self) -> bool:
        return bool(self.what["step"] >= self.what["steps"])

    def advance(self) -> None:
        self.what["step"] += 1
        self.update()

    def whole(self) -> Tensor:
        """Move what is given for the units to where the model is; in double precision only if the model is."""
        given: Tensor = self.what["values"]
        return given.to(self._device, torch.float64 if self._double else torch.float32)

    @abstractmethod
    def update(self) -> None: ...

    @abstractmethod
    def enter(self) -> None: ...

    @abstractmethod
    def leave(self) -> None: ...


class _Warm(_Term):
    """A constant added to the units' inputs."""

    def __init__(self, what: dict[str, Any], model: nn.Module) -> None:
        super().__init__(what, model)
        self._whole = self.whole()
        self.hook = _Adds(what["channels"].to(self._device), what["dim"], self._whole)
        self._handle: RemovableHandle | None = None
        self.update()

    def update(self) -> None:
        self.hook.set(self._whole * warmth_left(self.what["step"], self.what["steps"]))

    def enter(self) -> None:
        if self._handle is None:
            self._handle = self.module.register_forward_hook(self.hook)

    def leave(self) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None


class _Ramp(_Term):
    """A slope below the hinge, in a module that takes the rectifier's place."""

    def __init__(self, what: dict[str, Any], model: nn.Module) -> None:
        super().__init__(what, model)
        if original_of(self.module) is None:
            raise ValueError(
                f"A slope of `{what['site']}` goes to one of torch's rectifiers, and `{what['path']}` is a"
                f" `{type(self.module).__name__}`. Put an `nn.ReLU` there."
            )
        self._whole = self.whole()
        self._places = places_of(model, self.module)
        self.passing = _Passing(self.module, self._whole, what["dims"])
        self.update()

    def update(self) -> None:
        # in place: compiled code looks at the tensor's values, not at what it is
        self.passing.slope.copy_(self._whole * ramp_height(self.what["step"], self.what["steps"]))

    def enter(self) -> None:
        self._exchange(self.module, self.passing)

    def leave(self) -> None:
        self._exchange(self.passing, self.module)

    def _exchange(self, old: nn.Module, new: nn.Module) -> None:
        held = [(parent, name) for parent, name in self._places if parent._modules.get(name) is old]
        if held:
            take_over(old, new)
        for parent, name in held:
            setattr(parent, name, new)


class ForwardEdits:
    """What enters a model's forward in training batches, and fades.

    Values change in :meth:`advance` alone, so that a forward recomputed in backward sees what the first one saw. They
    are computed from the number of batches that have passed, so that a resumed run goes on to the last bit. A site has
    one term at a time; a new one takes the place of the old.

    Example:
        >>> from lightning_deadrelu.remedies.base import Warmth
        >>> from lightning_deadrelu.attribution.result import Outlet
        >>> model, terms = nn.Sequential(nn.Linear(3, 2), nn.ReLU()), ForwardEdits()
        >>> terms.warm(model, "1", Outlet("0", torch.arange(2), -1), Warmth(torch.tensor([0.0, 5.0]), 2))
        >>> terms.begin(); terms.offset("1"); terms.end(); terms.advance()
        tensor([0., 5.])
        []
        >>> terms.offset("1"), terms.advance()
        (tensor([0.0000, 2.5000]), ['1'])
    """

    def __init__(self) -> None:
        self._terms: dict[str, _Term] = {}

    @property
    def sites(self) -> list[str]:
        """The names of the sites that have a term."""
        return list(self._terms)

    @property
    def rectifiers(self) -> dict[str, Rectifier]:
        """By path, what the modules stand for that pass for rectifiers in training batches."""
        ramps = [term for term in self._terms.values() if isinstance(term, _Ramp)]
        return {ramp.what["path"]: ramp.passing.original.rectifier for ramp in ramps}

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
        what: dict[str, Any] = {"kind": "warm", "channels": _plain(outlet.channels), "dim": outlet.dim}
        what |= {"site": site, "path": outlet.path, "values": _plain(warmth.gamma), "steps": warmth.steps}
        self._add(model, what)

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
        what = {"kind": "ramp", "dims": list(dims), "site": site, "path": path}
        self._add(model, {**what, "values": _plain(slopes), "steps": steps})

    def _add(self, model: nn.Module, what: dict[str, Any]) -> None:
        term = (_Warm if what["kind"] == "warm" else _Ramp)({"step": 0, **what}, model)
        if (old := self._terms.pop(what["site"], None)) is not None:
            old.leave()
        self._terms[what["site"]] = term

    def begin(self) -> None:
        """Let the terms into the forward; to be called before each training batch."""
        for term in self._terms.values():
            term.enter()

    def end(self) -> None:
        """Take them out; to be called after each training batch. Harmless when they are out."""
        for term in self._terms.values():
            term.leave()

    def advance(self) -> list[str]:
        """Go on by one training batch.

        Returns:
            The names of the sites whose term is over.
        """
        for term in self._terms.values():
            term.advance()
        return self._drop([name for name, term in self._terms.items() if term.over])

    def offset(self, site: str) -> Tensor | None:
        """Give the constant that is added to each unit's input now, shape ``(units,)``; None if there is none."""
        term = self._terms.get(site)
        return term.hook.value if isinstance(term, _Warm) else None

    def clear(self) -> list[str]:
        """Drop all terms and leave the model as it was; harmless when there are none.

        Returns:
            The names of the sites that had one.
        """
        return self._drop(self.sites)

    def _drop(self, names: list[str]) -> list[str]:
        for name in names:
            self._terms.pop(name).leave()
        return names

    def state_dict(self) -> dict[str, Any]:
        """Save what is in flight, in tensors and plain types."""
        return {"terms": [dict(term.what) for term in self._terms.values()]}

    def load_state_dict(self, state: Mapping[str, Any], model: nn.Module) -> None:
        """Go on where :meth:`state_dict` was called.

        Args:
            state: What it returned.
            model: The model.

        Raises:
            ValueError: If the model lacks a module that a term goes to.
        """
        self.clear()
        for what in state["terms"]:
            self._add(model, dict(what))


def _plain(values: Tensor) -> Tensor:
    return values.detach().cpu().clone()


def is_compiled(model: nn.Module, path: str) -> bool:
    """Tell whether a module is compiled, or part of something that is: a hook that comes late is not seen there.

    Args:
        model: What the Trainer calls, which may be a wrapper around the model.
        path: The module's path, without prefixes of wrappers.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 2), nn.ReLU())
        >>> is_compiled(model, "0"), is_compiled(torch.compile(model), "0")
        (False, True)
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    ends = [name for name in modules if clean(name) in (path, f"module.{path}")]
    above = {".".join(name.split(".")[:depth]) for name in ends for depth in range(len(name.split(".")) + 1)}
    return any(_is_compiled(modules[name]) for name in above)


def _is_compiled(module: nn.Module) -> bool:
    ways = (
        getattr(module, "_compiled_call_impl", None),
        getattr(module, "_compiler_ctx", None),
    )  # torch's, then Lightning's
    functions = [getattr(module, name, None) for name in _CALLED]
    compiled = any(hasattr(function, "_torchdynamo_orig_callable") for function in functions)
    return compiled or type(module).__name__ == "OptimizedModule" or any(way is not None for way in ways)
