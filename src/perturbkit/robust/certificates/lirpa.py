"""Linear relaxation: outputs bounded by linear functions of the input, of the weights, or of the words of a text.

Use it to prove what no small change can do, for networks trained without thought of proofs, at a cost between boxes and
exact verification; and, differentiable as it is, to train for it. Xu, Shi, Zhang, Wang, Chang, Huang, Kailkhura, Lin and
Hsieh (2020), Automatic Perturbation Analysis for Scalable Certified Robustness and Beyond, arXiv:2002.12920.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from perturbkit.core import Ball, BallInBox, Box, Certificate, Cost, checks
from perturbkit.robust.certificates._linear_bounds import LinearBounds, Root
from perturbkit.robust.certificates._parts import Interval, evaluating, trace

__all__ = ["BoundedModule", "Synonyms", "loss_fusion"]

Method = Literal["ibp", "crown-ibp", "crown", "forward"]
InputSet = Ball | Box | BallInBox
_DUAL = {"linf": 1, "l2": 2, "l1": float("inf")}
_METHODS = ("ibp", "crown-ibp", "crown", "forward")


@dataclass(frozen=True)
class Synonyms:
    """Texts in which a few words are replaced, each by one of its own candidates.

    Attributes
    ----------
    candidates : Tensor, shape (n, length, m, d)
        Embeddings that may stand at each position; repeat the word's own where there are fewer.
    budget : int
        Positions changed at most, at least 1.
    """

    candidates: Tensor
    budget: int

    def __post_init__(self) -> None:
        checks.tensor("candidates", self.candidates, ndim=4)
        checks.integer("budget", self.budget, low=1)


class BoundedModule:
    """A network whose outputs can be bounded over sets of inputs and of weights.

    Parameters
    ----------
    model : nn.Module
        A network of linear and convolution layers, pooling, normalisation in evaluation mode, activations, sums, products,
        concatenation, softmax and reshaping, with a fixed graph. It is bounded as it computes in evaluation mode, and left
        as it is.
    example : Tensor, shape (n, ...)
        Inputs of the shape to come, to trace it with.

    Raises
    ------
    ModelError
        If the network has no fixed graph.

    Notes
    -----
    A linear function of the output is bounded by going back through the graph: an affine operation transposes the
    coefficients, an activation ``s`` is replaced by a line below it where a coefficient is positive and one above where it is
    negative, a product of two dependent things by McCormick's planes, and an operation with a box rule alone (layer
    normalisation, softmax, GELU) by its box. At the inputs ``min_{|d|_p <= r} a (x + d) = a x - r |a|_q``, q dual to p.
    The lines of a rectifier between l < 0 < u: ``u (x - l) / (u - l)`` above, and below ``x`` if u >= -l, else 0.
    Rounding is not bounded: the proof is one in real arithmetic. Differentiable, with the gradients of the weights.

    References
    ----------
    Xu et al. (2020), arXiv:2002.12920; Zhang et al. (2018), arXiv:1811.00866 (the lines); Zhang et al. (2020),
    arXiv:1906.06316 (boxes inside, lines outside).

    Examples
    --------
    >>> layer = nn.Linear(2, 1)
    >>> with torch.no_grad():
    ...     _ = layer.weight.copy_(torch.tensor([[3.0, -4.0]])), layer.bias.zero_()
    >>> x = torch.zeros(1, 2)
    >>> found = BoundedModule(layer, x).bounds(x, Ball("l2", 0.1))
    >>> round(found.lower.item(), 4), round(found.upper.item(), 4)
    (-0.5, 0.5)
    """

    def __init__(self, model: nn.Module, example: Tensor) -> None:
        if not isinstance(model, nn.Module):
            raise checks.ArgumentTypeError(
                f"model is a {type(model).__name__}; allowed: an nn.Module, whose layers can be bounded. Pass the network."
            )
        checks.tensor("example", example)
        self.model = model
        self._graph = trace(model, example)
        self._shape = tuple(example.shape[1:])
        with evaluating(model), torch.no_grad():
            answer = model(example[:1])
        if answer.ndim != 2 or len(answer) != 1:
            raise checks.ModelError(
                f"the network answers with shape {tuple(answer.shape)} to one input; allowed: one row of numbers an input, "
                "(n, outputs). Return the logits alone."
            )
        self.n_outputs: int = answer.shape[1]

    def bounds(
        self,
        x: Tensor,
        perturbation: InputSet | Synonyms | None = None,
        *,
        method: Method = "crown",
        C: Tensor | None = None,
        weights: Mapping[str, Ball] | None = None,
    ) -> Certificate:
        """Bound the outputs, or linear functions of them, over sets around each row.

        Parameters
        ----------
        x : Tensor, shape (n, ...)
            Inputs; embeddings, (n, length, d), for :class:`Synonyms`.
        perturbation : Ball, Box, BallInBox, Synonyms or None
            What may be added to each row (or put in its place); ``None`` perturbs no input.
        method : {"crown", "crown-ibp", "forward", "ibp"}
            Lines with bounds inside the network by lines too; lines with boxes inside; linear functions carried forward
            (for few inputs); boxes. All but the last are intersected with boxes, since neither dominates everywhere.
        C : Tensor, shape (n, specs, outputs), optional
            Linear functions of the outputs to bound in their place.
        weights : mapping of str to Ball, optional
            Weights of linear layers that are perturbed as well, by name, each over a ball of its own around its value.

        Returns
        -------
        Certificate
            ``lower`` and ``upper``, shape (n, outputs) or (n, specs).

        Raises
        ------
        ModelError
            If the network has an operation without a rule; it is named.
        ArgumentError, ArgumentTypeError
            If an argument is not allowed.
        """
        linear, box = self._relaxed(x, perturbation, method, weights or {})
        if C is not None:
            checks.tensor("C", C, shape=(len(x), None, self.n_outputs))
        with evaluating(self.model):
            found = _output_bounds(linear, box, method, C)
        norm = getattr(getattr(perturbation, "ball", perturbation), "norm", "linf")
        cost = Cost(nfev=2 * len(x), ngrad=linear.rows)
        return Certificate(found.lower, found.upper, norm=norm, cost=cost)

    def _relaxed(
        self, x: Tensor, perturbation: InputSet | Synonyms | None, method: Method, weights: Mapping[str, Ball]
    ) -> tuple[LinearBounds, Interval]:
        """Return the graph with bounds at every node, and the box of the outputs."""
        checks.tensor("x", x, shape=(None, *self._shape))
        checks.one_of("method", method, _METHODS)
        if perturbation is None and not weights:
            raise checks.ArgumentError(
                "neither an input nor a weight is perturbed; allowed: at least one. Pass perturbation= or weights=."
            )
        with evaluating(self.model):
            graph, where = _with_weights(self._graph, weights, x)
            entry = next(n for n in graph.graph.nodes if n.op == "placeholder")
            roots: dict[fx.Node, Root] = {node: _Set.around(w, ball) for node, (w, ball) in where.items()}
            if isinstance(perturbation, Synonyms):
                roots[entry] = _Words(x, perturbation)
            elif perturbation is not None:
                roots[entry] = _Set.around(x, perturbation)
            linear = LinearBounds(graph, roots, tighten=method == "crown")
            box = linear.run(x, enable_io_processing=False)
        if not isinstance(box, Interval):
            raise checks.ModelError(
                "the outputs do not depend on what is perturbed; allowed: an input or weights that they depend on. Name "
                "others."
            )
        return linear, box


def loss_fusion(
    bounded: BoundedModule,
    x: Tensor,
    perturbation: InputSet,
    y: Tensor,
    *,
    method: Method = "crown-ibp",
) -> Tensor:
    """Return an upper bound of the cross-entropy over a set around each row, by one linear function.

    Parameters
    ----------
    bounded : BoundedModule
        A classifier.
    x : Tensor, shape (n, ...)
        Inputs.
    perturbation : Ball, Box or BallInBox
        What may be added to each row.
    y : Tensor of int64, shape (n,)
        Labels.
    method : {"crown-ibp", "crown", "forward", "ibp"}
        As in :meth:`BoundedModule.bounds`.

    Returns
    -------
    Tensor, shape (n,)
        At least the cross-entropy of every input of the set; differentiable.

    Raises
    ------
    ModelError, ArgumentError, ArgumentTypeError
        As :meth:`BoundedModule.bounds`.

    Notes
    -----
    The cross-entropy is ``log g``, ``g = sum_k exp(z_k - z_y)``. On a box of the differences, ``exp`` lies below its chords,
    so that g is below one linear function of the logits, which is bounded in place of the K - 1 differences. It is
    intersected with the sum of the exponentials of the box.

    Cost: two passes and one backward function a row, whatever the number of classes.

    References
    ----------
    Xu et al. (2020), arXiv:2002.12920, section 3.3.

    Examples
    --------
    >>> x, y = torch.tensor([[0.0, 0.0]]), torch.tensor([0])
    >>> bounded = BoundedModule(nn.Identity(), x)
    >>> exact = torch.tensor([[0.1, -0.1]]).logsumexp(1) + 0.1  # at the worst corner
    >>> bool(loss_fusion(bounded, x, Ball("linf", 0.1), y) >= exact - 1e-6)
    True
    """
    checks.tensor("x", x)
    k = bounded.n_outputs
    labels = checks.labels("y", y, n=len(x), n_classes=k).to(x.device)
    eye = torch.eye(k, dtype=x.dtype, device=x.device)
    differences = eye[None] - eye[labels][:, None]
    with evaluating(bounded.model):
        linear, outputs = bounded._relaxed(x, perturbation, method, {})
        box = linear.bounds(linear.end, differences.transpose(0, 1), boxes=True)
    low, high = box.lower, box.upper
    # Far above, where the exponential leaves its range, the loss is bounded by its largest term alone.
    shift = high.detach().amax(1, keepdim=True)
    at_low, at_high = (low - shift).exp(), (high - shift).exp()
    width = high - low
    narrow = width < 1e-6
    slope = torch.where(narrow, 0.0, (at_high - at_low) / torch.where(narrow, 1.0, width))
    by_box = at_high.sum(1)
    if method == "ibp":
        return by_box.log() + shift[:, 0]
    fused = (slope[:, :, None] * differences).sum(1, keepdim=True)
    with evaluating(bounded.model):
        above = _output_bounds(linear, outputs, method, fused).upper[:, 0]
    by_lines = above + (at_high - slope * high).sum(1)
    # The true class alone contributes 1 to g, which keeps rounding out of the logarithm.
    return torch.minimum(by_lines, by_box).clamp_min((-shift[:, 0]).exp()).log() + shift[:, 0]


def _output_bounds(linear: LinearBounds, box: Interval, method: Method, specs: Tensor | None) -> Interval:
    output = linear.end
    if specs is None:
        if method == "ibp":
            return box
        if method == "forward":
            return linear.forward_bounds(output)
        k = box.lower.shape[1]
        eye = torch.eye(k, dtype=box.lower.dtype, device=box.lower.device)
        return _meet(box, linear.bounds(output, eye[:, None].expand(-1, len(box.lower), -1)))
    wanted = specs.transpose(0, 1)
    # A row of C is taken through the last affine operations before boxes are looked at: bounds of a difference.
    by_boxes = linear.bounds(output, wanted, boxes=True)
    if method == "ibp":
        return by_boxes
    if method == "forward":
        linear.forward_bounds(output)
        return _meet(by_boxes, linear.forward_bounds(output, wanted))
    return _meet(by_boxes, linear.bounds(output, wanted))


def _meet(a: Interval, b: Interval) -> Interval:
    return Interval(torch.maximum(a.lower, b.lower), torch.minimum(a.upper, b.upper))


def _with_weights(
    traced: fx.GraphModule, weights: Mapping[str, Ball], example: Tensor
) -> tuple[fx.GraphModule, dict[fx.Node, tuple[Tensor, Ball]]]:
    """Return the graph with the products of perturbed weights written out, and the nodes of the weights."""
    if not weights:
        return traced, {}
    graph = fx.GraphModule(traced, copy.deepcopy(traced.graph))
    ShapeProp(graph).propagate(example)
    where: dict[fx.Node, tuple[Tensor, Ball]] = {}
    for name, ball in weights.items():
        path = name.removesuffix(".weight")
        calls = [n for n in graph.graph.nodes if n.op == "call_module" and n.target == path]
        layer = graph.get_submodule(path) if calls else None
        flat = all(
            n.args[0].meta["tensor_meta"].shape[1:].numel() == n.args[0].meta["tensor_meta"].shape[-1]
            for n in calls
        )
        if (
            not isinstance(layer, nn.Linear)
            or not name.endswith(".weight")
            or not flat
            or not isinstance(ball, Ball)
        ):
            known = [f"{n.target}.weight" for n in graph.graph.nodes if n.op == "call_module" and isinstance(graph.get_submodule(str(n.target)), nn.Linear)]  # fmt: skip
            raise checks.ArgumentError(
                f"weights names {name!r} with a {type(ball).__name__}; allowed: a Ball for a weight of a linear layer on "
                f"flat rows, {', '.join(known) or 'of which there is none'}. Correct the name."
            )
        weight = layer.weight.expand(len(example), -1, -1)
        with graph.graph.inserting_before(calls[0]):
            root = graph.graph.get_attr(name)
            turned = graph.graph.call_function(torch.transpose, (root, 1, 2))
        where[root] = (weight, ball)
        for call in calls:
            with graph.graph.inserting_before(call):
                made = graph.graph.call_function(torch.unsqueeze, (call.args[0], -2))
                made = graph.graph.call_function(torch.matmul, (made, turned))
                made = graph.graph.call_function(torch.squeeze, (made, -2))
                if layer.bias is not None:
                    bias = graph.graph.get_attr(f"{path}.bias")
                    made = graph.graph.call_function(torch.add, (made, bias))
            call.replace_all_uses_with(made)
            graph.graph.erase_node(call)
    return graph, where


class _Set:
    """A ball, a box, or both, around each row."""

    def __init__(self, x: Tensor, box: Interval, ball: Ball | None) -> None:
        self.x, self.box, self._ball = x, box, ball
        self.round = ball is not None and ball.norm != "linf"

    @classmethod
    def around(cls, x: Tensor, perturbation: InputSet) -> _Set:
        if not isinstance(perturbation, Ball | Box | BallInBox):
            raise checks.ArgumentTypeError(
                f"perturbation is a {type(perturbation).__name__}; allowed: a Ball, a Box, a BallInBox or Synonyms. Use "
                "core.around(x, norm, radius)."
            )
        ball = perturbation if isinstance(perturbation, Ball) else getattr(perturbation, "ball", None)
        inside = perturbation if isinstance(perturbation, Box) else getattr(perturbation, "box", None)
        lower, upper = torch.full_like(x, -torch.inf), torch.full_like(x, torch.inf)
        if ball is not None:
            radius = _rows(ball.radius, x)
            lower, upper = x - radius, x + radius
        if inside is not None:
            low, high = (side.reshape(x.shape) for side in inside.bounds(x.detach()))
            lower, upper = torch.maximum(lower, x + low), torch.minimum(upper, x + high)
        if not bool(torch.isfinite(lower).all() and torch.isfinite(upper).all()):
            raise checks.ArgumentError(
                "the perturbation is unbounded; allowed: a bounded set. Add a ball or close the box."
            )
        return cls(x, Interval(lower, upper), ball)

    def lowest(self, coefficients: Tensor) -> Tensor:
        a = coefficients
        corner = (a.clamp(min=0) * self.box.lower + a.clamp(max=0) * self.box.upper).flatten(2).sum(2)
        if self._ball is None or self._ball.norm == "linf":
            return corner
        dual = torch.linalg.vector_norm(a.flatten(2), ord=_DUAL[self._ball.norm], dim=2)
        radius = _rows(self._ball.radius, self.x).reshape(-1)
        # Both hold for an intersection, and neither is always the greater.
        return torch.maximum(corner, (a * self.x).flatten(2).sum(2) - radius * dual)


class _Words:
    """A text with a budget of replaced words."""

    def __init__(self, x: Tensor, words: Synonyms) -> None:
        n, length, _, d = words.candidates.shape
        if tuple(x.shape) != (n, length, d):
            raise checks.ArgumentError(
                f"candidates has shape {tuple(words.candidates.shape)}; allowed: (n, length, m, d) for x of shape "
                f"{tuple(x.shape)}. Give candidates for each position."
            )
        self._x, self._change = x, words.candidates.to(x) - x[:, :, None]
        self._budget = min(words.budget, length)
        self.round = True
        low, high = self._change.amin(2).clamp(max=0), self._change.amax(2).clamp(min=0)
        self.box = Interval(x + low, x + high)

    def lowest(self, coefficients: Tensor) -> Tensor:
        gains = torch.einsum("snld,nlmd->snlm", coefficients, self._change).amin(3).clamp(max=0)
        best = gains.topk(self._budget, dim=2, largest=False).values.sum(2)
        return (coefficients * self._x).flatten(2).sum(2) + best


def _rows(radius: float | Tensor, x: Tensor) -> Tensor:
    """Return one radius a row, to be broadcast over it."""
    return (
        torch.as_tensor(radius, dtype=x.dtype, device=x.device)
        .expand(len(x))
        .reshape(-1, *[1] * (x.ndim - 1))
    )
