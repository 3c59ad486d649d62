"""One training loop: any model, any loss, with progress, a time limit, averaged weights and exact resumption.

A loss is a function ``loss(model, *batch, generator=g) -> scalar``; the loop draws the batches, keeps the learning rate's
course and writes checkpoints from which a stopped run goes on bit for bit, as if it had not been stopped.
"""

from __future__ import annotations

import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from perturbkit.core import checks
from perturbkit.core.parameters import keeping_modes
from perturbkit.core.progress import ProgressLike, track
from perturbkit.core.random import Seed, as_generator, randint, seeded_init, seeds
from perturbkit.core.results import Result

__all__ = ["History", "fit"]

Batches = Tensor | Sequence[Tensor] | Callable[[torch.Generator], Tensor | Sequence[Tensor]]
_CHECKED_EVERY = 100
_FORMAT = "perturbkit training 1"


@dataclass(frozen=True)
class History(Result):
    """How a training run went.

    Attributes
    ----------
    losses : Tensor of float64, shape (n_steps,)
        Loss of every batch, of all sessions of a resumed run.
    n_steps : int
        Steps taken.
    seconds : float
        Time taken, over all sessions.
    ended : {"steps", "seconds"}
        Which limit ended it.
    """

    losses: Tensor
    n_steps: int
    seconds: float
    ended: str


def fit(
    model: nn.Module,
    loss: Callable[..., Tensor],
    data: Batches,
    *,
    steps: int | None = None,
    seconds: float | None = None,
    batch_size: int = 128,
    lr: float = 1e-3,
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None = None,
    decay: Literal["cosine", "none"] = "cosine",
    average: float | None = None,
    clip: float | None = None,
    generator: Seed = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_seconds: float = 30.0,
    progress: ProgressLike = None,
) -> History:
    """Train a model in place.

    Parameters
    ----------
    model : nn.Module
        Trained where it is; parameters without ``requires_grad`` stay as they are.
    loss : callable
        ``loss(model, *batch, generator=g) -> Tensor``, one number to make small. Its own draws come from ``g``.
    data : Tensor, sequence of Tensor or callable
        Rows, of which each batch draws ``batch_size`` with replacement, the same rows of every tensor; or
        ``data(generator) -> Tensor or sequence of Tensor``, which makes a batch.
    steps, seconds : int or float, optional
        When to end, whichever comes first; at least one of the two.
    batch_size : int
        Rows of a batch, at least 1.
    lr : float
        Learning rate of Adam, positive. Ignored where an optimizer is given.
    optimizer : callable, optional
        ``optimizer(parameters) -> torch.optim.Optimizer``; Adam by default.
    decay : {"cosine", "none"}
        Course of the learning rate: half a cosine wave down to zero over the run, or none.
    average : float, optional
        In (0, 1): the model ends with an exponential average of its weights, this much of it kept a step (less in the
        first steps, where there is little to keep). ``None``: with the last ones.
    clip : float, optional
        Largest norm of the whole gradient.
    generator : torch.Generator, int or None
        Source of the batches, of the loss's draws, and of a seed for dropout, which PyTorch draws from its global
        generator; that is left as it was. Dropout on an accelerator draws from that device's own generator, which is
        neither seeded nor kept.
    checkpoint : path, optional
        A ``.safetensors`` file, written every ``checkpoint_seconds`` and when the run is interrupted. If it is there
        at the start, the run goes on from it; delete it to begin again. It stays after the last step.
    checkpoint_seconds : float
        Time between checkpoints, positive.
    progress : Progress, bool or None
        See :mod:`perturbkit.core.progress`.

    Returns
    -------
    History

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If an option is not allowed, or the checkpoint is of another run.
    ModelError
        If the loss is not one finite number.
    KeyboardInterrupt
        If the run is interrupted: after the step under way, once the checkpoint is written. A second interruption does
        not wait.

    Notes
    -----
    A run of ``steps`` alone is a function of the model and the generator; one ended by ``seconds`` is not.

    Cost: one evaluation and one gradient of the loss a step. A checkpoint holds the weights, their average and the
    optimizer's state.

    Examples
    --------
    >>> line = nn.Linear(1, 1)
    >>> x = torch.linspace(-1, 1, 64)[:, None]
    >>> def squared(model, x, y, *, generator):
    ...     return (model(x) - y).square().mean()
    >>> history = fit(line, squared, (x, 3 * x), steps=400, lr=0.05, generator=0, progress=False)
    >>> round(float(line.weight), 2)
    3.0
    """
    _check(model, loss, steps, seconds, average, clip)
    checks.integer("batch_size", batch_size, low=1)
    checks.positive("lr", lr)
    checks.one_of("decay", decay, ("cosine", "none"))
    checks.positive("checkpoint_seconds", checkpoint_seconds)
    draw = _drawing(data, batch_size)
    path = None if checkpoint is None else _checked_path(checkpoint)
    g = as_generator(generator)
    weights = [p for p in model.parameters() if p.requires_grad]
    if not weights:
        raise checks.ModelError(
            "the model has no trainable parameters; allowed: at least one with requires_grad. Unfreeze what is to be trained."
        )
    made = _made(optimizer, weights, lr)
    rate = lr if optimizer is None else None
    options = (
        f"{steps} {seconds} {batch_size} {rate} {decay} {clip} {average} {type(made).__name__} {len(weights)}"
    )
    run = _Run(model, made, weights, average, g, options)
    with ExitStack() as stack:
        stack.enter_context(torch.enable_grad())
        stack.enter_context(keeping_modes(model))
        stack.enter_context(seeded_init(seeds(g, 1)[0]))
        interrupted = stack.enter_context(_interruptions_after_the_step())
        if path is not None and path.exists():
            run.load(path)
        model.train()
        ended = run.steps_until(
            steps,
            seconds,
            loss,
            draw,
            decay == "cosine",
            clip,
            path,
            checkpoint_seconds,
            interrupted,
            progress,
        )
    run.use_average()
    return History(torch.stack(run.losses).double().cpu(), run.step, run.elapsed, ended)


