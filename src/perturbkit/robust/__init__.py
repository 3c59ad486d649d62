"""How far a model can be pushed: attacks, training defences, certificates and measurements of robustness.

Start with :func:`fast_minimum_norm` for the smallest change that breaks an answer, :func:`projected_gradient` inside
a given set, :func:`interval_bounds` or :func:`randomized_smoothing` for what is proved, and :func:`corrupt` for
natural damage.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
