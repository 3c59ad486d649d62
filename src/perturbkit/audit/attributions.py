"""Maps by two methods and a random control, on common cells, for whatever kind of input."""

from __future__ import annotations

import re
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

__all__ = ["attribute", "words"]

CELLS = 7
SHAPLEY_ORDERS = 24
IG_STEPS = {"image": 12, "tabular": 32, "text": 16}


def attribute(context: Context) -> Attributions:
    """Explain the planned rows by occlusion and integrated gradients; tables without a gradient by Shapley sampling."""
    subject = context.subject
    rows = context.correct_rows(context.rows["explain"])
    # Of a regression the only output is explained.
    target = torch.zeros_like(rows) if subject.regression else subject.predictions()[rows]
    if subject.task == "text":
        found = _text(subject, rows, target)
    else:
        found = _tensor(context, rows, target)
    g = context.generator("random map")
    shape = next(iter(found.maps.values())).shape
    found.maps["random"] = torch.rand(shape, generator=g, dtype=torch.float64)
    return found


# -- images and tables ------------------------------------------------------------------------------------------


def _tensor(context: Context, rows: Tensor, target: Tensor) -> Attributions:
    subject = context.subject
    assert subject.oracle is not None
    assert subject.x is not None
    oracle = subject.point_oracle() if subject.regression else subject.oracle
    x = subject.x[rows]
    image = subject.task == "image"
    baseline = _image_baseline(x) if image else _table_baseline(subject).expand_as(x)
    grid = (min(CELLS, x.shape[2]), min(CELLS, x.shape[3])) if image else None
    window = (-(-x.shape[2] // grid[0]), -(-x.shape[3] // grid[1])) if grid else 1
    maps, papers = {}, {}
    if subject.has_gradient():
        by_path = integrated_gradients(oracle, x, target, baseline=baseline, n_steps=IG_STEPS[subject.task])
        maps["integrated gradients"] = _on_cells(by_path.values, grid)
        papers["integrated gradients"] = "integrated_gradients"
    elif not image:
        explainer = RemovalExplainer(DefaultRemoval(baseline[0]), Prediction(), Shapley(SHAPLEY_ORDERS))
        sampled = explainer.attribute(oracle, x, target, generator=context.generator("shapley"))
        maps["Shapley sampling"] = _on_cells(sampled.values, None)
        papers["Shapley sampling"] = "removal_framework"
    removed = occlusion(oracle, x, target, window=window, baseline=baseline)
    maps["occlusion"] = _on_cells(removed.values, grid)
    papers["occlusion"] = "occlusion"
    names = (
        [[""] * maps["occlusion"].shape[1]] * len(rows)
        if image
        else [list(subject.feature_names)] * len(rows)
    )

    def keep(i: int, kept: Tensor) -> Tensor:
        mask = _enlarge(kept, grid, x.shape[2:]) if grid else kept
        return torch.where(mask, x[i], baseline[i])

    return Attributions(rows, target, maps, names, keep, grid, papers)


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


def _text(subject: Subject, rows: Tensor, target: Tensor) -> Attributions:
    texts = [words(subject.texts[int(i)])[:40] for i in rows]
    width = max(map(len, texts))

    def keep(i: int, kept: Tensor) -> list[str]:
        return [" ".join(w for w, k in zip(texts[i], row, strict=False) if k) for row in kept.tolist()]

    def probability(i: int, batch: list[str]) -> Tensor:
        return torch.from_numpy(to_probabilities(subject.predict_texts(batch))[:, int(target[i])].copy())

    removed = torch.zeros(len(rows), width, dtype=torch.float64)
    for i, row in enumerate(texts):
        kept = ~torch.eye(len(row), dtype=torch.bool)
        batch = [" ".join(row), *keep(i, kept)]
        values = probability(i, batch)
        removed[i, : len(row)] = values[0] - values[1:]
    maps, papers = {"word removal": removed}, {"word removal": "occlusion"}
    if subject.has_gradient():
        maps = {"integrated gradients": _text_gradients(subject, texts, target, width), **maps}
        papers["integrated gradients"] = "integrated_gradients"
    return Attributions(rows, target, maps, texts, keep, None, papers)


def _text_gradients(subject: Subject, texts: list[list[str]], target: Tensor, width: int) -> Tensor:
    """Integrated gradients at the embeddings, summed over each word's tokens."""
    model = subject.text_model
    assert model is not None
    assert model.tokenize
    assert model.embed
    assert model.from_embeddings
    assert subject.oracle
    found = torch.zeros(len(texts), width, dtype=torch.float64)
    for i, row in enumerate(texts):
        ids, mask = model.tokenize([" ".join(row)])
        with torch.no_grad():
            embedded = model.embed(ids)
        oracle = Oracle(_with_mask(model.from_embeddings, mask), memory=subject.oracle.memory)
        map_ = integrated_gradients(oracle, embedded, target[i : i + 1], n_steps=IG_STEPS["text"])
        subject.oracle.nfev += oracle.nfev
        subject.oracle.ngrad += oracle.ngrad
        scores = map_.values.double().sum(-1)[0]
        owner = _owners(row, model.decode(ids[0]) if model.decode else [])
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
