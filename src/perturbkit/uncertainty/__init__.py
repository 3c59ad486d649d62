"""How far a model's confidence may be trusted: calibration, conformal sets, and uncertainty carried through a model.

Start with :func:`calibration_errors`, which says how far the confidence is off, and with
:class:`SplitConformalClassifier` or :class:`SplitConformalRegressor`, which turn any model's predictions into sets
that hold the truth with a stated chance. :class:`TemperatureScaling` repairs the confidence itself.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
