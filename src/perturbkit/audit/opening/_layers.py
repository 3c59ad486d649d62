"""Layers out of a list of operations: a program of torch.export as a graph whose parts have rules for bounds."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from perturbkit.core import unwrap_output

__all__ = ["NoLayerError", "layers_of"]

_aten = torch.ops.aten
_SAME = 1e-4


class NoLayerError(Exception):
    """An operation is none that a layer does."""


def layers_of(program: Any) -> fx.GraphModule:
    """Return an exported program of one input as a graph of layers and of operations on tensors.

    The result shares the program's weights, takes any number of rows, and answers the same.

    Raises
    ------
    NoLayerError
        If an operation has no counterpart or puts several rows together, or the answers differ on the input that the
        program was exported with or on others.
    """
    signature = program.graph_signature
    held = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    constants = getattr(signature, "inputs_to_lifted_tensor_constants", {})
    weights: dict[str, Tensor] = {
        name: program.state_dict[key] for name, key in held.items() if key in program.state_dict
    }
    weights |= {
        name: program.constants[key]
        for name, key in {**held, **constants}.items()
        if key in program.constants
    }
    if len(signature.user_inputs) != 1 or len(signature.user_outputs) != 1:
        raise NoLayerError("it has several inputs or outputs")
    build = _Build(program.graph, signature.user_inputs[0], weights)
    graph = build.run()
    args, options = program.example_inputs or ((), {})
    given = [a for a in (*args, *options.values()) if isinstance(a, Tensor)]
    if len(given) != 1:
        raise NoLayerError("it holds no input to compare its layers on")
    call = program.module()
    for x in _compared(given[0]):
        with torch.no_grad():
            # Of copies, since a program may write into its input.
            expected = unwrap_output(call(*[x.clone()] * len(args), **dict.fromkeys(options, x.clone())))
            found = graph(x.clone())
        size = float(expected.nan_to_num(0.0, 0.0, 0.0).abs().max())
        if expected.shape != found.shape or not torch.allclose(
            expected, found, rtol=_SAME, atol=_SAME * size, equal_nan=True
        ):
            raise NoLayerError("its layers answer otherwise than it does")
    return graph


def _compared(example: Tensor) -> list[Tensor]:
    """Return the inputs of the export, and others: an export is often made with zeros, of which much may be made alike."""
    if not example.is_floating_point():
        return [example]
    drawn = [torch.randn(example.shape, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    return [example, *(d.to(example) for d in drawn)]


class _Build:
    """Copies a graph node by node, with a layer in the place of each operation that has weights."""

    def __init__(self, graph: fx.Graph, given: str, weights: dict[str, Tensor]) -> None:
        self.source, self.given, self.weights = graph, given, weights
        self.graph, self.root = fx.Graph(), nn.Module()
        self.made: dict[fx.Node, Any] = {}
        self.of_input: set[fx.Node] = set()
        self.rows = self.writes = ""

    def run(self) -> fx.GraphModule:
        for node in self.source.nodes:
            if node.op == "placeholder":
                if node.name == self.given:
                    self.made[node] = self.graph.placeholder("x")
                    self.of_input.add(node)
                    self.rows = _rows(node)
            elif node.op == "output":
                (answer,) = node.args[0]
                if answer not in self.of_input:
                    raise NoLayerError("its answer is not made of its input")
                self.graph.output(self.made[answer])
            elif node.op == "call_function":
                self.writes = self.writes or _writes(node)
                if node.users and isinstance(node.meta.get("val"), Tensor):
                    self.copy(node)
        # What is refused by name says more: in training mode a normalisation writes too.
        if self.writes:
            raise NoLayerError(self.writes)
        self.graph.lint()
        return fx.GraphModule(self.root, self.graph).eval()

    def copy(self, node: fx.Node) -> None:
        rule = _RULES.get(node.target)
        if rule is None:
            raise NoLayerError(
                f"the operation {str(node.target).removesuffix('.default')} is not that of a layer"
            )
        self.made[node] = rule(self, node)
        if any(given in self.of_input for given in node.all_input_nodes):
            self.of_input.add(node)
            if _rows(node) != self.rows:
                raise NoLayerError(f"{node.name} puts numbers of several rows together")

    def tensor(self, node: Any) -> Tensor | None:
        """Return the weight that a node stands for, if it does."""
        return self.weights.get(node.name) if isinstance(node, fx.Node) else None

    def value(self, argument: Any) -> Any:
        """Return what stands for an argument in the new graph; a weight becomes a buffer."""
        if isinstance(argument, list | tuple):
            return [self.value(a) for a in argument]
        if not isinstance(argument, fx.Node):
            return argument
        if argument not in self.made:
            weight = self.tensor(argument)
            if weight is None:
                raise NoLayerError(f"{argument.name} is neither a weight nor made of the input")
            self.root.register_buffer(argument.name, weight.detach())
            self.made[argument] = self.graph.get_attr(argument.name)
        return self.made[argument]

    def layer(self, node: fx.Node, module: nn.Module, x: Any) -> fx.Node:
        name = f"{node.name}_layer"
        self.root.add_module(name, module.eval())
        return self.graph.call_module(name, (self.value(x),))

    def call(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> fx.Node:
        return self.graph.call_function(function, tuple(self.value(arguments)), options)


def _is_view(node: fx.Node) -> bool:
    """Whether an operation answers with the memory of what it is given."""
    return _RULES.get(node.target) in (_reshape, _same, _dropout)


def _writes(node: fx.Node) -> str:
    """Say that an operation writes where others look: into the input, a weight, or what is viewed elsewhere too."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or not schema.is_mutable:
        return ""
    target: Any = node.args[0]
    # Later users of what was written into are handed the result; those of a view of it are not.
    shared = not node.users or any(_is_view(u) for u in target.users if u is not node)
    while _is_view(target):
        target = target.args[0]
        shared = shared or len(target.users) > 1
    return f"{node.name} writes into what it is given" if shared or target.op == "placeholder" else ""


