"""Attributions from gradients: along a path, smoothed, or propagated layer by layer."""
