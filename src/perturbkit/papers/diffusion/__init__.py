"""Reproductions of the papers behind perturbkit.diffusion."""
