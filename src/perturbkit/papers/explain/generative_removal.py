"""Painted digits look more like digits than grey ones; do the maps made from them change less with the settings?

Digits of 8x8 pixels, a convolutional classifier, a Gaussian that paints (fitted on one half of the training part), and an autoencoder
that judges (trained on the other half). The autoencoder's error of images with patches or random superpixels removed must be at most
0.7 of that with a grey fill. The Spearman correlation of maps at two settings (patches of 2 and 3 pixels, 16 and 9 superpixels,
two random first masks) must be higher with painting for two of the three methods at least. The deletion area, where grey
deletes, may be worse than that of the grey maps by 0.02. On canvases of 16x16 with a convolutional painter the same is asked of
the deletion area of occlusion. Noise as a fill, and random maps, are the controls.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from perturbkit.core import Oracle
from perturbkit.core.random import as_generator, randint, seeded_init, uniform
from perturbkit.explain import (
    ConvInpainter,
    GaussianInpainter,
    GenerativeRemoval,
    deletion_curve,
    pointing_game,
)
from perturbkit.papers import Comparison, Evidence, Run, paper
from perturbkit.papers.explain._canvas import canvas_classifier, draw_canvas

_N, _GREY = 100, 0.5
Painter = Callable[[Tensor, Tensor], Tensor]


@paper(
    number=5,
    title="Explaining image classifiers by removing input features using generative models",
    authors="Agarwal, Nguyen",
    year=2020,
    arxiv="1910.04256",
    claim="Inpainting removed pixels makes more plausible images, and attributions that are as accurate and more robust to their "
    "settings than grey or blurred patches do.",
    method="perturbkit.explain.GenerativeRemoval",
    needs="forward",
    input="image",
    cost="the plain method's evaluations, one inpainting each",
    seconds=60,
)
def reproduce(run: Run) -> Evidence:
    """Plausibility, robustness to settings and deletion."""
    from perturbkit.data import digits_classifier, load_digits8

    train, test = load_digits8("train"), load_digits8("test")
    model = digits_classifier(8).module.requires_grad_(False)
    oracle = Oracle(nn.Sequential(model, nn.Softmax(1)))
    order = torch.randperm(len(train.x), generator=run.generator("halves"))
    first, second = train.x[order[::2]], train.x[order[1::2]]
    gaussian = GaussianInpainter().fit(first)
    right = (model(test.x).argmax(1) == test.y).nonzero()[:_N, 0]
    x, y = test.x[right], test.y[right]

    errors = _errors(_autoencoder(second, run), x, gaussian, run)
    maps = {
        (method, name): [_map(oracle, x, y, painter, method, i, run) for i in range(2)]
        for method in ("occlusion", "lime", "meaningful")
        for name, painter in (("painted", gaussian), ("grey", _grey))
    }
    alike = {key: _spearman(*pair) for key, pair in maps.items()}
    more = sum(
        float(alike[m, "painted"].mean()) > float(alike[m, "grey"].mean())
        for m in ("occlusion", "lime", "meaningful")
    )
    areas = {
        key: deletion_curve(Oracle(model), x, pair[0], y, baseline=_GREY, n_steps=16).area
        for key, pair in maps.items()
    }
    chance = uniform(x.shape, generator=run.generator("random"), like=x)
    random = deletion_curve(Oracle(model), x, chance, y, baseline=_GREY, n_steps=16).area
    canvas, hits = _canvas(train.x, train.y, test.x, test.y, run)
    comparisons = [
        Comparison(
            "autoencoder's error of painted images, against grey ones", errors["painted"], errors["grey"], "lower",
            factor=0.7, n=_N,
        ),
        Comparison("methods of three whose maps at two settings agree more, against two", more, 2, "higher", n=_N),
        *(
            Comparison.over_seeds(
                f"deletion area, {method}, painted against grey", areas[method, "painted"].tolist(),
                areas[method, "grey"].tolist(), "lower", margin=-0.02,
            )
            for method in ("occlusion", "lime", "meaningful")
        ),
        Comparison.over_seeds(
            "deletion area, occlusion on canvases, painted against grey", canvas["painted"].tolist(),
            canvas["grey"].tolist(), "lower", margin=-0.02,
        ),
        Comparison(
            "autoencoder's error of images with noise, against grey ones", errors["noise"], errors["grey"], "lower",
            factor=0.7, n=_N, control=True, note="must fail",
        ),
        Comparison.over_seeds(
            "deletion area, a random map against grey occlusion", random.tolist(), areas["occlusion", "grey"].tolist(), "lower",
            margin=-0.02, control=True, note="must fail",
        ),
    ]  # fmt: skip
    notes = "Autoencoder's error: " + ", ".join(f"{k} {v:.4f}" for k, v in errors.items())
    notes += ". Spearman correlation at two settings (painted/grey): " + ", ".join(
        f"{m} {float(alike[m, 'painted'].mean()):.3f}/{float(alike[m, 'grey'].mean()):.3f}"
        for m in ("occlusion", "lime", "meaningful")
    )
    notes += ". SSIM: " + ", ".join(
        f"{m} {_ssim(*maps[m, 'painted']):.3f}/{_ssim(*maps[m, 'grey']):.3f}"
        for m in ("occlusion", "lime", "meaningful")
    )
    black = {
        key: float(deletion_curve(Oracle(model), x, pair[0], y, n_steps=16).area.mean())
        for key, pair in maps.items()
    }
    notes += ". Deletion area where black deletes: " + ", ".join(
        f"{m} {black[m, 'painted']:.3f}/{black[m, 'grey']:.3f}" for m in ("occlusion", "lime", "meaningful")
    )
    notes += ". Pointing on canvases: " + ", ".join(f"{k} {v:.2f}" for k, v in hits.items()) + ". "
    notes += "Where grey deletes, the grey maps rank the pixels that grey disturbs most: that metric and they share a fill."
    return Evidence(comparisons, _figure(x, gaussian, maps), notes)


def _grey(x: Tensor, masks: Tensor) -> Tensor:
    return torch.full_like(x, _GREY)


def _map(
    oracle: Oracle, x: Tensor, y: Tensor, painter: Painter, method: str, setting: int, run: Run
) -> Tensor:
    """Return one map an image at the first or second setting of a method."""
    line = torch.arange(8)
    parts = [(line // 2)[:, None] * 4 + line // 2, (line * 3 // 8)[:, None] * 3 + line * 3 // 8]
    made = GenerativeRemoval(
        painter, method, window=2 + setting, stride=1, segments=parts[setting], n_samples=200, steps=150,  # type: ignore[arg-type]
    )  # fmt: skip
    return made.attribute(oracle, x, y, generator=run.generator(f"{method} {setting}")).values


def _errors(judge: nn.Module, x: Tensor, gaussian: GaussianInpainter, run: Run) -> dict[str, float]:
    """Return the judge's mean squared error of whole images, and of images with patches or random squares removed, by fill."""
    g = run.generator("removed")
    squares = uniform((4, len(x), 1, 4, 4), generator=g) < 0.5
    kept = [*squares.repeat_interleave(2, 3).repeat_interleave(2, 4)]
    for _ in range(4):
        corner = randint(0, 6, (len(x), 2), generator=g)
        inside = [(torch.arange(8) >= c[:, None]) & (torch.arange(8) < c[:, None] + 3) for c in corner.T]
        kept.append(~(inside[0][:, :, None] & inside[1][:, None])[:, None])
    masks, many = torch.cat(kept), x.repeat(len(kept), 1, 1, 1)
    noise = uniform(many.shape, generator=run.generator("noise"))
    fills: dict[str, Painter] = {
        "painted": gaussian,
        "grey": _grey,
        "black": lambda z, m: 0 * z,
        "noise": lambda z, m: noise,
    }
    shown = {name: GenerativeRemoval(fill).remove(many, masks) for name, fill in fills.items()}
    return {name: float((judge(z) - z).square().mean()) for name, z in {"whole": x, **shown}.items()}


