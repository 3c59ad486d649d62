"""Tables: three of scikit-learn's, two from causal inference, and a classifier for one of them.

Use breast cancer or wine for classification, diabetes for regression, and lalonde or nhefs where the effect of a
treatment is asked for or a sensitive attribute matters.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from perturbkit.data._files import OWN_LICENCE, choose_part, every_fifth, installed, load_network
from perturbkit.data.types import Dataset, ReferenceModel

__all__ = ["load_breast_cancer", "load_diabetes", "load_lalonde", "load_nhefs", "load_wine", "tabular_model"]


def load_breast_cancer(part: str = "all") -> Dataset:
    """Return 569 tumours described by 30 measurements of cell nuclei, malignant or benign.

    Rows 4, 9, 14, … are the test part.

    Parameters
    ----------
    part : {"all", "train", "test"}
        Which rows of the fixed split.

    Returns
    -------
    Dataset
        ``x`` of shape (n, 30), float32; classes "malignant", "benign".

    Examples
    --------
    >>> load_breast_cancer().class_names
    ('malignant', 'benign')
    """
    from sklearn import datasets

    bunch = datasets.load_breast_cancer()
    # Lengths are in units of the digitised image; the source names none.
    return _table(
        "breast_cancer",
        bunch.data,
        bunch.target,
        part,
        feature_names=tuple(map(str, bunch.feature_names)),
        units=("",) * 30,
        class_names=("malignant", "benign"),
        target_name="diagnosis",
        licence="CC BY 4.0 (UCI Machine Learning Repository)",
        source="Wolberg, Mangasarian, Street and Street (1995), Breast Cancer Wisconsin (Diagnostic), "
        "https://doi.org/10.24432/C5DW2B; ships in scikit-learn",
        description="Mean, standard error and worst value of ten measurements of the nuclei in a fine needle "
        "aspirate, in units of the digitised image.",
    )


def load_wine(part: str = "all") -> Dataset:
    """Return 178 wines of three cultivars described by 13 chemical measurements.

    Rows 4, 9, 14, … are the test part.

    Parameters
    ----------
    part : {"all", "train", "test"}
        Which rows of the fixed split.

    Returns
    -------
    Dataset
        ``x`` of shape (n, 13), float32; three classes.

    Examples
    --------
    >>> load_wine("train").x.shape
    torch.Size([143, 13])
    """
    from sklearn import datasets

    bunch = datasets.load_wine()
    return _table(
        "wine",
        bunch.data,
        bunch.target,
        part,
        feature_names=tuple(map(str, bunch.feature_names)),
        units=("",) * 13,
        class_names=("cultivar 0", "cultivar 1", "cultivar 2"),
        target_name="cultivar",
        licence="CC BY 4.0 (UCI Machine Learning Repository)",
        source="Aeberhard and Forina (1992), Wine, https://doi.org/10.24432/C5PC7J; ships in scikit-learn",
        description="Chemical analysis of wines grown in one region of Italy from three cultivars; the source "
        "names no units.",
    )


def load_diabetes(part: str = "all") -> Dataset:
    """Return 442 diabetes patients, ten measurements and the progression of the disease a year later.

    Rows 4, 9, 14, … are the test part. The measurements are in their original units, not standardised.

    Parameters
    ----------
    part : {"all", "train", "test"}
        Which rows of the fixed split.

    Returns
    -------
    Dataset
        ``x`` of shape (n, 10) and ``y`` of shape (n,), float32.

    Examples
    --------
    >>> load_diabetes().feature_names[:3]
    ('age', 'sex', 'bmi')
    """
    from sklearn import datasets

    bunch = datasets.load_diabetes(scaled=False)
    return _table(
        "diabetes",
        bunch.data,
        bunch.target,
        part,
        feature_names=tuple(map(str, bunch.feature_names)),
        units=("years", "1 or 2", "kg/m^2", "mmHg", "mg/dl", "mg/dl", "mg/dl", "", "log mg/dl", "mg/dl"),
        target_name="progression",
        licence="none stated by the source; distributed with scikit-learn (BSD-3-Clause)",
        source="Efron, Hastie, Johnstone and Tibshirani (2004), Least Angle Regression, "
        "https://www4.stat.ncsu.edu/~boos/var.select/diabetes.html; ships in scikit-learn",
        description="Age, sex, body mass index, blood pressure and six blood serum measurements; the target is "
        "a quantitative measure of disease progression.",
    )


def load_lalonde(part: str = "all") -> Dataset:
    """Return the 445 men of the National Supported Work experiment: who was trained, and earnings in 1978.

    Randomised, so the difference of mean earnings (1,794 dollars) estimates the effect of the training.
    Rows 4, 9, 14, … are the test part; no model here is trained on these data.

    Parameters
    ----------
    part : {"all", "train", "test"}
        Which rows of the fixed split.

    Returns
    -------
    Dataset
        ``x`` of shape (n, 9), float32, with the treatment ``treat``; ``y`` is ``re78`` in dollars.

    Examples
    --------
    >>> jobs = load_lalonde()
    >>> treated = jobs.x[:, jobs.feature_names.index(jobs.treatment)] == 1
    >>> round(float(jobs.y[treated].mean() - jobs.y[~treated].mean()))
    1794
    """
    names = ("treat", "age", "educ", "black", "hisp", "marr", "nodegree", "re74", "re75")
    frame = _stata("nsw_mixtape")
    return _table(
        "lalonde",
        frame[list(names)].to_numpy("float64"),
        frame["re78"].to_numpy("float64"),
        part,
        feature_names=names,
        units=("0/1", "years", "years", "0/1", "0/1", "0/1", "0/1", "US dollars", "US dollars"),
        target_name="re78",
        treatment="treat",
        licence="MIT (package causaldata)",
        source="LaLonde (1986), Dehejia and Wahba (1999); package causaldata, nsw_mixtape, "
        "https://github.com/NickCH-K/causaldata",
        description="Job training experiment: training, age, schooling, race, marriage and real earnings of 1974 "
        "and 1975; the target is real earnings of 1978 in US dollars.",
    )


def load_nhefs(part: str = "all") -> Dataset:
    """Return 1,566 smokers of the NHEFS study: who stopped smoking, and the change of weight.

    Observational, so the naive difference (2.5 kg) is confounded. The covariates are those that Hernán and Robins
    adjust for; the 63 people without a weight in 1982 are left out, as there. Rows 4, 9, 14, … are the test part;
    no model here is trained on these data.

    Parameters
    ----------
    part : {"all", "train", "test"}
        Which rows of the fixed split.

    Returns
    -------
    Dataset
        ``x`` of shape (n, 10), float32, with the treatment ``qsmk``; ``y`` is ``wt82_71`` in kilograms.

    Examples
    --------
    >>> load_nhefs().x.shape
    torch.Size([1566, 10])
    """
    names = (
        "qsmk", "sex", "age", "race", "education", "wt71", "smokeintensity", "smokeyrs", "active", "exercise",
    )  # fmt: skip
    frame = _stata("nhefs")
    frame = frame[frame["wt82_71"].notna()].copy()
    # The file numbers these categories from 1, the study's codebook from 0.
    frame[["sex", "race", "active", "exercise"]] -= 1
    return _table(
        "nhefs",
        frame[list(names)].astype("float64").to_numpy(),
        frame["wt82_71"].to_numpy("float64"),
        part,
        feature_names=names,
        units=("0/1", "0 male, 1 female", "years", "0 white, 1 other", "level 1 to 5", "kg", "cigarettes a day",
               "years", "0 very to 2 inactive", "0 much to 2 little"),
        target_name="wt82_71",
        treatment="qsmk",
        licence="MIT (package causaldata)",
        source="Hernán and Robins (2020), Causal Inference: What If, "
        "https://www.hsph.harvard.edu/miguel-hernan/causal-inference-book/; package causaldata, nhefs",
        description="Smokers of 1971 followed to 1982: stopping, sex, age, race, schooling, weight, smoking and "
        "activity; the target is the change of weight from 1971 to 1982 in kilograms.",
    )  # fmt: skip


def tabular_model() -> ReferenceModel:
    """Return a two-layer network for breast cancer, trained on the train part; it standardises its inputs itself.

    Returns
    -------
    ReferenceModel
        Takes (n, 30) raw measurements, returns (n, 2) logits.

    Examples
    --------
    >>> tabular_model().module(load_breast_cancer("test").x).shape
    torch.Size([113, 2])
    """
    module, accuracy = load_network(_network, "breast_cancer_mlp")
    return ReferenceModel(
        name="breast cancer network",
        module=module,
        class_names=("malignant", "benign"),
        input_range=None,
        preprocess="standardises each column with the mean and standard deviation of the train part",
        licence=OWN_LICENCE,
        source="trained by python -m perturbkit.data.rebuild",
        accuracy=accuracy,
        accuracy_on='load_breast_cancer("test")',
    )


def _table(name: str, x: Any, y: Any, part: str, **facts: Any) -> Dataset:
    target = torch.tensor(y)
    data = Dataset(
        name=name,
        task="tabular",
        x=torch.tensor(x).float(),
        y=target.long() if "class_names" in facts else target.float(),
        part=part,
        **facts,
    )
    return data.rows(choose_part(part, every_fifth(len(data))))


def _stata(name: str) -> Any:
    """Read a table of causaldata from its file, without importing the package (its loaders need statsmodels)."""
    import pandas as pd

    return pd.read_stata(installed("causaldata") / name / f"{name}.dta", convert_categoricals=False)


class _Standardise(nn.Module):
    """Subtract a mean and divide by a scale, column by column."""

    mean: Tensor
    scale: Tensor

    def __init__(self, n_features: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(n_features))
        self.register_buffer("scale", torch.ones(n_features))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.scale


def _network() -> nn.Sequential:
    return nn.Sequential(
        _Standardise(30), nn.Linear(30, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 2)
    )
