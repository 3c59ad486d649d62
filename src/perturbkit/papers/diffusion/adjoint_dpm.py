"""Gradients through the sampler of a digits network: exact, at constant memory, and enough to turn a digit's label."""

from __future__ import annotations

from collections.abc import Callable

import torch
from matplotlib.figure import Figure
from torch import Tensor

from perturbkit.core import Denoiser
from perturbkit.core.random import randn
from perturbkit.diffusion import adjoint_sample, sample_ddim
from perturbkit.papers import Comparison, Evidence, Run, paper
from perturbkit.papers.diffusion._beds import SCHEDULE, grid
from perturbkit.papers.diffusion._networks import train_denoiser

_ROUNDS = 30


@paper(
    number=91,
    title="AdjointDPM: Adjoint Sensitivity Method for Gradient Backpropagation of Diffusion Probabilistic Models",
    authors="Pan, Liao, Shi, Yan, Tang, Feng, Zhang",
    year=2024,
    arxiv="2307.10711",
    claim="Gradients by noise, condition and parameters through the whole sampler, at a memory that does not grow with the steps.",
    method="perturbkit.diffusion.adjoint_sample",
    needs="gradient",
    input="any",
    cost="as many calls and vector-Jacobian products backward as calls forward",
    seconds=40,
)
def reproduce(run: Run) -> Evidence:
    """A denoiser of digits trained here; 20 starts, attacked through 20 steps."""
    from perturbkit.data import load_digits8

    digits = load_digits8()
    points = digits.x.flatten(1).double() * 2 - 1
    denoiser = train_denoiser(points, SCHEDULE, run.seeds(1)[0], t_end=0.02)
    logits = _classifier(points, digits.y)
    start = 20.0 * randn((20, 64), generator=run.generator("start"), dtype=torch.float64)

    times = grid(100)
    exact = _gradient(lambda x: sample_ddim(denoiser, x, times).x, logits, start)
    ours = _gradient(lambda x: adjoint_sample(denoiser, x, times), logits, start)
    wrong = _gradient(lambda x: denoiser.x0(x, times[0]), logits, start)
    memory = [[_saved(sample, start, n) for n in (10, 200)] for sample in _samplers(denoiser)]

    steps = grid(20)

    def draw(x: Tensor) -> Tensor:
        return adjoint_sample(denoiser, x, steps, method="euler", checkpoint=True)

    attacked = _attack(draw, logits, start)
    moved = (attacked - start).norm(dim=1, keepdim=True)
    direction = randn(start.shape, generator=run.generator("random"), like=start)
    random = _on_the_sphere(start + moved * direction / direction.norm(dim=1, keepdim=True), start)
    with torch.no_grad():
        label, after, by_chance = (logits(draw(x)).argmax(1) for x in (start, attacked, random))
    flips, chance = (float((y != label).double().mean()) for y in (after, by_chance))
    comparisons = [
        Comparison("cosine of the gradient by the noise with autograd through 100 steps, least of 20 rows", _cosine(ours, exact), 0.999, "higher", n=20),
        Comparison("numbers kept for the backward pass, 200 steps against 10", float(memory[0][1]), float(memory[0][0]), "equal"),
        Comparison("numbers kept at 200 steps, autograd against the adjoint", float(memory[1][1]), float(memory[0][1]), "higher", factor=10.0),
        Comparison("share of digits whose label the noise is turned to, norm kept", flips, 0.5, "higher", n=20),
        Comparison("share of labels turned by a random change of that size", chance, flips, "lower", factor=0.5, n=20),
        Comparison("cosine of the gradient through the first call alone with autograd, least of 20 rows", _cosine(wrong, exact), 0.999, "higher", control=True),
        Comparison("numbers kept by autograd, 200 steps against 10", float(memory[1][1]), float(memory[1][0]), "equal", control=True),
    ]  # fmt: skip
    return Evidence(
        comparisons,
        _figure(draw(start).detach(), draw(attacked).detach(), label, after),
        notes=f"The noise moves by {float((moved / start.norm(dim=1, keepdim=True)).median()):.2f} of its norm (median). Text "
        "embeddings and style fine-tuning, the paper's other uses, need its pretrained model.",
    )


def _classifier(points: Tensor, labels: Tensor) -> Callable[[Tensor], Tensor]:
    from sklearn.linear_model import LogisticRegression

    fitted = LogisticRegression(C=0.1, max_iter=500).fit(points.numpy(), labels.numpy())
    weight, bias = torch.from_numpy(fitted.coef_), torch.from_numpy(fitted.intercept_)
    return lambda x: x @ weight.T + bias


def _gradient(
    sample: Callable[[Tensor], Tensor], logits: Callable[[Tensor], Tensor], start: Tensor
) -> Tensor:
    x = start.clone().requires_grad_()
    return torch.autograd.grad(logits(sample(x)).logsumexp(1).sum(), x)[0]


def _samplers(denoiser: Denoiser) -> tuple[Callable[[Tensor, int], Tensor], ...]:
    return (
        lambda x, n: adjoint_sample(denoiser, x, grid(n)),
        lambda x, n: sample_ddim(denoiser, x, grid(n)).x,
    )


def _saved(sample: Callable[[Tensor, int], Tensor], start: Tensor, n: int) -> int:
    """Count the numbers that the graph of a draw keeps."""
    saved: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        sample(start.clone().requires_grad_(), n)
    return sum(saved)


def _attack(draw: Callable[[Tensor], Tensor], logits: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
    """Lower the margin of the first label by normalised gradient steps of 2 % of the norm, on the sphere."""
    x = start.clone()
    label = logits(draw(start).detach()).argmax(1, keepdim=True)
    for _ in range(_ROUNDS):
        leaf = x.clone().requires_grad_()
        answers = logits(draw(leaf))
        other = answers.scatter(1, label, -torch.inf).amax(1, keepdim=True)
        margin = answers.gather(1, label) - other
        (slope,) = torch.autograd.grad(margin.sum(), leaf)
        step = 0.02 * start.norm(dim=1, keepdim=True) * slope / slope.norm(dim=1, keepdim=True)
        x = torch.where(margin.detach() > 0, _on_the_sphere(x - step, start), x)
    return x


def _on_the_sphere(x: Tensor, start: Tensor) -> Tensor:
    return x * (start.norm(dim=1, keepdim=True) / x.norm(dim=1, keepdim=True))


def _cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.cosine_similarity(a, b, dim=1).min())


def _figure(before: Tensor, after: Tensor, label: Tensor, turned: Tensor) -> Figure:
    figure = Figure(figsize=(8, 2.4), layout="constrained")
    axes = figure.subplots(2, 10)
    for column in range(10):
        for row, (images, names) in enumerate(((before, label), (after, turned))):
            ax = axes[row, column]
            ax.imshow(images[column].reshape(8, 8), cmap="gray_r", vmin=-1, vmax=1)
            ax.set_title(str(int(names[column])), fontsize=8)
            ax.set_axis_off()
    return figure
