"""Privacy budget: adds up what releases cost and refuses the one that would exceed what was promised.

Give one budget to everything that touches a data set. Composition of concentrated privacy is built in (Bun and
Steinke, 2016, Concentrated Differential Privacy, arXiv:1605.02065; as a filter for costs that are chosen
adaptively: Feldman and Zrnic, 2021, arXiv:2008.11193); tighter accountants come from dp-accounting.
"""

from __future__ import annotations

import math
from typing import Any, Literal

from scipy.optimize import brentq, minimize_scalar

from perturbkit.core import checks

__all__ = ["PrivacyBudget", "zcdp_epsilon", "zcdp_rho"]


class PrivacyBudget:
    r"""A promise of (epsilon, delta)-differential privacy, and what is left of it.

    Parameters
    ----------
    epsilon : float
        Total privacy loss allowed, above 0.
    delta : float
        Chance with which it may be exceeded, in [0, 1); well below one over the number of people.
    accountant : {"auto", "pure", "zcdp", "rdp", "pld"}
        How costs add up. "pure": epsilons are summed (all there is for delta = 0). "zcdp": rhos are summed. "rdp" and
        "pld": Rényi and privacy-loss-distribution accountants of dp-accounting (extra ``privacy``), tighter; "pld"
        is proved only for costs that do not depend on earlier answers. "auto": "pure" for delta = 0, else "zcdp".

    Attributes
    ----------
    epsilon, delta, accountant
        As given.
    n_releases : int
        Releases paid for.

    Notes
    -----
    A pure loss epsilon is :math:`\epsilon^2/2`-zCDP; Gaussian noise sigma at l2 sensitivity Delta is
    :math:`\Delta^2/2\sigma^2`-zCDP; rhos add up, and stopping when their sum would pass a fixed bound keeps the
    guarantee even if each is chosen after seeing the answers before. :func:`zcdp_epsilon` converts.

    References
    ----------
    Bun and Steinke (2016), arXiv:1605.02065. Feldman and Zrnic (2021), arXiv:2008.11193. Canonne, Kamath and Steinke
    (2020), arXiv:2004.00010, for the conversion.

    Examples
    --------
    >>> budget = PrivacyBudget(epsilon=1.0)
    >>> budget.spend(epsilon=0.75)
    >>> budget.epsilon_spent
    0.75
    >>> budget.spend(epsilon=0.5)
    Traceback (most recent call last):
        ...
    perturbkit.core.checks.ArgumentError: the release would raise the privacy loss from 0.75 to 1.25; allowed: 1 at delta 0. Spend less, or stop: the budget cannot be refilled.
    """

    def __init__(
        self,
        epsilon: float,
        delta: float = 0.0,
        *,
        accountant: Literal["auto", "pure", "zcdp", "rdp", "pld"] = "auto",
    ) -> None:
        self.epsilon = checks.positive("epsilon", epsilon)
        self.delta = checks.between("delta", delta, 0, 1, inclusive="low")
        checks.one_of("accountant", accountant, ("auto", "pure", "zcdp", "rdp", "pld"))
        if delta == 0 and accountant not in ("auto", "pure"):
            raise checks.ArgumentError(
                f"accountant is {accountant!r} with delta 0; allowed: 'pure' or 'auto'. Allow a delta above 0."
            )
        self.accountant = ("pure" if delta == 0 else "zcdp") if accountant == "auto" else accountant
        self.n_releases = 0
        self._pure = self._rho = 0.0
        # Costs by kind, so that equal ones are composed in one go.
        self._events: dict[tuple[str, float], int] = {}
        if self.accountant in ("rdp", "pld"):
            checks.extra("dp_accounting", "privacy")

    @property
    def epsilon_spent(self) -> float:
        """Privacy loss so far at ``delta``."""
        return self._total(self._pure, self._rho, self._events)

    @property
    def remaining(self) -> float:
        """What ``epsilon`` exceeds the loss so far by; a further release may cost more or less than its share."""
        return max(self.epsilon - self.epsilon_spent, 0.0)

    def spend(self, *, epsilon: float | None = None, rho: float | None = None, count: int = 1) -> None:
        """Pay for ``count`` releases that are epsilon-DP, or rho-zCDP, each.

        Raises
        ------
        ArgumentError
            If not exactly one of the two is given, the accountant cannot take it, or the budget would be exceeded;
            nothing is then spent.
        """
        if (epsilon is None) == (rho is None):
            raise checks.ArgumentError(
                f"epsilon is {epsilon} and rho is {rho}; allowed: exactly one of them. Give the cost in one currency."
            )
        if epsilon is not None:
            cost = checks.positive("epsilon", epsilon)
            self._pay("pure", cost, cost, cost**2 / 2, count)
        elif rho is not None:
            cost = checks.positive("rho", rho)
            self._pay("zcdp", cost, math.inf, cost, count)

    def spend_laplace(self, scale: float, sensitivity: float, *, count: int = 1) -> None:
        """Pay for ``count`` releases with Laplace noise of a scale, at an l1 sensitivity in the same units."""
        cost = checks.positive("sensitivity", sensitivity) / checks.positive("scale", scale)
        self._pay("laplace", cost, cost, cost**2 / 2, count)

    def spend_gaussian(self, sigma: float, sensitivity: float, *, count: int = 1) -> None:
        """Pay for ``count`` releases with Gaussian noise of deviation sigma, at an l2 sensitivity in the same units."""
        mu = checks.positive("sensitivity", sensitivity) / checks.positive("sigma", sigma)
        self._pay("gaussian", mu, math.inf, mu**2 / 2, count)

    def _pay(self, kind: str, size: float, pure: float, rho: float, count: int) -> None:
        checks.integer("count", count, low=1)
        allowed = {
            "pure": ("pure", "laplace"),
            "pld": ("pure", "laplace", "gaussian"),
        }.get(self.accountant)
        if allowed is not None and kind not in allowed:
            raise checks.ArgumentError(
                f"the release has a {kind} cost; allowed with accountant {self.accountant!r}: {', '.join(allowed)} "
                "costs. Use another mechanism, or a budget with delta > 0 and accountant 'zcdp'."
            )
        events = dict(self._events)
        events[kind, size] = events.get((kind, size), 0) + count
        after = (self._pure + count * pure, self._rho + count * rho, events)
        total = self._total(*after)
        # Sums such as ten times 0.1 may pass the bound by rounding alone.
        if total > self.epsilon * (1 + 1e-9):
            raise checks.ArgumentError(
                f"the release would raise the privacy loss from {self.epsilon_spent:.6g} to {total:.6g}; allowed: "
                f"{self.epsilon:g} at delta {self.delta:g}. Spend less, or stop: the budget cannot be refilled."
            )
        self._pure, self._rho, self._events = after
        self.n_releases += count

    def _total(self, pure: float, rho: float, events: dict[tuple[str, float], int]) -> float:
        if not events:
            return 0.0
        if self.accountant == "pure":
            return pure
        if self.accountant == "zcdp":
            return min(pure, zcdp_epsilon(rho, self.delta))
        found = _pld_epsilon if self.accountant == "pld" else _rdp_epsilon
        return min(pure, found(events, self.delta))


