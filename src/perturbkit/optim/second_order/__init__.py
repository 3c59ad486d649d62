"""Use curvature to train: gains that rescale inputs, and preconditioners fitted to Hessian-vector pairs."""
