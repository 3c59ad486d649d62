"""perturbkit: perturb something, measure the response, act on it.

Start with the package that answers your question: ``perturbkit.explain`` (what a model looks at),
``perturbkit.robust`` (how far it can be pushed), ``perturbkit.uncertainty`` (how far to trust its confidence), or
run ``perturbkit audit demo``, which uses all three. ``perturbkit papers list`` lists every method by its paper.
"""

import lazy_loader

from perturbkit._version import __version__

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
__all__ = [*__all__, "__version__"]  # noqa: PLE0604 (attach_stub returns strings)
