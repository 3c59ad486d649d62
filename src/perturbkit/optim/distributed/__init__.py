"""Optimizers of several workers that own different data: compressed messages to all, or to neighbours of a graph only."""
