"""Attributions from removing parts of the input and watching the output."""
