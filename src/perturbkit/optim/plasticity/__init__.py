"""Training that would otherwise stall or forget.

Use :class:`OrthogonalGradient` or :class:`StableMaxCrossEntropy` where a network fits its training data and then stops
learning, :class:`UPGD` where data come as a stream that changes, and :class:`QuadraticConsolidation` where tasks come one
after another and old data are gone.
"""
