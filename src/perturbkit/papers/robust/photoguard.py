"""Immunised digits make an editor by latent diffusion fail, more so when protected against the whole editor."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional

from perturbkit.core import VPSchedule
from perturbkit.core.random import rademacher, randint, randn, seeded_init, uniform
from perturbkit.papers import Comparison, Evidence, Run, paper
from perturbkit.papers.robust._digits import stream
from perturbkit.robust import LatentEditor, diffusion_immunize, editing_report, encoder_immunize, jpeg

_LATENT, _IMAGES, _EPSILON = 24, 50, 16 / 255
_STRENGTH, _STEPS = 0.3, 5


@paper(
    number=198,
    title="Raising the Cost of Malicious AI-Powered Image Editing",
    authors="Salman, Khaddaj, Leclerc, Ilyas, Madry",
    year=2023,
    arxiv="2302.06588",
    claim="Imperceptible perturbations of images make a latent diffusion model fail to edit them; those made against the whole "
    "editor disturb it more than those made against its encoder.",
    method="perturbkit.robust.diffusion_immunize",
    needs="gradient",
    input="image",
    cost="steps x gradients of the encoder, or of the editor times draws of noise",
    seconds=65,
)
def reproduce(run: Run) -> Evidence:
    """Train two editors of digits, protect fifty digits against one, and edit them with both."""
    from perturbkit.data import digits_classifier, load_digits28

    seed = run.seeds(1)[0]
    train, test = load_digits28("train"), load_digits28("test").rows(range(_IMAGES))
    editor, other = (_editor(train.x, train.y, seed + k) for k in (0, 1))
    x = test.x
    wanted = (test.y + randint(1, 10, (_IMAGES,), generator=stream(seed, 2))) % 10
    classifier = digits_classifier(28).module
    found = {name: _protected(editor, x, wanted, name, seed) for name in _WAYS}
    sizes = {
        size: {name: _protected(editor, x, wanted, name, seed, size / 255) for name in _WAYS}
        for size in (8, 32)
    }

    def measured(by: LatentEditor, images: Tensor) -> dict[str, float]:
        report = editing_report(by, x, images, wanted, classifier=classifier, generator=stream(seed, 3))
        assert report.immunized_success is not None
        ink = report.immunized_edit.sum((1, 2, 3)) / x.sum((1, 2, 3))
        success = report.immunized_success & ((ink - 1).abs() < 1 / 3)
        numbers = {"similarity": report.similarity, "success": success, "PSNR": report.image_psnr, "shift": report.latent_shift}  # fmt: skip
        return {name: float(value.double().mean()) for name, value in numbers.items()}

    direct = {name: measured(editor, images) for name, images in found.items()}
    settings = {
        "clean": {"clean": measured(editor, x)},
        "at 16/255": direct,
        **{
            f"at {size}/255": {name: measured(editor, images) for name, images in ways.items()}
            for size, ways in sizes.items()
        },
        "after JPEG 75": {name: measured(editor, jpeg(images, 75)) for name, images in found.items()},
        "in 8 bits": {name: measured(editor, (255 * images).round() / 255) for name, images in found.items()},
        "by another editor": {name: measured(other, images) for name, images in found.items()},
    }
    signs, flat, encoder, whole = (
        direct[name] for name in ("random signs", "uniform noise", "encoder", "diffusion")
    )
    what = "similarity of the edit to that of the clean image"
    comparisons = [
        Comparison(f"{what}: protected against the encoder, 0.1 below random signs", encoder["similarity"], signs["similarity"], "lower", margin=0.1, n=_IMAGES),
        Comparison(f"{what}: against the editor, 0.1 below random signs", whole["similarity"], signs["similarity"], "lower", margin=0.1, n=_IMAGES),
        Comparison(f"{what}: against the editor, not above against the encoder", whole["similarity"], encoder["similarity"], "lower", n=_IMAGES),
        Comparison("success of edits: against the editor, at most 0.7 of that after random signs", whole["success"], signs["success"], "lower", factor=0.7, n=_IMAGES),
        Comparison(f"{what}: uniform noise, 0.1 below random signs", flat["similarity"], signs["similarity"], "lower", margin=0.1, n=_IMAGES, control=True, note="must fail: it is not size that protects"),
    ]  # fmt: skip
    shown = ". ".join(
        f"{setting}: "
        + "; ".join(
            f"{name} similarity {v['similarity']:.2f}, success {v['success']:.2f}, PSNR {v['PSNR']:.1f} dB"
            for name, v in rows.items()
        )
        for setting, rows in settings.items()
    )
    return Evidence(
        comparisons,
        _figure(editor, x, found, wanted, seed),
        notes="A variational encoder with 24 numbers a digit and a class-conditional diffusion of them, for Stable Diffusion. "
        "An edit succeeds if the classifier sees the digit asked for and the amount of ink stays within a third of the "
        "picture's. The paper gives no numbers to this; the margins here are ours. "
        "The small smooth encoder is hard to mislead: the order is the paper's, the margins are missed. Neither JPEG nor another "
        f"editor undoes the protection. {shown}.",
    )


_WAYS = ("random signs", "uniform noise", "encoder", "diffusion")


def _protected(
    editor: LatentEditor, x: Tensor, wanted: Tensor, way: str, seed: int, epsilon: float = _EPSILON
) -> Tensor:
    g = stream(seed, 4)
    if way == "random signs":
        return (x + epsilon * rademacher(x.shape, generator=g)).clamp(0, 1)
    if way == "uniform noise":
        return (x + uniform(x.shape, -epsilon, epsilon, generator=g)).clamp(0, 1)
    if way == "encoder":
        return encoder_immunize(editor.encode, x, epsilon, n_steps=100, generator=g).x
    return diffusion_immunize(editor, x, wanted, epsilon, n_steps=60, grad_reps=4, generator=g).x


class _Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 16, 4, stride=2, padding=1), nn.SiLU(), nn.Conv2d(16, 32, 4, stride=2, padding=1), nn.SiLU(),
            nn.Flatten(), nn.Linear(1568, 2 * _LATENT),
        )  # fmt: skip

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and logarithm of the deviation."""
        mean, log_std = self.body(x).chunk(2, 1)
        return mean, log_std

    def forward(self, x: Tensor) -> Tensor:
        return self.moments(x)[0]


