"""Reproductions of the papers behind ``perturbkit.uncertainty``."""
