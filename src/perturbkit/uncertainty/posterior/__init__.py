"""What a denoiser knows of the clean signal beyond its mean: the posterior's directions of spread and their marginals."""
