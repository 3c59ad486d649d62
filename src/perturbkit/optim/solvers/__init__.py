"""Solve deterministic and finite-sum problems in the style of SciPy, with an answer that says how far it is certified."""
