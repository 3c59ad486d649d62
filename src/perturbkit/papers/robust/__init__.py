"""Reproductions of the papers behind perturbkit.robust."""
