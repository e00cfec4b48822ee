"""Count inside compiled code: what :class:`~lightning_deadrelu.observe.probe.Probe` does for eager code.

An observed batch runs a graph of its own, which the user's compiler makes of the region's graph and a few reductions
behind each rectifier. Where that cannot be done, observed batches run eagerly.
"""

from __future__ import annotations

import inspect
import os
import sys
import weakref
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol, cast

from torch import Tensor, nn

from lightning_deadrelu.model.rectifiers import Rectifier
from lightning_deadrelu.model.sites import Site
from lightning_deadrelu.observe.compiled_graph import Additions, Found, Unreadable, find_calls
from lightning_deadrelu.observe.compiled_limits import Room
from lightning_deadrelu.observe.probe import Probe
from lightning_deadrelu.observe.torch_modes import innermost_backend, recomputes
from lightning_deadrelu.statistics import Counts
from lightning_deadrelu.warn import warn

_PACKAGE = os.path.dirname(__file__)


class Seen(NamedTuple):
    """A call of a rectifier in a graph, wherever the graph is run.

    Args:
        site: Its site.
        rectifier: What it is.
        dims: The dimensions of its input that hold the units, counted from the end.
    """

    site: Site
    rectifier: Rectifier
    dims: tuple[int, ...]


class Counter(Protocol):
    """Knows sites by their numbers, and takes what is counted of them."""

    probe: Probe

    def number_of(self, seen: Seen) -> int | None:
        """Number a site that was met before, and in the same way; -1 if it is left out, None if it is not known."""

    def name_of(self, number: int) -> str:
        """Name a site."""

    def add_counts(self, number: int, counts: Counts) -> None:
        """Take counts of a site."""

    def needs_eager_code(self) -> bool:
        """Tell whether more is asked of the present batch than to be counted."""

    def has_seen_all(self) -> bool:
        """Tell whether all rectifiers have run: one that has not may be in no compiled code, and run unseen."""


