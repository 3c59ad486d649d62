"""The handbook's deterministic rates against PEPit's numerical worst cases: what a proof gives away, and what a bound costs.

A ratio of one says that the theorem is tight. The floor is the arithmetic of the rate itself.
"""

from __future__ import annotations

from benchmarks._timing import Row, compare, table
from PEPit import PEP
from PEPit.functions import SmoothConvexFunction, SmoothFunction, SmoothStronglyConvexFunction

from perturbkit.optim import convergence_rate

_SMOOTH, _CONVEX = 2.0, 0.3


def _worst(kind: str, steps: int) -> float:
    """Worst case of gradient descent with step 1 / L over a class of functions, by a semidefinite program."""
    problem = PEP()
    if kind == "convex":
        f = problem.declare_function(SmoothConvexFunction, L=_SMOOTH)
    elif kind == "strongly_convex":
        f = problem.declare_function(SmoothStronglyConvexFunction, L=_SMOOTH, mu=_CONVEX)
    else:
        f = problem.declare_function(SmoothFunction, L=_SMOOTH)
    x = problem.set_initial_point()
    if kind == "nonconvex":
        start = f(x)
        for _ in range(steps):
            problem.set_performance_metric(f.gradient(x) ** 2)
            x = x - f.gradient(x) / _SMOOTH
        problem.set_initial_condition(start - f(x) <= 1)
        return float(problem.solve(verbose=0))
    solution = f.stationary_point()
    problem.set_initial_condition((x - solution) ** 2 <= 1)
    for _ in range(steps):
        x = x - f.gradient(x) / _SMOOTH
    problem.set_performance_metric(f(x) - f(solution) if kind == "convex" else (x - solution) ** 2)
    return float(problem.solve(verbose=0))


def main(rounds: int = 2) -> list[Row]:
    """Print the table and return its rows; raises if a worst case exceeds its theorem."""
    constants = {"L": _SMOOTH, "mu": _CONVEX, "D": 1.0, "F": 1.0}
    for kind in ("convex", "strongly_convex", "nonconvex"):
        for steps in (1, 4, 10):
            bound, worst = convergence_rate("gd", kind, steps, **constants), _worst(kind, steps)
            print(
                f"gradient descent, {kind}, {steps} steps: theorem {bound:.4f}, worst case {worst:.4f}, ratio {worst / bound:.3f}"
            )
            if worst > bound * (1 + 1e-4):
                raise AssertionError(f"the worst case {worst} exceeds the theorem's {bound}")

    def ours() -> float:
        return convergence_rate("gd", "convex", 10, **constants)

    rows = compare(ours, {"a bound for ten steps, PEPit": lambda: _worst("convex", 10)}, ours, rounds)
    print(table(rows))
    return rows


if __name__ == "__main__":
    main()
