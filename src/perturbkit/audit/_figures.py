"""The drawings of the sections, from plain data; every one returns a figure that belongs to no window."""

from __future__ import annotations

import base64
import io
import math
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

INK, SOFT, ACCENT, SECOND, MUTED = "#1f2933", "#52606d", "#0b6e99", "#c8553d", "#9aa5b1"
_COLORS = (ACCENT, SECOND, MUTED, "#5b8c5a")


def bars(names: Sequence[str], values: Sequence[float], label: str, *, top: float | None = None) -> Figure:
    """Horizontal bars, one a name."""
    figure, ax = _axes(6.4, 0.9 + 0.26 * len(names))
    ax.barh(range(len(names)), values, color=ACCENT, height=0.65)
    ax.set_yticks(range(len(names)), [_cut(n) for n in names])
    ax.invert_yaxis()
    ax.set_xlabel(label)
    if top is not None:
        ax.set_xlim(0, top)
    return figure


def grouped_bars(names: Sequence[str], groups: dict[str, Sequence[float]]) -> Figure:
    """Horizontal bars, one a name and group; each group is scaled to its own largest."""
    figure, ax = _axes(6.4, 1.2 + 0.36 * len(names))
    height = 0.8 / len(groups)
    for i, (group, values) in enumerate(groups.items()):
        largest = max(values) or 1.0
        places = np.arange(len(names)) + i * height - 0.4 + height / 2
        ax.barh(places, [v / largest for v in values], height=height, color=_COLORS[i], label=group)
    ax.set_yticks(range(len(names)), [_cut(n) for n in names])
    ax.invert_yaxis()
    ax.set_xlabel("mean size of the attribution, largest = 1")
    ax.legend(frameon=False, fontsize=8)
    return figure


def heat_maps(
    pictures: list[str], maps: dict[str, list[list[float]]], titles: list[str], grid: list[int]
) -> Figure:
    """Each picture, and under it one heat map a method."""
    figure = Figure(figsize=(2.1 * len(pictures), 2.25 * (1 + len(maps))), layout="constrained")
    axes = figure.subplots(1 + len(maps), len(pictures), squeeze=False)
    for column, (encoded, title) in enumerate(zip(pictures, titles, strict=True)):
        picture = decode_picture(encoded)
        height, width = picture.shape[:2]
        axes[0][column].imshow(picture)
        axes[0][column].set_title(_cut(title, 24), fontsize=8)
        for line, (method, values) in enumerate(maps.items(), 1):
            ax = axes[line][column]
            heat = np.array(values[column]).reshape(grid)
            limit = float(np.abs(heat).max()) or 1.0
            ax.imshow(picture.mean(2), cmap="gray", vmin=0, vmax=1)
            ax.imshow(
                heat, cmap="RdBu_r", vmin=-limit, vmax=limit, alpha=0.6, extent=(0, width, height, 0),
                interpolation="nearest",
            )  # fmt: skip
            if column == 0:
                axes[line][0].set_ylabel(method, fontsize=8)
    for ax in axes.flat:
        ax.set_xticks([])
        ax.set_yticks([])
    return figure


