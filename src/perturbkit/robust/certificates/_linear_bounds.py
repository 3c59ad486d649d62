"""Linear bounds through a traced network, backward from an output or forward from the inputs.

Operations that are affine in what depends on the input are transposed by automatic differentiation; activations are
replaced by lines; products of two dependent things by McCormick's planes; everything else by its box, which is sound.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from perturbkit.core import checks
from perturbkit.robust.certificates._parts import Interval, Propagate
from perturbkit.robust.certificates._relaxations import Lines, lines_of, relax

__all__ = ["LinearBounds", "Root", "inner", "over_box"]

Coefficients = dict[fx.Node, Tensor]
# Numbers of a coefficient tensor at once.
_CHUNK = 2**23


class Root(Protocol):
    """A set that a perturbed input ranges over, one for each row."""

    box: Interval
    round: bool

    def lowest(self, coefficients: Tensor) -> Tensor:
        """Return the least value of linear functions over the set: (specs, n, ...) to (specs, n)."""


class LinearBounds(Propagate):
    """Bounds of every node of a graph over its roots, and of linear functions of any node."""

    def __init__(
        self,
        graph: fx.GraphModule,
        roots: dict[fx.Node, Root],
        tighten: bool,
        mixed: frozenset[str] = frozenset(),
    ) -> None:
        super().__init__(graph, garbage_collect_values=False)
        self.extra_traceback = False
        self.roots, self._tighten, self._graph = roots, tighten, graph
        self._nodes = list(graph.graph.nodes)
        # Nodes whose first axis is not that of the inputs: coefficients are one a row, and would be added up.
        self._mixed = mixed
        self._tight: set[fx.Node] = set(roots)
        self._affine: set[fx.Node] = set(roots)
        self._round = any(root.round for root in roots.values())
        self._lines: dict[fx.Node, Lines] = {}
        self.rows = 0
        self.end: fx.Node = next(n for n in self._nodes if n.op == "output").args[0]

    def run_node(self, n: fx.Node) -> Any:
        if n in self.roots:
            return self.roots[n].box
        if n.op.startswith("call"):
            sources = self._dependent(n)
            if self._is_affine(n):
                if all(source in self._affine for source in sources):
                    self._affine.add(n)
            else:
                for source in sources:
                    # The box of a round set loses much in the first affine layers, where its exact bounds are cheap.
                    if self._round and source in self._affine:
                        self._tighten_node(source, None)
                    elif self._tighten:
                        self._tighten_node(source, lines_of(n, self._graph))
        out = super().run_node(n)
        rows = next(iter(self.roots.values())).box.lower.shape[0]
        if isinstance(out, Interval) and (n.name in self._mixed or out.lower.shape[:1] != (rows,)):
            raise checks.ModelError(
                f"{n.name} has the shape {tuple(out.lower.shape)}, whose first axis is not that of the {rows} inputs; "
                "allowed: a forward that keeps the inputs on the first axis and apart. Write it so, or use "
                "interval_bounds."
            )
        return out

    # -- bounds ---------------------------------------------------------------------------------------------------

    def bounds(self, node: fx.Node, specs: Tensor, boxes: bool = False) -> Interval:
        """Bound linear functions of a node: ``specs`` has shape (s, n, *node).

        With ``boxes``, they are taken back through affine operations alone, down to the boxes before these.
        """
        lows, highs = [], []
        for part in specs.split(self._at_once(specs)):
            both = self.lowest(node, torch.cat([part, -part]), boxes)
            lows.append(both[: len(part)])
            highs.append(-both[len(part) :])
        return Interval(torch.cat(lows).transpose(0, 1), torch.cat(highs).transpose(0, 1))

    def lowest(self, node: fx.Node, specs: Tensor, boxes: bool = False) -> Tensor:
        """Return lower bounds of linear functions of a node, shape (s, n)."""
        pending: Coefficients = {node: specs}
        total = specs.new_zeros(specs.shape[:2])
        for n in reversed(self._nodes[: self._nodes.index(node) + 1]):
            a = pending.pop(n, None)
            if a is None:
                continue
            if n in self.roots:
                total = total + self.roots[n].lowest(a)
                continue
            value = self.env[n]
            if boxes and isinstance(value, Interval) and not self._is_affine(n):
                total = total + over_box(a, value)
                continue
            # Consumers come later in the order: all of them have added to a by now.
            found, constant = self._push(n, a)
            total = total + constant
            for source, coefficient in found.items():
                pending[source] = pending[source] + coefficient if source in pending else coefficient
        return total

    def forward_bounds(self, node: fx.Node, specs: Tensor | None = None) -> Interval:
        """Bound a node, or linear functions of it, by linear functions of the roots carried forward."""
        functions: dict[fx.Node, tuple[dict[fx.Node, Tensor], Tensor, dict[fx.Node, Tensor], Tensor]] = {}
        for n in self._nodes[: self._nodes.index(node) + 1]:
            value = self.env.get(n)
            if not isinstance(value, Interval):
                continue
            eye = _identity(value.lower)
            if n in self.roots:
                flat = _flat(eye)
                functions[n] = (
                    {n: flat},
                    flat.new_zeros(flat.shape[:2]),
                    {n: flat},
                    flat.new_zeros(flat.shape[:2]),
                )
                continue
            lower, low = self._compose(self._push(n, eye), functions)
            upper, high = self._compose(self._push(n, -eye), functions)
            functions[n] = (lower, low, {k: -v for k, v in upper.items()}, -high)
            self.env[n] = self._concrete(functions[n], value)
        if specs is None:
            return self.env[node]
        none = specs.new_zeros(specs.shape[:2])
        lower, low = self._compose(({node: specs}, none), functions)
        upper, high = self._compose(({node: -specs}, none), functions)
        wide = Interval(none.T - torch.inf, none.T + torch.inf)
        return self._concrete((lower, low, {k: -v for k, v in upper.items()}, -high), wide)

    def _compose(self, pushed: Any, functions: Any) -> tuple[dict[fx.Node, Tensor], Tensor]:
        """Substitute the linear functions of its inputs into those of a node, towards the lower side."""
        found, constant = pushed
        total: dict[fx.Node, Tensor] = {}
        for source, a in found.items():
            flat, (lower, low, upper, high) = _flat(a), functions[source]
            positive, negative = flat.clamp(min=0), flat.clamp(max=0)
            constant = constant + torch.einsum("snw,wn->sn", positive, low)
            constant = constant + torch.einsum("snw,wn->sn", negative, high)
            for root in lower:
                term = torch.einsum("snw,wnd->snd", positive, lower[root])
                term = term + torch.einsum("snw,wnd->snd", negative, upper[root])
                total[root] = total[root] + term if root in total else term
        return total, constant

    def _concrete(self, functions: Any, value: Interval) -> Interval:
        lower, low, upper, high = functions
        for root, a in lower.items():
            shape = self.roots[root].box.lower.shape
            low = low + self.roots[root].lowest(a.reshape(*a.shape[:2], *shape[1:]))
            high = high - self.roots[root].lowest(-upper[root].reshape(*a.shape[:2], *shape[1:]))
        shape = value.lower.shape
        return value.meet(Interval(low.T.reshape(shape), high.T.reshape(shape)))

    def _tighten_node(self, node: fx.Node, kind: tuple[str, float] | None) -> None:
        if node in self._tight:
            return
        self._tight.add(node)
        box: Interval = self.env[node]
        width = box.lower[0].numel()
        eye = torch.eye(width, dtype=box.lower.dtype, device=box.lower.device)
        if kind is not None and kind[0] == "leaky":
            # Lines of a rectifier are exact where its input has one sign in every row.
            eye = eye[((box.lower < 0) & (box.upper > 0)).reshape(-1, width).any(0)]
            if not len(eye):
                return
        which = eye.argmax(1)
        n = len(box.lower)
        specs = eye.reshape(len(eye), 1, *box.lower.shape[1:]).expand(-1, n, *box.lower.shape[1:])
        found = self.bounds(node, specs)
        lower, upper = (end.reshape(n, width).clone() for end in (box.lower, box.upper))
        lower[:, which] = torch.maximum(lower[:, which], found.lower)
        upper[:, which] = torch.minimum(upper[:, which], found.upper)
        self.env[node] = Interval(lower.reshape(box.lower.shape), upper.reshape(box.lower.shape))

    def _at_once(self, specs: Tensor) -> int:
        widest = max(v.lower.numel() for v in self.env.values() if isinstance(v, Interval))
        return max(1, _CHUNK // (2 * widest))

    # -- one node -------------------------------------------------------------------------------------------------

    def _dependent(self, n: fx.Node) -> list[fx.Node]:
        return [a for a in n.all_input_nodes if isinstance(self.env[a], Interval)]

    def _factors(self, n: fx.Node) -> list[fx.Node]:
        """Return the dependent factors of a product, a square's twice."""
        return [a for a in n.args if isinstance(a, fx.Node) and isinstance(self.env[a], Interval)]

    def _push(self, n: fx.Node, a: Tensor) -> tuple[Coefficients, Tensor]:
        """Turn a lower bound in terms of a node into one in terms of what it is made of."""
        value = self.env[n]
        if not isinstance(value, Interval):
            return {}, inner(a, torch.as_tensor(value).to(a))
        self.rows += a.shape[0] * a.shape[1]
        sources = self._dependent(n)
        kind = lines_of(n, self._graph)
        if kind is not None:
            (source,) = sources
            if n not in self._lines:
                box = self.env[source]
                self._lines[n] = relax(kind, box.lower, box.upper)
            return _through_lines(source, self._lines[n], a)
        if self._is_affine(n):
            return self._through_affine(n, sources, a)
        if n.target in _PRODUCTS:
            left, right = self._factors(n)
            return self._through_product(_PRODUCTS[n.target], left, right, a)
        window = self._pooling(n)
        if window is not None and a.ndim == 5:
            return _through_max_pool(sources[0], self.env[sources[0]], window, a)
        # Its box, cut off from the input.
        return {}, over_box(a, value)

    def _is_affine(self, n: fx.Node) -> bool:
        if n.op == "call_module":
            return isinstance(self.fetch_attr(str(n.target)), _AFFINE_MODULES)
        if n.target in _AFFINE:
            return True
        if n.target in (operator.truediv, torch.div, "div"):
            return len(self._dependent(n)) == 1
        return n.target in _PRODUCTS and len(self._factors(n)) == 1

    def _through_affine(self, n: fx.Node, sources: list[fx.Node], a: Tensor) -> tuple[Coefficients, Tensor]:
        def apply(*values: Tensor) -> Tensor:
            given = dict(zip(sources, values, strict=True))

            def put(part: Any) -> Any:
                return fx.node.map_arg(part, lambda s: given.get(s, self.env.get(s)))

            args, kwargs = put(n.args), put(n.kwargs)
            if n.op == "call_module":
                return self.fetch_attr(str(n.target))(*args, **kwargs)
            target: Any = getattr(args[0], str(n.target)) if n.op == "call_method" else n.target
            return target(*args[1:], **kwargs) if n.op == "call_method" else target(*args, **kwargs)

        zeros = [torch.zeros_like(self.env[s].lower) for s in sources]
        constant, transposed = _transposable(apply, *zeros)
        found = torch.func.vmap(transposed)(a)
        return dict(zip(sources, found, strict=True)), inner(a, constant)

    def _through_product(
        self, product: Callable[..., Tensor], left: fx.Node, right: fx.Node, a: Tensor
    ) -> tuple[Coefficients, Tensor]:
        """``xy >= x_l y + y_l x - x_l y_l`` and ``xy <= x_u y + y_l x - x_u y_l``, also summed by a matrix product."""
        x, y = self.env[left], self.env[right]
        positive, negative = a.clamp(min=0), a.clamp(max=0)
        _, by_left = _transposable(lambda v: product(v, y.lower), x.lower)
        _, by_low = _transposable(lambda v: product(x.lower, v), y.lower)
        _, by_high = _transposable(lambda v: product(x.upper, v), y.lower)
        (of_left,) = torch.func.vmap(by_left)(a)
        (of_low,), (of_high,) = torch.func.vmap(by_low)(positive), torch.func.vmap(by_high)(negative)
        constant = inner(positive, product(x.lower, y.lower)) + inner(negative, product(x.upper, y.lower))
        if left is right:
            return {left: of_left + of_low + of_high}, -constant
        return {left: of_left, right: of_low + of_high}, -constant

    def _pooling(self, n: fx.Node) -> dict[str, Any] | None:
        if n.op == "call_module":
            module: Any = self.fetch_attr(str(n.target))
            if not isinstance(module, nn.MaxPool2d):
                return None
            window = {
                k: getattr(module, k) for k in ("kernel_size", "stride", "padding", "dilation", "ceil_mode")
            }
        elif n.target is functional.max_pool2d and len(n.args) >= 2:
            names = ("kernel_size", "stride", "padding", "dilation", "ceil_mode")
            window = {**dict(zip(names, n.args[1:], strict=False)), **n.kwargs}
        else:
            return None
        return None if window.pop("ceil_mode", False) else window


