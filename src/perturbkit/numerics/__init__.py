"""Numerical linear algebra and its derivatives: functions of matrices, and what a perturbation does to them.

Start with :func:`matrix_sqrt`, a batched and differentiable square root of symmetric positive definite matrices.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
