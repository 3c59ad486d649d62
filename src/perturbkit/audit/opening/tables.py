"""Tables: CSV and Parquet files and data frames, as numbers in named columns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from perturbkit.audit.opening._opened import OpenedData, OpenedModel, first_line
from perturbkit.core import checks

_LABELS = ("label", "y", "target", "class")
# Where more than this share of a text column's values differ, it is free text and no category.
_MOST_DISTINCT = 0.5


def read_table(path: Path) -> Any:
    """Read a CSV or Parquet file as a data frame.

    Raises
    ------
    DataError
        If it cannot be read or has no rows.
    MissingExtraError
        If Parquet is given and pyarrow is not installed.
    """
    import pandas as pd

    if path.suffix.lower() == ".parquet":
        checks.extra("pyarrow", "parquet")
        try:
            frame = pd.read_parquet(path, engine="pyarrow")
        except Exception as error:
            raise checks.DataError(
                f"{path} could not be read as Parquet ({first_line(error)}); allowed: a table as "
                "DataFrame.to_parquet writes it. Write it again."
            ) from error
    else:
        frame = _read_csv(path)
    if frame.empty:
        raise checks.DataError(f"{path} has a header but no rows; allowed: at least two rows. Add data.")
    twice = frame.columns[frame.columns.duplicated()]
    if len(twice):
        raise checks.DataError(
            f"{path} has the column {str(twice[0])!r} twice; allowed: one of each name. Rename or drop one."
        )
    return frame


def column(frame: Any, name: str, where: Any, flag: str) -> Any:
    """Return a column.

    Raises
    ------
    DataError
        If there is none of that name.
    """
    if name not in frame.columns:
        raise checks.DataError(
            f"{where} has no column {name!r}; allowed: one of {', '.join(map(str, frame.columns[:20]))}. "
            f"Name it with {flag}."
        )
    return frame[name]


def from_frame(
    frame: Any, name: str, label: str | None, group: str | None, task: str | None, model: OpenedModel | None
) -> OpenedData:
    """Part a table into labels, groups and inputs: texts, or columns.

    Raises
    ------
    DataError
        If a column is missing or nothing is left beside the labels.
    """
    chosen = label or next((c for c in _LABELS if c in frame.columns), "label")
    targets = column(frame, chosen, name, "--label")
    groups = tuple(str(v) for v in column(frame, group, name, "--groups")) if group else ()
    # A group that the model was fitted on is an input as well.
    aside = [group] if group and (model is None or group not in model.features) else []
    rest = frame.drop(columns=[chosen, *aside])
    if rest.shape[1] == 0:
        raise checks.DataError(
            f"{name} has no column beside the label; allowed: at least one input. Add the inputs of the model."
        )
    return part(rest, targets, name, groups, task, model)


def part(
    rest: Any, targets: Any, name: str, groups: tuple[str, ...], task: str | None, model: OpenedModel | None
) -> OpenedData:
    """Tell texts from tables, given the columns beside the labels."""
    texts = [c for c in rest.columns if not _numeric(rest[c])]
    frames = model is not None and bool(model.features)
    one = len(texts) == 1 and len(rest.columns) <= 2 and not frames
    if task == "text" or (task is None and one):
        chosen = "text" if "text" in rest.columns else (texts[0] if texts else rest.columns[0])
        missing = int(rest[chosen].isna().sum())
        if missing:
            raise checks.DataError(
                f"{name} has {missing} rows without a text in column {str(chosen)!r}; allowed: none. Remove or fill them."
            )
        return OpenedData(
            name, "text", targets, texts=[str(t) for t in rest[chosen]], groups=groups, from_file=True
        )
    if task == "image":
        raise checks.DataError(
            f"the task is 'image', but {name} is a table; allowed: 'tabular' or 'text'. Pass images as a folder or an .npz."
        )
    return OpenedData(name, "tabular", targets, frame=rest, groups=groups, from_file=True)


def numbers(data: OpenedData, model: OpenedModel) -> OpenedData:
    """Turn a frame into numbers, in the columns and the order that the model was fitted on.

    Text and categorical columns become the places of their values in the sorted list of those that occur, for models
    that take them by name; they are refused elsewhere.

    Raises
    ------
    DataError
        If a column is lacking, or holds text, dates or missing values.
    """
    frame = data.frame
    if model.features:
        lacking = [c for c in model.features if c not in map(str, frame.columns)]
        if lacking:
            raise checks.DataError(
                f"{data.name} lacks the column {lacking[0]!r}, on which the model {model.name} was fitted; allowed: all of "
                f"{', '.join(model.features[:20])}. Add it, or correct the header."
            )
        by_name = {str(c): c for c in frame.columns}
        spare = [str(c) for c in frame.columns if str(c) not in model.features]
        if spare:
            data.remarks.append(
                f"The model was not fitted on {_listed(spare)}; left out of what it is asked."
            )
        frame = frame[[by_name[c] for c in model.features]]
    columns, categories = [], {}
    for place, name in enumerate(frame.columns):
        values = frame[name]
        if _numeric(values):
            columns.append(values.to_numpy(dtype=np.float64, na_value=np.nan))
            continue
        if not (model.features and model.takes_frames):
            raise checks.DataError(
                f"{data.name} has text in column {str(name)!r}; allowed: numbers in every column but the label. Encode it "
                "as the model expects, drop it, or pass a scikit-learn pipeline fitted on a data frame that encodes it."
            )
        codes, legal = _categories(values.reset_index(drop=True), data.name, str(name))
        columns.append(codes)
        categories[place] = legal
    table = torch.as_tensor(np.stack(columns, 1))
    names = tuple(map(str, frame.columns))
    finite(table, data.name, names, missing=model.takes_frames)
    if categories:
        held = _listed([names[i] for i in categories])
        data.remarks.append(
            f"{held}: categories. The attack swaps them for other values seen, which is counted apart from its radius; the "
            "certificate and the damage hold them; explanations put the commonest value in their place."
        )
    data.x, data.feature_names, data.categories = table, names, categories
    return data


def finite(values: Tensor, where: Any, names: tuple[str, ...] | None, *, missing: bool = False) -> None:
    """Refuse values that are infinite or, unless ``missing``, not there: an estimator is asked itself about these.

    Raises
    ------
    DataError
        With the columns that have one.
    """
    bad = torch.isinf(values) if missing else ~torch.isfinite(values)
    if bool(bad.any()):
        counts = {} if names is None else dict(zip(names, bad.sum(0).tolist(), strict=True))
        place = f": {counted(counts)}" if counts else ""
        raise checks.DataError(
            f"{where} holds {int(bad.sum())} {'infinite' if missing else 'NaN, missing or infinite'} values{place}; allowed: "
            + ("numbers and missing cells. Remove or correct them." if missing else "finite numbers. Remove or impute them as "
               "you do before the model; with a scikit-learn pipeline that imputes, missing numbers are taken as they are.")
        )  # fmt: skip


def counted(counts: dict[str, int]) -> str:
    """Write counts by column, the largest first."""
    order = sorted((c for c in counts.items() if c[1]), key=lambda c: -c[1])
    shown = ", ".join(f"{n} in column {name!r}" for name, n in order[:6])
    return (
        shown
        if len(order) <= 6
        else f"{shown} and {sum(n for _, n in order[6:])} in {len(order) - 6} more columns"
    )


def _read_csv(path: Path) -> Any:
    import pandas as pd

    try:
        # "None" is a fair name of a class; what is missing is empty or says so in the usual ways.
        missing = ["", "NaN", "nan", "NA", "N/A", "null", "NULL"]
        frame = pd.read_csv(path, keep_default_na=False, na_values=missing)
    except UnicodeError as error:
        raise checks.DataError(
            f"{path} is not in UTF-8 ({first_line(error)}); allowed: UTF-8 text. Save it again as CSV UTF-8, or convert "
            "it with iconv -f LATIN1 -t UTF-8."
        ) from error
    except Exception as error:
        raise checks.DataError(
            f"{path} could not be read as CSV ({first_line(error)}); allowed: a comma-separated table with a header "
            "line. Open it and check the first lines."
        ) from error
    only = str(frame.columns[0]) if len(frame.columns) == 1 else ""
    for mark, spoken in ((";", "semicolons"), ("\t", "tabs"), ("|", "bars")):
        if only.count(mark) >= 1:
            raise checks.DataError(
                f"{path} has one column {only[:60]!r}, which looks separated by {spoken}; allowed: commas. Save it again "
                "with commas between the columns."
            )
    return frame


def _numeric(values: Any) -> bool:
    import pandas as pd

    return bool(pd.api.types.is_bool_dtype(values) or pd.api.types.is_numeric_dtype(values))


def _categories(values: Any, where: str, name: str) -> tuple[np.ndarray, Any]:
    """Return the place of each value among the legal ones, and those, in the column's own type; what is missing is the last."""
    import pandas as pd

    if pd.api.types.is_datetime64_any_dtype(values) or pd.api.types.is_timedelta64_dtype(values):
        raise checks.DataError(
            f"{where} has dates in column {name!r}; allowed: numbers and categories. Turn it into numbers "
            "(days since a date, month, weekday) before the model."
        )
    absent = values.isna().to_numpy(dtype=bool)
    legal = tuple(sorted(values[~absent].unique(), key=str))
    if len(legal) > max(20, _MOST_DISTINCT * len(values)):
        raise checks.DataError(
            f"{where} has {len(legal)} different texts among {len(values)} rows in column {name!r}; allowed: categories "
            "that recur. Drop free text, or pass it alone with --task text."
        )
    place = {value: i for i, value in enumerate(legal)}
    codes = np.array(
        [len(legal) if gone else place[v] for v, gone in zip(values, absent, strict=True)], dtype=np.float64
    )
    gone = [values[absent].iloc[0]] if absent.any() else []
    return codes, pd.Series([*legal, *gone], dtype=values.dtype)


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:6])
    return shown if len(names) <= 6 else f"{shown} and {len(names) - 6} more columns"
