"""Uncertainty carried through a network, or read out of one: distributions, posterior moments."""
