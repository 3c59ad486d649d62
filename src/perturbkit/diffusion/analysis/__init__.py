"""What a sampler does on its way, and how far from the data it may end: geometry of trajectories and error bounds."""
