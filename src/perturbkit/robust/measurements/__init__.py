"""Measurements of robustness beyond the accuracy under one attack."""
