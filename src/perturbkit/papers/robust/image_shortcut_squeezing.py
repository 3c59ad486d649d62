"""Compression takes poisons out of training images: digits in two worlds under three poisons and six treatments."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional

from perturbkit.core.random import randint, uniform
from perturbkit.papers import Comparison, Evidence, Run, paper
from perturbkit.papers.robust._digits import fill, fit, stream
from perturbkit.robust import (
    ImageShortcutSqueezing,
    corrupt,
    error_maximising_poison,
    error_minimising_poison,
    evaluate_poisons,
    patch_poison,
    reduce_bits,
)

_EPSILON = 8 / 255
_TRAIN, _TEST, _EPOCHS = 1500, 1000, 8
_POISONS = ("patches", "error-minimising", "error-maximising")
_SQUEEZED = "grey levels and JPEG"
_OTHERS = ("blur", "2 bits", "cutout")


@paper(
    number=43,
    title="Image Shortcut Squeezing: Countering Perturbative Availability Poisons with Compression",
    authors="Liu, Zhao, Larson",
    year=2023,
    arxiv="2301.13838",
    claim="Grey levels and JPEG restore what networks learn from poisoned images, far better than other preprocessing: grey levels "
    "against poisons of low frequency, JPEG against those of high frequency.",
    method="perturbkit.robust.ImageShortcutSqueezing",
    needs="data",
    input="image",
    cost="a pass of a codec over the training images",
    seconds=145,
)
def reproduce(run: Run) -> Evidence:
    """Train a network for every poison and treatment and test it on clean digits."""
    seed = run.seeds(1)[0]
    found = {world: _accuracies(world, seed) for world in _WORLDS}
    comparisons = [c for world, shares in found.items() for c in _comparisons(world, shares)]
    shown = ". ".join(
        f"{world}, {p}: " + ", ".join(f"{d} {share:.2f}" for (q, d), share in shares.items() if q == p)
        for world, shares in found.items()
        for p in ("clean", *_POISONS)
    )
    return Evidence(
        comparisons,
        _figure(found),
        notes=f"{_TRAIN} digits of 32x32 pixels, perturbed by at most 8/255: in a random colour on another, where any "
        "perturbation lies open, and as differences to pieces of photographs. Test images are treated as the training images "
        "(the paper leaves them as they are), but for cutout. Three kinds of poison of the paper's "
        f"twelve; its table has JPEG above grey levels for seven. Accuracies on {_TEST} clean digits: {shown}.",
    )


def _comparisons(world: str, found: dict[tuple[str, str], float]) -> list[Comparison]:
    def mean(defence: str) -> float:
        return statistics.mean(found[p, defence] for p in _POISONS)

    clean, best = found["clean", "none"], max(_OTHERS, key=mean)
    second = statistics.median(found[p, "none"] for p in _POISONS)
    grey, block = "grey levels", "JPEG"
    return [
        Comparison(f"{world}: accuracy after two of three poisons at most 0.6 of that after clean images", second, clean, "lower", factor=0.6, n=_TEST),
        Comparison(f"{world}: squeezed, mean over poisons, at least 0.85 of the accuracy after clean images", mean(_SQUEEZED), clean, "higher", factor=0.85, n=_TEST),
        Comparison(f"{world}: squeezed, mean over poisons, above the best other treatment ({best})", mean(_SQUEEZED), mean(best), "higher", n=_TEST),
        Comparison(f"{world}, patches: grey levels above JPEG", found["patches", grey], found["patches", block], "higher", n=_TEST),
        Comparison(f"{world}, error-minimising poison: grey levels above JPEG", found["error-minimising", grey], found["error-minimising", block], "higher", n=_TEST),
        Comparison(f"{world}, error-maximising poison: JPEG above grey levels", found["error-maximising", block], found["error-maximising", grey], "higher", n=_TEST),
        Comparison(
            f"{world}: accuracy after random signs of the poisons' size at most 0.6 of that after clean images", found["random signs", "none"],
            clean, "lower", factor=0.6, control=True, n=_TEST, note="must fail: it is not the size that poisons",
        ),
    ]  # fmt: skip


def _accuracies(world: str, seed: int) -> dict[tuple[str, str], float]:
    from perturbkit.data import load_digits28

    draw = _WORLDS[world]
    digits, test = load_digits28("train").rows(range(_TRAIN)), load_digits28("test").rows(range(_TEST))
    x, y = draw(digits.x, stream(seed, 0)), digits.y
    x_test, y_test = draw(test.x, stream(seed, 1)), test.y

    def train(x: Tensor, y: Tensor, number: int = 2) -> nn.Module:
        net = _network(stream(seed, number))
        fit(net, x, y, _loss, _EPOCHS, stream(seed, number + 1), lr=0.05)
        return net

    def signs(x: Tensor, y: Tensor) -> Tensor:
        return patch_poison(x, torch.arange(len(x)), _EPSILON, cells=32, generator=stream(seed, 6))

    surrogate = train(x, y, 4)
    minimising = partial(
        error_minimising_poison, _network(stream(seed, 7)), epsilon=_EPSILON, n_rounds=6, n_steps=10, step_size=_EPSILON / 5,
        lr=0.05, generator=stream(seed, 8),
    )  # fmt: skip
    poisons: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "patches": partial(patch_poison, epsilon=_EPSILON, generator=stream(seed, 6)),
        "error-minimising": minimising,
        "error-maximising": partial(error_maximising_poison, surrogate, epsilon=_EPSILON, n_steps=30),
    }
    made = {name: poison(x, y) for name, poison in poisons.items()}
    known = {name: partial(_given, images) for name, images in made.items()}
    harmless: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "clean": partial(_given, x),
        "random signs": signs,
    }
    treatments: dict[str, Callable[[Tensor], Tensor]] = {
        "none": _same,
        "grey levels": ImageShortcutSqueezing(jpeg_quality=None),
        "JPEG": ImageShortcutSqueezing(grayscale=False),
        _SQUEEZED: ImageShortcutSqueezing(),
        "blur": partial(corrupt, kind="blur", severity=3),
        "2 bits": reduce_bits,
    }
    cut: dict[str, Callable[[Tensor], Tensor]] = {"cutout": partial(_cutout, seed=seed)}
    tables = [
        evaluate_poisons(train, x, y, x_test, y_test, known, treatments),
        evaluate_poisons(train, x, y, x_test, y_test, known, cut, squeeze_test=False),
        evaluate_poisons(
            train, x, y, x_test, y_test, harmless, {k: treatments[k] for k in ("none", _SQUEEZED)}
        ),
    ]
    return {
        (p, d): float(t.accuracy[i, j])
        for t in tables
        for i, p in enumerate(t.poisons)
        for j, d in enumerate(t.defences)
    }


def _loss(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return functional.cross_entropy(net(x), y)


def _coloured(digits: Tensor, generator: torch.Generator) -> Tensor:
    """Return digits on 32x32 pixels in one random colour on another."""
    ink, sheet = uniform((2, len(digits), 3, 1, 1), generator=generator)
    return sheet + functional.pad(digits, (2, 2, 2, 2)) * (ink - sheet)


def _on_photographs(digits: Tensor, generator: torch.Generator) -> Tensor:
    """Return the differences between digits and pieces of 32x32 pixels of photographs."""
    from perturbkit.data import load_photographs

    photographs = load_photographs(size=112).x
    which = randint(0, len(photographs), (len(digits), 1, 1), generator=generator)
    corner = randint(0, 81, (2, len(digits), 1), generator=generator)
    rows, columns = corner + torch.arange(32)
    pieces = photographs[which, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    return (pieces - functional.pad(digits, (2, 2, 2, 2))).abs()


_WORLDS = {"two colours": _coloured, "on photographs": _on_photographs}


def _network(generator: torch.Generator) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in ((3, 16), (16, 32), (32, 32)):
        convolution = nn.utils.skip_init(nn.Conv2d, before, after, 3, stride=2, padding=1)
        layers += [convolution, nn.BatchNorm2d(after), nn.ReLU()]
    return fill(nn.Sequential(*layers, nn.Flatten(), nn.utils.skip_init(nn.Linear, 512, 10)), generator)


def _given(images: Tensor, x: Tensor, y: Tensor) -> Tensor:
    return images


def _same(x: Tensor) -> Tensor:
    return x


def _cutout(x: Tensor, seed: int) -> Tensor:
    """Blacken a square of 16x16 pixels around a random place of each image."""
    places = randint(0, x.shape[-1], (2, len(x), 1), generator=stream(seed, 9))
    near = (torch.arange(x.shape[-1]) - places + 0.5).abs() < 8  # [2, n, side]
    return x * ~(near[0][:, None, :, None] & near[1][:, None, None, :])


def _figure(found: dict[str, dict[tuple[str, str], float]]) -> Figure:
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    for ax, (world, shares) in zip(figure.subplots(1, 2, sharey=True), found.items(), strict=True):
        defences = list(dict.fromkeys(d for p, d in shares if p in _POISONS))
        for k, poison in enumerate(_POISONS):
            places = [i + 0.27 * (k - 1) for i in range(len(defences))]
            ax.bar(places, [shares[poison, d] for d in defences], 0.25, label=poison)
        ax.axhline(shares["clean", "none"], color="0.3", lw=1, ls="--", label="clean images")
        ax.set_xticks(range(len(defences)), defences, fontsize=7, rotation=20)
        ax.set_title(world, fontsize=9)
    figure.axes[0].set_ylabel("accuracy on clean digits")
    figure.axes[0].legend(frameon=False, fontsize=8)
    return figure
