"""A ball tree that reports the points of a half-space, for networks of which few neurons fire."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from perturbkit.core import checks

__all__ = ["HalfSpaceReporter"]


class HalfSpaceReporter:
    """Report which points lie in a half-space, by a ball tree that can be updated.

    Parameters
    ----------
    points : Tensor, shape (m, d)
        The points; copied.
    leaf_size : int
        Points in a leaf, at least 1.
    rebuild_after : float
        The tree is built anew after so many updates a point; until then its balls only grow.

    Attributes
    ----------
    nodes : int
        Nodes of the tree.
    visited, tested : int
        Nodes and points compared with a threshold so far.

    Notes
    -----
    ``max_{w in ball(c, R)} <w, q> = <c, q> + R ||q||``: a node where this is not above the threshold is left out. Every
    report is exact. In many dimensions balls are large and little is left out; ``visited`` says how much.

    Cost: a build is O(m d log m), an update O(d log m), a query at least the points it reports.

    References
    ----------
    Gao et al. (2022), arXiv:2208.05395, section 4, where the structure is that of Agarwal, Eppstein and Matousek (1992).

    Examples
    --------
    >>> reporter = HalfSpaceReporter(torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 0.0]]))
    >>> reporter.query(torch.tensor([1.0, 0.0]), 0.5).tolist()
    [0, 2]
    >>> reporter.update(torch.tensor([0]), torch.tensor([[-1.0, 0.0]]))
    >>> reporter.query(torch.tensor([1.0, 0.0]), 0.5).tolist()
    [2]
    """

    def __init__(self, points: Tensor, *, leaf_size: int = 16, rebuild_after: float = 20.0) -> None:
        self.points = checks.tensor("points", points, ndim=2).detach().clone()
        self.leaf_size = checks.integer("leaf_size", leaf_size, low=1)
        self.rebuild_after = checks.positive("rebuild_after", rebuild_after)
        self.visited = self.tested = 0
        self._build()

    def query(self, direction: Tensor, threshold: float) -> Tensor:
        """Return the indices of the points with ``<point, direction> > threshold``, rising."""
        checks.tensor("direction", direction, shape=(self.points.shape[1],))
        return self.query_batch(direction[None], threshold)[1]

    def query_batch(self, directions: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
        """Return row and point of every pair with ``<point, directions[row]> > threshold``, in rising order."""
        checks.tensor("directions", directions, shape=(None, self.points.shape[1]))
        checks.between("threshold", threshold, -math.inf, math.inf)
        size = max(1, 2**21 // len(self.points))
        found = [self._search(part, threshold) for part in directions.split(size)]
        rows = torch.cat([rows + i * size for i, (rows, _) in enumerate(found)])
        return rows, torch.cat([points for _, points in found])

    def update(self, index: Tensor, points: Tensor) -> None:
        """Move the points of some indices, each named once."""
        checks.tensor("points", points, shape=(len(index), self.points.shape[1]))
        self.points[index] = points
        self._updates += len(index)
        if self._updates > self.rebuild_after * len(self.points):
            self._build()
            return
        node = self._leaf[index]
        for level in reversed(range(len(self._centres))):
            distance = (points - self._centres[level][node]).norm(dim=1) * self._slack
            self._radii[level].scatter_reduce_(0, node, distance, "amax")
            node = node // 2

    def _build(self) -> None:
        m, d = self.points.shape
        depth = max(0, math.ceil(math.log2(m / self.leaf_size)))
        width = -(-m // 2**depth)
        # Empty places have the index m: they sort to the end, count for no ball and are never reported.
        padded = torch.cat([self.points, self.points.new_full((1, d), torch.nan)])
        order = torch.full((1, width * 2**depth), m, device=self.points.device)
        order[0, :m] = torch.arange(m, device=self.points.device)
        # A product of d terms is off by at most d roundings; so much larger balls leave out no point by rounding.
        self._slack = 1 + 4 * (d + 2) * torch.finfo(self.points.dtype).eps
        self._centres, self._radii = [], []
        for level in range(depth + 1):
            at = padded[order]
            centre = at.nanmean(1).nan_to_num()
            radius = (at - centre[:, None]).norm(dim=2).nan_to_num(nan=-torch.inf).amax(1)
            self._centres.append(centre)
            self._radii.append(radius * self._slack)
            if level < depth:
                low, high = at.nan_to_num(nan=torch.inf).amin(1), at.nan_to_num(nan=-torch.inf).amax(1)
                widest = (high - low).argmax(1)
                values = at.take_along_dim(widest[:, None, None], 2)[..., 0].nan_to_num(nan=torch.inf)
                order = order.gather(1, values.argsort(1)).reshape(2 * len(order), -1)
        self._members = order
        self._leaf = torch.empty(m + 1, dtype=torch.int64, device=order.device)
        self._leaf[order.reshape(-1)] = torch.arange(len(order), device=order.device).repeat_interleave(
            order.shape[1]
        )
        self.nodes, self._updates = 2 ** (depth + 1) - 1, 0

    def _search(self, q: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
        n, m = len(q), len(self.points)
        length = q.norm(dim=1)
        rows, nodes = torch.arange(n, device=q.device), torch.zeros(n, dtype=torch.int64, device=q.device)
        for level, (centre, radius) in enumerate(zip(self._centres, self._radii, strict=True)):
            if level > 0:
                rows = rows.repeat_interleave(2)
                nodes = torch.stack([2 * nodes, 2 * nodes + 1], 1).reshape(-1)
            self.visited += len(rows)
            c = centre[nodes]
            # The product with the centre is rounded too, by its own length.
            rounding = (self._slack - 1) * c.norm(dim=1)
            reach = (c * q[rows]).sum(1) + (radius[nodes] + rounding) * length[rows]
            kept = reach > threshold
            rows, nodes = rows[kept], nodes[kept]
        members = self._members[nodes]
        real = members < m
        rows, members = rows[:, None].expand_as(members)[real], members[real]
        self.tested += len(rows)
        above = (self.points[members] * q[rows]).sum(1) > threshold
        code = (rows[above] * m + members[above]).sort().values
        return code // m, code % m
