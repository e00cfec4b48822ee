"""Find the rectifiers of a compiler's graph, and have the graph count their units.

The graph is run once with tensors that hold no data, under the very probe that watches eager code, so that a call has
the same site in both. What the probe learns from a module's hooks is read from the graph's notes on modules.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from lightning_deadrelu.model.rectifiers import Rectifier
from lightning_deadrelu.model.sites import Site
from lightning_deadrelu.observe.call_stack import ModuleCall, in_forward
from lightning_deadrelu.observe.probe import Probe
from lightning_deadrelu.observe.site_resolver import Rectified, SiteCall, SiteResolver, activations_in
from lightning_deadrelu.observe.torch_function import torch_function
from lightning_deadrelu.observe.torch_modes import push_mode, recomputes, remove_mode


class Unreadable(Exception):
    """A graph in which not every rectifier can be told."""


class Found(NamedTuple):
    """One call of a rectifier in a graph.

    Args:
        site: Its site.
        rectifier: What it is.
        dims: The dimensions of its input that hold the units, counted from the end.
        node: Where it is called.
        x: Where its input comes from.
        in_place: True where the call overwrites its input.
        over: The other dimensions of its input.
        exact: What to add up in.
        wide: What to give sums and extremes as.
    """

    site: Site
    rectifier: Rectifier
    dims: tuple[int, ...]
    node: fx.Node
    x: fx.Node
    in_place: bool
    over: tuple[int, ...]
    exact: torch.dtype
    wide: torch.dtype


def find_calls(graph: fx.GraphModule, inputs: Sequence[Any], probe: Probe, home: nn.Module | None) -> list[Found]:
    """List the calls of rectifiers in a graph, in order.

    Args:
        graph: What the compiler made of a region.
        inputs: What it was made with: the parameters themselves, and examples.
        probe: Watches the same model when it runs eagerly.
        home: The module whose forward the region is, where it is one's.

    Raises:
        Unreadable: If there are calls that cannot be followed.
    """
    replay = _Replay(probe, home)
    _Walk(graph, replay).walk(inputs)
    if replay.resolver.unwatched:
        raise Unreadable(str(replay.resolver.unwatched))
    return replay.found


class _Replay(TorchFunctionMode):
    """Resolves the calls of a graph, told which module is running, with tensors that hold no data."""

    def __init__(self, probe: Probe, home: nn.Module | None) -> None:
        super().__init__()
        self.resolver = SiteResolver(probe.model, probe.unit_dims, self._runs, probe.wants)
        self.resolver.look_at_model()
        path = self._path(home)
        self._home = [] if path is None else [("", call) for call in self._calls_down_to(path)]
        self._running = list(self._home)
        self.met: tuple[SiteCall, Rectified, Tensor] | None = None
        """The site of the call just made, the call, and its output."""
        self.found: list[Found] = []

    def _runs(self, model: nn.Module) -> bool:
        return in_forward(model) or any(call.module is model for call in self.resolver.stack)

    def _path(self, module: nn.Module | None) -> str | None:
        return self.resolver.modules[id(module)][1] if id(module) in self.resolver.modules else None

    def _calls_down_to(self, path: str) -> list[ModuleCall]:
        """Put the modules in place that a region lies in: their forwards run outside of it."""
        above = [
            (name, module)
            for module, name in self.resolver.modules.values()
            if not name or f"{path}.".startswith(f"{name}.")
        ]
        called = [(name, module) for name, module in above if type(module).forward is not nn.Module.forward]
        return [ModuleCall(name, module) for name, module in sorted(called, key=lambda pair: len(pair[0]))]

    def enter(self, node: fx.Node) -> None:
        """Let the modules run that a call is noted to come from; a key differs from call to call of a module."""
        keys = [key for key in node.meta.get("nn_module_stack") or {} if self._module(key) is not None]
        running = [key for key, _ in self._running[len(self._home) :]]
        same = next((i for i, (old, new) in enumerate(zip(running, keys, strict=False)) if old != new), None)
        kept = min(len(running), len(keys)) if same is None else same
        del self._running[len(self._home) + kept :]
        self._running += [
            (key, ModuleCall(module[1], module[0])) for key in keys[kept:] if (module := self._module(key))
        ]
        self.resolver.stack[:] = [call for _, call in self._running]

    def _module(self, key: str) -> tuple[nn.Module, str] | None:
        number = str(key).split("@")[0]
        return self.resolver.modules.get(int(number)) if number.isdigit() else None

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs, function = kwargs or {}, torch_function(func)
        if recomputes():
            return func(*args, **kwargs)
        call = self.resolver.find(function, args, kwargs)
        output = func(*args, **kwargs)
        if call is None:
            if function.selects and (selected := self.resolver.select(function, args, kwargs, output)):
                raise Unreadable(f"`{selected.rectifier.kind}` is made of several calls")
            self.resolver.follow(function, args, kwargs, output)
        elif call.rectifier.fused:
            raise Unreadable(f"`{call.rectifier.kind}` hides its input")
        elif outputs := activations_in(output):
            resolved = self.resolver.resolve(call, outputs[0], _plain_strided)
            self.met = None if resolved is None else (resolved[0], call, outputs[0])
        return output


def _plain_strided(x: Tensor) -> Tensor | None:
    return x if x.layout is torch.strided and not x.is_nested else None


class _Walk(fx.Interpreter):
    """Run a graph without data under a replay."""

    def __init__(self, graph: fx.GraphModule, replay: _Replay) -> None:
        super().__init__(graph)
        self._replay = replay
        self._autocasts: list[Any] = []

    def walk(self, inputs: Sequence[Any]) -> None:
        """Run the graph, and leave torch's states as they were."""
        from torch._subclasses import FakeTensorMode

        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            stand_ins = [self._stand_in(mode, value) for value in inputs]
            with torch.set_grad_enabled(torch.is_grad_enabled()), self._as_before(), _pushed(self._replay):
                self.run(*stand_ins, enable_io_processing=False)

    @contextmanager
    def _as_before(self) -> Iterator[None]:
        try:
            yield
        finally:
            while self._autocasts:  # left open by an error
                torch.amp.autocast_mode._exit_autocast(self._autocasts.pop())

    def _stand_in(self, mode: Any, value: Any) -> Any:
        if isinstance(value, torch.SymInt):
            return int(value.node.hint)
        if not isinstance(value, Tensor):
            return value
        if type(value) not in (Tensor, nn.Parameter):
            raise Unreadable(f"an input is a {type(value).__name__}")
        other = mode.from_tensor(value.detach(), static_shapes=True)  # autograd, and its hooks, have no part in this
        self._replay.resolver.origins.stand_in(value, other)
        return other

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "get_attr" and isinstance(self.fetch_attr(str(n.target)), nn.Module):
            raise Unreadable(f"`{n.target}` is a graph inside the graph")
        if "functorch" in getattr(n.target, "__module__", ""):
            raise Unreadable(f"`{n.target}` transforms functions")
        if n.op.startswith("call"):
            self._replay.enter(n)
        result = super().run_node(n)
        if n.target is torch.amp.autocast_mode._enter_autocast:
            self._autocasts.append(result)
        elif n.target is torch.amp.autocast_mode._exit_autocast and self._autocasts:
            self._autocasts.pop()
        if self._replay.met is not None:
            self._note(n, *self._replay.met)
            self._replay.met = None
        return result

    def _note(self, node: fx.Node, met: SiteCall, call: Rectified, out: Tensor) -> None:
        x, dims = call.x, met.dims
        source = next((other for other in node.all_input_nodes if self.env.get(other) is x), None)
        if source is None:
            raise Unreadable(f"the input of `{node}` is not in the graph")
        over = tuple(dim for dim in range(-x.ndim, 0) if dim not in dims)
        exact = torch.promote_types(out.dtype, torch.float32)
        wide = torch.float32 if out.device.type == "mps" else torch.float64
        self._replay.found.append(Found(*met, node, source, call.values is not x, over, exact, wide))


