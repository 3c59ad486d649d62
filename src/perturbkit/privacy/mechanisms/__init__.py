"""Exact noise for counts, the budget that all releases draw on, and the attack that checks a stated guarantee."""
