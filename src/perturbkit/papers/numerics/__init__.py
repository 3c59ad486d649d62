"""Reproductions of the papers behind perturbkit.numerics."""