@contextmanager
def _pushed(mode: TorchFunctionMode) -> Iterator[None]:
    push_mode(mode)
    try:
        yield
    finally:
        remove_mode(mode)


class Additions:
    """What was added to a graph: two outputs with the counts of all calls, and one per size that is not fixed.

    Args:
        graph: Is changed.
        calls: Whose units to count.
    """

    def __init__(self, graph: fx.GraphModule, calls: Sequence[Found]) -> None:
        self._graph = graph
        self._output = graph.graph.output_node()
        self._before = self._output.args
        nodes = set(graph.graph.nodes)
        counts = [_add_counts(graph.graph, call) for call in calls]
        with graph.graph.inserting_before(self._output):
            sizes = [size for call in calls for size in _add_sizes(graph.graph, call)]
            flat = [graph.graph.call_function(torch.cat, ([one[0] for one in counts],))]
            rest = [one[column] for column in (1, 2, 3) for one in counts]
            flat.append(graph.graph.call_function(torch.cat, (rest,)))
        self.sizes = [None if isinstance(size, fx.Node) else size for size in sizes]
        """Samples and elements of each call in turn; None where the graph tells."""
        outputs = self._before[0]
        assert isinstance(outputs, (tuple, list))
        self.kept = len(outputs)
        """How many outputs there were before."""
        self._output.args = ((*outputs, *flat, *(size for size in sizes if isinstance(size, fx.Node))),)
        self._added = [node for node in graph.graph.nodes if node not in nodes]
        graph.recompile()

    def undo(self) -> None:
        """Take the additions out again."""
        self._output.args = self._before
        for node in reversed(self._added):
            self._graph.graph.erase_node(node)
        self._graph.recompile()


