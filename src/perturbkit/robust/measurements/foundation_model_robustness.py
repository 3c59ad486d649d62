"""Robustness beside an oracle: images moved uphill in a model's loss for as long as other models still know what they show.

Use it where a fixed test set says too little and a ball of one norm is not what changes in the world, and trusted models
stand in for people. Zhang, Liu, Li, Xie, Kim and Wang (2024), Foundation Model-oriented Robustness: Robust Image Model
Evaluation with Pretrained Models, arXiv:2308.10632.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional

from perturbkit.core import Cost, Oracle, Result, checks, track
from perturbkit.core.progress import ProgressLike
from perturbkit.robust.attacks._parts import column
from perturbkit.robust.measurements._perturbers import (
    LatentPerturber,
    Perturber,
    PixelPerturber,
    StylePerturber,
    check_render,
)

__all__ = [
    "FMRReport", "LatentPerturber", "PixelPerturber", "StylePerturber", "foundation_model_robustness", "oracle_vote",
]  # fmt: skip

Model = Oracle | nn.Module | Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class FMRReport(Result):
    """How a model does on images that its oracles still recognise.

    Attributes
    ----------
    standard_accuracy, perturbed_accuracy : float
        Of the model, on the images given and on those generated.
    oracle_accuracy : float
        Of the oracles' vote on the images generated; 1 without oracles.
    fmr : float
        Perturbed accuracy over that of the oracles; NaN where theirs is 0.
    retained : float
        Perturbed over standard accuracy; NaN where the latter is 0.
    validity : float
        Share of the changed images that the judges still give their label; NaN without judges or change.
    images : Tensor
        The images generated, in the shape of those given; a row without an accepted step is as it was.
    steps : Tensor of int64, shape (n,)
        Steps accepted.
    correct : Tensor of bool, shape (n,)
        Whether the model is right about the image generated.
    cost, oracle_cost : Cost
        Evaluations of the model, and of oracles and judges together.
    """

    standard_accuracy: float
    perturbed_accuracy: float
    oracle_accuracy: float
    fmr: float
    retained: float
    validity: float
    images: Tensor
    steps: Tensor
    correct: Tensor
    cost: Cost = field(default_factory=Cost)
    oracle_cost: Cost = field(default_factory=Cost)


def foundation_model_robustness(
    model: Model, oracles: Sequence[Model], x: Tensor, y: Tensor, *, perturber: Perturber, judges: Sequence[Model] = (),
    max_iter: int = 50, step: float = 0.1, max_rejections: int = 5, sparsity: float | None = None,
    progress: ProgressLike = False,
) -> FMRReport:  # fmt: skip
    """Generate images on which a model does worse while its oracles do not, and measure the model on them.

    Parameters
    ----------
    model : Oracle, nn.Module or callable
        Classifier under study, of a batch (n, ...), answering logits (n, classes).
    oracles : sequence of Oracle, nn.Module or callable
        Trusted classifiers, answering scores (n, classes); not differentiated. They should share neither weights nor training
        data with the model, whose score is otherwise high for nothing. Empty: every step is accepted, which makes it an attack.
    x : Tensor, shape (n, ...)
        Images, floating point.
    y : Tensor of int64, shape (n,)
        Labels.
    perturber : LatentPerturber, PixelPerturber, StylePerturber or one's own with ``start``, ``render`` and ``project``
        In what the images are moved.
    judges : sequence of Oracle, nn.Module or callable
        Further classifiers that say afterwards whether the images still show their label.
    max_iter : int
        Steps at most, zero or above.
    step : float
        Euclidean length of the first step, in units of the code, above 0.
    max_rejections : int
        Steps refused before an image is left as it is, at least 1.
    sparsity : float or None
        Share of the code, by row, that may move: where the first gradient is largest; in (0, 1]. ``None`` moves all.
    progress : Progress, bool or None
        Reports steps.

    Returns
    -------
    FMRReport

    Raises
    ------
    ArgumentError, ArgumentTypeError, ModelError
        If an argument or what a model answers is not allowed.

    Notes
    -----
    ``z <- z + s g / |g|`` with the gradient g of the model's cross-entropy in the code, accepted while the vote of the oracles
    on the image is the label; else undone and the step s of that row halved. Images that the oracles do not know from the
    start do not move. ``FMR = accuracy of the model / accuracy of the oracles``, both on the images generated; the paper's
    tables can also be read as :attr:`FMRReport.retained`. Nothing is drawn.

    The oracles' own errors are the floor: what they let through is the label only as far as they know.

    Cost: a gradient of the model, a gradient and an evaluation of ``render``, and an evaluation of every oracle, a step and row
    that still moves.

    References
    ----------
    Zhang et al. (2024), arXiv:2308.10632.

    Examples
    --------
    The model looks at one half of the image and the oracle at the other, so only the model is misled:

    >>> model, oracle = (lambda z: torch.stack([-z[:, 0], z[:, 0]], 1)), (lambda z: torch.stack([-z[:, 1], z[:, 1]], 1))
    >>> x, y = torch.tensor([[0.2, 0.2], [-0.3, -0.3]]), torch.tensor([1, 0])
    >>> ball = PixelPerturber("l2", 1.0, bounds=None)
    >>> report = foundation_model_robustness(model, [oracle], x, y, perturber=ball)
    >>> report.standard_accuracy, report.perturbed_accuracy, report.oracle_accuracy
    (1.0, 0.0, 1.0)
    """
    x = checks.tensor("x", x).detach()
    if not all(callable(getattr(perturber, name, None)) for name in ("start", "render", "project")):
        raise checks.ArgumentTypeError(
            f"perturber is a {type(perturber).__name__}; allowed: something with start, render and project. Pass for instance "
            "PixelPerturber()."
        )
    checks.integer("max_iter", max_iter, low=0)
    checks.positive("step", step)
    checks.integer("max_rejections", max_rejections, low=1)
    if sparsity is not None:
        checks.between("sparsity", sparsity, 0, 1, inclusive="high")
    studied, zoo, jury = Oracle.wrap(model), _wrapped(oracles), _wrapped(judges)
    costs = [oracle.cost for oracle in (studied, *zoo, *jury)]
    with _frozen(
        studied, *zoo, *jury, getattr(perturber, "encoder", None), getattr(perturber, "decoder", None)
    ):
        scores = studied(x)
        if scores.ndim != 2:
            raise checks.ModelError(
                f"the model answered shape {tuple(scores.shape)}; allowed: (n, classes). For one logit z, return "
                "torch.stack([0 * z, z], 1)."
            )
        labels = checks.labels("y", y, n=len(x), n_classes=scores.shape[1]).to(x.device)
        check_render(perturber, x[:1])
        images, steps = _climbed(
            studied, zoo, x, labels, perturber, max_iter, step, max_rejections, sparsity, progress
        )
        known = oracle_vote(zoo, images) == labels if zoo else torch.ones_like(labels, dtype=torch.bool)
        correct, moved = studied(images).argmax(1) == labels, steps > 0
        valid = oracle_vote(jury, images[moved]) == labels[moved] if jury and bool(moved.any()) else moved[:0]
    spent = [oracle.cost - before for oracle, before in zip((studied, *zoo, *jury), costs, strict=True)]
    standard, perturbed, recognised = (
        float(v.double().mean()) for v in (scores.argmax(1) == labels, correct, known)
    )
    return FMRReport(
        standard, perturbed, recognised, _ratio(perturbed, recognised), _ratio(perturbed, standard),
        float(valid.double().mean()), images, steps, correct, spent[0], sum(spent[1:], Cost()),
    )  # fmt: skip


def oracle_vote(oracles: Sequence[Model], x: Tensor) -> Tensor:
    """Return the label that most oracles give each image.

    Parameters
    ----------
    oracles : sequence of Oracle, nn.Module or callable
        Classifiers answering scores (n, classes), at least one.
    x : Tensor, shape (n, ...)
        Images.

    Returns
    -------
    Tensor of int64, shape (n,)
        -1 where two labels have as many votes.

    Raises
    ------
    ArgumentError, ModelError
        If there is no oracle, or one does not answer scores.

    Notes
    -----
    The mode of ``argmax`` over the oracles. Cost: an evaluation of each.

    References
    ----------
    Zhang et al. (2024), arXiv:2308.10632.

    Examples
    --------
    >>> one, other = (lambda z: z), (lambda z: -z)
    >>> z = torch.tensor([[0.0, 1.0]])
    >>> oracle_vote([one, one, other], z), oracle_vote([one, other], z)
    (tensor([1]), tensor([-1]))
    """
    zoo = _wrapped(oracles)
    checks.tensor("x", x)
    if not zoo:
        raise checks.ArgumentError("there are no oracles; allowed: at least one. Pass a list of classifiers.")
    votes = []
    for oracle in zoo:
        scores = oracle(x)
        if scores.ndim != 2:
            raise checks.ModelError(
                f"an oracle answered shape {tuple(scores.shape)}; allowed: scores (n, classes). Return one_hot of its labels."
            )
        votes.append(scores.argmax(1).to(x.device))
    labels = torch.stack(votes)
    counts = (labels[:, None] == labels[None]).sum(1)  # [oracle, row]: how many agree with this oracle
    most = counts.amax(0)
    # A tie: more oracles share the highest count than one label of that count can have.
    winner = labels.gather(0, counts.argmax(0, keepdim=True))[0]
    return torch.where((counts == most).sum(0) == most, winner, -1)


def _wrapped(models: Sequence[Model]) -> list[Oracle]:
    if not isinstance(models, Sequence):
        raise checks.ArgumentTypeError(
            f"oracles or judges are a {type(models).__name__}; allowed: a list of classifiers. Pass [classifier]."
        )
    return [Oracle.wrap(model) for model in models]


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else math.nan


@contextmanager
def _frozen(*oracles: object) -> Iterator[None]:
    with ExitStack() as stack:
        for oracle in oracles:
            if isinstance(oracle, Oracle):
                stack.enter_context(oracle.frozen())
        yield


def _climbed(
    studied: Oracle, zoo: list[Oracle], x: Tensor, y: Tensor, perturber: Perturber, max_iter: int, step: float,
    max_rejections: int, sparsity: float | None, progress: ProgressLike,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the last image of each row that was accepted, and how many were."""
    # Oracles, so that images are made and differentiated in chunks.
    render = Oracle(lambda code, start: perturber.render(start, code))
    pull = Oracle(lambda code, start, uphill: (perturber.render(start, code) * uphill).flatten(1).sum(1))
    code, images = perturber.start(x), x.clone()
    # What the codes stand for, which an image that has not moved need not be.
    pictures = render(code, x) if max_iter > 0 else images
    free = torch.ones_like(code, dtype=torch.bool)
    stride, refused = x.new_full((len(x),), step), torch.zeros_like(y)
    steps = torch.zeros_like(y)
    moving = oracle_vote(zoo, x) == y if zoo else torch.ones_like(y, dtype=torch.bool)
    for i in track(range(max_iter), "images", progress=progress):
        rows = moving.nonzero()[:, 0]
        if len(rows) == 0:
            break
        here, start = code[rows], x[rows]
        uphill = studied.value_and_gradient(pictures[rows], y[rows], objective=_row_loss)[1]
        gradient = pull.gradient(here, None, start, uphill)
        if i == 0 and sparsity is not None:
            free[rows] = _largest(gradient, sparsity)
        gradient = (gradient * free[rows]).flatten(1)
        length = stride[rows, None] * functional.normalize(gradient, dim=1)
        with torch.no_grad():
            trial = perturber.project(start, here + length.reshape(here.shape))
        shown = render(trial, start)
        sound = (gradient != 0).any(1) & shown.flatten(1).isfinite().all(1)
        # What is not finite is not shown to the oracles.
        safe = torch.where(column(sound, shown), shown, start)
        accepted = sound & (oracle_vote(zoo, safe) == y[rows]) if zoo else sound
        good, bad = rows[accepted], rows[~accepted]
        code = code.index_copy(0, good, trial[accepted])
        images = images.index_copy(0, good, shown[accepted])
        pictures = pictures.index_copy(0, good, shown[accepted])
        steps[good] += 1
        refused[bad] += 1
        stride[bad] /= 2
        moving &= refused < max_rejections
    return images, steps


def _row_loss(out: Tensor, y: Tensor) -> Tensor:
    return functional.cross_entropy(out, y, reduction="none")


def _largest(gradient: Tensor, share: float) -> Tensor:
    flat = gradient.flatten(1).abs()
    kept = flat.topk(max(1, round(share * flat.shape[1])), dim=1).indices
    return torch.zeros_like(flat, dtype=torch.bool).scatter(1, kept, True).reshape(gradient.shape)
