"""Whether a probability means what it says: errors of calibration, and calibrators that reduce them."""
