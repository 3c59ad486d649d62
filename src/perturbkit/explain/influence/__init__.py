"""Attributions to training data: which training rows a prediction rests on, and what it would be without them."""
