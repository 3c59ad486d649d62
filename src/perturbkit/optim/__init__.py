"""Optimizers that perturb: gradient-free, forward-mode, weight perturbation, and the first-order methods beside them.

Start with :class:`MeZO` where only losses are to be had, :class:`SAM` or :class:`AMP` where a network is to generalise,
:class:`ClippedSGD` or :class:`MedianSGD` where gradients have heavy tails, and :func:`forward_gradient` where a backward pass
takes too much memory. All but the solvers are ``torch.optim.Optimizer``.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
