"""The methods that the sections use: what each is called, the paper it comes from, and where it ends.

Keys are those of ``perturbkit papers`` where the method has a reproduction there, and names of the audit's own
elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["METHODS", "Method", "methods"]


@dataclass(frozen=True)
class Method:
    """A method with its source and its limits.

    Attributes
    ----------
    name : str
        What it is called.
    title, authors : str
        Of the paper.
    year : int
        Of the paper.
    link : str
        Where to read it; empty where there is no free page.
    limits : str
        Where it ends, in one or two sentences.
    reproduction : str
        Its key in ``perturbkit papers``; empty where it has none.
    """

    name: str
    title: str
    authors: str
    year: int
    link: str
    limits: str
    reproduction: str = ""

    @property
    def where(self) -> str:
        """The link as the report prints it."""
        return self.link.replace("https://arxiv.org/abs/", "arXiv:").replace("https://doi.org/", "doi:")


def _arxiv(
    key: str, name: str, title: str, authors: str, year: int, arxiv: str, limits: str, known: bool = True
) -> tuple[str, Method]:
    link = f"https://arxiv.org/abs/{arxiv}"
    return key, Method(name, title, authors, year, link, limits, key if known else "")


METHODS: dict[str, Method] = dict([
    _arxiv(
        "integrated_gradients", "Integrated gradients", "Axiomatic Attribution for Deep Networks",
        "Sundararajan, Taly, Yan", 2017, "1703.01365",
        "The map depends on the baseline, and sums up a path of inputs that the model may never meet.",
    ),
    _arxiv(
        "occlusion", "Occlusion", "Visualizing and Understanding Convolutional Networks", "Zeiler, Fergus", 2014,
        "1311.2901",
        "Parts are removed one at a time: two that stand in for one another both look unimportant.",
    ),
    _arxiv(
        "removal_framework", "Shapley sampling by removal",
        "Feature Removal Is a Unifying Principle for Model Explanation Methods", "Covert, Lundberg, Lee", 2020, "2011.03623",
        "Columns are removed as if they were independent, which takes the model outside its data; sampled, so the map has noise.",
    ),
    _arxiv(
        "deletion_curve", "Deletion and insertion curves", "RISE: Randomized Input Sampling for Explanation of Black-box Models",
        "Petsiuk, Das, Saenko", 2018, "1806.07421",
        "Inputs with parts removed are unlike those of training, and the ranking of methods changes with the way of removing.",
    ),
    _arxiv(
        "fast_minimum_norm", "Fast minimum-norm attack", "Fast Minimum-norm Adversarial Attacks through Adaptive Norm Constraints",
        "Pintor, Roli, Brendel, Biggio", 2021, "2102.12827",
        "It follows the gradient and stops at local minima: an upper bound of the radius, and useless where the gradient is flat.",
    ),
    _arxiv(
        "rays", "Search by scores", "RayS: A Ray Searching Method for Hard-label Adversarial Attack", "Chen, Gu", 2020,
        "2006.12792",
        "Sign flips of blocks are its source; the starts and the Euclidean turns are the audit's own. An upper bound, and a "
        "weak one in many dimensions.",
        known=False,
    ),
    _arxiv(
        "lirpa", "Bounds by linear relaxation", "Automatic Perturbation Analysis for Scalable Certified Robustness and Beyond",
        "Xu, Shi, Zhang, Wang, Chang, Huang, Kailkhura, Lin, Hsieh", 2020, "2002.12920",
        "The bounds loosen with every layer: on a deep network a radius of zero proves nothing either way. Rounding of "
        "floating-point numbers is not bounded.",
    ),
    _arxiv(
        "randomized_smoothing", "Randomized smoothing", "Certified Adversarial Robustness via Randomized Smoothing",
        "Cohen, Rosenfeld, Kolter", 2019, "1902.02918",
        "It certifies the vote under noise and not the model itself, in the Euclidean norm, with a chance of error; the "
        "radius cannot exceed what the number of draws supports.",
    ),
    _arxiv(
        "smoothing_attack", "Attack on the smoothed model",
        "Provably Robust Deep Learning via Adversarially Trained Smoothed Classifiers",
        "Salman, Yang, Li, Zhang, Zhang, Razenshteyn, Bubeck", 2019, "1906.04584",
        "A few draws stand in for the vote, so the attack is weaker than one on the vote itself; a change counts only if a vote "
        "of fresh draws has changed beyond doubt.",
        known=False,
    ),
    _arxiv(
        "randomized_ablation", "Randomized ablation",
        "Robustness Certificates for Sparse Adversarial Attacks by Randomized Ablation", "Levine, Feizi", 2020, "1911.09272",
        "It certifies a vote over texts with most words taken out, which answers worse than the model itself.",
        known=False,
    ),
    _arxiv(
        "calibration_errors", "Calibration errors", "On Calibration of Modern Neural Networks", "Guo, Pleiss, Sun, Weinberger",
        2017, "1706.04599",
        "The error depends on the bins, and is above zero by chance on few rows; the chance value is given beside it.",
    ),
    _arxiv(
        "split_conformal", "Adaptive conformal sets", "Classification with Valid and Adaptive Coverage",
        "Romano, Sesia, Candès", 2020, "2006.02544",
        "Coverage is promised in the mean over rows like these, not within a group nor for one row, and ends when the data drift.",
    ),
    _arxiv(
        "conformal_intervals", "Conformal intervals", "Distribution-Free Predictive Inference for Regression",
        "Lei, G'Sell, Rinaldo, Tibshirani, Wasserman", 2018, "1604.04173",
        "Coverage is promised in the mean over rows like these; around a single answer every interval has the same length.",
        known=False,
    ),
    _arxiv(
        "temperature", "Temperature scaling", "On Calibration of Modern Neural Networks", "Guo, Pleiss, Sun, Weinberger", 2017,
        "1706.04599",
        "One number mends confidence in the mean and leaves every answer as it is; classes may stay miscalibrated one by one.",
        known=False,
    ),
    _arxiv(
        "corrupt", "Common corruptions", "Benchmarking Neural Network Robustness to Common Corruptions and Perturbations",
        "Hendrycks, Dietterich", 2019, "1903.12261",
        "A handful of kinds at set severities: how often each occurs where the model is used is not known.",
    ),
    (
        "holm",
        Method(
            "Correction for many comparisons", "A Simple Sequentially Rejective Multiple Test Procedure", "Holm", 1979,
            "https://www.jstor.org/stable/4615733",
            "It holds for any dependence, and pays for it: small gaps on small slices stay unseen.",
        ),
    ),
])  # fmt: skip


def methods(keys: Iterable[str]) -> list[Method]:
    """Return the methods of these keys, each once; keys that are not listed here are left out."""
    return [METHODS[k] for k in dict.fromkeys(keys) if k in METHODS]
