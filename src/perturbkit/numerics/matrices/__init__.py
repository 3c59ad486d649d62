"""Functions of matrices, batched and differentiable."""
