"""Optimizers that perturb: gradient-free, forward-mode, weight perturbation, and the first-order methods beside them.

Start with :func:`forward_gradient` where backpropagation is not to be had or its memory is too much.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
