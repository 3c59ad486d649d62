from .forward.forward_gradient import ForwardSGD as ForwardSGD
from .forward.forward_gradient import forward_gradient as forward_gradient
from .forward.forward_gradient import forward_gradient_variance as forward_gradient_variance
