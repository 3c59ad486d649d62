"""Interval arithmetic through a traced network, one rule an operation.

Shared by interval bound propagation and linear relaxation. An operation without a rule is refused by its name;
nothing is skipped.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from perturbkit.core import checks, keeping_modes

__all__ = ["Interval", "Propagate", "affine", "cut_last_linear", "evaluating", "interval_forward", "trace"]


@dataclass(frozen=True)
class Interval:
    """Elementwise bounds on an activation."""

    lower: Tensor
    upper: Tensor

    @property
    def centre(self) -> Tensor:
        return (self.lower + self.upper) / 2

    @property
    def radius(self) -> Tensor:
        return (self.upper - self.lower) / 2

    def map(self, fun: Callable[[Tensor], Tensor]) -> Interval:
        """Apply a monotone (or merely rearranging) function to both ends."""
        return Interval(fun(self.lower), fun(self.upper))

    def meet(self, other: Interval) -> Interval:
        """Return what both allow."""
        return Interval(torch.maximum(self.lower, other.lower), torch.minimum(self.upper, other.upper))


def trace(model: nn.Module, sample: Tensor) -> fx.GraphModule:
    """Return the graph of a module's forward in evaluation mode; the module's own modes are left as they are.

    The graph is compared with the module on the first rows of ``sample``: values that the forward overwrites, which a
    trace does not see, would make it another function.

    Raises
    ------
    ModelError
        If the forward depends on values and has no fixed graph, or is not what the graph computes.
    """
    # A bare layer would be traced into; inside a Sequential it is a layer with a rule.
    bare = type(model).__module__.startswith("torch.nn") and not isinstance(model, nn.Sequential)
    fault = "fails on the inputs"
    try:
        # A functional dropout's mode is written into the graph.
        with evaluating(model), torch.no_grad():
            given = model(sample[:2].clone())
            fault = "has no fixed graph"
            graph = fx.symbolic_trace(nn.Sequential(model) if bare else model)
            traced = graph(sample[:2].clone())
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0][:200]
        raise checks.ModelError(
            f"the forward of {type(model).__name__} {fault} ({reason}); allowed: a forward made of layers and tensor "
            "operations, without branches on values. Correct the inputs, certify a part of it, or smooth it."
        ) from error
    hooked = [n for n, m in model.named_modules() if m._forward_hooks or m._forward_pre_hooks]
    if hooked or not (isinstance(given, Tensor) and torch.allclose(given, traced, equal_nan=True)):
        why = (
            f"{hooked[0] or 'it'} has forward hooks"
            if hooked
            else "values are overwritten, or drawn at random"
        )
        raise checks.ModelError(
            f"the forward of {type(model).__name__} is not what its graph computes ({why}); allowed: one tensor made by "
            "layers and operations without side effects. Remove what acts in place or from outside."
        )
    return graph


def cut_last_linear(graph: fx.GraphModule) -> tuple[fx.GraphModule, nn.Linear | None]:
    """Return the graph up to its last layer, and that layer, if it is linear and nothing else uses its input."""
    output = next(node for node in graph.graph.nodes if node.op == "output")
    last = output.args[0]
    if not isinstance(last, fx.Node) or last.op != "call_module" or len(last.args) != 1:
        return graph, None
    layer = graph.get_submodule(str(last.target))
    if not isinstance(layer, nn.Linear):
        return graph, None
    output.args = (last.args[0],)
    graph.graph.erase_node(last)
    graph.recompile()
    return graph, layer


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a module into evaluation mode, and every part of it back into its own after."""
    with keeping_modes(model):
        model.eval()
        yield


def interval_forward(graph: fx.GraphModule, lower: Tensor, upper: Tensor) -> Interval:
    """Propagate a box through a traced network."""
    interpreter = Propagate(graph, garbage_collect_values=True)
    interpreter.extra_traceback = False
    out = interpreter.run(Interval(lower, upper), enable_io_processing=False)
    if not isinstance(out, Interval):
        raise checks.ModelError(
            f"the network answers a {type(out).__name__}; allowed: one tensor that depends on its input. Return the "
            "logits alone."
        )
    return out


