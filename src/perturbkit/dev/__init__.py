"""Tools for those who add to perturbkit: the stubs of the lazy exports and the skeletons of a method."""