def _rows(node: fx.Node) -> str:
    """Return the length of the first axis, a number or the name of one that is left open."""
    shape = node.meta["val"].shape
    return str(shape[0]) if len(shape) else ""


def _argument(node: fx.Node, place: int, default: Any = None) -> Any:
    return node.args[place] if len(node.args) > place else default


def _weighted(build: _Build, node: fx.Node, places: tuple[int, int]) -> tuple[Tensor, Tensor | None]:
    weight, bias = (build.tensor(_argument(node, place)) for place in places)
    if weight is None or (bias is None and _argument(node, places[1]) is not None):
        raise NoLayerError(f"the weights of {node.name} are computed")
    return weight, bias


def _filled(module: Any, weight: Tensor | None, bias: Tensor | None) -> nn.Module:
    """Put weights into a module that was made without any."""
    module.weight = (
        None if weight is None else nn.Parameter(weight.detach(), requires_grad=weight.is_floating_point())
    )
    module.bias = None if bias is None else nn.Parameter(bias.detach())
    return module


def _linear(build: _Build, node: fx.Node) -> fx.Node:
    weight, bias = _weighted(build, node, (1, 2))
    with torch.device("meta"):
        module = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    return build.layer(node, _filled(module, weight, bias), node.args[0])


def _convolution(kind: type[nn.Module]) -> Callable[[_Build, fx.Node], fx.Node]:
    def made(build: _Build, node: fx.Node) -> fx.Node:
        weight, bias = _weighted(build, node, (1, 2))
        if node.args[0].meta["val"].ndim != weight.ndim:  # type: ignore[union-attr]
            raise NoLayerError(f"{node.name} takes its input for one row")
        stride, padding, dilation = (_argument(node, i, d) for i, d in ((3, 1), (4, 0), (5, 1)))
        groups = _argument(node, 6, 1)
        with torch.device("meta"):
            module = kind(
                weight.shape[1] * groups, weight.shape[0], tuple(weight.shape[2:]), stride, padding, dilation, groups,
                bias is not None,
            )  # fmt: skip
        return build.layer(node, _filled(module, weight, bias), node.args[0])

    return made


def _batch_norm(build: _Build, node: fx.Node) -> fx.Node:
    weight, bias, mean, variance = (build.tensor(_argument(node, place)) for place in (1, 2, 3, 4))
    if _argument(node, 5) or mean is None or variance is None:
        raise NoLayerError(
            "a batch normalisation uses the statistics of the batch; export the model in evaluation mode"
        )
    ndim = len(node.meta["val"].shape)
    kind = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d}.get(ndim)
    if kind is None:
        raise NoLayerError(f"a batch normalisation of {ndim} axes has no rule")
    with torch.device("meta"):
        module = kind(len(mean), eps=_argument(node, 7, 1e-5), affine=weight is not None)
    _filled(module, weight, bias)
    module.running_mean, module.running_var, module.num_batches_tracked = (
        mean.detach(),
        variance.detach(),
        None,
    )
    return build.layer(node, module, node.args[0])


def _pool(kind: Any, options: tuple[str, ...]) -> Callable[[_Build, fx.Node], fx.Node]:
    def made(build: _Build, node: fx.Node) -> fx.Node:
        given = {name: a for name, a in zip(options, node.args[1:], strict=False) if a not in ([], None)}
        return build.layer(node, kind(**given), node.args[0])

    return made


def _same(build: _Build, node: fx.Node) -> Any:
    return build.value(node.args[0])


def _dropout(build: _Build, node: fx.Node) -> Any:
    if node.args[2]:
        raise NoLayerError("a dropout is active; export the model in evaluation mode")
    return build.value(node.args[0])