def affine(x: Interval, apply: Callable[[Tensor], Tensor], magnitude: Callable[[Tensor], Tensor]) -> Interval:
    """Return the exact box of a linear map: its value at the centre, and ``|W|`` on the radius."""
    centre, radius = apply(x.centre), magnitude(x.radius)
    return Interval(centre - radius, centre + radius)


class Propagate(fx.Interpreter):
    """Runs a graph on intervals; values that depend on no input stay tensors."""

    def run_node(self, n: fx.Node) -> Any:
        if _in_place(n, self.module) and isinstance(n.args[0], fx.Node) and len(n.args[0].users) > 1:
            raise _unsupported(f"{n.name}, which overwrites a value that is used again,")
        out = super().run_node(n)
        if isinstance(out, Interval) and not isinstance(out.lower, Tensor):
            raise _unsupported(f"{n.name}, which answers a {type(out.lower).__name__},")
        return out

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        module = self.fetch_attr(target)
        if not _has_interval((args, kwargs)):
            return super().call_module(target, args, kwargs)
        for kind, rule in _MODULES.items():
            if isinstance(module, kind) and len(args) == 1 and not kwargs:
                return rule(module, args[0])
        raise _unsupported(f"the layer {target} ({type(module).__name__})")

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if not _has_interval((args, kwargs)):
            return super().call_function(target, args, kwargs)
        return _apply(
            _FUNCTIONS.get(target), f"the operation {getattr(target, '__name__', target)}", args, kwargs
        )

    def call_method(self, target: Any, args: Any, kwargs: Any) -> Any:
        if not _has_interval((args, kwargs)):
            return super().call_method(target, args, kwargs)
        return _apply(_METHODS.get(target), f"the method {target}", args, kwargs)


def _apply(rule: Callable[..., Any] | None, what: str, args: Any, kwargs: Any) -> Any:
    if rule is None:
        raise _unsupported(what)
    try:
        inspect.signature(rule).bind(*args, **kwargs)
    except TypeError as error:
        raise _unsupported(f"{what} with these arguments ({error})") from None
    return rule(*args, **kwargs)


def _in_place(node: fx.Node, root: nn.Module) -> bool:
    if node.op == "call_module":
        return bool(getattr(root.get_submodule(str(node.target)), "inplace", False))
    return node.target in (operator.iadd, operator.isub, operator.imul) or bool(node.kwargs.get("inplace"))


