"""The geometry of sampling: mean shift towards the data, nearly straight, with the denoised point ahead.

Use it to see when a sampler has decided where it goes, to stop there, and to see where a network departs from the
optimal denoiser of its training set. Chen, Zhou, Mei, Shen, Chen and Wang (2023), A Geometric Perspective on Diffusion
Models, arXiv:2305.19947.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from perturbkit.core import Denoiser, EDMSchedule, Result, SampleResult, Schedule, checks
from perturbkit.core.random import Seed, as_generator, randint, randn
from perturbkit.core.sampling import Path, check_start, transfer

__all__ = [
    "EmpiricalDenoiser",
    "TrajectoryGeometry",
    "annealed_mean_shift",
    "sample_ode_jump",
    "score_deviation",
    "trajectory_geometry",
]


class EmpiricalDenoiser(Denoiser):
    """The optimal denoiser of a data set: what a network without error and without limit would learn.

    Parameters
    ----------
    points : Tensor, shape (m, ...)
        The data, floating point.
    schedule : Schedule, optional
        An :class:`EDMSchedule` by default.
    weights : Tensor of shape (m,), optional
        Masses of the points, none negative, not all zero; equal by default.
    chunk_size : int
        Data points taken at once, for each of which every row of ``x`` holds one number.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If points, weights or the chunk size are not allowed.

    Notes
    -----
    ``D(x, t) = sum_i w_i y_i`` with ``w = softmax(log weight_i - |x - alpha y_i|^2 / (2 sigma^2))``, computed as a running
    softmax over chunks. At ``sigma = 0`` it is the nearest point. Cost: n m distances a call.

    References
    ----------
    Chen et al. (2023), arXiv:2305.19947.

    Examples
    --------
    >>> points = torch.tensor([[-1.0], [1.0]])
    >>> EmpiricalDenoiser(points).x0(torch.tensor([[0.0], [5.0]]), 1.0).round(decimals=3).tolist()
    [[0.0], [1.0]]
    """

    def __init__(
        self,
        points: Tensor,
        schedule: Schedule | None = None,
        weights: Tensor | None = None,
        *,
        chunk_size: int = 4096,
    ) -> None:
        self.points, self._log_weights = _with_mass(points, weights)
        self._chunk = checks.integer("chunk_size", chunk_size, low=1)
        super().__init__(self._mean, EDMSchedule() if schedule is None else schedule, predicts="x0")

    def _mean(self, x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = self.schedule.alpha(t).to(x), self.schedule.sigma(t).to(x)
        return _weighted_mean(x, alpha, sigma, self.points.to(x), self._log_weights.to(x), self._chunk)


def annealed_mean_shift(
    points: Tensor,
    x: Tensor,
    bandwidths: Tensor,
    *,
    weights: Tensor | None = None,
    chunk_size: int = 4096,
) -> Tensor:
    """Move points towards the modes of a data set by mean shift with a falling bandwidth.

    Parameters
    ----------
    points : Tensor, shape (m, ...)
        The data.
    x : Tensor, shape (n, ...)
        Where to start.
    bandwidths : Tensor, shape (steps + 1,)
        Decreasing, the last at least zero.
    weights : Tensor of shape (m,), optional
        Masses of the points; equal by default.
    chunk_size : int
        Data points taken at once.

    Returns
    -------
    Tensor, shape (steps + 1, n, ...)
        The trajectory, the start included.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If shapes or bandwidths are not allowed.

    Notes
    -----
    ``x' = (h' / h) x + (1 - h' / h) m(x; h)``, ``m`` the Gaussian mean shift of bandwidth ``h``: the Euler step of the
    probability flow of :class:`EmpiricalDenoiser` from noise ``h`` to ``h'``. ``h' = 0`` is the full mean shift step.

    References
    ----------
    Chen et al. (2023), arXiv:2305.19947.

    Examples
    --------
    >>> path = annealed_mean_shift(torch.tensor([[-1.0], [1.0]]), torch.tensor([[3.0]]), torch.tensor([4.0, 1.0, 0.0]))
    >>> path.shape, round(float(path[-1]), 3)
    (torch.Size([3, 1, 1]), 0.711)
    """
    checks.tensor("x", x)
    data, log_weights = _with_mass(points, weights)
    _same_items("points", points, x)
    grid = checks.tensor("bandwidths", bandwidths, ndim=1).double().cpu()
    if len(grid) < 2 or not bool((grid.diff() < 0).all()) or float(grid[-1]) < 0:
        raise checks.ArgumentError(
            f"bandwidths has {len(grid)} values from {float(grid[0]):g} to {float(grid[-1]):g}; allowed: at least two, "
            "strictly decreasing, none below zero. Use torch.logspace."
        )
    chunk = checks.integer("chunk_size", chunk_size, low=1)
    data, log_weights = data.to(x), log_weights.to(x)
    path, levels, one = [x], grid.tolist(), x.new_ones(len(x))
    for h, h_next in pairwise(levels):
        mean = _weighted_mean(path[-1], one, h * one, data, log_weights, chunk)
        path.append(torch.lerp(mean, path[-1], h_next / h))
    return torch.stack(path)


@dataclass(frozen=True, eq=False)
class TrajectoryGeometry(Result):
    """The shape of sampling trajectories, row by row.

    Attributes
    ----------
    deviation : Tensor, shape (n,)
        Largest distance of the trajectory from its chord, relative to the chord's length; 0 is a straight line.
    straightness : Tensor, shape (n,)
        Length of the chord over that of the path, in [0, 1].
    norms, denoised_norms : Tensor, shape (k, n)
        Norms along the trajectory and along the denoised points.
    distances, denoised_distances : Tensor, shape (k, n)
        Distances of both to the end of the trajectory.
    monotone : Tensor, shape (n,)
        Share of adjacent pairs in which the denoised point does not move away from the end.
    """

    deviation: Tensor
    straightness: Tensor
    norms: Tensor
    denoised_norms: Tensor
    distances: Tensor
    denoised_distances: Tensor
    monotone: Tensor


def trajectory_geometry(trajectory: Tensor, denoised: Tensor) -> TrajectoryGeometry:
    """Measure how straight trajectories are and how early their denoised points settle.

    Parameters
    ----------
    trajectory : Tensor, shape (k, n, ...)
        States from noise to data, in the scaled coordinates ``x / alpha``.
    denoised : Tensor, shape (k, n, ...) or (k - 1, n, ...)
        The denoised point of each state, or of each but the last.

    Returns
    -------
    TrajectoryGeometry

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If the shapes do not agree or there are fewer than two states.

    Notes
    -----
    The distance to the chord is that to the line through the two ends. A trajectory that does not move has deviation
    0 and straightness 1.

    References
    ----------
    Chen et al. (2023), arXiv:2305.19947.

    Examples
    --------
    >>> bent = torch.tensor([[[0.0, 0.0]], [[1.0, 1.0]], [[2.0, 0.0]]])
    >>> found = trajectory_geometry(bent, bent)
    >>> float(found.deviation), round(float(found.straightness), 3)
    (0.5, 0.707)
    """
    checks.tensor("trajectory", trajectory)
    checks.tensor("denoised", denoised)
    k = len(trajectory)
    if trajectory.ndim < 3 or k < 2:
        raise checks.ArgumentError(
            f"trajectory has shape {tuple(trajectory.shape)}; allowed: (states, rows, ...) with at least two states. "
            "Stack the states of the sampler's callback."
        )
    if denoised.shape[1:] != trajectory.shape[1:] or len(denoised) not in (k, k - 1):
        raise checks.ArgumentError(
            f"denoised has shape {tuple(denoised.shape)}; allowed: that of trajectory, {tuple(trajectory.shape)}, or one "
            "state less. Pass the denoised point of each state."
        )
    states, means = trajectory.flatten(2), denoised.flatten(2)
    tiny = torch.finfo(states.dtype).tiny
    chord = states[-1] - states[0]
    length = chord.norm(dim=1)
    along = chord / length.clamp_min(tiny)[:, None]
    offset = states - states[0]
    rejection = offset - (offset * along).sum(2, keepdim=True) * along
    path_length = states.diff(dim=0).norm(dim=2).sum(0)
    to_end = (means - states[-1]).norm(dim=2)
    return TrajectoryGeometry(
        deviation=torch.where(length > 0, rejection.norm(dim=2).amax(0) / length.clamp_min(tiny), 0),
        straightness=torch.where(path_length > 0, length / path_length.clamp_min(tiny), 1),
        norms=states.norm(dim=2),
        denoised_norms=means.norm(dim=2),
        distances=(states - states[-1]).norm(dim=2),
        denoised_distances=to_end,
        monotone=(to_end.diff(dim=0) <= 0).to(states.dtype).mean(0)
        if len(means) > 1
        else torch.ones_like(length),
    )


def sample_ode_jump(
    denoiser: Denoiser,
    x: Tensor,
    times: Tensor,
    *,
    jump_at: float,
    callback: Callable[[int, Tensor], None] | None = None,
) -> SampleResult:
    """Follow the probability flow to a noise level and jump to the denoised point from there.

    Parameters
    ----------
    denoiser : Denoiser
        The network with its schedule.
    x : Tensor, shape (n, ...)
        State at ``times[0]``, floating point.
    times : Tensor, shape (steps + 1,)
        Decreasing times.
    jump_at : float
        The jump is from the first time that is at most this, between ``times[-1]`` and ``times[0]``, where there is noise.
    callback : callable, optional
        Called as ``callback(i, x)`` after step ``i``, the jump included.

    Returns
    -------
    SampleResult
        Data, and the times visited, the last of which is that of the jump.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If the state, the times or ``jump_at`` are not allowed.

    Notes
    -----
    DDIM steps, then ``x = D(x, t)``: the denoised point converges before the state does, so the remaining calls change
    little. Cost: one call a step before the jump, and one.

    References
    ----------
    Chen et al. (2023), arXiv:2305.19947.

    Examples
    --------
    >>> denoiser = EmpiricalDenoiser(torch.tensor([[-1.0], [1.0]], dtype=torch.float64), EDMSchedule(10.0))
    >>> times = denoiser.schedule.times(40, t_end=0.01)
    >>> found = sample_ode_jump(denoiser, torch.tensor([[4.0]], dtype=torch.float64), times, jump_at=0.3)
    >>> round(float(found.x), 2), found.cost.nfev
    (1.0, 22)
    """
    check_start(denoiser, x, times)
    checks.between("jump_at", jump_at, float(times[-1]), float(times[0]))
    path, calls = Path(denoiser, times), denoiser.nfev
    last = next(i for i, t in enumerate(path.times) if t <= jump_at)
    if path.points[last].lam <= 0:
        raise checks.ArgumentError(
            f"jump_at is {jump_at:g}, where no noise is left; allowed: times with noise. Jump a step earlier."
        )
    for i in range(last):
        s, t = path.points[i], path.points[i + 1]
        x = transfer(x, denoiser.eps(x, s.time), s, t)
        if callback is not None:
            callback(i, x)
    x = denoiser.x0(x, path.times[last])
    if callback is not None:
        callback(last, x)
    result = path.result(x, denoiser.nfev - calls)
    return SampleResult(x, times[: last + 1].detach().to("cpu", torch.float64), result.cost)


def score_deviation(
    denoiser: Denoiser,
    points: Tensor,
    times: Tensor,
    *,
    n_samples: int = 256,
    generator: Seed = None,
) -> Tensor:
    """Measure how far a denoiser is from the optimal one of a data set, at each time.

    Parameters
    ----------
    denoiser : Denoiser
        The network with its schedule.
    points : Tensor, shape (m, ...)
        The data it was trained with.
    times : Tensor, shape (k,)
        Where to compare, with noise at each.
    n_samples : int
        Noisy states a time, at least 1.
    generator : torch.Generator, int or None
        Draws data points and noise.

    Returns
    -------
    Tensor, shape (k,)
        Mean of ``|D(x_t) - D_optimal(x_t)|`` over noisy data.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If an argument is not allowed.

    Notes
    -----
    Small at high noise, where both are the mean of the data, and at low noise, where both return the point; what is
    between is the network's own, and is what keeps it from returning its training set.

    References
    ----------
    Chen et al. (2023), arXiv:2305.19947.

    Examples
    --------
    >>> points = torch.randn(10, 3, generator=torch.Generator().manual_seed(0))
    >>> float(score_deviation(EmpiricalDenoiser(points), points, torch.tensor([1.0]), generator=0).max())
    0.0
    """
    checks.tensor("points", points)
    n = checks.integer("n_samples", n_samples, low=1)
    grid = checks.tensor("times", times, ndim=1).double().cpu()
    if not bool((denoiser.schedule.sigma(grid) > 0).all()):
        raise checks.ArgumentError(
            f"times go down to {float(grid.min()):g}, where there is no noise; allowed: times with noise. Leave it out."
        )
    g = as_generator(generator)
    optimal = EmpiricalDenoiser(points, denoiser.schedule)
    found = []
    for t in grid.tolist():
        clean = points[randint(0, len(points), (n,), generator=g, device=points.device)]
        x = denoiser.schedule.add_noise(clean, randn(clean.shape, generator=g, like=clean), t)
        found.append((denoiser.x0(x, t) - optimal.x0(x, t)).flatten(1).norm(dim=1).mean())
    return torch.stack(found)


def _weighted_mean(
    x: Tensor, alpha: Tensor, sigma: Tensor, points: Tensor, log_weights: Tensor, chunk: int
) -> Tensor:
    """Return the posterior mean of the data at each row, by a running softmax over chunks of points."""
    _same_items("x", x, points)
    rows, data = x.flatten(1), points.flatten(1)
    scaled = rows / alpha[:, None]
    # At zero noise the smallest positive bandwidth leaves the nearest points alone.
    width = (sigma / alpha).clamp_min(torch.finfo(x.dtype).tiny ** 0.25)
    top = rows.new_full((len(rows), 1), -torch.inf)
    total, mean = rows.new_zeros(len(rows), 1), torch.zeros_like(rows)
    for some, logs in zip(data.split(chunk), log_weights.split(chunk), strict=True):
        distance = torch.cdist(scaled, some, compute_mode="donot_use_mm_for_euclid_dist")
        energy = logs - 0.5 * (distance / width[:, None]) ** 2
        peak = torch.maximum(top, energy.amax(1, keepdim=True))
        keep, weight = (top - peak).exp(), (energy - peak).exp()
        total = keep * total + weight.sum(1, keepdim=True)
        mean = keep * mean + weight @ some
        top = peak
    return (mean / total).reshape(x.shape)


def _with_mass(points: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the points that have mass and the logarithms of their masses."""
    checks.tensor("points", points)
    if weights is None:
        return points, points.new_zeros(len(points))
    mass = checks.tensor("weights", weights, shape=(len(points),))
    if bool((mass < 0).any()) or not bool((mass > 0).any()):
        raise checks.ArgumentError(
            f"weights go from {float(mass.min()):g} to {float(mass.max()):g}; allowed: none negative, not all zero. "
            "Pass masses."
        )
    return points[mass > 0], mass[mass > 0].log()


def _same_items(name: str, value: Tensor, other: Tensor) -> None:
    if value.shape[1:] != other.shape[1:]:
        raise checks.ArgumentError(
            f"{name} has shape {tuple(value.shape)}; allowed: (n, ...) with items of shape {tuple(other.shape[1:])}. "
            "Reshape it."
        )
