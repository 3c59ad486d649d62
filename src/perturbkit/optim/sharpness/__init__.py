"""Find flat minima: optimizers that perturb the weights by the gradient before they step, and what is said of them."""
