from .attacks.fast_minimum_norm import fast_minimum_norm as fast_minimum_norm
from .attacks.projected_gradient import projected_gradient as projected_gradient
from .certificates.randomized_smoothing import SmoothedCertificate as SmoothedCertificate
from .certificates.randomized_smoothing import randomized_smoothing as randomized_smoothing
from .measurements.corrupt import IMAGE_CORRUPTIONS as IMAGE_CORRUPTIONS
from .measurements.corrupt import TABLE_CORRUPTIONS as TABLE_CORRUPTIONS
from .measurements.corrupt import corrupt as corrupt
