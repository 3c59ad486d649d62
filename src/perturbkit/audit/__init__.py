"""The application: what a model looks at, how far it can be pushed, what is certain, how far to trust it.

Start with ``perturbkit audit demo`` on the command line, or with :func:`perturbkit.audit.run` in Python, which
returns a :class:`~perturbkit.audit.report.Report` with ``to_frame()``, ``figure(name)``, ``save(folder)`` and
``check(gates)``.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