def coloured_words(cells: list[list[str]], maps: dict[str, list[list[float]]], titles: list[str]) -> Figure:
    """Texts with their words coloured, red for the class and blue against, one line group a method."""
    lines: list[tuple[str, list[tuple[str, float]] | None]] = []
    for i, title in enumerate(titles):
        for method, values in maps.items():
            lines.append((f"{title}, {method}", None))
            limit = max((abs(v) for v in values[i]), default=0.0) or 1.0
            line: list[tuple[str, float]] = []
            length = 0
            for word, value in zip(cells[i], values[i], strict=False):
                if length + len(word) > 100:
                    lines.append(("", line))
                    line, length = [], 0
                line.append((word, value / limit))
                length += len(word) + 1
            lines.append(("", line))
    longest = max((sum(len(w) + 1 for w, _ in pieces) for _, pieces in lines if pieces), default=1)
    wide = max(longest, max((min(len(h), 70) for h, _ in lines), default=1) * 0.9, 50) + 2
    figure = Figure(figsize=(7.2 * wide / 104.5, 0.24 * len(lines) + 0.2), layout="constrained")
    ax = figure.subplots()
    for number, (head, pieces) in enumerate(lines):
        if pieces is None:
            ax.text(0, -number, _plain(_cut(head, 70)), fontsize=7, color=SOFT, va="center")
            continue
        column = 0
        for word, value in pieces:
            color = colormaps["RdBu_r"](0.5 + 0.42 * value)
            ax.text(
                column, -number, _plain(_cut(word, 30)), family="monospace", fontsize=8, va="center",
                bbox={"facecolor": color, "alpha": 0.65, "edgecolor": "none", "pad": 1.2},
            )  # fmt: skip
            column += len(word) + 1
    # One column is one letter of this size.
    ax.set_xlim(-0.5, wide - 0.5)
    ax.set_ylim(-len(lines), 0.7)
    ax.set_axis_off()
    return figure


