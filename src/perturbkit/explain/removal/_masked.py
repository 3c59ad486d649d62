"""Activations that carry the mask of what they know, and what each operation of a convolutional network makes of both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._pytree import tree_leaves

from perturbkit.core import checks

_ONE_BY_ONE = {
    "add", "radd", "iadd", "sub", "rsub", "isub", "mul", "rmul", "imul", "multiply", "div", "truediv", "itruediv", "neg",
    "relu", "relu6", "hardtanh", "leaky_relu", "prelu", "elu", "celu", "selu", "silu", "gelu", "mish", "hardswish", "sigmoid",
    "hardsigmoid", "tanh", "softplus", "clamp", "clip", "batch_norm", "dropout", "dropout2d", "feature_dropout", "contiguous", "clone",
    "detach", "to", "float", "double", "type_as",
}  # fmt: skip


class Masked(Tensor):
    """An activation (n, channels, height, width) with ``state``, shape (n, 1, height, width).

    The state is 1 where the cell is known, 0 where it is removed and -1 where the model itself has padded. What stands in
    removed cells means nothing: whatever mixes cells takes it away first. Every torch function that takes an activation comes
    to :meth:`__torch_function__`, so a model needs no change.
    """

    state: Tensor

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", str(func)).strip("_")
        with torch._C.DisableTorchFunctionSubclass():
            if name in _RULES:
                return _RULES[name](*args, **kwargs)
            if name in _ONE_BY_ONE:
                return _one_by_one(name, func, args, kwargs)
            out = func(*args, **kwargs)
            if any(isinstance(leaf, Tensor) for leaf in tree_leaves(out)):
                raise _refused(name)
            return out


def masked(values: Tensor, state: Tensor) -> Masked:
    """Return values as an activation with that state."""
    made = values.as_subclass(Masked)
    made.state = state
    return made


def filled(values: Tensor, state: Tensor, iterations: int) -> Tensor:
    """Return values with removed cells set to the mean of their set neighbours, again and again, from the edge inwards."""
    known, open_ = (state == 1).to(values.dtype), (state == 0).to(values.dtype)
    if not bool(open_.any()):
        return values
    values, beyond = values * known, values * (state < 0).to(values.dtype)
    for _ in range(iterations):
        share = _box(known)
        reached = open_ * (share > 0)
        # The mean over the set neighbours, of which a reached cell has one at least.
        values = torch.addcmul(values, _box(values), reached / share.clamp(min=1))
        known, open_ = known + reached, open_ - reached
    return values + beyond


def _box(values: Tensor) -> Tensor:
    """Return sums over 3x3 cells; a convolution, since an average pool is many times slower on a CPU."""
    ones = values.new_ones(values.shape[1], 1, 3, 3)
    return functional.conv2d(values, ones, padding=1, groups=values.shape[1])


def _known(input: Masked) -> Tensor:
    """Return the activation with zeros where it is removed."""
    return _plain(input) * (input.state != 0).to(input.state.dtype)


def _plain(value: Any) -> Any:
    return value.as_subclass(Tensor) if isinstance(value, Masked) else value


def _refused(name: str, why: str = "") -> checks.ModelError:
    return checks.ModelError(
        f"the model calls {name} on masked activations{why}; allowed: convolutions and pooling in two dimensions, batch norm in "
        "evaluation mode, functions of single elements, sums, products, concatenated channels and flattening to (n, features). "
        "Fill the removed part of the input instead."
    )


def _one_by_one(name: str, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Masked:
    """Apply a function of single elements; where several activations meet, a cell is known if it is in each."""
    states = [a.state for a in args if isinstance(a, Masked)]
    if name == "batch_norm" and (kwargs.get("training") or (len(args) > 5 and args[5])):
        raise _refused(name, " in training mode")
    out = func(*map(_plain, args), **kwargs)
    if out.shape[-2:] != states[0].shape[-2:] or any(s.shape != states[0].shape for s in states):
        raise _refused(name, f" and broadcasts them to shape {tuple(out.shape)}")
    state = torch.stack(states).amin(0) if len(states) > 1 else states[0]
    return masked(out, state.to(out.dtype))


def _conv2d(
    input: Masked,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Masked:
    size, steps, apart = list(weight.shape[2:]), _pair(stride), _pair(dilation)
    reach = [(k - 1) * d for k, d in zip(size, apart, strict=True)]
    # A window that holds a known cell reaches no farther from it than this, so that all of the window is filled.
    # A filter of one cell mixes none.
    values = filled(_plain(input), input.state, max(reach)) if max(reach) else _plain(input)
    if isinstance(padding, str):
        around = [[r // 2, r - r // 2] if padding == "same" else [0, 0] for r in reach]
    else:
        around = [[p, p] for p in _pair(padding)]
    out = functional.conv2d(values, weight, bias, stride, padding, dilation, groups)
    state = functional.pad(input.state, [*around[1], *around[0]], value=-1.0)
    # One column or row at a time, since a pooling window may not be dilated beyond its padding rules.
    return masked(out, functional.max_pool2d(state, size, steps, 0, apart))


def _max_pool2d(
    input: Masked,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Masked:
    if return_indices:
        raise _refused("max_pool2d", " for its indices")
    # A removed cell never wins, also where activations are negative.
    seen = _plain(input).masked_fill(input.state == 0, -torch.inf)
    values, state = (
        functional.max_pool2d(part, kernel_size, stride or None, padding, dilation, ceil_mode)
        for part in (seen, input.state)
    )
    return masked(values.masked_fill(state == 0, 0.0), state)  # no infinity may meet a zero


def _avg_pool2d(
    input: Masked,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    if _pair(kernel_size) == list(input.shape[2:]) and _pair(padding) == [0, 0] and divisor_override is None:
        return _mean(input, (2, 3), keepdim=True)
    values = functional.avg_pool2d(
        _known(input), kernel_size, stride or None, padding, ceil_mode, count_include_pad, divisor_override
    )
    return masked(
        values, functional.max_pool2d(input.state, kernel_size, stride or None, padding, 1, ceil_mode)
    )


def _adaptive_avg_pool2d(input: Masked, output_size: Any) -> Tensor:
    known = (input.state != 0).to(input.state.dtype)
    share = functional.adaptive_avg_pool2d(known, output_size)
    values = functional.adaptive_avg_pool2d(_known(input), output_size) / share.clamp(min=_tiny(share))
    return values if tuple(values.shape[2:]) == (1, 1) else masked(values, (share > 0).to(values.dtype))


def _mean(input: Masked, dim: Any = None, keepdim: bool = False, **options: Any) -> Tensor:
    axes = sorted(d % 4 for d in ([dim] if isinstance(dim, int) else dim or []))
    if axes != [2, 3]:
        raise _refused("mean", f" over dimensions {dim}")
    known = (input.state != 0).to(input.state.dtype)
    share = known.mean((2, 3), keepdim=keepdim)
    return _known(input).mean((2, 3), keepdim=keepdim, **options) / share.clamp(min=_tiny(share))


def _tiny(share: Tensor) -> float:
    return torch.finfo(share.dtype).tiny


def _pad(input: Masked, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> Masked:
    values = functional.pad(_plain(input), list(pad), mode, value)
    state = functional.pad(input.state, list(pad), mode, -1.0 if mode == "constant" else None)
    if state.shape[1] != 1:
        raise _refused("pad", " beyond their height and width")
    return masked(values, state)


def _cat(tensors: Sequence[Tensor], dim: int = 0) -> Masked:
    states = [t.state for t in tensors if isinstance(t, Masked)]
    if dim % 4 != 1 or len(states) != len(tensors):
        raise _refused("cat", f" over dimension {dim}, or with tensors that carry no mask")
    return masked(torch.cat([_plain(t) for t in tensors], 1), torch.stack(states).amin(0))


def _reshaped(name: str) -> Callable[..., Tensor]:
    def rule(input: Masked, *shape: Any, **options: Any) -> Tensor:
        out = getattr(_known(input), name)(*shape, **options)
        if out.ndim != 2 or len(out) != len(input):
            raise _refused(name, f" to shape {tuple(out.shape)}")
        return out

    return rule


def _pair(value: Any) -> list[int]:
    return [int(v) for v in value] if isinstance(value, list | tuple | torch.Size) else [int(value)] * 2


_RULES: dict[str, Callable[..., Any]] = {
    "conv2d": _conv2d, "max_pool2d": _max_pool2d, "avg_pool2d": _avg_pool2d, "adaptive_avg_pool2d": _adaptive_avg_pool2d,
    "mean": _mean, "pad": _pad, "cat": _cat, "concat": _cat, "concatenate": _cat,
    **{name: _reshaped(name) for name in ("flatten", "reshape", "view")},
}  # fmt: skip
