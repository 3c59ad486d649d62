"""Losses and models that learn to generate: perturbed inputs, learned schedules, fixed points, one-step generators, flows.

Every loss is a plain function of a network and a batch that returns one number, for :func:`perturbkit.core.fit` or any other
loop.
"""
