"""Training defences: losses and loops that make a model bear perturbations."""
