"""Minimise without gradients: optimizers and solvers that only evaluate the loss, from seeded random directions."""