class _Run:
    """A model in training with all that a checkpoint must hold."""

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, weights: list[nn.Parameter],
        average: float | None, generator: torch.Generator, options: str,
    ) -> None:  # fmt: skip
        self.model, self.optimizer, self.weights, self.generator = model, optimizer, weights, generator
        self.average, self.options = average, options
        self.averaged = None if average is None else [w.detach().clone() for w in weights]
        self.rates = [group["lr"] for group in optimizer.param_groups]
        self.losses: list[Tensor] = []
        self.step, self.elapsed = 0, 0.0

    def steps_until(
        self, steps: int | None, seconds: float | None, loss: Callable[..., Tensor], draw: Callable[[torch.Generator], Sequence[Tensor]],
        cosine: bool, clip: float | None, path: Path | None, checkpoint_seconds: float, interrupted: list[bool],
        progress: ProgressLike,
    ) -> str:  # fmt: skip
        """Step until a limit is reached, and say which."""
        started, saved = time.monotonic() - self.elapsed, time.monotonic()
        before, ended = self.step, "steps"
        left = None if steps is None else max(steps - self.step, 0)
        for _ in track(_counter(left), "training", total=left, progress=progress):
            if seconds is not None and self.losses and self.elapsed >= seconds:
                ended = "seconds"
                break
            if cosine:
                shares = (self.step / steps if steps else 0.0, self.elapsed / seconds if seconds else 0.0)
                self._set_rate(0.5 + 0.5 * math.cos(math.pi * min(max(shares), 1.0)))
            self._take_step(loss, draw, clip)
            self.elapsed = time.monotonic() - started
            if self.step % _CHECKED_EVERY == 0:
                self._check_losses()
            stopping = bool(interrupted)  # read once: no interruption may come in between the two tests below
            if path is not None and (stopping or time.monotonic() - saved > checkpoint_seconds):
                self.save(path)
                saved = time.monotonic()
            if stopping:
                raise KeyboardInterrupt
        self._check_losses()
        if path is not None and self.step > before:
            self.save(path)
        return ended

    def _take_step(
        self,
        loss: Callable[..., Tensor],
        draw: Callable[[torch.Generator], Sequence[Tensor]],
        clip: float | None,
    ) -> None:
        value = loss(self.model, *draw(self.generator), generator=self.generator)
        if not isinstance(value, Tensor) or value.numel() != 1:
            shown = (
                f"of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
            )
            raise checks.ModelError(f"the loss is {shown}; allowed: a tensor of one number. Return its mean.")
        if not value.requires_grad:
            raise checks.ModelError(
                "the loss does not depend on the trained weights; allowed: one with a gradient. Compute it from the model's "
                "answers, without detach, item or torch.no_grad."
            )
        # Of all of them: clipping also looks at those that the optimizer was not given.
        for weight in self.weights:
            weight.grad = None
        value.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(self.weights, clip)
        self.optimizer.step()
        self.losses.append(value.detach().reshape(()))
        self.step += 1
        if self.averaged is not None:
            assert self.average is not None
            kept = min(self.average, (1 + self.step) / (10 + self.step))
            with torch.no_grad():
                torch._foreach_lerp_(self.averaged, [w.detach() for w in self.weights], 1 - kept)

    def _set_rate(self, factor: float) -> None:
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor

    def _check_losses(self) -> None:
        """Find a loss that is not finite; now and then, since looking waits for an accelerator."""
        first = len(self.losses) - _CHECKED_EVERY
        wrong = ~torch.isfinite(torch.stack(self.losses[max(first, 0) :]))
        if bool(wrong.any()):
            at = max(first, 0) + int(wrong.nonzero()[0]) + 1
            raise checks.ModelError(
                f"the loss is {float(self.losses[at - 1])} at step {at}; allowed: finite numbers. Lower the learning rate, clip "
                "gradients, or check the data."
            )

    def use_average(self) -> None:
        """Give the model its averaged weights."""
        if self.averaged is not None:
            with torch.no_grad():
                for weight, averaged in zip(self.weights, self.averaged, strict=True):
                    weight.copy_(averaged)

    def save(self, path: Path) -> None:
        """Write everything, under another name first, so that a file is whole or absent."""
        from safetensors.torch import save_file

        state = self.optimizer.state_dict()
        tensors = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        tensors |= {f"average.{i}": v for i, v in enumerate(self.averaged or [])}
        tensors |= {"losses": torch.stack(self.losses), "generator": self.generator.get_state()}
        tensors["dropout"] = torch.default_generator.get_state()
        numbers: dict[str, Any] = {}
        for i, values in state["state"].items():
            for k, v in values.items():
                if isinstance(v, Tensor):
                    tensors[f"optimizer.{i}.{k}"] = v
                else:
                    numbers[f"{i}.{k}"] = v
        # Some optimizers count in their groups.
        groups = [
            {k: v for k, v in group.items() if isinstance(v, bool | int | float)}
            for group in state["param_groups"]
        ]
        kept = {
            "step": self.step,
            "elapsed": self.elapsed,
            "options": self.options,
            "numbers": numbers,
            "groups": groups,
        }
        part = path.with_name(path.name + ".part")
        whole = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
        save_file(whole, part, {"format": _FORMAT, "run": json.dumps(kept)})
        part.replace(path)

    def load(self, path: Path) -> None:
        """Go on from a checkpoint, into everything that the run holds."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt") as file:
                about = file.metadata() or {}
                tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise checks.ArgumentError(
                f"checkpoint is {path}, which cannot be read ({error}); allowed: a file that fit wrote. Delete it to begin again."
            ) from error
        kept = json.loads(about["run"]) if about.get("format") == _FORMAT else {}
        shapes = {k: (v.shape, v.dtype) for k, v in self.model.state_dict().items()}
        stored = {
            k.removeprefix("model."): (v.shape, v.dtype) for k, v in tensors.items() if k.startswith("model.")
        }
        n_averages = sum(k.startswith("average.") for k in tensors)
        if shapes != stored or kept.get("options") != self.options or n_averages != len(self.averaged or []):
            raise checks.ArgumentError(
                f"checkpoint is {path}, written by another run (another model, other steps, batches, rate, averaging or optimizer); allowed: "
                "one of this run. Choose another path, or delete it to begin again."
            )
        self.model.load_state_dict({k: tensors[f"model.{k}"] for k in shapes})
        device = self.weights[0].device
        if self.averaged is not None:
            self.averaged = [tensors[f"average.{i}"].to(w.device) for i, w in enumerate(self.weights)]
        state: dict[int, dict[str, Any]] = {}
        for name, value in kept["numbers"].items():
            i, _, k = name.partition(".")
            state.setdefault(int(i), {})[k] = value
        for name in tensors:
            if name.startswith("optimizer."):
                _, i, k = name.split(".", 2)
                state.setdefault(int(i), {})[k] = tensors[name]
        own = self.optimizer.state_dict()["param_groups"]
        groups = [group | counted for group, counted in zip(own, kept["groups"], strict=True)]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        self.generator.set_state(tensors["generator"])
        torch.default_generator.set_state(tensors["dropout"])
        self.losses = list(tensors["losses"].to(device))
        self.step, self.elapsed = kept["step"], kept["elapsed"]


@contextmanager
def _interruptions_after_the_step() -> Iterator[list[bool]]:
    """Collect an interruption instead of raising it, so that no step is torn; the second one is raised at once."""
    pressed: list[bool] = []
    usual = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or usual is not signal.default_int_handler:
        yield pressed
        return

    def collect(number: int, frame: FrameType | None) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(True)

    signal.signal(signal.SIGINT, collect)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, usual)
    if pressed:  # after the last step: nobody has looked since
        raise KeyboardInterrupt


def _counter(n: int | None) -> Iterator[int]:
    i = 0
    while n is None or i < n:
        yield i
        i += 1


def _drawing(data: Batches, batch_size: int) -> Callable[[torch.Generator], Sequence[Tensor]]:
    if not isinstance(data, Tensor) and callable(data):
        return lambda generator: _batch(data(generator))
    rows = (data,) if isinstance(data, Tensor) else tuple(data) if isinstance(data, list | tuple) else ()
    if not rows or not all(isinstance(r, Tensor) and r.ndim and len(r) == len(rows[0]) > 0 for r in rows):
        shown: object = [tuple(r.shape) if isinstance(r, Tensor) else type(r).__name__ for r in rows]
        shown = shown if isinstance(data, Tensor | list | tuple) else f"a {type(data).__name__}"
        raise checks.ArgumentError(
            f"data is {shown}; allowed: tensors with as many rows, at least one, or a function that makes a batch. Pass (x, y)."
        )

    def draw(generator: torch.Generator) -> Sequence[Tensor]:
        chosen = randint(0, len(rows[0]), (batch_size,), generator=generator, device=rows[0].device)
        return [r[chosen.to(r.device)] for r in rows]

    return draw


def _batch(made: Any) -> Sequence[Tensor]:
    """Return what a function made as a batch; one tensor is a batch of one."""
    if isinstance(made, Tensor):
        return (made,)
    if not isinstance(made, list | tuple):
        raise checks.ArgumentTypeError(
            f"data answered a {type(made).__name__}; allowed: a tensor or a tuple of tensors. Return (x, y)."
        )
    return made


def _made(
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None,
    weights: list[nn.Parameter],
    lr: float,
) -> torch.optim.Optimizer:
    if optimizer is None:
        return torch.optim.Adam(weights, lr=lr)
    made = optimizer(weights) if callable(optimizer) else optimizer
    if not callable(optimizer) or not isinstance(made, torch.optim.Optimizer):
        raise checks.ArgumentTypeError(
            f"optimizer {'answered' if callable(optimizer) else 'is'} {type(made).__name__}; allowed: a function of the "
            "weights that answers a torch.optim.Optimizer. Pass lambda weights: torch.optim.SGD(weights, lr=0.1)."
        )
    return made


def _check(
    model: Any, loss: Any, steps: int | None, seconds: float | None, average: float | None, clip: float | None
) -> None:
    if not isinstance(model, nn.Module):
        raise checks.ArgumentTypeError(
            f"model is a {type(model).__name__}; allowed: an nn.Module. Wrap it in one."
        )
    if not callable(loss):
        raise checks.ArgumentTypeError(
            f"loss is a {type(loss).__name__}; allowed: a function loss(model, *batch, generator=g). Pass one."
        )
    if steps is None and seconds is None:
        raise checks.ArgumentError(
            "steps and seconds are None; allowed: at least one limit. Pass steps=1000."
        )
    if steps is not None:
        checks.integer("steps", steps, low=1)
    if seconds is not None:
        checks.positive("seconds", seconds)
    if average is not None:
        checks.between("average", average, 0, 1, inclusive="neither")
    if clip is not None:
        checks.positive("clip", clip)


def _checked_path(path: str | os.PathLike[str]) -> Path:
    found = Path(path)
    if found.suffix != ".safetensors" or not found.parent.is_dir():
        raise checks.ArgumentError(
            f"checkpoint is {found}; allowed: a .safetensors file in a folder that exists. Make the folder or change the name."
        )
    return found
