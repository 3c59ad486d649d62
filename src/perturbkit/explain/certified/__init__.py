"""How far an attribution can be moved by a small change of the input: bounds, certificates and attacks on them."""
