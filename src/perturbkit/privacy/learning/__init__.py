"""Models from private data: noisy gradients, perturbed posterior samples, and low-rank recommendations."""
