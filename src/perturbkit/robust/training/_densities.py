"""Conditional densities q(theta | x) that :mod:`robust_amortized_inference` trains: Gaussian, mixture and flow."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from perturbkit.core import checks
from perturbkit.core.random import randn, uniform

__all__ = [
    "DENSITIES",
    "FlowDensity",
    "GaussianDensity",
    "MixtureDensity",
    "check_density",
    "check_dtype",
    "normal_log_prob",
    "scaling",
]

_LOG_2PI = math.log(2 * math.pi)


def normal_log_prob(theta: Tensor, mean: Tensor, factor: Tensor) -> Tensor:
    """Return the log-density of a Gaussian of precision ``factor^T factor``, for a triangular factor."""
    z = (factor @ (theta - mean)[..., None])[..., 0]
    log_det = factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return log_det - 0.5 * (z.square().sum(-1) + theta.shape[-1] * _LOG_2PI)


class GaussianDensity(nn.Module):
    """A Gaussian with a full precision matrix from a network of two hidden layers."""

    def __init__(self, n_inputs: int, n_parameters: int, hidden: int) -> None:
        super().__init__()
        self.d = n_parameters
        self.net = _network(n_inputs, hidden, self.d + self.d * (self.d + 1) // 2)

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the means (n, d) and the lower triangular factors of the precisions (n, d, d)."""
        return _mean_and_factor(self.net(x), self.d)

    def log_prob(self, theta: Tensor, x: Tensor) -> Tensor:
        return normal_log_prob(theta, *self.moments(x))

    def sample(self, x: Tensor, n: int, generator: torch.Generator) -> Tensor:
        mean, factor = self.moments(x)
        return _draw(mean[:, None], factor[:, None], n, generator)


