"""Drawing from a distribution by removing noise: samplers, guidance, inversion and their analysis.

Start with :func:`sample_deis` and a :class:`~perturbkit.core.noise.Denoiser`; every sampler has the shape
``sample_*(denoiser, x, times, *, generator=None, callback=None) -> SampleResult``.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
