"""Shapley values of what a prediction knows: how much of the whole distribution of the label each part of an input tells."""
