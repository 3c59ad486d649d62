"""What optimizers that perturb share: the same batch evaluated again, weights moved and put back, an optimizer inside.

A method that needs the loss or gradient at displaced weights evaluates the user's closure several times a step. Every
evaluation must see the same batch, the same dropout masks and the same running statistics, or the difference measures
those instead of the displacement: :class:`Replay` takes care of it. :func:`displaced` moves weights and puts them back
bit for bit, :class:`BaseOptimizer` can be copied and resumed without loss, and :class:`WrappingOptimizer` hands the changed
gradient to any PyTorch optimizer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from perturbkit.core import checks

__all__ = [
    "BaseOptimizer",
    "Closure",
    "Replay",
    "WrappingOptimizer",
    "dense_gradients",
    "displaced",
    "evaluated",
    "global_norm",
    "loss_value",
]

Closure = Callable[[], Any]

_ATTACHED = frozenset({"step", "_opt_called"})
"""What learning-rate schedulers set on an optimizer."""


class Replay:
    """A closure that can be evaluated again under the same random numbers, leaving the running statistics alone.

    Parameters
    ----------
    closure : callable
        ``closure() -> loss``, the loss of one batch; it clears gradients and calls ``backward`` itself where the method
        needs gradients, as closures of PyTorch optimizers do.
    weights : iterable of Tensor
        The parameters; their devices' generators are replayed.
    model : nn.Module, optional
        Where given, its buffers (running means of batch normalisation) are updated by the first evaluation only.
    gradients : bool
        Whether the evaluations record a graph.

    Raises
    ------
    ArgumentTypeError
        If the closure cannot be called.

    Notes
    -----
    After any number of evaluations the global generators and buffers are as after one.

    Examples
    --------
    >>> import torch
    >>> drop = nn.Dropout()
    >>> again = Replay(lambda: drop(torch.ones(8)).sum())
    >>> bool(again() == again())
    True
    """

    def __init__(
        self,
        closure: Closure | None,
        weights: Iterable[Tensor] = (),
        model: nn.Module | None = None,
        *,
        gradients: bool = True,
    ) -> None:
        if not callable(closure):
            raise checks.ArgumentTypeError(
                f"closure is {closure!r}; allowed: a function without arguments that evaluates the loss of one batch. "
                "Pass step(closure), as for torch.optim.LBFGS."
            )
        self._closure, self._model, self._gradients = closure, model, gradients
        self._devices = sorted({p.device.index for p in weights if p.device.type == "cuda"})
        self._states: tuple[Tensor, list[Tensor]] | None = None

    def __call__(self) -> Any:
        """Evaluate the closure and return what it returns."""
        if self._states is None:
            self._states = torch.get_rng_state(), [torch.cuda.get_rng_state(d) for d in self._devices]
            with torch.set_grad_enabled(self._gradients):
                return self._closure()
        buffers = {} if self._model is None else {k: b.clone() for k, b in self._model.named_buffers()}
        with torch.random.fork_rng(self._devices):
            torch.set_rng_state(self._states[0])
            for device, state in zip(self._devices, self._states[1], strict=True):
                torch.cuda.set_rng_state(state, device)
            try:
                with torch.set_grad_enabled(self._gradients):
                    return self._closure()
            finally:
                with torch.no_grad():
                    for k, b in [] if self._model is None else self._model.named_buffers():
                        if k in buffers:
                            b.copy_(buffers[k])


def loss_value(loss: Any) -> float:
    """Return a closure's loss as a number, or say why it cannot be used.

    Raises
    ------
    ModelError
        If it is not one number.

    Examples
    --------
    >>> loss_value(torch.tensor(2.0))
    2.0
    """
    size = loss.numel() if isinstance(loss, Tensor) else 1 if isinstance(loss, (int, float)) else 0
    if size != 1:
        shown = f"of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
        raise checks.ModelError(
            f"the closure's loss is {shown}; allowed: one number. Return the mean of the batch's losses."
        )
    return float(loss.detach() if isinstance(loss, Tensor) else loss)


@contextmanager
def displaced(weights: Sequence[Tensor], shifts: Sequence[Tensor], scale: float = 1.0) -> Iterator[None]:
    """Add ``scale * shifts`` to weights inside a ``with``, and put back copies of the weights after it.

    Parameters
    ----------
    weights : sequence of Tensor
        Parameters, changed in place.
    shifts : sequence of Tensor
        One a parameter, of its shape; sparse ones are allowed.
    scale : float
        Their factor.

    Notes
    -----
    The copies cost a second set of weights; subtracting the shifts instead would leave rounding errors that add up.

    Examples
    --------
    >>> w = torch.tensor([1.0])
    >>> with displaced([w], [torch.tensor([1e-9])], 1e9):
    ...     print(float(w))
    2.0
    >>> float(w)
    1.0
    """
    copies = [w.detach().clone() for w in weights]
    try:
        with torch.no_grad():
            for w, shift in zip(weights, shifts, strict=True):
                w.add_(shift, alpha=scale)
        yield
    finally:
        with torch.no_grad():
            for w, copy in zip(weights, copies, strict=True):
                w.copy_(copy)


def evaluated(closure: Closure | None) -> Any:
    """Return the loss of an optional closure, evaluated with gradients; None without one.

    Raises
    ------
    ArgumentTypeError
        If it is neither None nor callable.

    Examples
    --------
    >>> evaluated(lambda: 2.0), evaluated(None)
    (2.0, None)
    """
    if closure is None:
        return None
    if not callable(closure):
        raise checks.ArgumentTypeError(
            f"closure is {closure!r}; allowed: a function without arguments that evaluates loss and gradients, or None. "
            "Pass step(closure), or call backward and step()."
        )
    with torch.enable_grad():
        return closure()


def dense_gradients(weights: Sequence[Tensor]) -> list[Tensor]:
    """Return copies of weights' gradients, sparse ones made dense; zeros where there is none.

    Examples
    --------
    >>> dense_gradients([torch.ones(2, requires_grad=True)])
    [tensor([0., 0.])]
    """
    grads = [torch.zeros_like(w) if w.grad is None else w.grad.detach() for w in weights]
    return [g.to_dense() if g.layout != torch.strided else g.clone() for g in grads]


def global_norm(tensors: Sequence[Tensor]) -> Tensor:
    """Return the Euclidean norm of all tensors as one vector, in single precision at least, on the first one's device.

    Examples
    --------
    >>> global_norm([torch.tensor([3.0]), torch.tensor([[4.0]])])
    tensor(5.)
    """
    parts = [torch.linalg.vector_norm(t, dtype=torch.promote_types(t.dtype, torch.float32)) for t in tensors]
    return torch.linalg.vector_norm(torch.stack([p.to(tensors[0].device) for p in parts]))


class BaseOptimizer(torch.optim.Optimizer):
    """An optimizer that can be copied, pickled and resumed without loss.

    Parameters
    ----------
    params : iterable of Tensor, or of dict
        Parameters or parameter groups, as for any PyTorch optimizer.
    defaults : mapping
        Options and their defaults.

    Notes
    -----
    PyTorch's own class leaves all attributes but groups and state out of copies, and rounds a loaded state to the precision
    of the weights.

    Examples
    --------
    >>> import copy
    >>> class Plain(BaseOptimizer):
    ...     colour = "none"
    >>> one = Plain([torch.ones(1)], {"lr": 0.1})
    >>> one.colour = "red"
    >>> copy.deepcopy(one).colour
    'red'
    """

    def __init__(self, params: Any, defaults: Mapping[str, Any]) -> None:
        super().__init__(params, dict(defaults))

    @property
    def weights(self) -> list[Tensor]:
        """The parameters that are trained, in order."""
        return [p for group in self.param_groups for p in group["params"] if p.requires_grad]

    def per_weight(self, option: str) -> list[float]:
        """Return a group option, once for each of :attr:`weights`."""
        return [
            float(group[option]) for group in self.param_groups for p in group["params"] if p.requires_grad
        ]

    def trained(self) -> list[tuple[dict[str, Any], Tensor]]:
        """Return each parameter that has a gradient, with its group."""
        return [(group, p) for group in self.param_groups for p in group["params"] if p.grad is not None]

    def advance(self, counter: str = "step") -> int:
        """Return a counter of the state, from 0, and count on."""
        now = int(self.state.get(counter, 0))  # type: ignore[call-overload]
        self.state[counter] = now + 1  # type: ignore[index]
        return now

    def check_group(self, group: Mapping[str, Any]) -> None:
        """Check a group's own options; every group passes here when it is added."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, with its own options if it has some."""
        self.check_group({**self.defaults, **param_group})
        super().add_param_group(param_group)

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy has: groups, state and own attributes, without hooks and what schedulers attach."""
        own = {
            name: value
            for name, value in vars(self).items()
            if name not in _ATTACHED and not name.startswith(("_optimizer_", "_zero_grad", "_warned"))
        }
        return {**own, **super().__getstate__()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load groups and state; numbers that are kept in a higher precision than the weights stay so."""
        super().load_state_dict(state_dict)
        saved = state_dict["state"]
        numbers = [i for group in state_dict["param_groups"] for i in group["params"]]
        weights = [p for group in self.param_groups for p in group["params"]]
        for number, p in zip(numbers, weights, strict=True):
            for name, value in saved.get(number, {}).items():
                if isinstance(value, Tensor) and value.is_floating_point():
                    loaded = self.state[p][name]
                    dtype = self.state_dtype(name, value.dtype, p)
                    self.state[p][name] = value.to(device=loaded.device, dtype=dtype, copy=True)

    def state_dtype(self, name: str, saved: torch.dtype, p: Tensor) -> torch.dtype:
        """Return the precision of a part of the state that was saved in another: single at least."""
        return saved if saved == p.dtype else torch.promote_types(p.dtype, torch.float32)


