"""Search of the reproductions by words: BM25 over title, claim, names and docstrings, all read from the source.

Robertson and Zaragoza (2009), "The Probabilistic Relevance Framework: BM25 and Beyond".
"""

from __future__ import annotations

import ast
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

from perturbkit.papers.records import PaperRecord, method_source

__all__ = ["rank"]

_K1, _B = 1.2, 0.75
# A word in the title says more than one in a docstring.
_WEIGHTS = {"title": 4, "key": 4, "claim": 2, "authors": 2, "text": 1}


def rank(query: str, records: Sequence[PaperRecord]) -> list[tuple[PaperRecord, float]]:
    """Return the records that share a word with the query, best first, with their scores.

    Parameters
    ----------
    query : str
        Words.
    records : sequence of PaperRecord
        What is searched.

    Returns
    -------
    list of (PaperRecord, float)

    Notes
    -----
    The score is the sum over the query's words of idf(w) tf (k1 + 1) / (tf + k1 (1 - b + b length / mean length)),
    where tf weights the fields (BM25F without separate length normalisation).
    """
    counts = [_counted(record) for record in records]
    lengths = [sum(c.values()) for c in counts]
    mean = sum(lengths) / len(lengths) if lengths else 1.0
    scores = [0.0] * len(records)
    for word in dict.fromkeys(_tokens(query)):
        holders = sum(word in c for c in counts)
        idf = math.log(1 + (len(records) - holders + 0.5) / (holders + 0.5))
        for i, count in enumerate(counts):
            tf = count[word]
            scores[i] += idf * tf * (_K1 + 1) / (tf + _K1 * (1 - _B + _B * lengths[i] / mean)) if tf else 0.0
    found = [(record, score) for record, score in zip(records, scores, strict=True) if score > 0]
    return sorted(found, key=lambda pair: (-pair[1], pair[0].key))


def _counted(record: PaperRecord) -> Counter[str]:
    fields = {
        "title": record.title,
        "key": f"{record.key} {record.method.rpartition('.')[2]}",
        "claim": record.claim,
        "authors": f"{record.authors} {record.year} {record.arxiv}",
        "text": f"{record.package} {record.input} {record.needs} {record.summary} {_docstrings(record)}",
    }
    count: Counter[str] = Counter()
    for name, text in fields.items():
        for token in _tokens(text):
            count[token] += _WEIGHTS[name]
    return count


def _docstrings(record: PaperRecord) -> str:
    """Return the docstrings of the method's module and of the method itself."""
    source = method_source(record.method) if record.method else None
    if source is None:
        return ""
    try:
        tree = ast.parse(source.read_text(encoding="utf-8"))
    except (OSError, SyntaxError):
        return ""
    name = record.method.rpartition(".")[2]
    own = [n for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef) and n.name == name]
    return " ".join(ast.get_docstring(node) or "" for node in [tree, *own])


def _tokens(text: str) -> list[str]:
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    # "integrated_gradients" and "IntegratedGradients" are two words each; "gradients" and "gradient" are one.
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", plain)
    found = re.findall(r"[a-z0-9]+(?:\.[0-9]+)?", spaced.lower())
    return [t[:-1] if len(t) > 3 and t.endswith("s") and not t.endswith("ss") else t for t in found]
