"""How good an explanation is: fidelity to the model, and stability under small changes."""
