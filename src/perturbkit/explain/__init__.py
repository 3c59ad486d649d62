"""What a model looks at: attributions by gradients, by removal and by attention, and the metrics that judge them.

Start with :func:`integrated_gradients` where gradients reach the input, :func:`occlusion` where they do not and
:func:`atman` for transformers; :func:`compare` scores them by every metric in one table, beside a random map. All take a
model or an Oracle, a batch and a target, and return an Attribution.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