def _function(function: Callable[..., Any], n: int) -> Callable[[_Build, fx.Node], fx.Node]:
    """Return a rule that hands over the first ``n`` arguments; further ones must be left out."""

    def made(build: _Build, node: fx.Node) -> fx.Node:
        if len(node.args) > n or (set(node.kwargs) - {"dtype"}) or node.kwargs.get("dtype") is not None:
            raise NoLayerError(f"{node.name} has options without a rule")
        if any(given in build.of_input for given in node.all_input_nodes):
            _keeps_rows_apart(build, node)
        return build.call(function, *node.args[:n])

    return made


def _keeps_rows_apart(build: _Build, node: fx.Node) -> None:
    """Refuse what runs over the first axis, also where a program for one row hides it."""
    ndim = node.args[0].meta["val"].ndim if isinstance(node.args[0], fx.Node) else node.meta["val"].ndim
    if node.target in (_aten.mean.dim, _aten.softmax.int, _aten.cat.default):
        axes = _argument(node, 1, 0 if node.target is _aten.cat.default else None)
        axes = [axes] if isinstance(axes, int) else list(axes or range(ndim))
        apart = all(axis % ndim for axis in axes)
        if node.target is _aten.cat.default:
            apart = apart and all(given in build.of_input for given in node.all_input_nodes)
    else:
        ndim = node.meta["val"].ndim
        apart = all(
            given.meta["val"].ndim == ndim
            if given in build.of_input
            else given.meta["val"].ndim < ndim or given.meta["val"].shape[0] == 1
            for given in node.all_input_nodes
            if isinstance(given.meta["val"], Tensor)
        )
    if not apart:
        raise NoLayerError(f"{node.name} puts numbers of several rows together")


def _sloped(kind: Callable[..., nn.Module]) -> Callable[[_Build, fx.Node], fx.Node]:
    def made(build: _Build, node: fx.Node) -> fx.Node:
        return build.layer(node, kind(*node.args[1:]), node.args[0])

    return made


def _reshape(build: _Build, node: fx.Node) -> fx.Node:
    """Keep the rows and their order: only what one row holds takes another shape."""
    before, after = node.args[0].meta["val"].shape, node.meta["val"].shape  # type: ignore[union-attr]
    rows, inner = before[0], [int(s) for s in after[1:]]
    if str(after[0]) != str(rows) or math.prod(inner) != math.prod(int(s) for s in before[1:]):
        raise NoLayerError(f"{node.name} puts numbers of several rows together")
    if len(inner) == 1:
        return build.call(torch.flatten, node.args[0], 1)
    return build.graph.call_method("reshape", (build.value(node.args[0]), -1, *inner))


_RULES: dict[Any, Callable[[_Build, fx.Node], Any]] = {
    _aten.linear.default: _linear,
    _aten.conv1d.default: _convolution(nn.Conv1d), _aten.conv2d.default: _convolution(nn.Conv2d),
    _aten.conv1d.padding: _convolution(nn.Conv1d), _aten.conv2d.padding: _convolution(nn.Conv2d),
    _aten.batch_norm.default: _batch_norm,
    _aten.dropout.default: _dropout, _aten.contiguous.default: _same, _aten.clone.default: _same, _aten.alias.default: _same,
    _aten.max_pool2d.default: _pool(nn.MaxPool2d, ("kernel_size", "stride", "padding", "dilation", "ceil_mode")),
    _aten.avg_pool2d.default: _pool(
        nn.AvgPool2d, ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")
    ),
    _aten.adaptive_avg_pool2d.default: _pool(nn.AdaptiveAvgPool2d, ("output_size",)),
    _aten.relu.default: _sloped(nn.ReLU), _aten.relu_.default: _sloped(nn.ReLU), _aten.tanh.default: _sloped(nn.Tanh),
    _aten.sigmoid.default: _sloped(nn.Sigmoid), _aten.leaky_relu.default: _sloped(nn.LeakyReLU),
    _aten.leaky_relu_.default: _sloped(nn.LeakyReLU), _aten.softplus.default: _sloped(nn.Softplus),
    _aten.flatten.using_ints: _reshape, _aten.view.default: _reshape, _aten.reshape.default: _reshape,
    _aten.unflatten.int: _reshape, _aten.squeeze.dim: _reshape, _aten.unsqueeze.default: _reshape,
    _aten.add.Tensor: _function(torch.add, 2), _aten.add_.Tensor: _function(torch.add, 2),
    _aten.sub.Tensor: _function(torch.sub, 2), _aten.mul.Tensor: _function(torch.mul, 2),
    _aten.div.Tensor: _function(torch.div, 2), _aten.neg.default: _function(torch.neg, 1),
    _aten.mean.dim: _function(torch.mean, 3), _aten.cat.default: _function(torch.cat, 2),
    _aten.softmax.int: _function(torch.softmax, 2), _aten.exp.default: _function(torch.exp, 1),
}  # fmt: skip
