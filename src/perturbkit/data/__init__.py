"""Real data that ships inside packages, reference models to try things on, and worlds whose answers are known.

Start with :func:`~perturbkit.data.digits.load_digits8` (small images),
:func:`~perturbkit.data.tabular.load_breast_cancer` (a table) or
:func:`~perturbkit.data.text.load_sentences` (text), each with a trained network beside it, and with
:class:`~perturbkit.data.worlds.GaussianMixture` where the right answer must be known exactly. Nothing here uses
the network; every data set and model states its licence and source.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
