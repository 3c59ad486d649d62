"""Samplers: one integrator of the probability flow each, deterministic unless it says otherwise."""
