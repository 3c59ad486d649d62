"""Labels: as numbers of classes with their names, or as the real numbers of a regression."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from perturbkit.core import checks

_MOST_CLASSES = 1_000_000


def refuse_missing(values: Any, where: Any) -> None:
    """Refuse rows without a label."""
    missing = int(values.isna().sum())
    if missing:
        raise checks.DataError(
            f"{where} has {missing} rows without a label; allowed: none. Remove or label them."
        )


def are_real(values: Any) -> bool:
    """Whether labels are numbers of which some are not whole."""
    return values.dtype.kind == "f" and not bool((values.dropna() == values.dropna().round()).all())


def real_targets(values: Any, where: Any) -> Tensor:
    """Return the targets of a regression as float64.

    Raises
    ------
    DataError
        If they are text, missing, infinite or all the same.
    """
    refuse_missing(values, where)
    if values.dtype.kind not in "iufb":
        raise checks.DataError(
            f"{where} has the target {str(values.iloc[0])!r}, which is text, but the model answers one number a row; "
            "allowed: numbers. Name the column of the number with --label, or return class scores (n, classes)."
        )
    y = torch.as_tensor(values.to_numpy(dtype=np.float64, copy=True))
    if not bool(torch.isfinite(y).all()):
        raise checks.DataError(
            f"{where} has infinite targets; allowed: finite numbers. Remove or correct these rows."
        )
    if bool((y == y[0]).all()):
        raise checks.DataError(
            f"{where} has the same target {float(y[0]):g} in every row; allowed: targets that differ. Add other rows."
        )
    return y


def class_labels(
    values: Any, where: Any, names: tuple[str, ...] = (), *, known: tuple[str, ...] = (), hint: str = ""
) -> tuple[Tensor, tuple[str, ...]]:
    """Return labels as 0..K-1 and the names of the classes.

    Parameters
    ----------
    values : pandas.Series
        Labels as they stand.
    where : str or Path
        What to call the data in a refusal.
    names : tuple of str
        Names that every label must be one of, in the order of the outputs.
    known : tuple of str
        Names that the model has for its outputs; labels are matched with them where all of them fit.
    hint : str
        What to do about an unknown label.

    Raises
    ------
    DataError
        If labels are missing, not whole, out of range or unknown.
    """
    refuse_missing(values, where)
    kind = values.dtype.kind
    if kind == "f":
        if not bool(np.isfinite(values).all()) or are_real(values):
            raise checks.DataError(
                f"{where} has labels that are not whole numbers; allowed: class numbers or names. To audit a regression "
                "give a model that answers one number a row; else name the column of the class with --label."
            )
        values, kind = values.astype("int64"), "i"
    if known and not names:
        folded = {name.casefold(): i for i, name in enumerate(known)}
        texts = [str(v).casefold() for v in values]
        if len(folded) == len(known) and set(texts) <= set(folded):
            return torch.tensor([folded[t] for t in texts]), known
    if kind in "iub" and not names:
        y = torch.as_tensor(values.astype("int64").to_numpy().copy())
        if int(y.min()) < 0 or int(y.max()) >= _MOST_CLASSES:
            wrong = int(y.min()) if int(y.min()) < 0 else int(y.max())
            raise checks.DataError(
                f"{where} has the label {wrong}; allowed: 0 to {_MOST_CLASSES - 1}. Number classes from 0; name the "
                "column of the class with --label if another was read."
            )
        return y, known if known and int(y.max()) < len(known) else tuple(
            str(i) for i in range(int(y.max()) + 1)
        )
    order = names or tuple(
        sorted(map(str, values.unique()), key=lambda n: (not n.isdigit(), int(n) if n.isdigit() else 0, n))
    )
    place = {name: i for i, name in enumerate(order)}
    unknown = sorted({str(v) for v in values} - set(place))
    if unknown:
        raise checks.DataError(
            f"{where} has the label {unknown[0]!r}; allowed: {', '.join(order[:20])}. "
            f"{hint or 'Use the names of the columns.'}"
        )
    return torch.tensor([place[str(v)] for v in values]), order