def _autoencoder(x: Tensor, run: Run) -> nn.Module:
    with seeded_init(run.seeds(1)[0]):
        net = nn.Sequential(
            nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 12), nn.Linear(12, 64), nn.ReLU(), nn.Linear(64, 64),
            nn.Unflatten(1, (1, 8, 8)),
        )  # fmt: skip
    g, optimiser = as_generator(run.generator("autoencoder")), torch.optim.Adam(net.parameters(), 2e-3)
    for _ in range(1500):
        batch = x[randint(0, len(x), (64,), generator=g)]
        optimiser.zero_grad()
        (net(batch) - batch).square().mean().backward()
        optimiser.step()
    return net.requires_grad_(False)


def _spearman(a: Tensor, b: Tensor) -> Tensor:
    """Return the rank correlation of two maps, one an image; equal values share their ranks."""
    from scipy.stats import rankdata

    ranks = [torch.from_numpy(rankdata(v.flatten(1).numpy(), axis=1)) for v in (a, b)]
    first, second = (r - r.mean(1, keepdim=True) for r in ranks)
    return nn.functional.cosine_similarity(first, second)


def _ssim(a: Tensor, b: Tensor) -> float:
    """Return the mean structural similarity of maps scaled to [0, 1]."""
    from skimage.metrics import structural_similarity

    low, high = (
        torch.stack([v.flatten(1).aminmax(dim=1)[i] for v in (a, b)])[..., None, None, None] for i in (0, 1)
    )
    scaled = (torch.stack((a, b)) - low) / (high - low).clamp(min=1e-12)
    return sum(
        float(structural_similarity(u[0].numpy(), v[0].numpy(), data_range=1.0))
        for u, v in zip(scaled[0], scaled[1], strict=True)
    ) / len(a)


