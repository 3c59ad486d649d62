"""Interleaved timing of two libraries and of the bare model evaluations that both must make."""

from __future__ import annotations

import time
from collections.abc import Callable

from perturbkit.core.oracle import _LivingBytes

Row = dict[str, float | str]
Call = Callable[[], object]


def compare(ours: Call, peers: dict[str, Call], floor: Call, rounds: int) -> list[Row]:
    """Time all in turn, in one process; return the best of the rounds, ratios and peak tensor bytes, a row a peer.

    The best and not the middle: what else runs on the machine only ever adds time. ``ratio_peer`` and ``ratio_floor`` are our time over theirs: below 1 we are faster. Peak memory is that of tensors
    alive at once, counted in one more run of each, which is not timed. Call each once before, so that all are warm.
    """
    runs: dict[str, Call] = {"ours": ours, "floor": floor, **peers}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(rounds):
        # The order turns, so that no one always runs on the caches of the same other one.
        turn = i % len(runs)
        for name in [*list(runs)[turn:], *list(runs)[:turn]]:
            start = time.perf_counter()
            runs[name]()
            seconds[name].append(time.perf_counter() - start)
    best = {name: min(values) for name, values in seconds.items()}
    peak_ours = _peak(ours)
    return [
        {
            "comparison": name,
            "ours_s": best["ours"],
            "peer_s": best[name],
            "floor_s": best["floor"],
            "ratio_peer": best["ours"] / best[name],
            "ratio_floor": best["ours"] / best["floor"],
            "peak_ours_mb": peak_ours,
            "peak_peer_mb": _peak(peer),
        }
        for name, peer in peers.items()
    ]


def table(rows: list[Row]) -> str:
    """Return the rows as text."""
    lines = [
        f"{'comparison':<62}{'ours s':>8}{'peer s':>8}{'floor s':>8}{'/peer':>7}{'/floor':>7}{'MB':>7}{'peer MB':>9}"
    ]
    for row in rows:
        n = [float(row[key]) for key in list(row)[1:]]
        lines.append(
            f"{row['comparison']:<62}{n[0]:>8.2f}{n[1]:>8.2f}{n[2]:>8.2f}{n[3]:>7.2f}{n[4]:>7.2f}{n[5]:>7.0f}{n[6]:>9.0f}"
        )
    return "\n".join(lines)


def table_in_ms(rows: list[Row]) -> list[Row]:
    """Turn the times of the rows into milliseconds, print them and return them."""
    told = [
        {k: float(v) * 1e3 if k in ("ours_s", "peer_s", "floor_s") else v for k, v in r.items()} for r in rows
    ]
    print("times in ms")
    print(table(told))
    return told


def _peak(run: Call) -> float:
    with _LivingBytes() as living:
        run()
    return living.peak / 1e6
