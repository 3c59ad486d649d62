"""Sublinear adversarial training: a wide two-layer network of which each step touches the few neurons that fire.

Use it to train very wide networks on inputs of few dimensions, and to see how few neurons answer an input. Gao, Qin, Song
and Wang (2022), A Sublinear Adversarial Training Algorithm, arXiv:2208.05395.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from perturbkit.core import Result, checks, track
from perturbkit.core.progress import ProgressLike
from perturbkit.core.random import Seed, as_generator, rademacher, randn
from perturbkit.robust.training._halfspace import HalfSpaceReporter

__all__ = [
    "HalfSpaceReporter",
    "ShiftedReLUNet",
    "SublinearAdversarialTrainer",
    "SublinearHistory",
    "expected_active_fraction",
]


@dataclass(frozen=True, eq=False)
class SublinearHistory(Result):
    """A training of a shifted ReLU network, one entry a step.

    Attributes
    ----------
    loss : Tensor
        Mean logistic loss of the attacked inputs, before the step.
    active_fraction : Tensor
        Share of neurons that fire, the mean over the attacked inputs.
    multiply_adds : Tensor of int64
        Multiply-adds of attack, search, gradient and update.
    visited_fraction : Tensor
        Share of the tree's nodes that a query visits; one for the dense backend.
    """

    loss: Tensor
    active_fraction: Tensor
    multiply_adds: Tensor
    visited_fraction: Tensor


def expected_active_fraction(bias: float) -> float:
    """Return the share of neurons that fire at initialisation.

    Parameters
    ----------
    bias : float
        Threshold b.

    Returns
    -------
    float

    Notes
    -----
    ``P(N(0, 1) > b) <= exp(-b^2 / 2)``, which is ``m^(-1/5)`` for ``b = sqrt(0.4 ln m)``.

    References
    ----------
    Gao et al. (2022), arXiv:2208.05395, section 3.

    Examples
    --------
    >>> expected_active_fraction(0.0)
    0.5
    """
    return 0.5 * math.erfc(checks.between("bias", bias, -math.inf, math.inf) / math.sqrt(2))


class ShiftedReLUNet(nn.Module):
    """A two-layer network whose neurons fire above a threshold; only the first layer is trained.

    Parameters
    ----------
    d : int
        Values of an input, whose norm should be one.
    m : int
        Neurons, at least 2.
    bias : float, optional
        Threshold b; ``sqrt(0.4 ln m)`` by default.
    generator : torch.Generator, int or None
        Source of weights and signs.
    dtype : torch.dtype, optional
        Of the weights.

    Notes
    -----
    ``f(x) = sum_r a_r relu(<w_r, x> - b)`` with ``w_r ~ N(0, I)`` and fixed ``a_r = +-1 / sqrt(m)``. The answer is the logits
    ``(-f / 2, f / 2)`` of two classes, so that cross-entropy is the logistic loss of ``f``.

    References
    ----------
    Gao et al. (2022), arXiv:2208.05395, section 2.

    Examples
    --------
    >>> ShiftedReLUNet(3, 64, generator=0)(torch.eye(3)).shape
    torch.Size([3, 2])
    """

    def __init__(
        self,
        d: int,
        m: int,
        *,
        bias: float | None = None,
        generator: Seed = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        checks.integer("d", d, low=1)
        checks.integer("m", m, low=2)
        g = as_generator(generator)
        self.bias = (
            math.sqrt(0.4 * math.log(m))
            if bias is None
            else checks.between("bias", bias, -math.inf, math.inf)
        )
        self.weight = nn.Parameter(randn((m, d), generator=g, dtype=dtype))
        self.register_buffer("signs", rademacher((m,), generator=g, dtype=self.weight.dtype) / math.sqrt(m))
        self.signs: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """Return logits, shape (n, 2)."""
        f = (x @ self.weight.T - self.bias).relu() @ self.signs
        return torch.stack([-f, f], 1) / 2


class SublinearAdversarialTrainer:
    """Train a shifted ReLU network on attacked inputs, touching only neurons that fire.

    Parameters
    ----------
    net : ShiftedReLUNet
        Trained in place.
    epsilon : float
        Radius of the attack, zero or above and at most 1: Euclidean, on the unit sphere.
    lr : float
        Learning rate of the full-batch descent, above 0.
    n_attack_steps : int
        Steps of the attack, at least 1; one step goes all the way.
    backend : {"halfspace", "dense"}
        Whether firing neurons are found by a :class:`HalfSpaceReporter` or by a product with all. The result is the same;
        a product is often faster, and counts more.
    leaf_size : int
        Of the reporter.

    Notes
    -----
    ``w_r <- w_r - lr / n sum_i l'(y_i f(x~_i)) y_i a_r x~_i 1[<w_r, x~_i> > b]`` with ``x~_i`` the end of the great circle from
    ``x_i`` along the gradient of the loss. While weights stay near their draw, about ``m^(4/5)`` neurons fire.

    Cost: O(d m^(4/5)) a row and step beside the search, against O(d m).

    References
    ----------
    Gao et al. (2022), arXiv:2208.05395, algorithm 1.

    Examples
    --------
    >>> net = ShiftedReLUNet(2, 256, generator=0)
    >>> x = functional.normalize(torch.tensor([[1.0, 0.2], [0.9, -0.1], [-0.3, 1.0], [0.1, 1.0]]), dim=1)
    >>> history = SublinearAdversarialTrainer(net, 0.05, lr=10.0).fit(x, torch.tensor([0, 0, 1, 1]), n_steps=50)
    >>> bool(history.loss[-1] < 0.5 * history.loss[0]), bool((history.active_fraction < 0.2).all())
    (True, True)
    """

    def __init__(
        self,
        net: ShiftedReLUNet,
        epsilon: float,
        *,
        lr: float = 1.0,
        n_attack_steps: int = 1,
        backend: Literal["halfspace", "dense"] = "halfspace",
        leaf_size: int = 16,
    ) -> None:
        if not isinstance(net, ShiftedReLUNet):
            raise checks.ArgumentTypeError(
                f"net is a {type(net).__name__}; allowed: a ShiftedReLUNet. Build one with ShiftedReLUNet(d, m)."
            )
        self.net = net
        self.epsilon = checks.between("epsilon", epsilon, 0, 1)
        self.lr = checks.positive("lr", lr)
        self.n_attack_steps = checks.integer("n_attack_steps", n_attack_steps, low=1)
        self.backend = checks.one_of("backend", backend, ("halfspace", "dense"))
        self.leaf_size = checks.integer("leaf_size", leaf_size, low=1)

    @torch.no_grad()
    def fit(self, x: Tensor, y: Tensor, *, n_steps: int, progress: ProgressLike = False) -> SublinearHistory:
        """Train for a number of steps on inputs of norm one and labels 0 and 1."""
        w, (m, d) = self.net.weight, self.net.weight.shape
        checks.tensor("x", x, shape=(None, d))
        signs = 2 * checks.labels("y", y, n=len(x), n_classes=2).to(x) - 1
        checks.integer("n_steps", n_steps, low=1)
        worst = float((x.norm(dim=1) - 1).abs().max())
        if worst > 1e-3:
            raise checks.ArgumentError(
                f"x has a row whose norm is off by {worst:.3g}; allowed: rows of norm 1. Use normalize(x, dim=1)."
            )
        reporter = HalfSpaceReporter(w, leaf_size=self.leaf_size) if self.backend == "halfspace" else None
        losses, active, counts, visited = [], [], [], []
        for _ in track(range(n_steps), "sublinear training", progress=progress):
            before = (0, 0) if reporter is None else (reporter.visited, reporter.tested)
            at, pairs = self._attack(x, signs, reporter)
            rows, neurons, slope, value = self._forward(at, signs, reporter)
            gradient = torch.zeros_like(w)
            gradient.index_add_(0, neurons, (slope[rows] * self.net.signs[neurons])[:, None] * at[rows])
            w.sub_(gradient, alpha=self.lr / len(x))
            passes = self.n_attack_steps + 1
            if reporter is None:
                search, moved, seen = passes * len(x) * m, 0, 1.0
            else:
                touched = torch.unique(neurons)
                search = reporter.visited - before[0] + reporter.tested - before[1]
                seen = (reporter.visited - before[0]) / (passes * len(x) * reporter.nodes)
                reporter.update(touched, w[touched])
                moved = len(touched) * (1 + int(math.log2(reporter.nodes + 1)))
            losses.append(value)
            active.append(len(rows) / (len(x) * m))
            counts.append((search + pairs + len(rows) + moved) * d)
            visited.append(seen)
        loss, fraction, share = (torch.tensor(v, dtype=x.dtype) for v in (losses, active, visited))
        return SublinearHistory(loss, fraction, torch.tensor(counts), share)

    def _attack(self, x: Tensor, signs: Tensor, reporter: HalfSpaceReporter | None) -> tuple[Tensor, int]:
        """Return the attacked inputs, and the pairs of row and firing neuron that it took."""
        widest = 2 * math.asin(self.epsilon / 2)  # the angle whose chord is epsilon
        stride = widest if self.n_attack_steps == 1 else 2 * widest / self.n_attack_steps
        at, pairs = x, 0
        for _ in range(self.n_attack_steps):
            rows, neurons, slope, _ = self._forward(at, signs, reporter)
            uphill = torch.zeros_like(x)
            uphill.index_add_(0, rows, self.net.signs[neurons][:, None] * self.net.weight[neurons])
            at = _turn(at, slope[:, None] * uphill, stride)
            angle = torch.atan2(_tangent(at, x).norm(dim=1), (at * x).sum(1))
            at = torch.where((angle > widest)[:, None], _turn(x, at, widest), at)
            pairs += len(rows)
        return at, pairs

    def _forward(
        self, x: Tensor, signs: Tensor, reporter: HalfSpaceReporter | None
    ) -> tuple[Tensor, Tensor, Tensor, float]:
        """Return pairs of row and firing neuron, the derivative of each row's loss in f, and the mean loss."""
        net = self.net
        if reporter is None:
            rows, neurons = (x @ net.weight.T > net.bias).nonzero(as_tuple=True)
        else:
            rows, neurons = reporter.query_batch(x, net.bias)
        above = (net.weight[neurons] * x[rows]).sum(1) - net.bias
        f = torch.zeros_like(x[:, 0]).index_add_(0, rows, net.signs[neurons] * above)
        return (
            rows,
            neurons,
            -signs * torch.sigmoid(-signs * f),
            float(functional.softplus(-signs * f).mean()),
        )


def _tangent(v: Tensor, x: Tensor) -> Tensor:
    """Return the part of v that is orthogonal to the unit vectors x."""
    return v - (v * x).sum(1, keepdim=True) * x


def _turn(x: Tensor, towards: Tensor, angle: float) -> Tensor:
    """Return unit vectors turned by an angle along the great circle towards a vector."""
    return math.cos(angle) * x + math.sin(angle) * functional.normalize(_tangent(towards, x), dim=1)
