"""Reproductions of the papers behind perturbkit.optim."""