class _Network(nn.Module):
    """``(z, t, class) -> v``."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(_LATENT + 18, 256), nn.SiLU(), nn.Linear(256, 256), nn.SiLU(), nn.Linear(256, 256), nn.SiLU(),
            nn.Linear(256, _LATENT),
        )  # fmt: skip

    def forward(self, z: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        angles = t[:, None] * torch.arange(1, 5).to(t) * torch.pi
        classes = functional.one_hot(condition, 10).to(z)
        return self.body(torch.cat([z, classes, angles.sin(), angles.cos()], 1))


def _editor(x: Tensor, y: Tensor, seed: int) -> LatentEditor:
    """Train encoder and decoder, then the diffusion of the latents."""
    g = stream(seed, 0)
    with seeded_init(seed % 2**31):
        encode, network = _Encoder(), _Network()
        decode = nn.Sequential(
            nn.Linear(_LATENT, 1568), nn.SiLU(), nn.Unflatten(1, (32, 7, 7)), nn.ConvTranspose2d(32, 16, 4, stride=2, padding=1),
            nn.SiLU(), nn.ConvTranspose2d(16, 1, 4, stride=2, padding=1), nn.Sigmoid(),
        )  # fmt: skip
    schedule = VPSchedule()

    def bound() -> Tensor:
        batch = x[randint(0, len(x), (64,), generator=g)]
        mean, log_std = encode.moments(batch)
        out = decode(mean + log_std.exp() * randn(mean.shape, generator=g))
        divergence = (0.5 * (mean.square() + (2 * log_std).exp()) - log_std).sum(1)
        return (
            functional.binary_cross_entropy(out, batch, reduction="none").sum((1, 2, 3)) + divergence
        ).mean()

    _cycle([*encode.parameters(), *decode.parameters()], bound, 800, 3e-3)
    with torch.no_grad():
        latents = encode(x)

    def denoising() -> Tensor:
        rows = randint(0, len(x), (256,), generator=g)
        t = uniform((256,), 1e-3, 1, generator=g)
        noise = randn((256, _LATENT), generator=g)
        alpha, sigma = schedule.alpha(t)[:, None], schedule.sigma(t)[:, None]
        v = alpha * noise - sigma * latents[rows]
        return (network(alpha * latents[rows] + sigma * noise, t, y[rows]) - v).square().mean()

    _cycle(network.parameters(), denoising, 2000, 2e-3)
    for part in (encode, decode, network):
        part.eval().requires_grad_(False)
    return LatentEditor(encode, decode, network, schedule, predicts="v", strength=_STRENGTH, n_steps=_STEPS)


def _cycle(parameters: Iterable[nn.Parameter], loss: Callable[[], Tensor], steps: int, lr: float) -> None:
    optimizer = torch.optim.Adam(parameters, lr)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        rate.step()


def _figure(editor: LatentEditor, x: Tensor, found: dict[str, Tensor], wanted: Tensor, seed: int) -> Figure:
    shown = {"clean": x, **{name: found[name] for name in ("random signs", "encoder", "diffusion")}}
    figure = Figure(figsize=(6.4, 6), layout="constrained")
    axes = figure.subplots(2 * len(shown), 8)
    for k, (name, images) in enumerate(shown.items()):
        edits = editor.edit(images, wanted, generator=stream(seed, 3))
        for row, pictures, title in ((2 * k, images, name), (2 * k + 1, edits, "edited")):
            for i in range(8):
                axes[row, i].imshow(pictures[i, 0], cmap="gray", vmin=0, vmax=1)
                axes[row, i].set_xticks([])
                axes[row, i].set_yticks([])
            axes[row, 0].set_ylabel(title, fontsize=7, rotation=0, ha="right", va="center")
    for i in range(8):
        axes[0, i].set_title(f"as {int(wanted[i])}", fontsize=7)
    return figure
