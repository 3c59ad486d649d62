"""The Gauss-Newton matrix of a network's loss in a form of which functions can be taken: exact, by layer, or diagonal."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from perturbkit.core import checks
from perturbkit.explain.influence._parts import Data, Network, State

Kind = Literal["exact", "kfac", "diag"]
KINDS = ("exact", "kfac", "diag")

# Beyond this the matrix itself and its eigenvectors are too large and too slow.
MAX_EXACT = 4000

Elementwise = Callable[[Tensor], Tensor]


class Curvature(ABC):
    """A symmetric matrix G with known eigenvalues."""

    @abstractmethod
    def apply(self, function: Elementwise, vectors: Tensor) -> Tensor:
        """Return function(G) times each of the vectors (m, p)."""

    @abstractmethod
    def values(self) -> Tensor:
        """Return the eigenvalues, shape (p,)."""


@dataclass(frozen=True, eq=False)
class _Dense(Curvature):
    eigenvalues: Tensor
    eigenvectors: Tensor

    def apply(self, function: Elementwise, vectors: Tensor) -> Tensor:
        return (vectors @ self.eigenvectors * function(self.eigenvalues)) @ self.eigenvectors.T

    def values(self) -> Tensor:
        return self.eigenvalues


@dataclass(frozen=True, eq=False)
class _Diagonal(Curvature):
    eigenvalues: Tensor

    def apply(self, function: Elementwise, vectors: Tensor) -> Tensor:
        return vectors * function(self.eigenvalues)

    def values(self) -> Tensor:
        return self.eigenvalues


@dataclass(frozen=True, eq=False)
class _Layer:
    """Where a layer's weight and bias stand in the vector, as one matrix (outputs, inputs + 1)."""

    name: str
    places: Tensor  # (outputs, inputs [+ 1]) positions in the weight vector
    bias: bool


@dataclass(frozen=True, eq=False)
class _Kronecker(Curvature):
    layers: list[tuple[_Layer, Tensor, Tensor]]  # with the eigenbases of outputs and inputs
    eigenvalues: Tensor  # (p,), at the places of the layers in their eigenbases, of the rest as they are

    def apply(self, function: Elementwise, vectors: Tensor) -> Tensor:
        scale = function(self.eigenvalues)
        found = vectors * scale
        for layer, left, right in self.layers:
            inner = left.T @ vectors[:, layer.places] @ right * scale[layer.places]
            found[:, layer.places] = left @ inner @ right.T
        return found

    def values(self) -> Tensor:
        return self.eigenvalues


def fitted(
    kind: str,
    network: Network,
    states: list[State],
    data: Data,
    n_samples: int | None,
    generator: torch.Generator,
) -> Curvature:
    """Return the Gauss-Newton matrix of the mean loss over the data, averaged over checkpoints."""
    if kind == "exact":
        _small(network)
        total = torch.zeros((), dtype=torch.float64)
        for p in _vectors(network, states, data, n_samples, generator):
            flat = p.flatten(0, 1).double()
            total = total + flat.T @ flat
        values, vectors = torch.linalg.eigh(total / (len(data[0]) * len(states)))
        like = network.point(states[-1])[0]
        return _Dense(values.clamp(min=0).to(like), vectors.to(like))
    rows = len(data[0]) * len(states)
    bases = _bases(network, states, data, n_samples, generator) if kind == "kfac" else []
    squares = torch.zeros(network.size, dtype=torch.float64)
    known = torch.zeros(network.size, dtype=torch.bool)
    for layer, _, _ in bases:
        known[layer.places] = True
    if bases:
        layers = [layer for layer, _, _ in bases]
        for seen in _pairs(network, layers, states, data, n_samples, generator):
            for (layer, left, right), (g, a) in zip(bases, seen, strict=True):
                # Rotated, the squares are the eigenvalues that suit these bases best (George et al., 2018).
                squares[layer.places] += _squares(g @ left, a @ right).double().cpu()
    if not bool(known.all()):
        total = torch.zeros((), dtype=torch.float64)
        for p in _vectors(network, states, data, n_samples, generator):
            total = total + p.square().sum((0, 1)).double()
        squares = torch.where(known, squares, total.cpu())
    values = (squares / rows).to(network.point(states[-1])[0])
    return _Kronecker(bases, values) if bases else _Diagonal(values)


def _squares(g: Tensor, a: Tensor) -> Tensor:
    """Return the sum over rows of the squared entries of sum_t g_t a_t^T, from (n, t, outputs) and (n, t, inputs)."""
    if g.shape[1] == 1:
        return g[:, 0].square().T @ a[:, 0].square()
    return torch.einsum("nto,nti->noi", g, a).square().sum(0)


def _small(network: Network) -> None:
    if network.size > MAX_EXACT:
        raise checks.ArgumentError(
            f"curvature is 'exact' with {network.size} weights; allowed: at most {MAX_EXACT}. Use curvature='kfac'."
        )