class WrappingOptimizer(BaseOptimizer):
    """The part that optimizers share which hand a changed gradient to another optimizer.

    Parameters
    ----------
    params : iterable of Tensor, or of dict
        Parameters or parameter groups, as for any PyTorch optimizer; a group may set its own options.
    base_optimizer : callable
        Class of the optimizer inside, called with the groups and ``base_options``.
    defaults : mapping
        This optimizer's own options and their defaults.
    base_options : mapping
        Options of the optimizer inside, such as ``lr``.
    model : nn.Module, optional
        See :class:`Replay`.

    Notes
    -----
    Both optimizers share the groups and the state, so that learning-rate schedulers, ``state_dict`` and
    ``load_state_dict`` work on this one.
    """

    base_optimizer: torch.optim.Optimizer

    def __init__(
        self,
        params: Any,
        base_optimizer: Callable[..., torch.optim.Optimizer],
        defaults: Mapping[str, Any],
        base_options: Mapping[str, Any],
        model: nn.Module | None = None,
    ) -> None:
        if not callable(base_optimizer):
            raise checks.ArgumentTypeError(
                f"base_optimizer is a {type(base_optimizer).__name__}; allowed: a class of optimizers. "
                "Pass torch.optim.SGD, and its options by name."
            )
        if model is not None and not isinstance(model, nn.Module):
            raise checks.ArgumentTypeError(
                f"model is a {type(model).__name__}; allowed: an nn.Module or None. Pass the model whose buffers are to be kept."
            )
        self._model = model
        super().__init__(params, defaults)
        base = base_optimizer(self.param_groups, **base_options)
        self._share(base)
        self.defaults = {**base.defaults, **self.defaults}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters to both optimizers."""
        base = self.__dict__.get("base_optimizer")
        if base is None:
            super().add_param_group(param_group)
            return
        self.check_group({**self.defaults, **param_group})
        for name, value in self.defaults.items():
            param_group.setdefault(name, value)
        base.add_param_group(param_group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of both optimizers."""
        super().load_state_dict(state_dict)
        self.base_optimizer.__setstate__({"state": self.state, "param_groups": self.param_groups})

    def state_dtype(self, name: str, saved: torch.dtype, p: Tensor) -> torch.dtype:
        """Return the precision that the optimizer inside keeps a part of its state in."""
        if isinstance(self.base_optimizer, BaseOptimizer):
            return self.base_optimizer.state_dtype(name, saved, p)
        return self.state[p][name].dtype

    def replay(self, closure: Closure | None) -> Replay:
        """Return the closure as one that can be evaluated again on the same batch."""
        return Replay(closure, (p for group in self.param_groups for p in group["params"]), self._model)

    def _share(self, base: torch.optim.Optimizer) -> None:
        self.base_optimizer = base
        self.state = base.state
        self.param_groups = base.param_groups
