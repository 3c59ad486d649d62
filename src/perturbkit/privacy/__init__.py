"""Answers about data that say little about any one person: exact noise, budgets, private learning and queries.

Start with :class:`PrivacyBudget`, which adds up what has been spent and refuses what would exceed it, and with
:func:`discrete_laplace` or :func:`discrete_gaussian` for counts. Train with
:class:`NormalizedGradientPerturbation`, answer an analyst with :class:`StatisticalQueryOracle`, and check any
mechanism with :func:`epsilon_lower_bound`. Without a ``generator`` all noise comes from the operating system's
secure source; a seeded generator makes results repeatable and is not private.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
