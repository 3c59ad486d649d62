"""Waves and spectrograms: linear stochastic equations for generation given a condition, mean-reverting ones for enhancement."""
