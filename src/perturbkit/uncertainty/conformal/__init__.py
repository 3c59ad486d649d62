"""Sets and intervals that hold the truth with a stated chance, in finite samples, whatever the model."""