def _canvas(
    digits: Tensor, labels: Tensor, test: Tensor, test_labels: Tensor, run: Run
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Return deletion areas and pointing accuracies of occlusion on canvases, painted by a convolutional network and grey."""
    model = canvas_classifier(digits, labels, run.seeds(2)[1], steps=300)
    painter = ConvInpainter(steps=300).fit(
        draw_canvas(digits, labels, 2000, run.generator("canvases")).x, run.generator("painter")
    )
    canvas = draw_canvas(test, test_labels, 200, run.generator("canvas"))
    right = (model(canvas.x).argmax(1) == canvas.y).nonzero()[:_N, 0]
    x, y, oracle = canvas.x[right], canvas.y[right], Oracle(nn.Sequential(model, nn.Softmax(1)))
    fills: dict[str, Painter] = {"painted": painter, "grey": _grey}
    maps = {
        name: GenerativeRemoval(fill, window=4, stride=2).attribute(oracle, x, y).values
        for name, fill in fills.items()
    }
    areas = {
        name: deletion_curve(Oracle(model), x, values, y, baseline=_GREY, n_steps=16).area
        for name, values in maps.items()
    }
    hits = {
        name: float(pointing_game(values, canvas.inside[right]).values.mean())
        for name, values in maps.items()
    }
    return areas, hits


def _figure(x: Tensor, gaussian: GaussianInpainter, maps: dict[tuple[str, str], list[Tensor]]) -> Figure:
    figure = Figure(figsize=(8, 3), layout="constrained")
    axes = figure.subplots(2, 5)
    kept = torch.ones(1, 1, 8, 8, dtype=torch.bool)
    kept[:, :, 2:6, 2:6] = False
    painters: dict[str, Painter] = {"painted": gaussian, "grey": _grey}
    for row, (name, painter) in enumerate(painters.items()):
        shown = {"image": x[:1], name: GenerativeRemoval(painter).remove(x[:1], kept)}
        shown |= {m: maps[m, name][0] for m in ("occlusion", "lime", "meaningful")}
        for ax, (title, image) in zip(axes[row], shown.items(), strict=True):
            ax.imshow(image[0, 0], cmap="gray" if title in ("image", name) else "viridis")
            ax.set_title(title, fontsize=8)
            ax.set_axis_off()
    return figure
