"""Attributions of one output of a model whose outputs hang together: labels, sequences, pixels predicted at once."""
