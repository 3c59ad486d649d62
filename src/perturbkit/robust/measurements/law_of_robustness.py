"""The law of robustness: how steep any function must be that fits noisy labels, and how steep one is.

Use it to see whether a data set can be interpolated smoothly at all, and whether more parameters could help. Wu, Huang and
Wang (2022), A Law of Robustness beyond Isoperimetry, arXiv:2202.11592.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from perturbkit.core import Result, checks, keeping_modes

__all__ = [
    "LawOfRobustness",
    "LipschitzInterpolator",
    "law_of_robustness",
    "minimal_lipschitz_constant",
    "network_lipschitz",
]

Norm = Literal["l1", "l2", "linf"]
_ORDERS = {"l1": 1.0, "l2": 2.0, "linf": math.inf}


@dataclass(frozen=True)
class LawOfRobustness(Result):
    """Lower bounds on the Lipschitz constant of a function that fits labels below their noise.

    Attributes
    ----------
    parametric : float
        For functions of so many parameters, up to the constant given.
    nonparametric : float
        For any function.
    probability : float
        With which the second holds over the draw of the labels, at least.
    regime : str
        Which of the two is the larger: "parameters" or "dimension".
    """

    parametric: float
    nonparametric: float
    probability: float
    regime: str

    @property
    def bound(self) -> float:
        """The larger of the two."""
        return max(self.parametric, self.nonparametric)


def law_of_robustness(
    n_samples: int,
    n_params: int,
    dim: int,
    *,
    gap: float = 2.0,
    chance: float = 0.5,
    diameter: float = 2.0,
    constant: float = 1.0,
) -> LawOfRobustness:
    """Bound the Lipschitz constant of functions that interpolate random labels.

    Parameters
    ----------
    n_samples, n_params, dim : int
        Rows, parameters of the function, and dimension of the inputs, at least 1.
    gap : float
        How far two labels are apart when they differ, above zero.
    chance : float
        Probability that two labels differ by so much, in (0, 1].
    diameter : float
        Of the set that holds the inputs, above zero.
    constant : float
        Factor of the parametric bound, which the paper leaves open; 1 by default, or fitted to one network.

    Returns
    -------
    LawOfRobustness

    Raises
    ------
    ArgumentError
        If an argument is not allowed.

    Notes
    -----
    With p parameters and any distribution of the inputs: ``constant sqrt(n / p)``, up to logarithms. Any function: a set of
    diameter D holds at most ``(1 + 2 D / delta)^d`` points further apart than delta, so that one can take ``n / 4`` disjoint
    pairs no further apart than ``delta = 2 D / ((n / 2)^{1/d} - 1)``; unless all have close labels,
    ``L >= gap / delta``. More parameters help only while n is below the exponential of the dimension.

    References
    ----------
    Wu, Huang and Wang (2022), arXiv:2202.11592; the constant of the second bound is that of the argument above.

    Examples
    --------
    >>> found = law_of_robustness(10_000, 1_000_000, dim=2)
    >>> round(found.parametric, 3), round(found.nonparametric, 1), found.regime
    (0.1, 34.9, 'dimension')
    """
    n = checks.integer("n_samples", n_samples, low=1)
    p = checks.integer("n_params", n_params, low=1)
    d = checks.integer("dim", dim, low=1)
    checks.positive("gap", gap)
    checks.between("chance", chance, 0, 1, inclusive="high")
    checks.positive("diameter", diameter)
    parametric = checks.positive("constant", constant) * math.sqrt(n / p)
    packed = (n / 2) ** (1 / d) - 1
    nonparametric = max(0.0, gap * packed / (2 * diameter))
    return LawOfRobustness(
        parametric,
        nonparametric,
        1 - (1 - chance) ** (n // 4),
        "parameters" if parametric >= nonparametric else "dimension",
    )


def minimal_lipschitz_constant(x: Tensor, y: Tensor, *, norm: Norm = "l2") -> float:
    """Return the least Lipschitz constant of any function through the data.

    Parameters
    ----------
    x : Tensor, shape (n, ...)
        Inputs, floating point, at least two.
    y : Tensor, shape (n,)
        Values.
    norm : {"l2", "l1", "linf"}
        Of the inputs.

    Returns
    -------
    float
        Infinite if equal inputs have different values.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If shapes or the norm are not allowed.

    Notes
    -----
    ``max_{i<j} |y_i - y_j| / |x_i - x_j|``, which :class:`LipschitzInterpolator` attains. Cost: all pairs, in blocks.

    References
    ----------
    McShane (1934), Extension of range of functions; Wu, Huang and Wang (2022), arXiv:2202.11592.

    Examples
    --------
    >>> minimal_lipschitz_constant(torch.tensor([[0.0], [2.0]]), torch.tensor([1.0, 4.0]))
    1.5
    """
    rows, values = _data(x, y, norm)
    if len(rows) < 2:
        raise checks.ArgumentError("x has one row; allowed: at least two. Give more data.")
    worst = 0.0
    for i in range(0, len(rows), 1024):
        distance = _distances(rows[i : i + 1024], rows, norm)
        change = (values[i : i + 1024, None] - values).abs()
        # A pair of equal rows with equal values asks for nothing.
        ratio = torch.where(change > 0, change / distance, 0.0)
        worst = max(worst, float(ratio.max()))
    return worst


class LipschitzInterpolator:
    """The functions through the data with the least Lipschitz constant: the lowest, the highest and their middle.

    Parameters
    ----------
    x : Tensor, shape (n, ...)
        Inputs, floating point.
    y : Tensor, shape (n,)
        Values.
    norm : {"l2", "l1", "linf"}
        Of the inputs.
    constant : float, optional
        A Lipschitz constant to use, no smaller than the least; the least by default.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If shapes are not allowed, or no function of the constant goes through the data.

    Notes
    -----
    ``max_i (y_i - L |z - x_i|)`` and ``min_i (y_i + L |z - x_i|)``; every L-Lipschitz function through the data is between.

    References
    ----------
    McShane (1934), Extension of range of functions.

    Examples
    --------
    >>> between = LipschitzInterpolator(torch.tensor([[0.0], [2.0]]), torch.tensor([0.0, 1.0]))
    >>> [v.tolist() for v in between.predict(torch.tensor([[1.0], [4.0]]))]
    [[0.5, 0.0], [0.5, 1.0], [0.5, 2.0]]
    """

    def __init__(self, x: Tensor, y: Tensor, *, norm: Norm = "l2", constant: float | None = None) -> None:
        least = minimal_lipschitz_constant(x, y, norm=norm)
        self.constant = least if constant is None else checks.nonnegative("constant", constant)
        if not math.isfinite(least) or self.constant < least * (1 - 1e-12):
            raise checks.ArgumentError(
                f"constant is {self.constant:g}; allowed: at least {least:g} for these data (infinite: equal inputs have "
                "different values). Raise it, or average repeated inputs."
            )
        self._x, self._y = _data(x, y, norm)
        self._norm: Norm = norm

    def predict(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the lowest, the middle and the highest value at new inputs, each of shape (m,)."""
        rows = checks.tensor("z", z).flatten(1).to(self._x)
        lows, highs = [], []
        for part in rows.split(1024):
            reach = self.constant * _distances(part, self._x, self._norm)
            lows.append((self._y - reach).amax(1))
            highs.append((self._y + reach).amin(1))
        low, high = torch.cat(lows), torch.cat(highs)
        return low, (low + high) / 2, high


