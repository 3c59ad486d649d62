"""Diffusion on bounded domains: noise that is reflected at the walls, so that no sample leaves the domain."""