def _through_lines(source: fx.Node, lines: Lines, a: Tensor) -> tuple[Coefficients, Tensor]:
    positive, negative = a.clamp(min=0), a.clamp(max=0)
    constant = inner(positive, lines.low_shift) + inner(negative, lines.high_shift)
    return {source: positive * lines.low_slope + negative * lines.high_slope}, constant


def _through_max_pool(
    source: fx.Node, box: Interval, window: dict[str, Any], a: Tensor
) -> tuple[Coefficients, Tensor]:
    """Bound a maximum below by the element with the greatest lower bound, and above by it where it must win."""
    kernel, padding = window["kernel_size"], window.get("padding", 0)
    stride = window.get("stride")
    shape = {
        "kernel_size": kernel,
        "dilation": window.get("dilation", 1),
        "stride": kernel if stride is None else stride,
    }
    pad = [p for p in reversed((padding, padding) if isinstance(padding, int) else padding) for _ in range(2)]
    channels = box.lower.shape[1]

    def windows(x: Tensor, fill: float) -> Tensor:
        return functional.unfold(functional.pad(x, pad, value=fill), **shape).unflatten(1, (channels, -1))

    low, high = windows(box.lower, -math.inf), windows(box.upper, -math.inf)
    best, winner = low.max(2, keepdim=True)
    others = high.scatter(2, winner, -math.inf).amax(2)
    a = a.flatten(3)
    decided = best.squeeze(2) >= others
    positive, negative = a.clamp(min=0), a.clamp(max=0)
    chosen = torch.where(decided, a, positive)
    constant = inner(torch.where(decided, 0.0, negative), high.amax(2))
    _, transposed = _transposable(lambda x: windows(x, 0.0).gather(2, winner).squeeze(2), box.lower)
    (found,) = torch.func.vmap(transposed)(chosen)
    return {source: found}, constant


