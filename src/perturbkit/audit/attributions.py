"""Maps by two methods and a random control, on common cells, for whatever kind of input."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from perturbkit.audit.context import Attributions, Context
from perturbkit.audit.subject import Subject, to_probabilities
from perturbkit.core import Oracle
from perturbkit.explain import (
    DefaultRemoval,
    Prediction,
    RemovalExplainer,
    Shapley,
    integrated_gradients,
    occlusion,
)

__all__ = ["attribute", "part_name", "shares", "words"]

CELLS = 7
SHAPLEY_ORDERS = 24
IG_STEPS = {"image": 12, "tabular": 32, "text": 16}
# Words of a text that are explained; those behind are left alone.
LONGEST = 40
_PAPERS = {
    "integrated gradients": "integrated_gradients", "Shapley sampling": "removal_framework", "occlusion": "occlusion",
    "word removal": "occlusion",
}  # fmt: skip


def evaluations(subject: Subject) -> int:
    """Rows evaluated to explain one row, a gradient counted as three."""
    cells = {"image": CELLS**2, "text": 16}.get(subject.task, len(subject.feature_names))
    if subject.task == "tabular" and not subject.has_gradient():
        return (cells + 1) * (1 + SHAPLEY_ORDERS)
    return cells + 1 + 3 * IG_STEPS[subject.task]


def attribute(context: Context) -> Attributions:
    """Explain the planned rows by occlusion and integrated gradients; tables without a gradient by Shapley sampling."""
    subject = context.subject
    rows = context.correct_rows(context.rows["explain"])
    maps_of = _text_maps if subject.task == "text" else _tensor_maps
    done, maps = context.chunks(
        "explain", rows, lambda part, generator: maps_of(context, part, generator), evaluations(subject)
    )
    # Drawn for all rows, so that a row has the same random map whether or not the others were reached.
    shape = (len(rows), next(iter(maps.values())).shape[1])
    maps["random"] = torch.rand(shape, generator=context.generator("random map"), dtype=torch.float64)[done]
    rows = rows[done]
    papers = {m: _PAPERS[m] for m in maps if m != "random"}
    described = _text_cells if subject.task == "text" else _tensor_cells
    cells, keep, grid = described(context, rows)
    return Attributions(rows, _target(subject, rows), maps, cells, keep, grid, papers)


def shares(found: Attributions) -> Tensor:
    """Return each part's share of the size of the maps, in the mean over rows and methods; for images and tables."""
    sizes = [found.maps[m].abs().mean(0) for m in found.maps if m != "random"]
    return torch.stack([s / s.sum().clamp_min(1e-300) for s in sizes if bool((s > 0).any())]).mean(0)


def part_name(found: Attributions, part: int) -> str:
    """Return what a part is called: its column, or its place in the grid of an image."""
    if found.grid is None:
        return found.cells[0][part]
    row, column = divmod(part, found.grid[1])
    return f"the cell {row + 1} down, {column + 1} across (of {found.grid[0]} by {found.grid[1]})"


def _target(subject: Subject, rows: Tensor) -> Tensor:
    """Return the output explained: the predicted class, or of a regression the only one."""
    return torch.zeros_like(rows) if subject.regression else subject.predictions()[rows]


# -- images and tables ------------------------------------------------------------------------------------------


