"""The sets that inputs, words and weights range over, and the least value of a linear function on each."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from perturbkit.core import Ball, BallInBox, Box, checks
from perturbkit.robust.certificates._linear_bounds import inner, over_box
from perturbkit.robust.certificates._parts import Interval

__all__ = ["InputSet", "SetRoot", "Synonyms", "WordsRoot", "with_weights"]

InputSet = Ball | Box | BallInBox
_DUAL = {"linf": 1, "l2": 2, "l1": float("inf")}


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


def with_weights(
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
        flat = all(len(n.args[0].meta["tensor_meta"].shape) == 2 for n in calls)
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
        # Elsewhere it would stay as it is, and the bounds be those of another network.
        users = [k for k, p in traced.named_parameters(remove_duplicate=False) if p is layer.weight]
        read = [n for n in traced.graph.nodes if n.op == "get_attr" and n.target == name]
        if len(users) > 1 or read:
            raise checks.ArgumentError(
                f"weights names {name!r}, which is also used {'outside its layer' if read else 'as ' + ', '.join(set(users) - {name})}; "
                "allowed: a weight of one layer alone. Call that layer twice, or leave the weight out."
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


class SetRoot:
    """A ball, a box, or both, around each row."""

    def __init__(self, x: Tensor, box: Interval, ball: Ball | None) -> None:
        self.x, self.box, self._ball = x, box, ball
        self.round = ball is not None and ball.norm != "linf"

    @classmethod
    def around(cls, x: Tensor, perturbation: InputSet) -> SetRoot:
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
        a, corner = coefficients, over_box(coefficients, self.box)
        if self._ball is None or self._ball.norm == "linf":
            return corner
        dual = torch.linalg.vector_norm(a.reshape(*a.shape[:2], -1), ord=_DUAL[self._ball.norm], dim=2)
        radius = _rows(self._ball.radius, self.x).reshape(-1)
        # Both hold for an intersection, and neither is always the greater.
        return torch.maximum(corner, inner(a, self.x) - radius * dual)


class WordsRoot:
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
        return inner(coefficients, self._x) + best


def _rows(radius: float | Tensor, x: Tensor) -> Tensor:
    """Return one radius a row, to be broadcast over it."""
    return (
        torch.as_tensor(radius, dtype=x.dtype, device=x.device)
        .expand(len(x))
        .reshape(-1, *[1] * (x.ndim - 1))
    )
