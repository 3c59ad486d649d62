"""Gaussian and Cauchy input noise carried through a network without sampling.

Use it to see how uncertain inputs make the outputs, for a few passes in place of thousands of samples. Petersen, Mishra,
Kuehne, Borgelt, Deussen and Yurochkin (2024), Uncertainty Quantification via Stable Distribution Propagation,
arXiv:2402.08324.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from perturbkit.core import Oracle, Result, checks

__all__ = ["StableCauchy", "StableGaussian", "pairwise_probability", "propagate", "sdp_loss"]

_MODES = ("full", "marginal", "moments")
_ELEMENTWISE = (nn.ReLU, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Softplus, nn.Tanh, nn.Sigmoid)
_AS_THEY_ARE = (nn.Identity, nn.Flatten, nn.Dropout, nn.Dropout1d, nn.Dropout2d)
_AFFINE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.BatchNorm1d, nn.BatchNorm2d, nn.AvgPool2d)


@dataclass(frozen=True, eq=False)
class StableGaussian(Result):
    """Normal distributions, one a row.

    Attributes
    ----------
    mean : Tensor, shape (n, ...)
        Means.
    variance : Tensor, shape of the mean
        Variances of the entries.
    covariance : Tensor, shape (n, d, d), or None
        Of the flattened entries; ``None``: taken as independent.
    """

    mean: Tensor
    variance: Tensor
    covariance: Tensor | None = None


@dataclass(frozen=True, eq=False)
class StableCauchy(Result):
    """Cauchy distributions, independent entries, one a row.

    Attributes
    ----------
    loc : Tensor, shape (n, ...)
        Medians.
    scale : Tensor, shape of the median
        Half the distances between quartiles.
    """

    loc: Tensor
    scale: Tensor


def propagate(
    model: Oracle | nn.Module | Callable[[Tensor], Tensor],
    distribution: StableGaussian | StableCauchy,
    *,
    mode: Literal["full", "marginal", "moments"] = "full",
) -> StableGaussian | StableCauchy:
    r"""Carry a distribution of the inputs to the outputs.

    Parameters
    ----------
    model : nn.Module, Oracle or callable
        Answers (n, outputs). "full" takes any that is differentiable; the others walk through an ``nn.Sequential`` of
        linear, convolution, batch normalisation, average pooling, max pooling, elementwise activation, flatten and
        dropout layers, and refuse others by name.
    distribution : StableGaussian or StableCauchy
        Of the inputs.
    mode : {"full", "marginal", "moments"}
        "full": linearise the whole network at the location; keeps correlations. "marginal": layer by layer, entries
        taken as independent after each. "moments": the same, with the exact mean and variance of a ReLU of a normal
        number in place of its linearisation (Gaussian and ReLU only); the usual baseline.

    Returns
    -------
    StableGaussian or StableCauchy
        Of the outputs; a Gaussian in mode "full" with its covariance.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If an argument is not allowed.
    ModelError
        If a layer has no rule.

    Notes
    -----
    Stable distributions are closed under affine maps: :math:`W \Sigma W^T` for a covariance, :math:`|W| \gamma` for
    independent Cauchy scales. An activation is replaced by its tangent at the location, which for a ReLU is the stable
    distribution closest in total variation; at exactly zero its slope is taken as 0. A max pool takes the branch of the
    largest location. "full" is therefore :math:`f(\mu), J \Sigma J^T`, and :math:`|J| \gamma`. Exact for affine
    networks and within one linear region; else the error grows with the curvature over the spread.

    Cost: "full" one gradient an output and row, or one forward derivative an input if these are fewer; "marginal" and
    "moments" two forward passes.

    References
    ----------
    Petersen et al. (2024), arXiv:2402.08324.

    Examples
    --------
    >>> f = lambda x: torch.stack([x[:, 0] + x[:, 1], x[:, 0] - x[:, 1]], 1)
    >>> noise = StableGaussian(torch.zeros(1, 2), torch.tensor([[1.0, 3.0]]))
    >>> propagate(f, noise).covariance
    tensor([[[ 4., -2.],
             [-2.,  4.]]])
    """
    checks.one_of("mode", mode, _MODES)
    place, spread, covariance = _checked(distribution)
    gaussian = isinstance(distribution, StableGaussian)
    if mode != "full":
        if mode == "moments" and not gaussian:
            raise checks.ArgumentError(
                "mode is 'moments' for a StableCauchy, which has none; allowed: 'full' or 'marginal'. Choose one."
            )
        network = model.fun if isinstance(model, Oracle) else model
        power = 2 if gaussian else 1
        with Oracle(network).frozen(), torch.no_grad():
            for layer in _layers(network):
                place, spread = _through(layer, place, spread, power, mode)
        return StableGaussian(place, spread) if gaussian else StableCauchy(place, spread)
    out, jacobian = _linearised(Oracle.wrap(model), place)
    if not gaussian:
        return StableCauchy(out, torch.einsum("nkd,nd->nk", jacobian.abs(), spread.flatten(1)))
    half = jacobian * spread.flatten(1)[:, None] if covariance is None else jacobian @ covariance
    found = half @ jacobian.transpose(1, 2)
    return StableGaussian(out, found.diagonal(dim1=1, dim2=2).clone(), found)


def pairwise_probability(distribution: StableGaussian | StableCauchy, y: Any) -> Tensor:
    r"""Return the chance that output y exceeds each other output.

    Parameters
    ----------
    distribution : StableGaussian or StableCauchy
        Of the outputs, shape (n, k).
    y : array of int, shape (n,)
        An output a row.

    Returns
    -------
    Tensor, shape (n, k)
        :math:`P(z_y > z_j)`; 1 in column y.

    Notes
    -----
    :math:`\Phi((\mu_y - \mu_j) / \sqrt{s_{yy} + s_{jj} - 2 s_{yj}})`, or
    :math:`1/2 + \arctan((m_y - m_j) / (\gamma_y + \gamma_j)) / \pi`.

    References
    ----------
    Petersen et al. (2024), arXiv:2402.08324.

    Examples
    --------
    >>> noise = StableGaussian(torch.tensor([[1.0, 0.0]]), torch.full((1, 2), 0.5))
    >>> pairwise_probability(noise, [0])
    tensor([[1.0000, 0.8413]])
    """
    place, spread, covariance = _checked(distribution)
    checks.tensor("distribution", place, ndim=2)
    label = checks.labels("y", y, n=len(place), n_classes=place.shape[1]).to(place.device)
    if isinstance(distribution, StableCauchy):
        rows = label[:, None]
        chance = (
            0.5 + torch.atan((place.gather(1, rows) - place) / (spread.gather(1, rows) + spread)) / math.pi
        )
    else:
        chance = torch.special.ndtr(_standardised(place, spread, covariance, label))
    return chance.scatter(1, label[:, None], 1.0)


def sdp_loss(
    model: nn.Module, x: Tensor, y: Tensor, *, input_std: Tensor | float, output_std: Tensor | float = 0.0
) -> Tensor:
    r"""Return a loss that trains a network under input noise, with gradients in its weights.

    Parameters
    ----------
    model : nn.Module
        Answers (n, outputs); rows independent (no batch statistics).
    x : Tensor, shape (n, ...)
        Inputs.
    y : Tensor
        Class indices, shape (n,), or responses, shape (n, outputs).
    input_std, output_std : Tensor or float
        Standard deviations of the noise of the inputs and outputs; may be learned.

    Returns
    -------
    Tensor
        A scalar.

    Notes
    -----
    Responses: the Gaussian negative log-likelihood with variance :math:`\mathrm{diag}(J \Sigma J^T) + s^2`. Classes:
    the mean over j not y of :math:`-\log P(z_y > z_j)`. Cost: one gradient an output and row, differentiated again.

    References
    ----------
    Petersen et al. (2024), arXiv:2402.08324.

    Examples
    --------
    >>> net = torch.nn.utils.skip_init(nn.Linear, 1, 1)
    >>> _ = net.weight.data.fill_(1.0), net.bias.data.fill_(0.0)
    >>> sdp_loss(net, torch.zeros(1, 1), torch.zeros(1, 1), input_std=1.0).item()
    0.918938
    """
    checks.tensor("x", x)
    jacobian, out = torch.func.vmap(torch.func.jacrev(lambda z: (model(z[None])[0],) * 2, has_aux=True))(x)
    variance = torch.as_tensor(input_std, dtype=x.dtype, device=x.device).square().expand_as(x).flatten(1)
    flat = jacobian.flatten(2)
    noise = torch.as_tensor(output_std, dtype=x.dtype, device=x.device).square()
    covariance = (flat * variance[:, None]) @ flat.transpose(1, 2) + torch.diag_embed(noise.expand_as(out))
    if y.is_floating_point():
        checks.same_shape("y", y, "the outputs", out)
        return functional.gaussian_nll_loss(out, y, covariance.diagonal(dim1=1, dim2=2), full=True, eps=1e-12)
    label = checks.labels("y", y, n=len(out), n_classes=out.shape[1]).to(out.device)
    gap = _standardised(out, covariance.diagonal(dim1=1, dim2=2), covariance, label)
    losses = -torch.special.log_ndtr(gap).scatter(1, label[:, None], 0.0)
    return losses.sum(1).mean() / (out.shape[1] - 1)


def _standardised(mean: Tensor, variance: Tensor, covariance: Tensor | None, label: Tensor) -> Tensor:
    """Return the mean of z_y - z_j over its standard deviation, shape (n, k)."""
    rows = label[:, None]
    shared = 0 if covariance is None else covariance[torch.arange(len(mean), device=mean.device), label]
    total = variance.gather(1, rows) + variance - 2 * shared
    return (mean.gather(1, rows) - mean) / total.clamp_min(torch.finfo(mean.dtype).tiny).sqrt()


def _checked(distribution: StableGaussian | StableCauchy) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return location, variance (or scale) and covariance."""
    if isinstance(distribution, StableCauchy):
        place, spread, covariance = distribution.loc, distribution.scale, None
    elif isinstance(distribution, StableGaussian):
        place, spread, covariance = distribution.mean, distribution.variance, distribution.covariance
    else:
        raise checks.ArgumentTypeError(
            f"distribution is a {type(distribution).__name__}; allowed: StableGaussian, StableCauchy. Make one."
        )
    checks.tensor("the location", place)
    checks.same_shape("the spread", checks.tensor("the spread", spread), "the location", place)
    if bool((spread < 0).any()):
        raise checks.ArgumentError(
            "the spread has negative entries; allowed: variances or scales of 0 or more. Square them."
        )
    if covariance is not None:
        d = place[0].numel()
        checks.tensor("covariance", covariance, shape=(len(place), d, d))
    return place, spread, covariance