def _transposable(fun: Callable[..., Tensor], *at: Tensor) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """Return the value of a map and its transposed, which takes coefficients to coefficients."""
    pair: Any = torch.func.vjp(fun, *at)
    return pair[0], pair[1]


def _identity(like: Tensor) -> Tensor:
    """Return every unit vector of a row, for every row: (w, n, *shape)."""
    width = like[0].numel()
    eye = torch.eye(width, dtype=like.dtype, device=like.device).reshape(width, 1, *like.shape[1:])
    return eye.expand(-1, len(like), *like.shape[1:])


def _flat(a: Tensor) -> Tensor:
    """Return coefficients as (s, n, width), also where a row is a single number."""
    return a.reshape(*a.shape[:2], -1)


def inner(a: Tensor, values: Tensor) -> Tensor:
    """Return sums of products over all but specs and rows, (s, n)."""
    return _flat(a * values).sum(2)


def over_box(a: Tensor, box: Interval) -> Tensor:
    """Return the least values of linear functions on a box, (s, n)."""
    return inner(a.clamp(min=0), box.lower) + inner(a.clamp(max=0), box.upper)


_AFFINE_MODULES = (
    nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.BatchNorm1d, nn.BatchNorm2d, nn.Identity, nn.Flatten, nn.Unflatten,
    nn.AvgPool1d, nn.AvgPool2d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.Dropout, nn.Dropout2d, nn.ZeroPad2d,
    nn.PixelShuffle,
)  # fmt: skip
_AFFINE: set[Any] = {
    operator.add, torch.add, operator.iadd, operator.sub, torch.sub, operator.isub, operator.neg, torch.neg, torch.cat,
    operator.getitem, functional.linear, functional.dropout, torch.flatten, torch.reshape, torch.squeeze, torch.unsqueeze,
    torch.transpose, torch.permute, torch.mean, torch.sum, functional.avg_pool2d, functional.adaptive_avg_pool2d,
    "add", "sub", "neg", "flatten", "reshape", "view", "squeeze", "unsqueeze", "transpose", "permute", "mean", "sum",
    "contiguous", "float", "double",
}  # fmt: skip
_PRODUCTS: dict[Any, Callable[..., Tensor]] = {
    operator.mul: torch.mul, torch.mul: torch.mul, operator.imul: torch.mul, "mul": torch.mul,
    operator.matmul: torch.matmul, torch.matmul: torch.matmul, "matmul": torch.matmul,
}  # fmt: skip
