"""Inverse problems: what was measured, and samplers that answer it with a diffusion model (or a generator) as the prior."""