def _add_counts(graph: fx.Graph, call: Found) -> tuple[fx.Node, ...]:
    """Have the graph reduce one call as :func:`~lightning_deadrelu.statistics.count` does."""
    tracer = fx.proxy.GraphAppendingTracer(graph)
    with graph.inserting_before(call.node):
        before: Any = fx.Proxy(call.x, tracer).detach()
        before = before.clone() if call.in_place else before
    with graph.inserting_before(call.node.next):
        out: Any = fx.Proxy(call.node, tracer).detach()
        if not call.over:
            before, out = before.unsqueeze(0), out.unsqueeze(0)
        over, hinge = call.over or (0,), call.rectifier.hinge
        fired = (before > hinge).sum(over).flatten()
        if not call.rectifier.plain:
            out = out.abs()
        elif call.rectifier.cap == math.inf:  # rectified anew, it is read along with the rest, which the output is not
            out = before.clamp(min=0.0)
        magnitude = out.sum(over, dtype=call.exact).flatten().to(call.wide)
        peak, trough = before.amax(over).flatten().to(call.wide), before.amin(over).flatten().to(call.wide)
        if hinge:
            peak, trough = peak - hinge, trough - hinge
    return fired.node, magnitude.node, peak.node, trough.node


def _add_sizes(graph: fx.Graph, call: Found) -> tuple[int | fx.Node, int | fx.Node]:
    """Tell samples and elements, by the graph where a size differs from call to call."""
    shape, proxy = call.x.meta["example_value"].shape, fx.Proxy(call.x, fx.proxy.GraphAppendingTracer(graph))
    sizes: dict[int, Any] = {d: shape[d] if isinstance(shape[d], int) else proxy.size(d) for d in call.over}
    rows = call.over if -1 in call.dims else [dim for dim in call.over if dim < min(call.dims)]
    samples, elements = (math.prod(sizes[dim] for dim in over) for over in (rows, call.over))
    return getattr(samples, "node", samples), getattr(elements, "node", elements)