def _vectors(
    network: Network,
    states: list[State],
    data: Data,
    n_samples: int | None,
    generator: torch.Generator,
) -> Iterator[Tensor]:
    """Yield the pseudo-gradients (rows, k, p) of all checkpoints, chunk by chunk."""
    for state in states:
        with torch.no_grad():
            copies = network.outputs(*network.point(state), data[0][:1]).numel()
        for _, part in network.chunks(data, n_samples or copies):
            yield network.pseudo_gradients(state, part, n_samples, generator)


def _bases(
    network: Network,
    states: list[State],
    data: Data,
    n_samples: int | None,
    generator: torch.Generator,
) -> list[tuple[_Layer, Tensor, Tensor]]:
    """Return the layers with the eigenbases of the covariances of their pseudo-gradients and inputs."""
    layers = _layers(network)
    sums = [[torch.zeros(()), torch.zeros(())] for _ in layers]
    for seen in _pairs(network, layers, states, data, n_samples, generator):
        for pair, both in zip(sums, seen, strict=True):
            for i, part in enumerate(both):
                flat = part.flatten(0, 1)
                pair[i] = pair[i] + flat.T @ flat
    return [
        (layer, *(torch.linalg.eigh(m.double())[1].to(m.dtype) for m in pair))
        for layer, pair in zip(layers, sums, strict=True)
        if all(m.ndim == 2 for m in pair)
    ]


def _pairs(
    network: Network,
    layers: list[_Layer],
    states: list[State],
    data: Data,
    n_samples: int | None,
    generator: torch.Generator,
) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Yield pseudo-gradients at the outputs and the inputs of the layers, (rows, positions, ...), a pseudo-gradient at a time."""
    for state in states:
        vector, rest = network.point(state)
        for _, part in network.chunks(data):
            with _watched(network, layers) as seen, torch.enable_grad():
                out = network.outputs(vector.detach().requires_grad_(True), rest, part[0])
                roots = network.roots(out, part[1], n_samples, generator)
                network.count(len(roots), roots.shape[1])
                names = [layer.name for layer in layers]
                ends = [end for name in names for _, end in seen[name]]
                inputs = [
                    [_patches(network.module.get_submodule(layer.name), a, layer.bias) for a, _ in seen[layer.name]]
                    for layer in layers
                ]  # fmt: skip
                for j in range(roots.shape[1]):
                    cotangent = roots[:, j].reshape(out.shape)
                    grads = torch.autograd.grad(
                        out, ends, cotangent, retain_graph=True, allow_unused=True, materialize_grads=True
                    )
                    left, found = list(grads), []
                    for several in inputs:
                        g = torch.cat([_positions(left.pop(0)) for _ in several], 1)
                        found.append((g, torch.cat(several, 1)))
                    yield found


def _layers(network: Network) -> list[_Layer]:
    """Return the linear and convolutional layers with a trainable weight."""
    start, first = 0, {}
    for name, shape in network.shapes.items():
        first[name] = start
        start += shape.numel()
    found = []
    for name, module in network.module.named_modules():
        weight = f"{name}.weight" if name else "weight"
        kinds = isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)
        if not kinds or weight not in first:
            continue
        shape = network.shapes[weight]
        places = first[weight] + torch.arange(shape.numel()).reshape(shape[0], -1)
        bias = weight.removesuffix("weight") + "bias" in first
        if bias:
            column = first[weight.removesuffix("weight") + "bias"] + torch.arange(shape[0])[:, None]
            places = torch.cat((places, column), 1)
        found.append(_Layer(name, places, bias))
    return found


@contextmanager
def _watched(network: Network, layers: list[_Layer]) -> Iterator[dict[str, list[tuple[Tensor, Tensor]]]]:
    """Collect the inputs and outputs of the layers while the module runs."""
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {layer.name: [] for layer in layers}

    def hook(name: str) -> Callable[..., Tensor]:
        def see(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            seen[name].append((inputs[0].detach(), output))
            return output.clone()  # what follows may write into it

        return see

    handles = [
        network.module.get_submodule(layer.name).register_forward_hook(hook(layer.name)) for layer in layers
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _positions(g: Tensor) -> Tensor:
    """Return the gradients at a layer's outputs, (rows, positions, outputs)."""
    return g.flatten(2).transpose(1, 2) if g.ndim == 4 else g.reshape(len(g), -1, g.shape[-1])


def _patches(module: nn.Module, a: Tensor, bias: bool) -> Tensor:
    """Return what a layer multiplies by its weight, (rows, positions, inputs), with a one for the bias."""
    if isinstance(module, nn.Conv2d):
        padding = module.padding
        if isinstance(padding, str) or module.padding_mode != "zeros":
            reach = module._reversed_padding_repeated_twice
            mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
            a, padding = nn.functional.pad(a, reach, mode=mode), (0, 0)
        a = nn.functional.unfold(a, module.kernel_size, module.dilation, padding, module.stride)
        a = a.transpose(1, 2)
    flat = a.reshape(len(a), -1, a.shape[-1])
    return torch.cat((flat, torch.ones_like(flat[:, :, :1])), 2) if bias else flat
