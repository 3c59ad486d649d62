"""Linear relaxation: outputs bounded by linear functions of the input, of the weights, or of the words of a text.

Use it to prove what no small change can do, for networks trained without thought of proofs, at a cost between boxes and
exact verification; and, differentiable as it is, to train for it. Xu, Shi, Zhang, Wang, Chang, Huang, Kailkhura, Lin and
Hsieh (2020), Automatic Perturbation Analysis for Scalable Certified Robustness and Beyond, arXiv:2002.12920.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from perturbkit.core import Ball, Certificate, Cost, checks
from perturbkit.robust.certificates._linear_bounds import LinearBounds, Root
from perturbkit.robust.certificates._parts import Interval, evaluating, trace
from perturbkit.robust.certificates._roots import InputSet, SetRoot, Synonyms, WordsRoot, with_weights

__all__ = ["BoundedModule", "Synonyms", "loss_fusion"]

Method = Literal["ibp", "crown-ibp", "crown", "forward"]
_METHODS = ("ibp", "crown-ibp", "crown", "forward")


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
        # Of other sizes than the example's, so that an axis of the same length is not taken for that of the inputs.
        shapes = [_shapes(self._graph, model, torch.cat([example[:1]] * n)) for n in (2, 3)]
        answer = shapes[0]["output"]
        if len(answer) != 2 or answer[0] != 2:
            raise checks.ModelError(
                f"the network answers with shape {answer} to two inputs; allowed: one row of numbers an input, "
                "(n, outputs). Return the logits alone."
            )
        self.n_outputs: int = answer[1]
        self._mixed = frozenset(
            k for k in shapes[0] if any(s[k][:1] != (n,) for n, s in zip((2, 3), shapes, strict=True))
        )

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
            If the network has an operation without a rule, or one that takes the inputs off the first axis or mixes them;
            it is named.
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
            graph, where = with_weights(self._graph, weights, x)
            entry = next(n for n in graph.graph.nodes if n.op == "placeholder")
            roots: dict[fx.Node, Root] = {node: SetRoot.around(w, ball) for node, (w, ball) in where.items()}
            if isinstance(perturbation, Synonyms):
                roots[entry] = WordsRoot(x, perturbation)
            elif perturbation is not None:
                roots[entry] = SetRoot.around(x, perturbation)
            linear = LinearBounds(graph, roots, tighten=method == "crown", mixed=self._mixed)
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


def _shapes(graph: fx.GraphModule, model: nn.Module, x: Tensor) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of the graph at an input."""
    found: dict[str, tuple[int, ...]] = {}

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            out = super().run_node(n)
            if isinstance(out, Tensor):
                found[n.name] = tuple(out.shape)
            return out

    recorder = Recorder(graph)
    recorder.extra_traceback = False
    try:
        with evaluating(model), torch.no_grad():
            recorder.run(x.clone())
    except Exception as error:
        raise checks.ModelError(
            f"the forward of {type(model).__name__} fails on {len(x)} inputs ({str(error).strip().splitlines()[:1]}); "
            "allowed: a forward for any number of inputs. Take the number from the input."
        ) from error
    return found


def _output_bounds(linear: LinearBounds, box: Interval, method: Method, specs: Tensor | None) -> Interval:
    output = linear.end
    if specs is None:
        if method == "ibp":
            return box
        if method == "forward":
            return linear.forward_bounds(output)
        k = box.lower.shape[1]
        eye = torch.eye(k, dtype=box.lower.dtype, device=box.lower.device)
        return box.meet(linear.bounds(output, eye[:, None].expand(-1, len(box.lower), -1)))
    wanted = specs.transpose(0, 1)
    # A row of C is taken through the last affine operations before boxes are looked at: bounds of a difference.
    by_boxes = linear.bounds(output, wanted, boxes=True)
    if method == "ibp":
        return by_boxes
    if method == "forward":
        return by_boxes.meet(linear.forward_bounds(output, wanted))
    return by_boxes.meet(linear.bounds(output, wanted))