def network_lipschitz(
    model: nn.Module,
    x: Tensor | None = None,
    *,
    method: Literal["local", "product", "lipsdp"] = "local",
) -> float:
    """Bound or measure the Lipschitz constant of a network, in the Euclidean norm.

    Parameters
    ----------
    model : nn.Module
        For "local" any differentiable network; otherwise a ``Sequential`` of linear layers and activations whose slopes are
        between 0 and 1 (for "lipsdp" with one hidden layer of rectifiers).
    x : Tensor, shape (n, ...), optional
        Where to look, for "local".
    method : {"local", "product", "lipsdp"}
        The largest Jacobian over the rows, a lower bound; the product of spectral norms, an upper bound; or the upper bound
        of a semidefinite program, between the two (extra ``convex``).

    Returns
    -------
    float

    Raises
    ------
    ArgumentError, ArgumentTypeError, ModelError, MissingExtraError
        If the network or an option is not allowed.

    Notes
    -----
    LipSDP with one hidden layer: the least ``sqrt(rho)`` with a diagonal ``T >= 0`` such that
    ``[[-rho I, W0' T], [T W0, W1' W1 - 2 T]]`` is negative semidefinite.

    References
    ----------
    Fazlyab, Robey, Hassani, Morari and Pappas (2019), arXiv:1906.04893.

    Examples
    --------
    >>> layer = nn.Sequential(nn.Linear(2, 1, bias=False))
    >>> _ = layer[0].weight.data.copy_(torch.tensor([[3.0, 4.0]]))
    >>> network_lipschitz(layer, method="product"), network_lipschitz(layer, torch.zeros(1, 2))
    (5.0, 5.0)
    """
    checks.one_of("method", method, ("local", "product", "lipsdp"))
    if method == "local":
        if x is None:
            raise checks.ArgumentError("x is None under method='local'; allowed: inputs. Pass x=.")
        checks.tensor("x", x)
        return _steepest(model, x)
    weights = _weights(model)
    if method == "product":
        return math.prod(float(torch.linalg.matrix_norm(w.double(), ord=2)) for w in weights)
    if len(weights) != 2:
        raise checks.ModelError(
            f"the network has {len(weights)} linear layers under method='lipsdp'; allowed: two. Use method='product'."
        )
    return _lipsdp(*(w.double().cpu() for w in weights))