def zcdp_epsilon(rho: float, delta: float) -> float:
    r"""Return the epsilon that rho-zCDP gives at delta.

    Parameters
    ----------
    rho : float
        Zero-concentrated privacy loss, at least 0.
    delta : float
        In (0, 1).

    Returns
    -------
    float

    Notes
    -----
    :math:`\inf_{\alpha>1} \alpha\rho + \frac{\log(1/\alpha\delta)}{\alpha-1} + \log(1 - 1/\alpha)`, at most the better
    known :math:`\rho + 2\sqrt{\rho \log(1/\delta)}`.

    References
    ----------
    Canonne, Kamath and Steinke (2020), arXiv:2004.00010, proposition 12.

    Examples
    --------
    >>> round(zcdp_epsilon(0.01, 1e-6), 3)
    0.622
    """
    checks.nonnegative("rho", rho)
    checks.between("delta", delta, 0, 1, inclusive="neither")
    if rho == 0:
        return 0.0

    def at(log_order: float) -> float:
        """Epsilon at the order 1 + exp(log_order); any order gives a valid bound."""
        above = math.exp(log_order)
        order = 1 + above
        return (
            order * rho + (math.log(1 / delta) - math.log(order)) / above + math.log(above) - math.log(order)
        )

    middle = 0.5 * math.log(max(math.log(1 / delta), 1e-9) / rho)
    found = minimize_scalar(at, bounds=(middle - 6, middle + 6), method="bounded", options={"xatol": 1e-10})
    return max(min(float(found.fun), rho + 2 * math.sqrt(rho * math.log(1 / delta))), 0.0)


def zcdp_rho(epsilon: float, delta: float) -> float:
    """Return the largest rho whose :func:`zcdp_epsilon` is at most epsilon.

    Parameters
    ----------
    epsilon : float
        Above 0.
    delta : float
        In (0, 1).

    Returns
    -------
    float

    Notes
    -----
    By bisection; the result is rounded down so that converting it back does not exceed epsilon.

    Examples
    --------
    >>> round(zcdp_epsilon(zcdp_rho(1.0, 1e-6), 1e-6), 6)
    1.0
    """
    checks.positive("epsilon", epsilon)
    checks.between("delta", delta, 0, 1, inclusive="neither")
    # rho-zCDP costs at most rho + 2 sqrt(rho log(1/delta)); grow the bracket from that inverse.
    log_term = math.log(1 / delta)
    high = (math.sqrt(epsilon + log_term) - math.sqrt(log_term)) ** 2
    while zcdp_epsilon(high, delta) <= epsilon:
        high *= 2
    root = float(
        brentq(lambda r: zcdp_epsilon(r, delta) - epsilon, high * 1e-6, high, xtol=1e-300, rtol=1e-12)
    )
    return root * (1 - 1e-9)


def _rdp_epsilon(events: dict[tuple[str, float], int], delta: float) -> float:
    library: Any = checks.extra("dp_accounting", "privacy")
    made = checks.extra("dp_accounting.rdp", "privacy").RdpAccountant()
    for (kind, size), count in events.items():
        if kind == "gaussian":
            event = library.GaussianDpEvent(1 / size)
        elif kind == "laplace":
            event = library.LaplaceDpEvent(1 / size)
        else:
            event = library.ZCDpEvent(size if kind == "zcdp" else size**2 / 2)
        made.compose(event, count)
    return float(made.get_epsilon(delta))


def _pld_epsilon(events: dict[tuple[str, float], int], delta: float) -> float:
    losses: Any = checks.extra("dp_accounting.pld.privacy_loss_distribution", "privacy")
    common: Any = checks.extra("dp_accounting.pld.common", "privacy")
    total = losses.identity()
    for (kind, size), count in events.items():
        if kind == "gaussian":
            one = losses.from_gaussian_mechanism(1 / size)
        elif kind == "laplace":
            one = losses.from_laplace_mechanism(1 / size)
        else:
            one = losses.from_privacy_parameters(common.DifferentialPrivacyParameters(size, 0.0))
        total = total.compose(one.self_compose(count))
    return float(total.get_epsilon_for_delta(delta))
