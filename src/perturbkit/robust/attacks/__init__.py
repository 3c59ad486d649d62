"""Attacks: a model, inputs, labels and a perturbation set or norm in, an AttackResult out."""