def curves(fractions: Sequence[float], lines: dict[str, dict[str, Sequence[float]]]) -> Figure:
    """Deletion on the left and insertion on the right, one line a method."""
    figure = Figure(figsize=(7.2, 2.9), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for ax, mode in zip(axes, ("deletion", "insertion"), strict=True):
        for i, (method, values) in enumerate(m for m in lines.items() if m[0] != "random"):
            ax.plot(fractions, values[mode], color=_COLORS[i], marker="o", ms=3, label=method)
        ax.plot(fractions, lines["random"][mode], color=MUTED, ls="--", label="random order")
        ax.set_xlabel("share removed" if mode == "deletion" else "share brought")
        ax.set_title(mode, fontsize=9)
        _tidy(ax)
    axes[0].set_ylabel("mean probability")
    axes[0].legend(frameon=False, fontsize=8)
    return figure


def survival(radius: Sequence[float], unit: str, eps: float, *, proved: bool = False) -> Figure:
    """Share of rows whose radius exceeds a size, against that size."""
    figure, ax = _axes(6.4, 2.9)
    finite = sorted(v for v in radius if math.isfinite(v))
    right = max([*finite, eps, 1e-12]) * 1.08
    steps = [0.0, *finite, right]
    share = [sum(r > s for r in radius) / len(radius) for s in steps]
    ax.step(steps, share, where="post", color=ACCENT)
    ax.fill_between(steps, share, step="post", color=ACCENT, alpha=0.15)
    if eps > 0:
        ax.axvline(eps, color=SECOND, ls="--", lw=1)
        ax.annotate(
            f"asked: {eps:.3g}", (eps, 1.02), color=SECOND, fontsize=8, ha="left", annotation_clip=False
        )
    ax.set_xlim(0, right)
    ax.set_ylim(0, 1.05)
    ax.set_xlabel(unit)
    ax.set_ylabel("rows proved" if proved else "rows still right")
    return figure


def sandwich(certified: Sequence[float], attacked: Sequence[float], unit: str) -> Figure:
    """Certified and attack radius of every row, the gap between them shaded; certificates above an attack in red."""
    figure, ax = _axes(6.4, 3.2)
    low, high = np.array(certified), np.array(attacked)
    order = np.lexsort((low, high))
    low, high = low[order], high[order]
    ends = np.concatenate([low, high[np.isfinite(high)]])
    top = 1.12 * (float(ends.max()) or 1.0)
    drawn = np.where(np.isfinite(high), high, top)
    place = np.arange(len(low))
    ax.fill_between(
        place,
        low,
        drawn,
        where=drawn >= low,
        step="mid",
        color=MUTED,
        alpha=0.3,
        linewidth=0,
        label="unknown",
    )
    ax.scatter(place, drawn, s=14, marker="v", color=SECOND, label="attacked: changes here", linewidths=0)
    ax.scatter(place, low, s=14, marker="^", color=ACCENT, label="proved: stays up to here", linewidths=0)
    wrong = low > drawn * (1 + 1e-4) + 1e-9
    if wrong.any():
        ax.scatter(
            place[wrong], low[wrong], s=60, marker="x", color="#a61b1b", label="ALARM: proof above attack"
        )
    if not np.isfinite(high).all():
        ax.axhline(top, color=SECOND, lw=0.8, ls=":")
        ax.annotate("no attack succeeded", (0, top), fontsize=7, color=SECOND, va="bottom")
    ax.set_ylim(0, top * 1.08)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_xlabel("rows, by attack radius")
    ax.set_ylabel(_wrapped(unit))
    ax.legend(frameon=False, fontsize=7)
    return figure


def thumbnails(pictures: Sequence[str], titles: Sequence[str], columns: int = 4) -> Figure:
    """Small pictures with what went wrong under each."""
    lines = -(-len(pictures) // columns)
    figure = Figure(figsize=(7.2, 2.35 * lines), layout="constrained")
    for i, ax in enumerate(figure.subplots(lines, columns, squeeze=False).flat):
        ax.set_axis_off()
        if i < len(pictures):
            ax.imshow(decode_picture(pictures[i]))
            ax.set_title("\n".join(_cut(t, 26) for t in titles[i].split("\n")), fontsize=7.5)
    return figure


def losses(values: Sequence[float], shown: Sequence[int], label: str) -> Figure:
    """The loss of every row, the largest first, with the rows of the table marked."""
    figure, ax = _axes(6.4, 2.6)
    order = np.argsort(-np.array(values), kind="stable")
    place = np.empty(len(order), dtype=int)
    place[order] = np.arange(len(order))
    ax.fill_between(
        np.arange(len(order)), np.array(values)[order], step="mid", color=ACCENT, alpha=0.25, linewidth=0
    )
    marked = np.array(shown, dtype=int)
    ax.scatter(
        place[marked], np.array(values)[marked], s=16, color=SECOND, linewidths=0, label="rows of the table"
    )
    ax.set_ylim(bottom=0)
    ax.set_xlabel("rows, the worst first")
    ax.set_ylabel(label)
    ax.legend(frameon=False, fontsize=8)
    return figure


def differences(
    names: Sequence[str], values: Sequence[float], low: Sequence[float], high: Sequence[float], marked: Sequence[bool]
) -> Figure:  # fmt: skip
    """Differences with intervals, one line a slice; marked ones in another colour."""
    figure, ax = _axes(6.8, 0.9 + 0.3 * len(names))
    # An interval without an end runs to the edge of the drawing.
    ends = np.array([v for v in (*values, *low, *high) if math.isfinite(v)])
    edges = float(ends.min(initial=-1e-3)) * 1.1, float(ends.max(initial=1e-3)) * 1.1
    for i, (value, a, b, m) in enumerate(zip(values, low, high, marked, strict=True)):
        color = SECOND if m else MUTED
        ax.plot(np.clip([a, b], *edges), [i, i], color=color, lw=1.5)
        ax.plot(value, i, "o", color=color, ms=5)
    ax.axvline(0, color=INK, lw=0.8)
    ax.set_yticks(range(len(names)), [_cut(n, 64) for n in names])
    ax.invert_yaxis()
    ax.set_xlabel("here less elsewhere; orange is worse beyond noise")
    return figure


def reliability(
    confidence: Sequence[float], accuracy: Sequence[float], low: Sequence[float], high: Sequence[float],
    count: Sequence[float],
) -> Figure:  # fmt: skip
    """Accuracy against confidence with intervals, over a histogram of the confidences."""
    figure = Figure(figsize=(5.2, 4.2), layout="constrained")
    top, bottom = figure.subplots(2, 1, height_ratios=(4, 1), sharex=True)
    top.plot([0, 1], [0, 1], color=MUTED, ls="--", lw=1, label="calibrated")
    errors = np.abs(np.array([np.subtract(accuracy, low), np.subtract(high, accuracy)]))
    top.errorbar(
        confidence, accuracy, yerr=errors, color=ACCENT, marker="o", ms=4, ls="", capsize=2, label="model"
    )
    top.set_ylabel("accuracy")
    top.set_ylim(-0.02, 1.02)
    top.legend(frameon=False)
    bottom.bar(confidence, count, width=0.06, color=MUTED)
    bottom.set_ylabel("rows")
    bottom.set_xlabel("confidence")
    bottom.set_xlim(0, 1)
    for ax in (top, bottom):
        _tidy(ax)
    return figure


def set_sizes(
    sizes: Sequence[int], counts: Sequence[int], coverages: Sequence[float], alpha: float
) -> Figure:
    """Histogram of set sizes on the left, coverage over splits on the right."""
    figure = Figure(figsize=(7.2, 2.7), layout="constrained")
    left, right = figure.subplots(1, 2)
    last = max((i for i, c in enumerate(counts) if c), default=1)
    left.bar(sizes[: last + 1], counts[: last + 1], color=ACCENT, width=max(0.8, (last + 1) / 160))
    left.set_xlabel("labels in the set")
    left.set_ylabel("rows")
    right.hist(coverages, bins=10, color=ACCENT, alpha=0.8)
    right.axvline(1 - alpha, color=SECOND, ls="--", lw=1, label=f"asked: {1 - alpha:.2f}")
    right.set_xlabel("coverage over random splits")
    right.set_ylabel("splits")
    right.legend(frameon=False)
    for ax in (left, right):
        _tidy(ax)
    return figure


def heat_table(rows: Sequence[str], columns: Sequence[Any], values: Sequence[Sequence[float]]) -> Figure:
    """A heat map with its numbers written in."""
    figure, ax = _axes(6.4, 1.0 + 0.36 * len(rows))
    ax.imshow(values, cmap="YlGnBu", vmin=0, vmax=1, aspect="auto")
    for i, line in enumerate(values):
        for j, value in enumerate(line):
            ax.text(
                j,
                i,
                f"{value:.2f}",
                ha="center",
                va="center",
                fontsize=8,
                color="white" if value > 0.6 else INK,
            )
    ax.set_xticks(range(len(columns)), [str(c) for c in columns])
    ax.set_yticks(range(len(rows)), list(rows))
    ax.set_xlabel("severity")
    ax.tick_params(length=0)
    for spine in ax.spines.values():
        spine.set_visible(False)
    return figure


def encode_picture(image: Tensor, size: int = 112) -> str:
    """Return an image of shape (channels, height, width) in [0, 1] as the base64 text of a small PNG."""
    from PIL import Image

    values = image.detach().cpu().float().clamp(0, 1)
    values = values.expand(3, -1, -1) if values.shape[0] == 1 else values[:3]
    picture = Image.fromarray((values.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8))
    picture.thumbnail((size, size))
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def decode_picture(text: str) -> np.ndarray:
    """Return the picture that :func:`encode_picture` wrote, shape (height, width, 3), in [0, 1]."""
    from PIL import Image

    with Image.open(io.BytesIO(base64.b64decode(text)), formats=("PNG",)) as picture:
        return np.asarray(picture.convert("RGB"), dtype=float) / 255


def to_svg(figure: Figure) -> str:
    """Return a figure as SVG text with text kept as text; the same figure gives the same text."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context(
        {"svg.fonttype": "none", "svg.hashsalt": "perturbkit", "font.family": "sans-serif"}
    ):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _axes(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, min(height, 9)), layout="constrained")
    ax = figure.subplots()
    _tidy(ax)
    return figure, ax


def _tidy(ax: Axes) -> None:
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    ax.tick_params(labelsize=8, colors=INK)
    ax.xaxis.label.set_fontsize(8)
    ax.yaxis.label.set_fontsize(8)


def _cut(text: str, length: int = 40) -> str:
    return _plain(text if len(text) <= length else text[: length - 1] + "…")


def _wrapped(text: str, width: int = 34) -> str:
    return _plain("\n".join(textwrap.wrap(text, width)))


def _plain(text: str) -> str:
    """Keep matplotlib from reading dollar signs as mathematics."""
    return text.replace("$", r"\$")