def _linearised(oracle: Oracle, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the outputs (n, k) and the Jacobian (n, k, d), by the shorter of its sides."""
    out = oracle(x)
    checks.tensor("the model's answer", out, ndim=2)
    k, d = out.shape[1], x[0].numel()
    if k <= d:
        columns = [
            oracle.vjp(x, functional.one_hot(torch.tensor(j), k).to(out).expand_as(out))[1] for j in range(k)
        ]
        return out, torch.stack([c.flatten(1) for c in columns], 1)
    units = torch.eye(d, dtype=x.dtype, device=x.device).reshape(d, 1, *x.shape[1:])
    return out, torch.stack([oracle.jvp(x, u.expand_as(x).contiguous())[1] for u in units], 2)


def _layers(model: Any) -> Iterator[nn.Module]:
    if isinstance(model, nn.Sequential):
        for child in model:
            yield from _layers(child)
    elif isinstance(model, (*_ELEMENTWISE, *_AS_THEY_ARE, *_AFFINE, nn.MaxPool2d)):
        yield model
    else:
        names = ", ".join(c.__name__ for c in (*_AFFINE, nn.MaxPool2d, *_ELEMENTWISE, *_AS_THEY_ARE))
        raise checks.ModelError(
            f"the model has a {type(model).__name__}; allowed layer by layer: {names}, in nn.Sequential. "
            "Use mode='full', which takes any differentiable model."
        )


def _through(layer: nn.Module, place: Tensor, spread: Tensor, power: int, mode: str) -> tuple[Tensor, Tensor]:
    """Carry locations and spreads (sums of |w|^power spreads are those of sums) through one layer."""
    if isinstance(layer, _AS_THEY_ARE):
        return layer(place), layer(spread)
    if isinstance(layer, _ELEMENTWISE):
        if mode == "moments":
            return _relu_moments(layer, place, spread)
        out, slope, *_ = torch.func.jvp(layer, (place,), (torch.ones_like(place),))
        return out, spread * slope.abs() ** power
    if isinstance(layer, nn.MaxPool2d):
        if mode == "moments" or layer.ceil_mode or layer.return_indices:
            raise checks.ModelError(
                "a MaxPool2d has no rule for moments, ceil_mode or return_indices; allowed: mode='marginal' and plain "
                "pooling. Use mode='full'."
            )
        options = (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
        out, index = functional.max_pool2d(place, *options, return_indices=True)
        return out, spread.flatten(2).gather(2, index.flatten(2)).reshape(out.shape)
    return layer(place), _spread_of_sums(layer, spread, power)


def _spread_of_sums(layer: nn.Module, spread: Tensor, power: int) -> Tensor:
    if isinstance(layer, nn.Linear):
        return functional.linear(spread, layer.weight.abs() ** power)
    if isinstance(layer, nn.Conv1d | nn.Conv2d):
        if layer.padding_mode == "zeros" and not isinstance(layer.padding, str):
            convolve: Any = functional.conv1d if isinstance(layer, nn.Conv1d) else functional.conv2d
            options = (layer.stride, layer.padding, layer.dilation, layer.groups)
            return convolve(spread, layer.weight.abs() ** power, None, *options)
    elif isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
        if layer.running_var is not None:
            scale = (layer.running_var + layer.eps).rsqrt() * (1.0 if layer.weight is None else layer.weight)
            return spread * (scale.abs() ** power).reshape(-1, *[1] * (spread.ndim - 2))
    elif isinstance(layer, nn.AvgPool2d) and not (layer.ceil_mode or layer.divisor_override):
        area = layer.kernel_size**2 if isinstance(layer.kernel_size, int) else math.prod(layer.kernel_size)
        if layer.count_include_pad or layer.padding in (0, (0, 0)):
            return layer(spread) / area ** (power - 1)
    raise checks.ModelError(
        f"the model has {layer}, whose options have no rule; allowed layer by layer: zero padding by numbers, running "
        "statistics, a divisor that is the kernel's area. Use mode='full'."
    )


def _relu_moments(layer: nn.Module, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    if not isinstance(layer, nn.ReLU):
        raise checks.ModelError(
            f"the model has a {type(layer).__name__}, whose moments have no closed form; allowed: ReLU. "
            "Use mode='marginal' or 'full'."
        )
    std = variance.sqrt()
    ratio = mean / std.clamp_min(torch.finfo(std.dtype).tiny)
    above = torch.special.ndtr(ratio)
    height = torch.exp(-ratio.square() / 2) / math.sqrt(2 * math.pi)
    first = mean * above + std * height
    second = (mean.square() + variance) * above + mean * std * height
    return first, (second - first.square()).clamp_min(0)