def _has_interval(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return any(map(_has_interval, value))
    if isinstance(value, dict):
        return any(map(_has_interval, value.values()))
    return isinstance(value, Interval)


def _unsupported(what: str) -> checks.ModelError:
    layers = ", ".join(k.__name__.lstrip("_") for k in _MODULES)
    return checks.ModelError(
        f"{what} has no interval rule; allowed: {layers}, and sums, products, relu, tanh, sigmoid, softmax, cat, "
        "flatten and reshape. Replace it, or certify the smoothed model."
    )


# -- layers ---------------------------------------------------------------------------------------------------


def _linear(m: nn.Linear, x: Interval) -> Interval:
    return affine(x, m, lambda r: functional.linear(r, m.weight.abs()))


def _conv(m: Any, x: Interval) -> Interval:
    centre = m(x.centre)
    radius = m._conv_forward(x.radius, m.weight.abs(), None)
    return Interval(centre - radius, centre + radius)


def _batch_norm(m: Any, x: Interval) -> Interval:
    # Evaluation statistics: a diagonal affine map. In training mode the batch's own would depend on the box.
    if m.training or m.running_mean is None:
        raise checks.ModelError(
            f"{type(m).__name__} uses the statistics of the batch; allowed: evaluation mode with running statistics. "
            "Call model.eval()."
        )
    scale = (m.running_var + m.eps).rsqrt() * (1 if m.weight is None else m.weight)
    shape = (1, -1, *[1] * (x.lower.ndim - 2))
    return affine(x, m, lambda r: r * scale.abs().reshape(shape))


def _monotone(m: nn.Module, x: Interval) -> Interval:
    # Copies, so that a layer that works in place leaves the bounds that came in alone.
    return x.map(lambda end: m(end.clone()) if getattr(m, "inplace", False) else m(end))


def _sloped(m: Any, x: Interval) -> Interval:
    slope = getattr(m, "negative_slope", getattr(m, "alpha", 1.0))
    if slope < 0:
        raise _unsupported(f"{type(m).__name__} with the slope {slope:g}, which is not monotone,")
    return _monotone(m, x)


def _softplus(x: Interval, beta: float = 1.0, threshold: float = 20.0) -> Interval:
    if threshold < 20:
        raise _unsupported(f"softplus with the threshold {threshold:g}, where it falls by a step,")
    return x.map(lambda end: functional.softplus(end, beta, threshold))


def _dropout(m: Any, x: Interval) -> Interval:
    if m.training:
        raise checks.ModelError(
            f"{type(m).__name__} draws at random; allowed: evaluation mode, where it does nothing. Call model.eval()."
        )
    return x


def _layer_norm(m: nn.LayerNorm, x: Interval) -> Interval:
    """Bound (x - mean) / std: the centred value by its affine box, the deviation by the box's own extremes."""
    axes = tuple(range(-len(m.normalized_shape), 0))
    n = 1
    for size in m.normalized_shape:
        n *= size
    others_low = x.lower.sum(axes, keepdim=True) - x.lower
    others_high = x.upper.sum(axes, keepdim=True) - x.upper
    low = x.lower * (1 - 1 / n) - others_high / n
    high = x.upper * (1 - 1 / n) - others_low / n
    smallest = torch.where((low <= 0) & (high >= 0), 0.0, torch.minimum(low.abs(), high.abs()))
    largest = torch.maximum(low.abs(), high.abs())
    wide = ((largest**2).mean(axes, keepdim=True) + m.eps).rsqrt()
    narrow = ((smallest**2).mean(axes, keepdim=True) + m.eps).rsqrt()
    bottom = torch.where(low < 0, low * narrow, low * wide)
    top = torch.where(high > 0, high * narrow, high * wide)
    # A normalised vector has no entry beyond sqrt(n - 1).
    limit = (n - 1) ** 0.5
    unit = Interval(bottom.clamp(min=-limit), top.clamp(max=limit))
    if m.weight is None:
        return unit
    bias = 0 if m.bias is None else m.bias
    return affine(unit, lambda c: c * m.weight + bias, lambda r: r * m.weight.abs())


def _unimodal(m: nn.Module, x: Interval) -> Interval:
    """Bound an activation that falls to one minimum and rises after it."""
    place, value = _MINIMA[(type(m), getattr(m, "approximate", "none"))]
    ends = _monotone(m, x)
    low = torch.minimum(ends.lower, ends.upper)
    inside = (x.lower < place) & (x.upper > place)
    return Interval(torch.where(inside, low.clamp_max(value), low), torch.maximum(ends.lower, ends.upper))


# Where the minimum lies, and a number just below its value.
_MINIMA = {
    (nn.GELU, "none"): (-0.7517915246935645, -0.1699712074799037),
    (nn.GELU, "tanh"): (-0.7524614220710163, -0.1700407505712541),
    (nn.SiLU, "none"): (-1.2784645427610738, -0.2784645427610739),
}
_MONOTONE = (
    nn.ReLU, nn.Tanh, nn.Sigmoid, nn.SELU, nn.CELU, nn.Hardtanh, nn.ReLU6, nn.LogSigmoid, nn.Hardsigmoid,
    nn.Softsign,
)  # fmt: skip
_REARRANGING = (
    nn.Flatten, nn.Unflatten, nn.Identity, nn.MaxPool1d, nn.MaxPool2d, nn.AvgPool1d, nn.AvgPool2d,
    nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.ZeroPad2d, nn.PixelShuffle,
)  # fmt: skip
_MODULES: dict[type[nn.Module], Callable[[Any, Interval], Interval]] = {
    nn.Linear: _linear, nn.Conv1d: _conv, nn.Conv2d: _conv, nn.Conv3d: _conv, nn.BatchNorm1d: _batch_norm,
    nn.BatchNorm2d: _batch_norm, nn.LayerNorm: _layer_norm, nn.GELU: _unimodal, nn.SiLU: _unimodal,
    nn.Softmax: lambda m, x: _softmax(x, m.dim), nn.Softplus: lambda m, x: _softplus(x, m.beta, m.threshold), nn.LeakyReLU: _sloped, nn.ELU: _sloped, nn.Dropout: _dropout, nn.Dropout2d: _dropout,
    **dict.fromkeys((*_MONOTONE, *_REARRANGING), _monotone),
}  # fmt: skip


# -- functions ------------------------------------------------------------------------------------------------


def _add(a: Any, b: Any, *, alpha: float = 1) -> Interval:
    left, right = _as_interval(a), _as_interval(b if alpha == 1 else _multiply(b, alpha))
    return Interval(left.lower + right.lower, left.upper + right.upper)


def _subtract(a: Any, b: Any) -> Interval:
    left, right = _as_interval(a), _as_interval(b)
    return Interval(left.lower - right.upper, left.upper - right.lower)


def _multiply(a: Any, b: Any) -> Interval:
    left, right = _as_interval(a), _as_interval(b)
    lower = upper = left.lower * right.lower
    for corner in (left.lower * right.upper, left.upper * right.lower, left.upper * right.upper):
        lower, upper = torch.minimum(lower, corner), torch.maximum(upper, corner)
    return Interval(lower, upper)


def _divide(a: Any, b: Any) -> Interval:
    if isinstance(b, Interval):
        raise _unsupported("division by something that depends on the input")
    first, second = a.lower / b, a.upper / b
    return Interval(torch.minimum(first, second), torch.maximum(first, second))


def _matmul(a: Any, b: Any) -> Interval:
    if isinstance(a, Interval) and not isinstance(b, Interval):
        return affine(a, lambda c: c @ b, lambda r: r @ b.abs())
    if isinstance(b, Interval) and not isinstance(a, Interval):
        return affine(b, lambda c: a @ c, lambda r: a.abs() @ r)
    # Around the centres: |xy - x_c y_c| <= |x_c| r_y + r_x |y_c| + r_x r_y, summed.
    centre = a.centre @ b.centre
    radius = a.centre.abs() @ b.radius + a.radius @ b.centre.abs() + a.radius @ b.radius
    return Interval(centre - radius, centre + radius)


def _softmax(x: Interval, dim: int, *args: Any, **kwargs: Any) -> Interval:
    """Bound a softmax by its own monotony: it rises in its own logit and falls in the others."""

    def one_sided(own: Tensor, other: Tensor) -> Tensor:
        # 1 / (1 + sum_j e^(other_j - own_i)), j over the rest, in logarithms.
        size = own.shape[dim]
        gap = other.movedim(dim, -1)[..., None, :] - own.movedim(dim, -1)[..., :, None]
        gap = gap.masked_fill(torch.eye(size, dtype=torch.bool, device=own.device), 0.0)
        return (-torch.logsumexp(gap, -1)).exp().movedim(-1, dim)

    return Interval(one_sided(x.lower, x.upper), one_sided(x.upper, x.lower))


def _as_interval(value: Any) -> Interval:
    """Return a number or tensor as an interval of one point. A number stays one, so that nothing is rounded."""
    return value if isinstance(value, Interval) else Interval(value, value)


def _negate(x: Interval) -> Interval:
    return Interval(-x.upper, -x.lower)


def _cat(parts: Any, dim: int = 0) -> Interval:
    items = [_as_interval(p) for p in parts]
    return Interval(torch.cat([i.lower for i in items], dim), torch.cat([i.upper for i in items], dim))


def _both(fun: Callable[..., Tensor]) -> Callable[..., Interval]:
    """Return the rule of a function that never falls in its first argument, or merely rearranges it."""

    def rule(x: Interval, *args: Any, **kwargs: Any) -> Interval:
        if _has_interval((args, kwargs)) or not isinstance(x, Interval):
            raise _unsupported(f"{getattr(fun, '__name__', fun)} with arguments that depend on the input")
        kwargs.pop("inplace", None)
        return x.map(lambda end: fun(end, *args, **kwargs))

    return rule


def _function_sloped(fun: Callable[..., Tensor], slope: str, standard: float) -> Callable[..., Interval]:
    def rule(x: Interval, *args: Any, **kwargs: Any) -> Interval:
        if (args[0] if args else kwargs.get(slope, standard)) < 0:
            raise _unsupported(f"{fun.__name__} with a slope below zero, which is not monotone,")
        return _both(fun)(x, *args, **kwargs)

    return rule


def _function_linear(x: Any, weight: Tensor, bias: Tensor | None = None) -> Interval:
    if _has_interval((weight, bias)):
        raise _unsupported("linear with a weight or bias that depends on the input")
    return affine(
        x, lambda c: functional.linear(c, weight, bias), lambda r: functional.linear(r, weight.abs())
    )


def _function_dropout(x: Interval, p: float = 0.5, training: bool = True, inplace: bool = False) -> Interval:
    if training:
        raise checks.ModelError(
            "functional.dropout draws at random; allowed: training=self.training in evaluation mode. Pass that."
        )
    return x


def _attribute(x: Interval, name: str) -> Any:
    if name not in ("shape", "dtype", "device", "ndim"):
        raise _unsupported(f"the attribute {name}")
    return getattr(x.lower, name)


_FUNCTIONS: dict[Any, Callable[..., Any]] = {
    operator.add: _add, torch.add: _add, operator.iadd: _add, operator.sub: _subtract, torch.sub: _subtract,
    operator.isub: _subtract, operator.mul: _multiply, torch.mul: _multiply, operator.imul: _multiply,
    operator.truediv: _divide, torch.div: _divide, operator.neg: _negate, torch.neg: _negate, torch.cat: _cat,
    operator.matmul: _matmul, torch.matmul: _matmul, functional.linear: _function_linear, getattr: _attribute,
    functional.dropout: _function_dropout, operator.getitem: _both(operator.getitem),
    functional.leaky_relu: _function_sloped(functional.leaky_relu, "negative_slope", 0.01),
    functional.elu: _function_sloped(functional.elu, "alpha", 1.0),
    functional.gelu: lambda x, approximate="none": _unimodal(nn.GELU(approximate), x),
    functional.silu: lambda x, inplace=False: _unimodal(nn.SiLU(), x),
    torch.softmax: _softmax, functional.softmax: _softmax, functional.softplus: _softplus,
    **{f: _both(f) for f in (
        torch.relu, functional.relu, torch.tanh, functional.tanh, torch.sigmoid, functional.sigmoid,
        functional.relu6, functional.hardtanh, torch.flatten, torch.reshape, torch.squeeze,
        torch.unsqueeze, torch.transpose, torch.permute, torch.mean, torch.sum, torch.exp, functional.max_pool2d,
        functional.avg_pool2d, functional.adaptive_avg_pool2d, torch.clamp,
    )},
}  # fmt: skip
_METHODS: dict[str, Callable[..., Any]] = {
    "add": _add, "sub": _subtract, "mul": _multiply, "div": _divide, "neg": _negate, "matmul": _matmul,
    "softmax": _softmax,
    **{name: _both(getattr(torch.Tensor, name)) for name in (
        "relu", "tanh", "sigmoid", "flatten", "reshape", "view", "squeeze", "unsqueeze", "transpose", "permute",
        "mean", "sum", "contiguous", "float", "double", "exp", "clamp", "amax",
    )},
    # A size is the same at both ends.
    "size": lambda x, *args: x.lower.size(*args),
    "dim": lambda x: x.lower.dim(),
}  # fmt: skip
