"""Certificates: what no perturbation of a set can do to a model, proved."""
