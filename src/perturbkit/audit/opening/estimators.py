"""scikit-learn estimators: handed over in Python, or saved with skops."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from perturbkit.audit.opening import tables
from perturbkit.audit.opening._opened import OpenedData, OpenedModel, first_line
from perturbkit.audit.subject import TextModel, missing_cells
from perturbkit.core import checks

NO_GRADIENT = "a scikit-learn estimator answers scores and no gradients. Pass a differentiable model as a PyTorch module to have it"
# Rows that a model is asked about to learn whether it takes missing cells.
_PROBED = 4
# Plain data and classes of scikit-learn that skops does not list; the trees among them are checked once loaded.
_TRUSTED = {
    "numpy.dtype",  # read from the header of an empty array
    "sklearn.tree._tree.Tree",
    "sklearn.ensemble._hist_gradient_boosting.predictor.TreePredictor",
    "sklearn.neural_network._stochastic_optimizers.AdamOptimizer",
    "sklearn.neural_network._stochastic_optimizers.SGDOptimizer",
}


def is_estimator(model: Any) -> bool:
    """Whether an object speaks as a scikit-learn estimator."""
    return hasattr(model, "get_params") and hasattr(model, "fit") and not isinstance(model, torch.nn.Module)


def open_skops(path: Path) -> OpenedModel:
    """Open a ``.skops`` file; types beyond scikit-learn's own are refused by name.

    Raises
    ------
    ModelError
        If it is no skops file, holds untrusted types or broken trees, or no estimator.
    MissingExtraError
        If skops is not installed.
    """
    skops = checks.extra("skops.io", "skops")
    try:
        untrusted = sorted(set(skops.get_untrusted_types(file=path)) - _TRUSTED)
    except Exception as error:
        raise checks.ModelError(
            f"{path} could not be read as a skops file ({type(error).__name__}: {first_line(error)}); allowed: a file "
            "written by skops.io.dump. Save it again with the versions of scikit-learn and skops that are here."
        ) from error
    if untrusted:
        raise checks.ModelError(
            f"{path} holds types that are not trusted: {', '.join(untrusted[:8])}; allowed: estimators of scikit-learn "
            "itself. Load it yourself with skops.io.load(path, trusted=[...]) after a look at them, and pass the "
            "estimator to perturbkit.audit.run in Python."
        )
    try:
        model = skops.load(path, trusted=sorted(_TRUSTED))
    except Exception as error:
        raise checks.ModelError(
            f"{path} could not be loaded ({type(error).__name__}: {first_line(error)}); allowed: an estimator saved with "
            "the same version of scikit-learn. Save it again with the versions that are here."
        ) from error
    for tree, width in _trees(model, None, set()):
        if hasattr(tree, "nodes") and bool(tree.nodes["is_categorical"].any()):
            raise checks.ModelError(
                f"{path} holds trees that split on categories, which cannot be checked before they run; allowed: trees that "
                "split on numbers. Load it yourself with skops.io.load and pass the estimator to perturbkit.audit.run."
            )
        if not _sound(tree, width):
            raise checks.ModelError(
                f"{path} holds a {type(tree).__name__} whose nodes point outside it; allowed: trees as scikit-learn grows "
                "them. Do not use this file; save the model again."
            )
    if not is_estimator(model):
        raise checks.ModelError(
            f"{path} holds a {type(model).__name__}; allowed: a fitted scikit-learn classifier or regressor. Save the "
            "estimator itself."
        )
    return open_estimator(model, path.name)


def open_estimator(model: Any, name: str = "") -> OpenedModel:
    """Open a fitted estimator or pipeline.

    Raises
    ------
    ModelError
        If it is not fitted, or answers neither classes with scores nor one number a row.
    """
    from sklearn.base import is_classifier, is_regressor
    from sklearn.exceptions import NotFittedError
    from sklearn.utils.validation import check_is_fitted

    name = name or type(model).__name__
    try:
        check_is_fitted(model)
    except (NotFittedError, TypeError) as error:
        raise checks.ModelError(
            f"the model {name} is not fitted; allowed: a fitted estimator. Call fit(X, y) first."
        ) from error
    remarks: list[str] = []
    classes: tuple[str, ...] = ()
    if is_regressor(model):
        method = "predict"
    elif is_classifier(model):
        method, classes = _score_method(model, name, remarks), _class_names(model, name)
    else:
        raise checks.ModelError(
            f"the model {name} is neither a classifier nor a regressor; allowed: an estimator that predicts labels or "
            "numbers. Pass the estimator or the pipeline that ends with it."
        )
    features = tuple(str(c) for c in getattr(model, "feature_names_in_", ()))
    fun = _Asked(model, method, features)
    return OpenedModel(
        fun, name, remarks=remarks, classes=classes, regression=method == "predict", no_gradient=NO_GRADIENT,
        text_model=TextModel(fun.texts), features=features, takes_frames=True, dtype=torch.float64,
        operations=_operations(model), row_bytes=None, fit_inputs=fun.fit,
    )  # fmt: skip


class _Asked:
    """An estimator as a function of a batch."""

    def __init__(self, model: Any, method: str, features: tuple[str, ...]) -> None:
        self.model, self.method, self.features = model, method, features
        self.categories: dict[int, Any] = {}

    def fit(self, data: OpenedData) -> tuple[Any, list[str]]:
        """Take the categories of the data, and refuse another number of columns."""
        self.categories = data.categories
        wanted = getattr(self.model, "n_features_in_", None)
        if data.x is not None and wanted is not None and data.x.ndim == 2 and data.x.shape[1] != wanted:
            raise checks.ModelError(
                f"the model was fitted on {wanted} columns, but {data.name} has {data.x.shape[1]} ("
                f"{', '.join(data.feature_names[:8])}); allowed: the same columns in the same order. Drop or add columns."
            )
        return self, [] if data.x is None or data.x.ndim != 2 else self._missing(data)

    def _missing(self, data: OpenedData) -> list[str]:
        """Ask about rows with missing cells, column by column and as they stand; refuse what is not answered."""
        x = data.x
        assert x is not None
        names = data.feature_names
        counts = missing_cells(x, names, data.categories)
        if not counts:
            return []
        blank = torch.full((x.shape[1],), torch.nan, dtype=x.dtype)
        for place, legal in data.categories.items():
            blank[place] = len(legal) - 1
        absent = torch.isnan(x)
        for place in data.categories:
            absent[:, place] = (x[:, place] == blank[place]) & (names[place] in counts)
        affected = absent.any(0)
        whole = x[:_PROBED].nan_to_num(0.0)
        whole[:, affected] = x.masked_fill(absent, torch.nan).nanmean(0).nan_to_num(0.0)[affected]
        whole[:, list(data.categories)] = 0.0
        columns = torch.arange(x.shape[1])
        # A column is to blame only where the others are answered without it.
        alone = [] if self._refusal(whole) else affected.nonzero()[:, 0].tolist()
        why = {names[i]: self._refusal(torch.where(columns == i, blank, whole)) for i in alone}
        together = torch.cat([x[absent.any(1)][:_PROBED], torch.where(affected, blank, whole[:1])])
        refused = {name: said for name, said in why.items() if said} or {"": self._refusal(together)}
        name, said = next(iter(refused.items()))
        if said:
            kind = type(self.model).__name__
            where = f" in column {name!r}" if name else ""
            raise checks.DataError(
                f"{data.name} holds {sum(counts.values())} missing cells ({tables.counted(counts)}), and the model {kind} takes "
                f"none{where} ({said}); allowed: missing cells where the model takes them. Put what fills them before the "
                "model, as in make_pipeline(SimpleImputer(), model), or remove these rows."
            )
        told = [
            f"Missing cells ({tables.counted(counts)}) stay as they are: the attack, the certificate and the explanations change "
            "only what is there, and damage that loses values empties cells of these columns."
        ]
        held = [names[i] for i in data.categories if names[i] in counts]
        if held:
            told.append(f"{', '.join(held[:6])}: what is missing is a category of its own.")
        return told

    def _refusal(self, x: Tensor) -> str:
        """Return why the model does not answer rows, empty where it does."""
        try:
            answers = self(x)
        except checks.PerturbkitError:
            raise
        except Exception as error:
            return f"{type(error).__name__}: {first_line(error)}"
        return "" if bool(torch.isfinite(answers).all()) else "it answers NaN"

    def __call__(self, x: Tensor) -> Tensor:
        values = x.detach().cpu().numpy().astype(np.float64, copy=False)
        return self._ask(self._frame(values) if self.features else values.reshape(len(values), -1))

    def texts(self, texts: Sequence[str]) -> Tensor:
        """Answer texts."""
        return self._ask(list(texts))

    def _frame(self, values: np.ndarray) -> Any:
        """Name the columns, and put legal values in the place of their numbers."""
        import pandas as pd

        columns: dict[str, Any] = {}
        for i, name in enumerate(self.features):
            legal = self.categories.get(i)
            if legal is None:
                columns[name] = values[:, i]
            else:
                place = np.clip(np.rint(values[:, i]), 0, len(legal) - 1).astype(int)
                columns[name] = legal.take(place).reset_index(drop=True)
        return pd.DataFrame(columns)

    def _ask(self, inputs: Any) -> Tensor:
        out = np.asarray(getattr(self.model, self.method)(inputs), dtype=np.float64)
        if self.method == "predict":
            if out.ndim == 2 and out.shape[1] != 1:
                raise checks.ModelError(
                    f"the model answers {out.shape[1]} numbers a row; allowed: one. Audit one target at a time."
                )
            out = out.reshape(len(out), 1)
        elif out.ndim == 1:
            # The logits whose softmax is the logistic function of the decision.
            out = np.stack([-out / 2, out / 2], 1)
        return torch.from_numpy(np.array(out))


def _score_method(model: Any, name: str, remarks: list[str]) -> str:
    if hasattr(model, "predict_proba"):
        return "predict_proba"
    if hasattr(model, "decision_function"):
        remarks.append(
            f"{name} has no predict_proba; its decision_function is read as logits, so its confidence is not calibrated. "
            "Wrap it in CalibratedClassifierCV to give it probabilities."
        )
        return "decision_function"
    raise checks.ModelError(
        f"the model {name} answers labels alone; allowed: predict_proba or decision_function. Wrap it in "
        "sklearn.calibration.CalibratedClassifierCV, or vote softly."
    )


def _class_names(model: Any, name: str) -> tuple[str, ...]:
    classes = model.classes_
    if isinstance(classes, list) or np.ndim(classes) != 1:
        raise checks.ModelError(
            f"the model {name} answers several targets; allowed: one. Audit the estimator of one target at a time."
        )
    whole = np.asarray(classes).dtype.kind == "f" and bool((np.asarray(classes) % 1 == 0).all())
    return tuple(str(int(c)) if whole else str(c) for c in classes)


def _parts(value: Any) -> Iterator[Any]:
    """Yield what an attribute holds, through lists, tuples, dictionaries and arrays of objects."""
    if isinstance(value, dict):
        for held in value.values():
            yield from _parts(held)
    elif isinstance(value, list | tuple):
        for held in value:
            yield from _parts(held)
    elif isinstance(value, np.ndarray) and value.dtype == object:
        for held in value.ravel():
            yield from _parts(held)
    else:
        yield value


def _trees(model: Any, width: int | None, seen: set[int]) -> Iterator[tuple[Any, int | None]]:
    """Yield the trees inside an estimator with the number of columns that they are asked with."""
    if id(model) in seen or not hasattr(model, "__dict__"):
        return
    seen.add(id(model))
    ensemble = type(model).__name__
    own: int | None = getattr(model, "n_features_in_", width)
    # Forests and boosting ask their trees without a check of the columns, so the ensemble's number counts.
    inner = own if width is None or own is None else min(own, width)
    passes_on = ensemble.startswith(
        ("RandomForest", "ExtraTrees", "GradientBoosting", "HistGradientBoosting")
    )
    for value in vars(model).values():
        for held in _parts(value):
            kind = f"{type(held).__module__}.{type(held).__qualname__}"
            if kind in _TRUSTED and "ree" in type(held).__name__:
                yield held, inner
            elif hasattr(held, "__dict__") and type(held).__module__.startswith("sklearn"):
                yield from _trees(held, inner if passes_on else None, seen)


def _sound(tree: Any, width: int | None) -> bool:
    """Whether every node leads further down inside the tree and asks about a column that exists."""
    if hasattr(tree, "children_left"):
        left, right = np.asarray(tree.children_left), np.asarray(tree.children_right)
        feature, leaf = np.asarray(tree.feature), np.asarray(tree.children_left) == -1
        width = int(tree.n_features) if width is None else min(width, int(tree.n_features))
        leaves_agree = bool((right[leaf] == -1).all())
    else:
        nodes = tree.nodes
        left, right = nodes["left"].astype(np.int64), nodes["right"].astype(np.int64)
        feature, leaf = nodes["feature_idx"], nodes["is_leaf"].astype(bool)
        leaves_agree = True
    n = len(left)
    here = np.arange(n)[~leaf]
    inside = all(bool(((side[~leaf] > here) & (side[~leaf] < n)).all()) for side in (left, right))
    columns = bool((feature[~leaf] >= 0).all()) and (width is None or bool((feature[~leaf] < width).all()))
    return n > 0 and inside and columns and leaves_agree


def _operations(model: Any) -> float:
    """Return about how much work one row is: twice the numbers that were fitted, a tree its depth."""
    total, trees = 0.0, list(_trees(model, None, set()))
    total += sum(200.0 * max(1.0, np.log2(_n_nodes(tree) + 1)) for tree, _ in trees)
    stack, seen = [model], set()
    while stack:
        held = stack.pop()
        if id(held) in seen:
            continue
        seen.add(id(held))
        if isinstance(held, np.ndarray) and held.dtype.kind == "f":
            total += 2.0 * held.size
        elif hasattr(held, "__dict__") and type(held).__module__.startswith("sklearn"):
            for value in vars(held).values():
                stack.extend(_parts(value))
    return max(total, 1.0)


def _n_nodes(tree: Any) -> int:
    return int(tree.node_count) if hasattr(tree, "node_count") else len(tree.nodes)
