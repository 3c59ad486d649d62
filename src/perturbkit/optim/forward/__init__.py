"""Training without a backward pass through the network: forward-mode derivatives, and layers that learn locally."""