class Compiled:
    """Take the counts of compiled regions while a watch observes them.

    The first observed batch runs eagerly, and shows which sites are in compiled regions. If all are, and all regions
    have the same compiler, later ones run compiled.

    Args:
        counter: Takes the counts.
    """

    def __init__(self, counter: Counter) -> None:
        self._counter = counter
        self.refusal = ""
        """Why observed batches run eagerly for good; empty if they need not."""
        self._backends: list[Any] | None = []  # of the regions of the present eager batch; None if some call is outside
        self._backend: Observing | None = None
        self._expected: set[int] = set()
        self._met: set[int] = set()
        self._doubted: set[int] = set()
        self._proven = False
        self.counting = False
        """Whether a batch is being observed in compiled code."""

    def begin(self) -> Observing | None:
        """Start a batch, and tell with which backend; None to run it eagerly."""
        self._met, self._backends = set(), []
        self.counting = self._backend is not None and not self.refusal and not self._counter.needs_eager_code()
        if not self.counting:
            return None
        Room.open_for(self)
        Observing.current = weakref.ref(self)
        return self._backend

    def saw(self, place: int) -> None:
        """Note that a site ran in an eager batch."""
        if "torch._dynamo" not in sys.modules or (self.refusal and not self._doubted):
            return
        self._met.add(place)
        if self._backends is not None:
            backend = self._region()
            self._backends = None if backend is None else [*self._backends, backend]

    def _region(self) -> Any:
        try:
            return _region()
        except Exception as error:  # it looks into the compiler
            self.refuse(f"{type(error).__name__}: {error}")
            return None

    def displace(self) -> None:
        """Go on eagerly in a batch that was begun compiled."""
        self.counting = False

    def end(self) -> None:
        """End a batch's forwards."""
        if self.counting:
            self._check()
        elif self._met:
            self._settle()
        self.counting = False

    def _settle(self) -> None:
        """Learn from an eager batch."""
        self._expected = self._met
        backends = self._backends or []
        if not backends or any(other != backends[0] for other in backends):
            self.refuse("some sites are not in compiled code, or others than that of the rest")
        elif self._counter.has_seen_all():
            self._backend = Observing(backends[0])
        if lost := self._doubted & self._met:
            names = ", ".join(f"`{self._counter.name_of(place)}`" for place in sorted(lost))
            warn(
                f"An observed batch ran compiled and nothing was counted of {names}, which did run before and after."
                " Observed batches run eagerly from now on. If the compiler gave up (see `TORCH_LOGS=recompiles`),"
                " raise `torch._dynamo.config.recompile_limit`."
            )
        self._doubted = set()

    def _check(self) -> None:
        """Hold what was counted against what ran in the last eager batch."""
        if missing := self._expected - self._met:
            names = ", ".join(map(self._counter.name_of, sorted(missing)))
            self.refuse(f"nothing was counted of {names}")
            self._doubted = missing if self._proven else set()
        self._proven = True

    def close(self) -> None:
        """Leave the compiler as its user has set it, and without graphs of ours, once nobody else counts in any."""
        Room.close_for(self)

    def forget(self) -> None:
        """Learn anew from the next eager batch, because sites have other numbers."""
        self._backend, self._expected, self._doubted = None, set(), set()

    def refuse(self, reason: str) -> None:
        """Run observed batches eagerly from the next one on."""
        self.refusal = self.refusal or reason

    def plan(self, graph: Any, inputs: Sequence[Any]) -> list[Found]:
        """List the calls to count in a graph.

        Raises:
            Unreadable: If some cannot be told, or are of no known site.
        """
        calls = find_calls(graph, inputs, self._counter.probe, _home())
        unknown = [call.site for call in calls if self._counter.number_of(Seen(*call[:3])) is None]
        if unknown:
            raise Unreadable(f"eagerly, there was no site {unknown[0]}")
        return [
            call for call in calls if (place := self._counter.number_of(Seen(*call[:3]))) is not None and place >= 0
        ]

    def names(self, inputs: Sequence[Any]) -> tuple[str | None, ...]:
        """Name the parameters among a region's inputs."""
        return tuple(self._counter.probe.name(value) for value in inputs)

    def take(self, calls: Sequence[Seen], sizes: Sequence[Any], fired: Tensor, rest: Tensor) -> None:
        """Add what a graph has counted."""
        if not self.counting or recomputes() or self._counter.probe.passes_over():
            return
        units = [call.site.units for call in calls]
        columns = [column.split(units) for column in rest.clone().view(3, -1)]  # a CUDA graph reuses its outputs
        counted = zip(fired.clone().split(units), *columns, sizes[::2], sizes[1::2], strict=True)
        for call, counts in zip(calls, counted, strict=True):
            place = self._counter.number_of(call)
            if place is None:
                self.refuse(f"eagerly, there was no site {call.site}")
            elif place >= 0:
                self._met.add(place)
                self._counter.add_counts(place, Counts(*counts))


class Observing:
    """A compiler's backend that has its graphs count; two are equal if their compilers are.

    Compiled code outlives watches, and one graph may serve several modules of a class: which ones, the parameters tell
    that it is called with.
    """

    current: ClassVar[weakref.ref[Compiled] | None] = None

    def __init__(self, backend: Callable[..., Any]) -> None:
        self.backend = backend
        self.__name__ = f"observing {getattr(backend, '__name__', type(backend).__name__)}"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Observing) and bool(self.backend == other.backend)

    def __hash__(self) -> int:
        return hash(Observing)  # backends need not be hashable

    def __call__(self, graph: Any, inputs: Sequence[Any]) -> Any:
        """Compile a graph that counts; the graph as it is where that fails."""
        watch = _watching()
        try:
            Room.note_graph()
            calls = watch.plan(graph, inputs) if watch else []
            if not watch or not calls:
                return self.backend(graph, inputs)
            region = _Region(calls, watch.names(inputs), Additions(graph, calls))
        except Exception as error:
            return self._plainly(graph, inputs, watch, error)
        try:
            return region.stripped(self.backend(graph, inputs))
        except Exception as error:
            region.additions.undo()
            return self._plainly(graph, inputs, watch, error)

    def _plainly(self, graph: Any, inputs: Sequence[Any], watch: Compiled | None, error: Exception) -> Any:
        if watch:
            watch.refuse(f"{type(error).__name__}: {error}")
        return self.backend(graph, inputs)


def _watching() -> Compiled | None:
    """The watch of the present batch, unless its forwards are over: an optimizer may be compiled too."""
    watch = Observing.current() if Observing.current else None
    return watch if watch and (watch.counting or recomputes()) else None


