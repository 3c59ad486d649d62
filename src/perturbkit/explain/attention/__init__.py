"""Attributions from turning attention down, for transformers."""
