"""The vocabulary that every package speaks: oracles, perturbations, parameters, curvature, noise and results.

Start with :class:`~perturbkit.core.oracle.Oracle`, the counted and memory-bounded function under study, and
:mod:`~perturbkit.core.perturbation`, the sets and distributions that perturbations come from.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
