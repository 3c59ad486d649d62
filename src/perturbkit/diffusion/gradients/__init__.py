"""Gradients through a sampler: adjoint equations, and optimisation of what a sampler draws while it draws."""
