"""Reproductions of the papers behind ``perturbkit.privacy``."""
