"""Reproductions of the papers behind perturbkit.explain."""