class _Region:
    """One graph that counts, and what its counts mean for the parameters it is called with."""

    def __init__(self, calls: Sequence[Found], names: tuple[str | None, ...], additions: Additions) -> None:
        self.additions = additions
        self._names = names
        self._calls = {names: [Seen(*call[:3]) for call in calls]}

    def stripped(self, compiled: Callable[..., Any]) -> Callable[..., Any]:
        """Hand the counts on, and the outputs to the caller alone."""
        kept, fixed = self.additions.kept, self.additions.sizes

        def run(*args: Any) -> Any:
            outputs = compiled(*args)
            watch = _watching()
            if watch:
                try:
                    fired, rest, *more = outputs[kept:]
                    told = iter(more)
                    sizes = [next(told) if size is None else size for size in fixed]
                    watch.take(self.calls(watch.names(args)), sizes, fired, rest)
                except Exception as error:
                    watch.refuse(f"{type(error).__name__}: {error}")
            return outputs[:kept]

        return run

    def calls(self, names: tuple[str | None, ...]) -> list[Seen]:
        """List the calls as they are with these parameters; none if they are not the model's."""
        if names not in self._calls:
            first = self._calls[self._names]
            moved = _moved(self._names, names)
            self._calls[names] = (
                [] if moved is None else [call._replace(site=_move(call.site, *moved)) for call in first]
            )
        return self._calls[names]


def _moved(old: Sequence[str | None], new: Sequence[str | None]) -> tuple[str, str] | None:
    """Tell which module is in another's place, by the names of their parameters.

    Example:
        >>> _moved(["blocks.0.fc.weight", None], ["blocks.1.fc.weight", None])
        ('blocks.0', 'blocks.1')
    """
    pairs = {_prefixes(*pair) for pair in zip(old, new, strict=True) if pair != (None, None)}
    return pairs.pop() if len(pairs) == 1 else None


def _prefixes(old: str | None, new: str | None) -> tuple[str, str] | None:
    if old is None or new is None:
        return None
    left, right = old.split("."), new.split(".")
    while left and right and left[-1] == right[-1]:
        left, right = left[:-1], right[:-1]
    return ".".join(left), ".".join(right)


def _move(site: Site, old: str, new: str) -> Site:
    def move(name: str) -> str:
        return new + name[len(old) :] if name == old or name.startswith(f"{old}.") else name

    return site._replace(owner=move(site.owner), source=tuple(map(move, site.source)))


def _home() -> nn.Module | None:
    """The module whose forward is being compiled, if it is one's."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    root = InstructionTranslator.current_tx().output.root_tx
    resumed = "in_forward_at" in root.f_code.co_name  # behind a break
    for value in root.f_locals.values():
        own = getattr(inspect.unwrap(type(value).forward), "__code__", None) if isinstance(value, nn.Module) else None
        if own is root.f_code or (resumed and own is not None and own.co_filename == root.f_code.co_filename):
            return cast(nn.Module, value)
    return None


def _has_own_limit(callback: Any) -> bool:
    """Whether a region has a limit of recompilations of its own, which leaves our graphs no room."""
    while callback is not None and getattr(callback, "_recompile_limit", None) is None:
        callback = getattr(callback, "_torchdynamo_orig_backend", None)
    return callback is not None


def _region() -> Any:
    """The backend of the compiled region that is running, eagerly at present; None outside and where it is left.

    What is checkpointed inside a region is a graph inside its graph, and a region of nothing but torch's own modules
    may not be compiled at all (`nn.Sequential(...).compile()`).
    """
    from torch._dynamo import eval_frame, trace_rules
    from torch.utils import checkpoint

    backend, checkpointed, compilable = None, False, False
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_filename == checkpoint.__file__:
            checkpointed = True
        elif code.co_filename != eval_frame.__file__:
            compilable = compilable or not (code.co_filename.startswith(_PACKAGE) or trace_rules.check(code))
        elif code.co_name == "compile_wrapper":
            callback = frame.f_locals["callback"]
            if checkpointed or not compilable or _has_own_limit(callback):
                return None
            backend = innermost_backend(callback)
        elif code.co_name == "_fn":  # not to be compiled
            return backend
        frame = frame.f_back  # type: ignore[assignment]
    return backend