class MixtureDensity(nn.Module):
    """A mixture of Gaussians with full precision matrices."""

    def __init__(self, n_inputs: int, n_parameters: int, hidden: int, n_components: int = 8) -> None:
        super().__init__()
        self.d, self.k = n_parameters, n_components
        self.net = _network(n_inputs, hidden, self.k * (1 + self.d + self.d * (self.d + 1) // 2))

    def _parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        out = self.net(x).reshape(len(x), self.k, -1)
        return out[..., 0].log_softmax(1), *_mean_and_factor(out[..., 1:], self.d)

    def log_prob(self, theta: Tensor, x: Tensor) -> Tensor:
        weight, mean, factor = self._parts(x)
        return torch.logsumexp(weight + normal_log_prob(theta[:, None], mean, factor), 1)

    def sample(self, x: Tensor, n: int, generator: torch.Generator) -> Tensor:
        weight, mean, factor = self._parts(x)
        u = uniform((len(x), n), generator=generator, like=mean)
        chosen = torch.searchsorted(weight.exp().cumsum(1), u).clamp_max(self.k - 1)
        rows = torch.arange(len(x), device=x.device)[:, None]
        return _draw(mean[rows, chosen], factor[rows, chosen], n, generator)


class FlowDensity(nn.Module):
    """A masked autoregressive flow: layers ``u = (theta - m(theta_<, x)) exp(-s(theta_<, x))``, each in reversed order."""

    def __init__(self, n_inputs: int, n_parameters: int, hidden: int, n_layers: int = 4) -> None:
        super().__init__()
        self.d = n_parameters
        self.layers = nn.ModuleList(
            _AutoregressiveLayer(n_inputs, n_parameters, hidden) for _ in range(n_layers)
        )

    def log_prob(self, theta: Tensor, x: Tensor) -> Tensor:
        u, log_det = theta, torch.zeros_like(theta[:, 0])
        for layer in self.layers:
            shift, log_scale = layer(u, x)
            u = ((u - shift) * (-log_scale).exp()).flip(1)
            log_det = log_det - log_scale.sum(1)
        return log_det - 0.5 * (u.square().sum(1) + theta.shape[1] * _LOG_2PI)

    def sample(self, x: Tensor, n: int, generator: torch.Generator) -> Tensor:
        given = x.repeat_interleave(n, 0)
        u = randn((len(given), self.d), generator=generator, like=x)
        for layer in reversed(self.layers):
            wanted, u = u.flip(1), torch.zeros_like(u)
            # The parameters become right one by one, as each depends on those before.
            for i in range(self.d):
                shift, log_scale = layer(u, given)
                column = wanted[:, i] * log_scale[:, i].exp() + shift[:, i]
                u = torch.cat([u[:, :i], column[:, None], u[:, i + 1 :]], 1)
        return u.reshape(len(x), n, self.d)


DENSITIES = {"gaussian": GaussianDensity, "mdn": MixtureDensity, "maf": FlowDensity}


def check_density(density: str | nn.Module) -> None:
    """Accept the name of a density, or a module that can do what one does."""
    if not isinstance(density, nn.Module):
        checks.one_of("density", density, DENSITIES)
    elif not all(callable(getattr(density, name, None)) for name in ("log_prob", "sample")):
        raise checks.ArgumentTypeError(
            f"density is a {type(density).__name__}; allowed: {', '.join(map(repr, DENSITIES))}, or a module with "
            "log_prob(theta, x) and sample(x, n, generator). Give it both."
        )


def check_dtype(name: str, value: Tensor, trained: Tensor) -> None:
    """Refuse what would be computed in a lower precision than it has."""
    if torch.promote_types(value.dtype, trained.dtype) != trained.dtype:
        raise checks.ArgumentTypeError(
            f"{name} has dtype {value.dtype}; allowed: {trained.dtype}, in which the density was trained. Convert it, or fit "
            f"to simulations in {value.dtype}."
        )


def scaling(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return means and standard deviations a column; one for a column that is constant, up to the mean's rounding."""
    mean, std = values.mean(0), values.std(0)
    return mean, torch.where(std > 4 * torch.finfo(std.dtype).eps * mean.abs(), std, torch.ones_like(std))


class _AutoregressiveLayer(nn.Module):
    """A network whose outputs for a parameter see the inputs and only the parameters before it."""

    first: Tensor
    second: Tensor
    last: Tensor

    def __init__(self, n_inputs: int, d: int, hidden: int) -> None:
        super().__init__()
        self.from_theta, self.from_x = nn.Linear(d, hidden), nn.Linear(n_inputs, hidden, bias=False)
        self.inner, self.outer = nn.Linear(hidden, hidden), nn.Linear(hidden, 2 * d)
        # A unit of degree k sees the first k parameters; those of degree 0 see the inputs alone.
        degree, place = torch.arange(hidden) % d, torch.arange(d)
        masks = {
            "first": degree[:, None] > place,
            "second": degree[:, None] >= degree,
            "last": (place[:, None] >= degree).repeat(2, 1),
        }
        for name, mask in masks.items():
            self.register_buffer(name, mask.to(self.inner.weight.dtype))

    def forward(self, theta: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        linear, act = nn.functional.linear, nn.functional.silu
        h = act(linear(theta, self.from_theta.weight * self.first, self.from_theta.bias) + self.from_x(x))
        h = act(linear(h, self.inner.weight * self.second, self.inner.bias))
        shift, raw = linear(h, self.outer.weight * self.last, self.outer.bias).chunk(2, 1)
        return shift, 3 * torch.tanh(raw / 3)


def _network(n_inputs: int, hidden: int, n_outputs: int) -> nn.Sequential:
    # Smooth activations: the penalty differentiates the Jacobian.
    return nn.Sequential(
        nn.Linear(n_inputs, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, n_outputs)
    )  # fmt: skip


def _mean_and_factor(out: Tensor, d: int) -> tuple[Tensor, Tensor]:
    """Split outputs (..., d + d (d + 1) / 2) into a mean and a lower triangular factor of positive diagonal."""
    mean, log_diagonal, below = out.split([d, d, d * (d - 1) // 2], -1)
    rows, columns = torch.tril_indices(d, d, -1, device=out.device)
    factor = torch.diag_embed(log_diagonal.exp())
    factor[..., rows, columns] = below
    return mean, factor


def _draw(mean: Tensor, factor: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """Draw n points for each of (rows, 1 or n) Gaussians; shape (rows, n, d)."""
    noise = randn((len(mean), n, mean.shape[-1]), generator=generator, like=mean)
    return mean + torch.linalg.solve_triangular(factor, noise[..., None], upper=False)[..., 0]
