"""First-order optimizers that adapt to scale, noise or cost: of memory, heavy tails, unknown constants, dear gradients."""
