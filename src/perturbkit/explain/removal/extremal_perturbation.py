"""Extremal perturbations: the mask of a given area that keeps an output highest, or whose removal brings it lowest.

Use it for images and networks with gradients where a region of a chosen size is the answer. Fong, Patrick and Vedaldi (2019),
Understanding Deep Networks via Extremal Perturbations and Smooth Masks, arXiv:1910.08485.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from perturbkit.core import Attribution, Cost, Oracle, Result, checks, target_rows, track
from perturbkit.core.progress import ProgressLike
from perturbkit.explain.removal._extremal import between_levels, blur_pyramid, smoothed, window_of
from perturbkit.explain.removal._parts import gaussian_blur

__all__ = ["ExtremalResult", "area_regulariser", "extremal_channels", "extremal_perturbation", "smooth_mask"]

_LEVELS, _BLOCK = 8, 2**25


@dataclass(frozen=True, eq=False)
class ExtremalResult(Result):
    """Masks by area.

    Attributes
    ----------
    areas : tuple of float
        Shares of the image that a mask may keep (or delete).
    masks : Tensor, shape (areas, n, 1, height, width), or (areas, n, channels) for channels
        1 inside the region that matters.
    scores : Tensor, shape (areas, n)
        The output for the image that only the mask keeps, also where the mask was found by deletion.
    history : Tensor, shape (areas, n, steps)
        The objective along the optimisation.
    saliency : Tensor, shape of a mask
        Sum of the masks over areas.
    target : Tensor or None
        The output explained.
    cost : Cost
        Evaluations spent.
    """

    areas: tuple[float, ...]
    masks: Tensor
    scores: Tensor
    history: Tensor
    saliency: Tensor
    target: Tensor | None = None
    cost: Cost = field(default_factory=Cost)

    def attribution(self, blur: float = 0.0) -> Attribution:
        """Return the masks of images summed over areas, for metrics, under a Gaussian of ``blur`` pixels."""
        values = gaussian_blur(self.saliency, checks.positive("blur", blur)) if blur else self.saliency
        return Attribution(values, self.target, self.cost, "extremal perturbation")

    def smallest(self, threshold: Tensor) -> Tensor:
        """Return the smallest area of each row whose score reaches its threshold, NaN where none does."""
        order = torch.tensor(self.areas, dtype=self.scores.dtype, device=self.scores.device)[:, None]
        reached = torch.where(self.scores >= threshold, order, torch.inf).amin(0)
        return torch.where(reached.isinf(), torch.nan, reached)


def extremal_perturbation(
    model: Oracle | nn.Module | Callable[[Tensor], Tensor],
    x: Tensor,
    target: Tensor | int | None = None,
    *,
    areas: Sequence[float] = (0.1,),
    variant: Literal["preserve", "delete", "dual"] = "preserve",
    perturbation: Literal["blur"] | float = "blur",
    step: int = 7,
    sigma: float = 21.0,
    max_blur: float = 20.0,
    max_iter: int = 800,
    lr: float = 0.01,
    weight: float = 300.0,
    growth: float | None = None,
    progress: ProgressLike = False,
) -> ExtremalResult:
    """Find, for each area, the smooth mask that keeps (or destroys) an output best.

    Parameters
    ----------
    model : Oracle, nn.Module or callable
        Function of a batch of images, answering (n, outputs) or (n,): logits, differentiable.
    x : Tensor, shape (n, channels, height, width)
        Images, floating point.
    target : Tensor of shape (n,), int or None
        The output explained.
    areas : sequence of float
        Shares in (0, 1).
    variant : {"preserve", "delete", "dual"}
        Keep the output high, bring it low by removing the region, or both.
    perturbation : "blur" or float
        What is outside: the image at a blur that grows as the mask falls, or a number.
    step : int
        Pixels between the mask's parameters, at least 1.
    sigma : float
        Width of the smooth mask's window, in pixels; 0 for the parameters as they are.
    max_blur : float
        Standard deviation of the strongest blur, in pixels.
    max_iter : int
        Steps of gradient descent with momentum 0.9, dampened by as much.
    lr : float
        Step size.
    weight : float
        First weight of the area term. 300 suits logits of ImageNet networks; where logits vary less it fixes the area before the
        logit has chosen the place, and a smaller one keeps more of it.
    growth : float or None
        Its factor a step; by default 1.0035 for 800 steps, and what ends at as many times the first weight for others.
    progress : Progress, bool or None
        Reports steps.

    Returns
    -------
    ExtremalResult

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If an input or option is not allowed.

    Notes
    -----
    ``min_m -Phi(m (x) x) + lambda_t R_a(m)`` over parameters in [0, 1] that start at 1, with R_a of
    :func:`area_regulariser`, which asks for a mask of ones on the share a and zeros elsewhere, and m of :func:`smooth_mask`. The
    blur is interpolated in a pyramid of eight levels from none (m = 1) to the strongest (m = 0).

    Cost: ``max_iter`` gradients for each area and row, twice for "dual"; all areas and rows in chunks of one batch.

    References
    ----------
    Fong, Patrick and Vedaldi (2019), arXiv:1910.08485.

    Examples
    --------
    >>> x = torch.tensor([[[[3.0, 1.0], [0.5, 2.0]]]])
    >>> f = lambda z: z.flatten(1).sum(1)
    >>> found = extremal_perturbation(f, x, areas=(0.5,), perturbation=0.0, step=1, sigma=0.0, max_iter=300)
    >>> found.masks[0, 0, 0].round()
    tensor([[1., 0.],
            [0., 1.]])
    """
    checks.image_batch("x", x)
    shares = _areas(areas)
    checks.one_of("variant", variant, ("preserve", "delete", "dual"))
    height, width = x.shape[2:]
    checks.integer("step", step, low=1, high=min(height, width))
    checks.nonnegative("sigma", sigma)
    oracle = Oracle.wrap(model)
    before = oracle.cost
    if isinstance(perturbation, str) and checks.one_of("perturbation", perturbation, ("blur",)):
        pyramid = blur_pyramid(x, _LEVELS, checks.positive("max_blur", max_blur))
    else:
        fill = checks.between("perturbation", perturbation, -float("inf"), float("inf"))  # type: ignore[arg-type]
        pyramid = torch.stack((x, torch.full_like(x, fill)), 1)
    k, n, schedule = len(shares), len(x), _Schedule(max_iter, lr, weight, growth)
    rows = target_rows(target, x)
    signs = {"preserve": (-1.0,), "delete": (1.0,), "dual": (-1.0, 1.0)}[variant]
    grid = x.new_ones(1, 1, -(-height // step), -(-width // step))
    window = window_of(grid, step, sigma)

    def solve(levels: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return masks, scores and histories of some images, all areas at once."""
        many = None if labels is None else labels.repeat(k)

        def pull(mask: Tensor) -> tuple[Tensor, Tensor]:
            """Return the objective without the area, and its gradient in the mask."""
            value, slope = mask.new_zeros(len(mask)), torch.zeros_like(mask)
            for sign in signs:
                with torch.enable_grad():
                    leaf = mask.detach().requires_grad_(True)
                    shown = between_levels(levels, leaf if sign < 0 else 1 - leaf)
                out, gradient = oracle.value_and_gradient(shown.detach(), many)
                value, slope = (
                    value + sign * out,
                    slope + sign * torch.autograd.grad(shown, leaf, gradient)[0],
                )
            return value, slope

        start, size = grid.repeat(k * len(levels), 1, 1, 1), (height, width)
        best, history = _descend(
            start, lambda p: smoothed(p, *window, size), pull, shares, len(levels), schedule, progress
        )
        scores = oracle.value(between_levels(levels, best), many)
        return best.unflatten(0, (k, -1)), scores.unflatten(0, (k, -1)), history.unflatten(0, (k, -1))

    # The smooth maximum holds all taps of every pixel: so many images at once as keep it within bounds.
    block = max(1, _BLOCK // (k * window[1].numel()))
    with oracle.frozen():
        found = [
            solve(pyramid[i : i + block], None if rows is None else rows[i : i + block])
            for i in range(0, n, block)
        ]
    masks, scores, history = (torch.cat(parts, 1) for parts in zip(*found, strict=True))
    return ExtremalResult(shares, masks, scores, history, masks.sum(0), rows, oracle.cost - before)


def smooth_mask(parameters: Tensor, step: int, sigma: float, size: tuple[int, int]) -> Tensor:
    """Enlarge a grid of parameters to a mask without holes or specks.

    Parameters
    ----------
    parameters : Tensor, shape (n, 1, rows, columns)
        In [0, 1].
    step : int
        Pixels between parameters.
    sigma : float
        Width of the window, in pixels; with 0 each pixel takes its nearest parameter.
    size : (int, int)
        Height and width of the mask.

    Returns
    -------
    Tensor, shape (n, 1, height, width)

    Notes
    -----
    ``m(u) = smax_v k(u - v) p(v)``, ``smax z = sum z exp(z / T) / sum exp(z / T)`` with T = 1/20, and
    ``k(u) = exp(-max(0, 2 |u| / sigma - 1)^2 / 2)`` up to 1.5 sigma, the window of the authors' program: it falls to one half
    at about sigma. Memory: pixels times the parameters within reach.

    References
    ----------
    Fong, Patrick and Vedaldi (2019), arXiv:1910.08485, section 3.2.

    Examples
    --------
    >>> smooth_mask(torch.tensor([[[[0.0, 1.0]]]]), 2, 0.0, (1, 4))
    tensor([[[[0., 0., 1., 1.]]]])
    """
    checks.tensor("parameters", parameters, ndim=4)
    checks.integer("step", step, low=1)
    checks.nonnegative("sigma", sigma)
    return smoothed(parameters, *window_of(parameters, step, sigma), size)


def area_regulariser(mask: Tensor, area: float) -> Tensor:
    """Return how far masks are from ones on a share of their elements and zeros elsewhere.

    Parameters
    ----------
    mask : Tensor, shape (n, ...)
    area : float
        The share, in (0, 1).

    Returns
    -------
    Tensor, shape (n,)

    Notes
    -----
    ``R_a = mean (sort(m) - r_a)^2``, r_a with (1 - a) N zeros and then a N ones, rounded. The gradient treats equal elements alike.

    References
    ----------
    Fong, Patrick and Vedaldi (2019), arXiv:1910.08485, section 3.1.

    Examples
    --------
    >>> area_regulariser(torch.tensor([[0.0, 1.0, 0.0, 0.0], [0.25, 0.25, 0.25, 0.25]]), 0.25)
    tensor([0.0000, 0.1875])
    """
    checks.tensor("mask", mask)
    (area,) = _areas((area,))
    ordered = mask.flatten(1).sort(1).values
    total = ordered.shape[1]
    wanted = (torch.arange(total, device=mask.device) >= total - round(area * total)).to(mask.dtype)
    # Equal elements share their zeros and ones, or the gradient would order them by their place in memory. The value is
    # the same, since wanted is its own square.
    group = (ordered.detach().diff(dim=1) > 0).long().cumsum(1)
    group = functional.pad(group, (1, 0))
    sums = torch.zeros_like(ordered.detach()).scatter_add(1, group, wanted.expand_as(ordered))
    sizes = torch.zeros_like(sums).scatter_add(1, group, torch.ones_like(sums))
    shared = (sums / sizes.clamp(min=1)).gather(1, group)
    return (ordered.square() - 2 * ordered * shared + wanted).mean(1)


def extremal_channels(
    model: nn.Module,
    layer: nn.Module,
    x: Tensor,
    target: Tensor | int | None = None,
    *,
    areas: Sequence[float] = (0.1,),
    max_iter: int = 800,
    lr: float = 0.01,
    weight: float = 300.0,
    growth: float | None = None,
    progress: ProgressLike = False,
) -> ExtremalResult:
    """Find the channels of a layer that keep an output highest when all others are zero.

    Parameters
    ----------
    model : nn.Module
        Answers (n, outputs) or (n,).
    layer : nn.Module
        A module inside it whose output is (n, channels, ...).
    x, target, areas, max_iter, lr, weight, growth, progress
        As in :func:`extremal_perturbation`; areas are shares of the channels.

    Returns
    -------
    ExtremalResult
        ``masks`` of shape (areas, n, channels).

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If an input or option is not allowed.

    Notes
    -----
    The objective of :func:`extremal_perturbation` over one number a channel, without smoothing.

    References
    ----------
    Fong, Patrick and Vedaldi (2019), arXiv:1910.08485, section 4.

    Examples
    --------
    >>> net = nn.Sequential(nn.Identity(), nn.Flatten(), nn.Linear(3, 1, bias=False))
    >>> net[2].weight.data = torch.tensor([[1.0, 3.0, -1.0]])
    >>> extremal_channels(net, net[0], torch.ones(1, 3), areas=(0.34,), max_iter=300).masks.round()
    tensor([[[0., 1., 0.]]])
    """
    checks.tensor("x", x)
    shares = _areas(areas)
    if not isinstance(model, nn.Module) or all(layer is not m for m in model.modules()):
        raise checks.ArgumentError(
            f"layer is {type(layer).__name__}, not in model, a {type(model).__name__}; allowed: a module of an nn.Module. Pass both."
        )
    seen: list[Tensor] = []
    watch = layer.register_forward_hook(lambda module, given, out: seen.append(out))
    try:
        Oracle(model)(x[:1])
    finally:
        watch.remove()
    channels, k, n = seen[0].shape[1], len(shares), len(x)

    def kept(mask: Tensor, rows: Tensor) -> Tensor:
        def scale(module: nn.Module, given: object, out: Tensor) -> Tensor:
            return out * mask.reshape(*mask.shape, *[1] * (out.ndim - 2))

        hook = layer.register_forward_hook(scale)
        try:
            return model(rows)
        finally:
            hook.remove()

    oracle, rows = Oracle(kept), target_rows(target, x)
    many, images = None if rows is None else rows.repeat(k), x.repeat(k, *[1] * (x.ndim - 1))

    def pull(mask: Tensor) -> tuple[Tensor, Tensor]:
        value, slope = oracle.value_and_gradient(mask, many, images)
        return -value, -slope

    start, schedule = x.new_ones(k * n, channels), _Schedule(max_iter, lr, weight, growth)
    with Oracle(model).frozen():
        best, history = _descend(start, lambda p: p, pull, shares, n, schedule, progress)
        scores = oracle.value(best, many, images)
    masks = best.reshape(k, n, channels)
    history = history.reshape(k, n, -1)
    return ExtremalResult(shares, masks, scores.reshape(k, n), history, masks.sum(0), rows, oracle.cost)


@dataclass(frozen=True)
class _Schedule:
    max_iter: int
    lr: float
    weight: float
    growth: float | None

    def __post_init__(self) -> None:
        checks.integer("max_iter", self.max_iter, low=1)
        checks.positive("lr", self.lr)
        checks.positive("weight", self.weight)
        if self.growth is not None:
            checks.positive("growth", self.growth)


def _areas(areas: Sequence[float]) -> tuple[float, ...]:
    shares = tuple(checks.between("areas", a, 0, 1, inclusive="neither") for a in areas)
    if not shares:
        raise checks.ArgumentError("areas is empty; allowed: one share at least. Pass for instance (0.1,).")
    return shares


def _descend(
    parameters: Tensor,
    mask_of: Callable[[Tensor], Tensor],
    pull: Callable[[Tensor], tuple[Tensor, Tensor]],
    areas: tuple[float, ...],
    n: int,
    schedule: _Schedule,
    progress: ProgressLike,
) -> tuple[Tensor, Tensor]:
    """Minimise the objective with the area term by projected gradient descent with momentum."""
    growth = schedule.growth or 1.0035 ** (800 / schedule.max_iter)
    weight, speed, history = schedule.weight, torch.zeros_like(parameters), []
    for _ in track(range(schedule.max_iter), "extremal perturbation", progress=progress):
        with torch.enable_grad():
            leaf = parameters.detach().requires_grad_(True)
            mask = mask_of(leaf)
            area = torch.cat(
                [area_regulariser(part, a) for part, a in zip(mask.split(n), areas, strict=True)]
            )
            value, slope = pull(mask)
            (gradient,) = torch.autograd.grad((mask * slope.detach()).sum() + weight * area.sum(), leaf)
        history.append(value + weight * area.detach())
        speed = 0.9 * speed + 0.1 * gradient
        parameters = (parameters - schedule.lr * speed).clamp(0, 1)
        weight *= growth
    return mask_of(parameters).detach(), torch.stack(history, 1)