def _steepest(model: nn.Module, x: Tensor) -> float:
    def one(row: Tensor) -> Tensor:
        return model(row[None])[0].reshape(-1)

    with keeping_modes(model):
        model.eval()
        jacobian = torch.func.vmap(torch.func.jacrev(one))(x).flatten(2)
    return float(torch.linalg.matrix_norm(jacobian.detach(), ord=2).max())


def _weights(model: nn.Module) -> list[Tensor]:
    slopes = (nn.ReLU, nn.Tanh, nn.Identity, nn.Flatten, nn.Dropout, nn.Softplus, nn.Hardtanh)
    parts = list(model) if isinstance(model, nn.Sequential) else [model]
    for part in parts:
        if not isinstance(part, (nn.Linear, *slopes)):
            raise checks.ModelError(
                f"the network holds a {type(part).__name__}; allowed: a Sequential of Linear layers and "
                f"{', '.join(s.__name__ for s in slopes)}. Use method='local'."
            )
    found = [part.weight.detach() for part in parts if isinstance(part, nn.Linear)]
    if not found:
        raise checks.ModelError("the network has no linear layer; allowed: at least one. Pass another.")
    return found


def _lipsdp(first: Tensor, second: Tensor) -> float:
    cp: Any = checks.extra("cvxpy", "convex")
    hidden, inputs = first.shape
    w0, w1 = first.numpy(), second.numpy()
    rho, t = cp.Variable(), cp.Variable(hidden, nonneg=True)
    scale = cp.diag(t)
    matrix = cp.bmat([[-rho * torch.eye(inputs).numpy(), w0.T @ scale], [scale @ w0, w1.T @ w1 - 2 * scale]])
    problem = cp.Problem(cp.Minimize(rho), [matrix << 0])
    problem.solve(solver=cp.CLARABEL)
    if rho.value is None:
        raise checks.ModelError(
            f"the semidefinite program ended as {problem.status}; allowed: one that is solved. Use method='product'."
        )
    return math.sqrt(max(float(rho.value), 0.0))


def _data(x: Tensor, y: Tensor, norm: str) -> tuple[Tensor, Tensor]:
    checks.one_of("norm", norm, tuple(_ORDERS))
    checks.tensor("x", x)
    checks.tensor("y", y, shape=(len(x),), floating=False)
    return x.detach().flatten(1), y.detach().to(x)


def _distances(a: Tensor, b: Tensor, norm: str) -> Tensor:
    return torch.cdist(a, b, p=_ORDERS[norm], compute_mode="donot_use_mm_for_euclid_dist")
