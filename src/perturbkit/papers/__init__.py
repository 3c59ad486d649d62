"""The reproductions: one small program a paper, which shows its headline claim holding here, or not.

Start with ``perturbkit papers list``. A reproduction is a function under :func:`paper` that takes a :class:`Run`
and returns :class:`Evidence`: comparisons of numbers, from which the verdict follows, and a figure.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