def _tensor_maps(context: Context, rows: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    subject = context.subject
    assert subject.oracle is not None
    oracle = subject.point_oracle() if subject.regression else subject.oracle
    x, baseline, grid = _tensor_parts(subject, rows)
    target = _target(subject, rows)
    window = (-(-x.shape[2] // grid[0]), -(-x.shape[3] // grid[1])) if grid else 1
    maps = {}
    if subject.has_gradient():
        by_path = integrated_gradients(oracle, x, target, baseline=baseline, n_steps=IG_STEPS[subject.task])
        maps["integrated gradients"] = _on_cells(by_path.values, grid)
    elif subject.task != "image":
        explainer = RemovalExplainer(DefaultRemoval(baseline[0]), Prediction(), Shapley(SHAPLEY_ORDERS))
        sampled = explainer.attribute(oracle, x, target, generator=generator)
        maps["Shapley sampling"] = _on_cells(sampled.values, None)
    removed = occlusion(oracle, x, target, window=window, baseline=baseline)
    maps["occlusion"] = _on_cells(removed.values, grid)
    return maps


def _tensor_parts(subject: Subject, rows: Tensor) -> tuple[Tensor, Tensor, tuple[int, int] | None]:
    """Return rows, what stands for "taken away" in each, and the grid of an image's cells."""
    assert subject.x is not None
    x = subject.x[rows]
    if subject.task != "image":
        return x, _table_baseline(subject).expand_as(x), None
    return x, _image_baseline(x), (min(CELLS, x.shape[2]), min(CELLS, x.shape[3]))


def _tensor_cells(context: Context, rows: Tensor) -> tuple[list[list[str]], Any, tuple[int, int] | None]:
    x, baseline, grid = _tensor_parts(context.subject, rows)
    names = [""] * (grid[0] * grid[1]) if grid else list(context.subject.feature_names)

    def keep(i: int, kept: Tensor) -> Tensor:
        mask = _enlarge(kept, grid, x.shape[2:]) if grid else kept
        return torch.where(mask, x[i], baseline[i])

    return [names] * len(rows), keep, grid


def _image_baseline(x: Tensor) -> Tensor:
    """Each image's own mean colour: what is taken away looks like nothing in particular."""
    return x.mean((2, 3), keepdim=True).expand_as(x)


def _table_baseline(subject: Subject) -> Tensor:
    """The mean of every column; of categories the commonest."""
    assert subject.x is not None
    mean = subject.x.mean(0)
    return torch.where(subject.held, subject.x.mode(0).values, mean) if len(subject.held) else mean


def _on_cells(values: Tensor, grid: tuple[int, int] | None) -> Tensor:
    """Sum a map over channels and average it over the cells of the grid, shape (n, cells)."""
    if grid is None:
        return values.double()
    flat = values.double().sum(1, keepdim=True)
    return torch.nn.functional.adaptive_avg_pool2d(flat, grid).flatten(1)


def _enlarge(kept: Tensor, grid: tuple[int, int], size: Any) -> Tensor:
    """Blow cells up to pixels, shape (m, 1, height, width)."""
    small = kept.reshape(-1, 1, *grid).float()
    return torch.nn.functional.interpolate(small, size=tuple(size), mode="nearest") > 0.5


# -- texts ------------------------------------------------------------------------------------------------------


def words(text: str) -> list[str]:
    """Cut a text at white space."""
    return re.findall(r"\S+", text) or [""]


def _text_maps(context: Context, rows: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    subject, target = context.subject, _target(context.subject, rows)
    texts, keep, _ = _text_cells(context, rows)
    width = min(LONGEST, max(len(words(t)) for t in subject.texts))
    removed = torch.zeros(len(rows), width, dtype=torch.float64)
    # Every text whole and then without each of its words, all in one run.
    batches = [
        [" ".join(row), *keep(i, ~torch.eye(len(row), dtype=torch.bool))] for i, row in enumerate(texts)
    ]
    probabilities = to_probabilities(subject.predict_texts([text for batch in batches for text in batch]))
    place = 0
    for i, batch in enumerate(batches):
        values = torch.from_numpy(probabilities[place : place + len(batch), int(target[i])].copy())
        removed[i, : len(batch) - 1] = values[0] - values[1:]
        place += len(batch)
    if subject.has_gradient():
        return {
            "integrated gradients": _text_gradients(subject, texts, target, width), "word removal": removed
        }  # fmt: skip
    return {"word removal": removed}


def _text_cells(context: Context, rows: Tensor) -> tuple[list[list[str]], Any, None]:
    texts = [words(context.subject.texts[int(i)])[:LONGEST] for i in rows]

    def keep(i: int, kept: Tensor) -> list[str]:
        return [" ".join(w for w, k in zip(texts[i], row, strict=False) if k) for row in kept.tolist()]

    return texts, keep, None


def _text_gradients(subject: Subject, texts: list[list[str]], target: Tensor, width: int) -> Tensor:
    """Integrated gradients at the embeddings, summed over each word's tokens."""
    model = subject.text_model
    assert model is not None
    assert model.tokenize
    assert model.embed
    assert model.from_embeddings
    assert subject.oracle
    found = torch.zeros(len(texts), width, dtype=torch.float64)
    # Texts of as many tokens go together. None is padded: models that pool the last token find no padding in embeddings.
    alike: dict[tuple[int, ...], list[int]] = {}
    tokens = []
    for i, row in enumerate(texts):
        ids, mask = model.tokenize([" ".join(row)])
        tokens.append(ids[0])
        alike.setdefault(tuple(mask[0].tolist()), []).append(i)
    chunk_size: int | None = None
    for kept in sorted(alike, key=len, reverse=True):
        members = alike[kept]
        with torch.no_grad():
            embedded = model.embed(torch.stack([tokens[i] for i in members]))
        mask = torch.tensor(kept, device=embedded.device)
        oracle = Oracle(
            _with_mask(model.from_embeddings, mask), memory=subject.oracle.memory, chunk_size=chunk_size
        )
        # What the longest texts allow at once, the shorter ones do too.
        chunk_size = chunk_size or next(oracle.chunks(sys.maxsize, embedded, gradient=True))
        map_ = integrated_gradients(oracle, embedded, target[members], n_steps=IG_STEPS["text"])
        subject.oracle.nfev += oracle.nfev
        subject.oracle.ngrad += oracle.ngrad
        for i, scores in zip(members, map_.values.double().sum(-1), strict=True):
            owner = _owners(texts[i], model.decode(tokens[i]) if model.decode else [])
            for position, word in enumerate(owner):
                if word is not None and word < width:
                    found[i, word] += scores[position]
    return found


def _with_mask(fun: Callable[[Tensor, Tensor], Tensor], mask: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda embedded: fun(embedded, mask.expand(len(embedded), -1))


def _owners(row: list[str], tokens: list[str]) -> list[int | None]:
    """Match WordPiece tokens to words by their letters; special tokens belong to none."""
    owners: list[int | None] = []
    word, used = 0, 0
    for token in tokens:
        piece = token.removeprefix("##")
        if token.startswith("[") and token.endswith("]") and token not in row:
            owners.append(None)
            continue
        while word < len(row) and used >= len(row[word]):
            word, used = word + 1, 0
        owners.append(word if word < len(row) else None)
        used += len(piece)
    return owners
