"""Explanations and metrics beside captum, shap, lime and quantus, at equal budgets: time, memory, infidelity, deletion.

A digits network on pixels and a network on a table of breast cancer; the baseline is zero throughout (black, and the mean
of the standardised table). Quality is measured by our metrics on what each library answers; the metrics themselves are
timed against those of quantus. The floor is the same number of evaluations of the bare model.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from benchmarks._timing import Row, compare
from torch import Tensor

from perturbkit.core import Oracle
from perturbkit.explain import (
    DefaultRemoval,
    LinearModel,
    Prediction,
    RemovalExplainer,
    Shapley,
    deletion_curve,
    infidelity,
    integrated_gradients,
    occlusion,
)

N_SUBSETS, N_STEPS, N_ROWS = 512, 50, 12


def main(rounds: int = 3) -> list[Row]:
    """Print the table and return its rows."""
    from perturbkit.papers.explain._classifiers import cases

    rows: list[Row] = []
    for case in cases(N_ROWS):
        model, x, label = case.oracle.fun.eval(), case.x, case.label
        for name, (ours, theirs, evaluations) in _pairs(model, x, label).items():
            floor = _floor(model, x, evaluations)
            found, other = ours(), theirs()
            floor()
            (row,) = compare(ours, {f"{case.name}: {name}": theirs}, floor, rounds)
            for side, values in (("ours", found), ("peer", other)):
                scores = infidelity(
                    model,
                    x,
                    values,
                    label,
                    perturbation=case.perturbation,
                    n_samples=1000,
                    normalize=True,
                    generator=0,
                ).values
                row[f"infidelity_{side}"] = float(scores.mean())
                row[f"deletion_{side}"] = float(
                    deletion_curve(model, x, values, label, n_steps=16).area.mean()
                )
            rows.append(row)
        if x.ndim == 4:
            rows += _metric_rows(model, x, label, rounds)
    print(quality_table(rows))
    return rows


def quality_table(rows: list[Row]) -> str:
    """Return the rows as a table in Markdown: times below 1 are in our favour, and so are lower scores."""
    lines = [
        "| Comparison | time / theirs | MB | theirs | infidelity | theirs | deletion | theirs |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        scores = [
            f"{row[key]:.3f}" if key in row else ""
            for key in ("infidelity_ours", "infidelity_peer", "deletion_ours", "deletion_peer")
        ]
        sizes = f"{row['peak_ours_mb']:.1f} | {row['peak_peer_mb']:.1f}"
        lines.append(f"| {row['comparison']} | {row['ratio_peer']:.2f} | {sizes} | {' | '.join(scores)} |")
    return "\n".join(lines)


def _pairs(
    model: Any, x: Tensor, label: Tensor
) -> dict[str, tuple[Callable[[], Any], Callable[[], Any], int]]:
    from captum import attr
    from captum._utils.models.linear_model import SkLearnLinearRegression
    from captum.attr._core.lime import get_exp_kernel_similarity_function

    n, d = len(x), x[0].numel()
    made: dict[str, tuple[Callable[[], Any], Callable[[], Any], int]] = {
        f"integrated gradients, {N_STEPS} steps, captum": (
            lambda: integrated_gradients(model, x, label, n_steps=N_STEPS).values,
            lambda: attr.IntegratedGradients(model).attribute(x, target=label, n_steps=N_STEPS).detach(),
            n * N_STEPS,
        ),
        "occlusion of one element, captum": (
            lambda: occlusion(model, x, label).values if x.ndim == 4 else _leave_one_out(model, x, label),
            lambda: attr.FeatureAblation(model).attribute(x, target=label).detach(),
            n * (d + 1),
        ),
        "the same, as many rows at once as captum": (
            lambda: occlusion(Oracle(model, chunk_size=n), x, label).values
            if x.ndim == 4
            else _leave_one_out(Oracle(model, chunk_size=n), x, label),
            lambda: attr.FeatureAblation(model).attribute(x, target=label).detach(),
            n * (d + 1),
        ),
        f"KernelSHAP, {N_SUBSETS} subsets, shap": (
            lambda: _explained(Shapley(N_SUBSETS, "kernel"), model, x, label),
            lambda: _shap(model, x, label),
            n * N_SUBSETS,
        ),
        f"KernelSHAP, {N_SUBSETS} subsets, captum": (
            lambda: _explained(Shapley(N_SUBSETS, "kernel"), model, x, label),
            lambda: _captum_rows(attr.KernelShap(model), x, label, {"n_samples": N_SUBSETS, "perturbations_per_eval": 64}),
            n * N_SUBSETS,
        ),
        "the same, 64 rows at once as captum": (
            lambda: _explained(Shapley(N_SUBSETS, "kernel"), Oracle(model, chunk_size=64), x, label),
            lambda: _captum_rows(attr.KernelShap(model), x, label, {"n_samples": N_SUBSETS, "perturbations_per_eval": 64}),
            n * N_SUBSETS,
        ),
        f"LIME, {N_SUBSETS} subsets, captum": (
            lambda: _explained(LinearModel(N_SUBSETS), model, x, label),
            lambda: _captum_rows(
                attr.Lime(model, SkLearnLinearRegression(), get_exp_kernel_similarity_function("cosine", 0.25)),
                x, label, {"n_samples": N_SUBSETS, "perturbations_per_eval": 64},
            ),
            n * N_SUBSETS,
        ),
    }  # fmt: skip
    if x.ndim == 2:
        made[f"LIME, {N_SUBSETS} samples, lime"] = (
            lambda: _explained(LinearModel(N_SUBSETS), model, x, label),
            lambda: _lime(model, x, label),
            n * N_SUBSETS,
        )
    return made


def _explained(summary: Any, model: Any, x: Tensor, label: Tensor) -> Tensor:
    return (
        RemovalExplainer(DefaultRemoval(0.0), Prediction(), summary)
        .attribute(model, x, label, generator=0)
        .values
    )


def _leave_one_out(model: Any, x: Tensor, label: Tensor) -> Tensor:
    from perturbkit.explain import RemoveIndividual

    return _explained(RemoveIndividual(), model, x, label)


def _shap(model: Any, x: Tensor, label: Tensor) -> Tensor:
    import shap

    def predict(z: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return model(torch.from_numpy(z).to(x).reshape(-1, *x.shape[1:])).numpy()

    flat = x.flatten(1).numpy()
    explainer = shap.KernelExplainer(predict, np.zeros((1, flat.shape[1])))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        values = np.asarray(explainer.shap_values(flat, nsamples=N_SUBSETS, l1_reg=0, silent=True))
    chosen = values[np.arange(len(x)), :, label.numpy()]
    return torch.from_numpy(chosen).to(x).reshape(x.shape)


def _captum_rows(method: Any, x: Tensor, label: Tensor, options: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return torch.cat(
            [method.attribute(x[i : i + 1], target=int(label[i]), **options) for i in range(len(x))]
        )


def _lime(model: Any, x: Tensor, label: Tensor) -> Tensor:
    from lime.lime_tabular import LimeTabularExplainer

    def predict(z: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return model(torch.from_numpy(z).to(x)).numpy()

    flat = x.numpy().astype(float)
    explainer = LimeTabularExplainer(flat, discretize_continuous=False, random_state=0)
    out = np.zeros_like(flat)
    for i, (row, k) in enumerate(zip(flat, label.tolist(), strict=True)):
        found = explainer.explain_instance(
            row, predict, labels=(k,), num_features=row.size, num_samples=N_SUBSETS
        )
        for feature, weight in found.as_map()[k]:
            # Its weights are slopes in standardised features: shares of the output are slope times value.
            out[i, feature] = (
                weight * (row[feature] - explainer.scaler.mean_[feature]) / explainer.scaler.scale_[feature]
            )
    return torch.from_numpy(out).to(x)


def _metric_rows(model: Any, x: Tensor, label: Tensor, rounds: int) -> list[Row]:
    def ours() -> object:
        return deletion_curve(model, x, x, label, n_steps=16)

    def theirs() -> object:
        return _quantus(model, x, label)

    floor = _floor(model, x, len(x) * 17)
    ours(), theirs(), floor()
    return compare(ours, {"digits: the deletion curve itself, 16 steps, quantus": theirs}, floor, rounds)


def _quantus(model: Any, x: Tensor, label: Tensor) -> Any:
    import quantus

    metric = quantus.PixelFlipping(
        features_in_step=max(1, x[0].numel() // 16), perturb_baseline="black", return_auc_per_sample=False,
        disable_warnings=True, display_progressbar=False,
    )  # fmt: skip
    return metric(
        model=model,
        x_batch=x.numpy(),
        y_batch=label.numpy(),
        a_batch=x.numpy(),
        channel_first=True,
        softmax=False,
    )


def _floor(model: Any, x: Tensor, evaluations: int) -> Callable[[], None]:
    batch = x.repeat(-(-512 // len(x)), *[1] * (x.ndim - 1))[:512]

    def floor() -> None:
        with torch.no_grad():
            for _ in range(-(-evaluations // 512)):
                model(batch)

    return floor


if __name__ == "__main__":
    main()
