"""Damage, edits and ablations of texts, by words and letters."""

from __future__ import annotations

import math

import numpy as np
import torch
from scipy.special import gammaln
from torch import Tensor

from perturbkit.audit.attributions import words
from perturbkit.audit.subject import Subject
from perturbkit.core.statistics import clopper_pearson

TEXT_CORRUPTIONS = ("typing errors", "case", "dropped words", "repeated letters")
MAX_EDITS = 5
_KEPT = 0.25


def corrupt_text(text: str, kind: str, severity: int, generator: torch.Generator) -> str:
    """Damage a text; severity 1 to 5 touches 10 to 50 % of its words, at least one."""
    pieces = words(text)
    touched = torch.rand(len(pieces), generator=generator) < 0.1 * severity
    if not bool(touched.any()):
        touched[int(torch.randint(len(pieces), (1,), generator=generator))] = True
    if kind == "dropped words":
        kept = [w for w, t in zip(pieces, touched.tolist(), strict=True) if not t]
        return " ".join(kept or pieces[:1])
    change = {"typing errors": swap_letters, "case": _case, "repeated letters": _repeat}[kind]
    return " ".join(change(w, generator) if t else w for w, t in zip(pieces, touched.tolist(), strict=True))


def swap_letters(word: str, generator: torch.Generator) -> str:
    """Swap two neighbouring, different letters."""
    places = [i for i in range(len(word) - 1) if word[i] != word[i + 1]]
    if not places:
        return word
    i = places[int(torch.randint(len(places), (1,), generator=generator))]
    return word[:i] + word[i + 1] + word[i] + word[i + 2 :]


def edits_until_change(
    subject: Subject, rows: Tensor, generator: torch.Generator
) -> tuple[list[float], list[tuple[str, str, object]], list[int]]:
    """Swap letters in one word after the other, the most harmful first, until the answer changes.

    Returns
    -------
    edits : list of float
        Words edited for each row, infinity where ``MAX_EDITS`` did not do.
    examples : list of (text, edited text, edits)
    control : list of int
        Whether as many swaps in words chosen at random change each answer, 0 or 1.
    """
    pieces = [words(subject.texts[row]) for row in rows.tolist()]
    labels = [int(subject.y[row]) for row in rows.tolist()]
    edits, edited = _greedy(subject, pieces, labels, generator)
    examples: list[tuple[str, str, object]] = [
        (" ".join(text), changed, int(n) if math.isfinite(n) else f"more than {MAX_EDITS}")
        for text, changed, n in zip(pieces, edited, edits, strict=True)
    ]
    random = []
    for text, n in zip(pieces, edits, strict=True):
        chosen = torch.randperm(len(text), generator=generator)[: int(min(n, MAX_EDITS, len(text)))].tolist()
        random.append(" ".join(swap_letters(w, generator) if i in chosen else w for i, w in enumerate(text)))
    answers = subject.predict_texts(random).argmax(1).tolist() if random else []
    return edits, examples, [int(answer != label) for answer, label in zip(answers, labels, strict=True)]


def _greedy(
    subject: Subject, pieces: list[list[str]], labels: list[int], generator: torch.Generator
) -> tuple[list[float], list[str]]:
    """Try one swap in every word, keep the one that lowers the label's score most, and go on; all texts side by side."""
    current, free = [list(text) for text in pieces], [set(range(len(text))) for text in pieces]
    edits, edited = [math.inf] * len(pieces), [""] * len(pieces)
    left = list(range(len(pieces)))
    for n in range(1, MAX_EDITS + 1):
        tries = []
        for row in left:
            for i in sorted(free[row]):
                word = swap_letters(current[row][i], generator)
                if word != current[row][i]:
                    tries.append((row, i, word, " ".join([*current[row][:i], word, *current[row][i + 1 :]])))
        if not tries:
            break
        scores = subject.predict_texts([text for *_, text in tries]).double()
        label = torch.tensor([labels[row] for row, *_ in tries], device=scores.device)[:, None]
        lead = (scores.gather(1, label)[:, 0] - scores.scatter(1, label, -math.inf).amax(1)).tolist()
        best: dict[int, int] = {}
        for k, (row, *_) in enumerate(tries):
            if row not in best or lead[k] < lead[best[row]]:
                best[row] = k
        for row, k in best.items():
            _, i, word, text = tries[k]
            current[row][i] = word
            free[row].discard(i)
            if lead[k] < 0:
                edits[row], edited[row] = float(n), text
        left = [row for row in best if not math.isfinite(edits[row])]
    return edits, edited


def ablation_certificate(
    subject: Subject, rows: Tensor, *, n_draws: int, alpha: float, generator: torch.Generator
) -> list[int]:
    """Return how many replaced words the vote over random ablations is proved to bear, a row.

    Each draw keeps a random quarter of the words. Replacing ``r`` of ``d`` words can touch at most a share
    ``1 - C(d - r, k) / C(d, k)`` of the draws that keep ``k``; the vote stands while the lower confidence bound of
    the winner's share, less that, is above one half (Levine and Feizi, 2020, arXiv:1911.09272). Rows on which the
    vote is wrong count as zero.
    """
    proved = []
    for row in rows.tolist():
        pieces = words(subject.texts[row])
        d = len(pieces)
        k = max(1, round(_KEPT * d))
        ranks = torch.rand(n_draws, d, generator=generator).argsort(1).argsort(1)
        texts = [" ".join(w for w, r in zip(pieces, line, strict=True) if r < k) for line in ranks.tolist()]
        votes = subject.predict_texts(texts).argmax(1)
        hits = int((votes == int(subject.y[row])).sum())
        low = float(clopper_pearson(hits, n_draws, 1 - alpha, side="lower").low)
        r = 0
        while r < d - k and low - _touched(d, k, r + 1) > 0.5:
            r += 1
        proved.append(r)
    return proved


def _touched(d: int, k: int, r: int) -> float:
    """Return the share of draws of k of d words that contain one of r given words."""
    if d - r < k:
        return 1.0
    logs = gammaln(d - r + 1) - gammaln(d - r - k + 1) - gammaln(d + 1) + gammaln(d - k + 1)
    return float(-np.expm1(logs))


def _case(word: str, generator: torch.Generator) -> str:
    return word.lower() if word.isupper() else word.upper()


def _repeat(word: str, generator: torch.Generator) -> str:
    i = int(torch.randint(len(word), (1,), generator=generator)) if word else 0
    return word[: i + 1] + word[i : i + 1] * 2 + word[i + 1 :]
