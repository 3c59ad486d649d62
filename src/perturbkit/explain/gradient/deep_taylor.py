"""Deep Taylor decomposition: the evidence for a class shared out from layer to layer, down to the input, without loss.

Use it for networks of convolutions, linear layers and ReLUs where scores should be positive and sum to the output.
Montavon, Bach, Binder, Samek and Müller (2017), Explaining NonLinear Classification Decisions with Deep Taylor
Decomposition, arXiv:1512.02479.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from perturbkit.core import Attribution, Cost, Oracle, checks, target_rows, track
from perturbkit.core.progress import ProgressLike

__all__ = ["deep_taylor", "relprop_box", "relprop_w2", "relprop_zplus"]

_WEIGHTED = (nn.Linear, nn.Conv1d, nn.Conv2d)
_AVERAGES = (nn.AvgPool1d, nn.AvgPool2d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d)
_MAXIMA = (nn.MaxPool1d, nn.MaxPool2d)
_SHAPES = (nn.Flatten, nn.Unflatten, nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


def deep_taylor(
    model: nn.Sequential,
    x: Tensor,
    target: Tensor | int,
    *,
    input_rule: Literal["box", "w2", "z+"] = "box",
    low: float | Tensor = 0.0,
    high: float | Tensor = 1.0,
    pooling: Literal["winner", "proportional"] = "winner",
    progress: ProgressLike = False,
) -> Attribution:
    """Decompose the positive part of an output over the elements of the input.

    Parameters
    ----------
    model : nn.Sequential
        Layers, nested or not: Linear, Conv1d, Conv2d, ReLU, batch norms right after a weighted layer (folded into it), average
        and max pooling, flattening and dropout; a ReLU between weighted layers. Answers logits (n, outputs).
    x : Tensor, shape (n, ...)
        Inputs, floating point.
    target : Tensor of shape (n,) or int
        The output explained.
    input_rule : {"box", "w2", "z+"}
        For inputs in [low, high], for any real inputs, or for inputs that are not negative.
    low, high : float or Tensor, broadcastable to ``x``
        Ends of the box, for "box".
    pooling : {"winner", "proportional"}
        Max pooling gives all to its winner, or to each by activation.
    progress : Progress, bool or None
        Reports chunks.

    Returns
    -------
    Attribution
        ``values`` in the shape of ``x``. ``extras["per_layer"]``: the sum of relevance, shape (n,), at the output and then at
        the input of each weighted layer, from the last to the first. ``extras["conservation_gap"]``, shape (n,): the sum of
        scores less ``max(0, f(x))``.

    Raises
    ------
    ArgumentError, ArgumentTypeError, ModelError
        If an input, option or layer is not allowed.

    Notes
    -----
    ``R_f = max(0, f_c(x))``; a neuron's relevance is expanded to first order at a root in the domain of its layer's inputs,
    which gives the rules of :func:`relprop_zplus` (hidden layers), :func:`relprop_w2` and :func:`relprop_box`.

    Scores are conservative where no bias is positive. A positive bias can make a neuron relevant whose inputs all speak
    against it; that relevance is lost, and the gap shows it. Constrain biases in training (``bias.clamp_(max=0)`` after each
    step) to avoid it.

    Cost: one evaluation, and a pass back a layer (three in the box), in chunks.

    References
    ----------
    Montavon, Bach, Binder, Samek and Müller (2017), arXiv:1512.02479.

    Examples
    --------
    >>> layer = nn.Linear(2, 1, bias=False)
    >>> layer.weight.data = torch.ones(1, 2)
    >>> deep_taylor(nn.Sequential(layer), torch.tensor([[1.0, 3.0]]), 0, input_rule="z+").values
    tensor([[1., 3.]])
    """
    checks.tensor("x", x)
    checks.one_of("input_rule", input_rule, ("box", "w2", "z+"))
    checks.one_of("pooling", pooling, ("winner", "proportional"))
    ends = _box(x, low, high) if input_rule == "box" else None
    if input_rule == "z+" and bool((x < 0).any()):
        raise checks.ArgumentError(
            f"x reaches {float(x.min()):.4g} under input_rule='z+'; allowed: numbers from 0. Use 'w2' or 'box'."
        )
    if not isinstance(model, nn.Sequential):
        raise checks.ArgumentTypeError(
            f"model is a {type(model).__name__}; allowed: an nn.Sequential. Write the network as a sequence of layers."
        )
    rows = target_rows(target, x)
    oracle, values, sums, place = Oracle(model), [], [], 0
    with oracle.frozen():
        layers = _layers(model)
        for size in track(list(oracle.chunks(len(x), x, gradient=True)), "deep Taylor", progress=progress):
            part = slice(place, place + size)
            corners = None if ends is None else (ends[0][part], ends[1][part])
            relevance, found = _chunk(layers, x[part], rows[part], input_rule, corners, pooling)
            values.append(relevance)
            sums.append(found)
            place += size
    out, per_layer = torch.cat(values), [torch.cat(column) for column in zip(*sums, strict=True)]
    extras = {"per_layer": per_layer, "conservation_gap": per_layer[-1] - per_layer[0]}
    return Attribution(out, rows, Cost(len(x), len(x)), f"deep Taylor, {input_rule}", extras)


def relprop_zplus(layer: nn.Module, a: Tensor, relevance: Tensor) -> Tensor:
    """Share out relevance in proportion to what each input adds through positive weights.

    Parameters
    ----------
    layer : nn.Linear, nn.Conv1d or nn.Conv2d
    a : Tensor
        The layer's inputs, not negative.
    relevance : Tensor
        Of its outputs.

    Returns
    -------
    Tensor
        Relevance of its inputs.

    Notes
    -----
    ``R_i = sum_j a_i w+_ij / (sum_i' a_i' w+_i'j) R_j``, zero where the denominator is.

    References
    ----------
    Montavon et al. (2017), arXiv:1512.02479, section 4.

    Examples
    --------
    >>> layer = nn.Linear(2, 1)
    >>> layer.weight.data = torch.tensor([[1.0, -1.0]])
    >>> relprop_zplus(layer, torch.ones(1, 2), torch.tensor([[3.0]]))
    tensor([[3., 0.]])
    """
    weight = _weight(layer).clamp(min=0)
    return a * _pulled(lambda z: _applied(layer, z, weight), a, relevance)


def relprop_w2(layer: nn.Module, a: Tensor, relevance: Tensor) -> Tensor:
    """Share out relevance in proportion to squared weights, for inputs that can be any real numbers.

    Parameters
    ----------
    layer : nn.Linear, nn.Conv1d or nn.Conv2d
    a : Tensor
        The layer's inputs; only their shape matters.
    relevance : Tensor
        Of its outputs.

    Returns
    -------
    Tensor
        Relevance of its inputs.

    Notes
    -----
    ``R_i = sum_j w_ij^2 / (sum_i' w_i'j^2) R_j``.

    References
    ----------
    Montavon et al. (2017), arXiv:1512.02479, section 4.

    Examples
    --------
    >>> layer = nn.Linear(2, 1)
    >>> layer.weight.data = torch.tensor([[1.0, -1.0]])
    >>> relprop_w2(layer, torch.ones(1, 2), torch.tensor([[3.0]]))
    tensor([[1.5000, 1.5000]])
    """
    weight = _weight(layer).square()
    return _pulled(lambda z: _applied(layer, z, weight), torch.ones_like(a), relevance)


def relprop_box(
    layer: nn.Module, a: Tensor, relevance: Tensor, low: float | Tensor = 0.0, high: float | Tensor = 1.0
) -> Tensor:
    """Share out relevance over inputs that lie in a box.

    Parameters
    ----------
    layer : nn.Linear, nn.Conv1d or nn.Conv2d
    a : Tensor
        The layer's inputs.
    relevance : Tensor
        Of its outputs.
    low, high : float or Tensor, broadcastable to ``a``
        Ends of the box.

    Returns
    -------
    Tensor
        Relevance of its inputs.

    Notes
    -----
    ``R_i = sum_j (a_i w_ij - l_i w+_ij - h_i w-_ij) / (sum_i' of the same) R_j``, zero where the denominator is.

    References
    ----------
    Montavon et al. (2017), arXiv:1512.02479, section 4.

    Examples
    --------
    >>> layer = nn.Linear(2, 1)
    >>> layer.weight.data = torch.tensor([[1.0, -1.0]])
    >>> relprop_box(layer, torch.tensor([[0.5, 0.0]]), torch.tensor([[3.0]]))
    tensor([[1., 2.]])
    """
    lower, upper = _box(a, low, high)
    weight = _weight(layer)
    up, down = weight.clamp(min=0), weight.clamp(max=0)

    def reach(z: Tensor, l: Tensor, h: Tensor) -> Tensor:  # noqa: E741
        return _applied(layer, z, weight) - _applied(layer, l, up) - _applied(layer, h, down)

    with torch.enable_grad():
        leaves = [v.detach().clone().requires_grad_(True) for v in (a, lower, upper)]
        z = reach(*leaves)
        pulled = torch.autograd.grad(z, leaves, _quotient(relevance, z))
    return sum((leaf.detach() * g for leaf, g in zip(leaves, pulled, strict=True)), torch.zeros_like(a))


def _box(x: Tensor, low: float | Tensor, high: float | Tensor) -> tuple[Tensor, Tensor]:
    try:
        ends = [torch.as_tensor(end, dtype=x.dtype, device=x.device).expand_as(x) for end in (low, high)]
    except RuntimeError:
        raise checks.ArgumentError(
            f"low or high does not fit x of shape {tuple(x.shape)}; allowed: numbers, or tensors that broadcast to it. "
            "Reshape them."
        ) from None
    if bool((ends[0] > x).any()) or bool((ends[1] < x).any()):
        raise checks.ArgumentError(
            f"x goes from {float(x.min()):.4g} to {float(x.max()):.4g}; allowed: numbers between low and high. Give the "
            "ends of the data's range, or use input_rule='w2'."
        )
    return ends[0], ends[1]


def _layers(model: nn.Sequential) -> list[nn.Module]:
    """Return the layers in order, with batch norms folded in; refuse what has no rule."""
    flat: list[nn.Module] = []
    for layer in _leaves(model):
        if isinstance(layer, _NORMS) and flat and isinstance(flat[-1], _WEIGHTED):
            fuse = fuse_linear_bn_eval if isinstance(flat[-1], nn.Linear) else fuse_conv_bn_eval
            flat[-1] = fuse(flat[-1], layer)  # type: ignore[type-var]
        elif isinstance(layer, _SHAPES):
            if not isinstance(layer, nn.Dropout | nn.Dropout1d | nn.Dropout2d | nn.Identity):
                flat.append(layer)
        else:
            flat.append(layer)
    seen = rectified = False
    for layer in flat:
        fits = isinstance(layer, (*_AVERAGES, *_MAXIMA, nn.ReLU)) and seen
        if isinstance(layer, _WEIGHTED):
            fits, seen, rectified = rectified or not seen, True, False
        elif isinstance(layer, nn.ReLU):
            rectified = True
        if not fits and not isinstance(layer, _SHAPES):
            raise checks.ModelError(
                f"the model has a {type(layer).__name__} where it has no rule; allowed: Linear and Conv layers with a ReLU "
                "between them, batch norms right after them, pooling after the first, flattening and dropout. Use "
                "integrated_gradients for other networks."
            )
    if not seen:
        raise checks.ModelError(
            "the model has no weighted layer; allowed: one at least. Pass the whole network."
        )
    return flat


def _leaves(module: nn.Module) -> list[nn.Module]:
    if isinstance(module, nn.Sequential):
        return [leaf for child in module for leaf in _leaves(child)]
    return [module]


def _chunk(
    layers: list[nn.Module],
    x: Tensor,
    target: Tensor,
    rule: str,
    ends: tuple[Tensor, Tensor] | None,
    pooling: str,
) -> tuple[Tensor, list[Tensor]]:
    """Return relevance of the inputs, and its sums after each weighted layer."""
    inputs = []
    with torch.no_grad():
        out = x
        for layer in layers:
            inputs.append(out)
            out = layer(out)
    if out.ndim != 2 or int(target.max()) >= out.shape[1]:
        raise checks.ArgumentError(
            f"target is {int(target.max())} for outputs of shape {tuple(out.shape)}; allowed: the index of an output, "
            "(n, outputs). Pass one index a row."
        )
    relevance = torch.zeros_like(out).scatter(1, target[:, None], out.gather(1, target[:, None]).clamp(min=0))
    sums, first = (
        [relevance.flatten(1).sum(1)],
        next(i for i, m in enumerate(layers) if isinstance(m, _WEIGHTED)),
    )
    for i in range(len(layers) - 1, -1, -1):
        layer, a = layers[i], inputs[i]
        if isinstance(layer, _WEIGHTED):
            if i > first or rule == "z+":
                relevance = relprop_zplus(layer, a, relevance)
            elif ends is None:
                relevance = relprop_w2(layer, a, relevance)
            else:
                relevance = relprop_box(layer, a, relevance, *(end.reshape(a.shape) for end in ends))
            sums.append(relevance.flatten(1).sum(1))
        elif isinstance(layer, _MAXIMA) and pooling == "winner":
            relevance = _gradient(layer, a, relevance)
        elif isinstance(layer, (*_AVERAGES, *_MAXIMA)):
            relevance = a * _pulled(_summing(layer), a, relevance)
        elif not isinstance(layer, nn.ReLU):
            relevance = relevance.reshape(a.shape)
    return relevance, sums


def _summing(layer: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return a layer's average: itself, or that over the windows of a max pooling."""
    if not isinstance(layer, _MAXIMA):
        return layer
    pool = functional.avg_pool2d if isinstance(layer, nn.MaxPool2d) else functional.avg_pool1d
    return lambda z: pool(z, layer.kernel_size, layer.stride, layer.padding, layer.ceil_mode)


def _weight(layer: nn.Module) -> Tensor:
    if not isinstance(layer, _WEIGHTED):
        raise checks.ArgumentTypeError(
            f"layer is a {type(layer).__name__}; allowed: Linear, Conv1d or Conv2d. Pass a weighted layer."
        )
    return layer.weight.detach()


def _applied(layer: nn.Module, a: Tensor, weight: Tensor) -> Tensor:
    """Apply a layer with other weights and no bias."""
    if isinstance(layer, nn.Linear):
        return functional.linear(a, weight)
    return layer._conv_forward(a, weight, None)  # type: ignore[operator]


def _quotient(relevance: Tensor, z: Tensor) -> Tensor:
    z = z.detach()
    return torch.where(z > 0, relevance / z.clamp(min=torch.finfo(z.dtype).tiny), torch.zeros_like(z))


def _pulled(fun: Callable[[Tensor], Tensor], a: Tensor, relevance: Tensor) -> Tensor:
    """Return the gradient of <fun(a), R / fun(a)> in a, the quotient held fixed."""
    with torch.enable_grad():
        leaf = a.detach().requires_grad_(True)
        z = fun(leaf)
        (pulled,) = torch.autograd.grad(z, leaf, _quotient(relevance, z))
    return pulled


def _gradient(fun: Callable[[Tensor], Tensor], a: Tensor, cotangent: Tensor) -> Tensor:
    with torch.enable_grad():
        leaf = a.detach().requires_grad_(True)
        (pulled,) = torch.autograd.grad(fun(leaf), leaf, cotangent)
    return pulled
