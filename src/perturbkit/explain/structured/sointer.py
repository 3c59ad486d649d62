"""SOInter: the features on which a structured model decides one output, with the other outputs taken into account.

Use it where a model answers many related outputs at once, so that a feature may act on the output through another one, and many
rows are to be explained: after training, an explanation is one pass of a small network. Seyyedsalehi, Soleymani and Rabiee (2022),
SOInter: A Novel Deep Energy Based Interpretation Method for Explaining Structured Output Models, arXiv:2202.09914.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Self

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from perturbkit.core import Attribution, Cost, Oracle, checks, track
from perturbkit.core.progress import ProgressLike
from perturbkit.core.random import Seed, as_generator, randint, uniform
from perturbkit.explain.shapley._networks import mlp, moments

__all__ = ["SOInter"]


class SOInter:
    r"""A network that selects the features behind one output, trained against an energy of inputs and all outputs.

    Parameters
    ----------
    model : Oracle, nn.Module or callable
        The black box: a batch (n, features) to outputs (n, outputs), numbers or zeros and ones. No gradients are taken.
    target : int
        The output that is explained.
    n_select : int
        Number of features selected a row, at least 1.
    hidden, n_layers : int
        Width and number of hidden layers of both networks, at least 1.
    temperature : float
        Of the relaxed selection, above 0.
    baseline : float or Tensor
        What stands in for a feature that is not selected: a number, or one a feature.
    others : bool
        Whether the energy sees the other outputs; without them the target is explained on its own.
    warm_up : float
        Share of the steps, in [0, 1), in which only the energy learns, from features drawn alike: a selector that follows an
        energy that knows nothing settles on any features.
    lr : float
        Step of Adam, for both networks.
    n_steps, batch_size : int
        Training steps, each of one update of both networks, and rows a step.
    generator : torch.Generator, int or None
        Source of the weights, batches, selections and wrong outputs.
    progress : Progress, bool or None
        Reports steps.

    Notes
    -----
    The energy :math:`E(x, y)` learns to be low for what the black box answers, by the hinge
    :math:`\max(0, \Delta(y', y) + E(x, y) - E(x, y'))`, where y' has some outputs of another row and :math:`\Delta` is
    half the mean squared distance in variances; for rows, and for rows with a selection z of features, the selector's or
    one drawn blindly, :math:`(x \odot z, \tilde y)`. The selection is the elementwise maximum of ``n_select`` Gumbel-softmax
    draws, zeros and ones whose gradient is that of the relaxed ones. It learns to lower
    :math:`E(x \odot z, [y_t, \tilde y_{-t}]) - E(x \odot z, [\tilde y_t, \tilde y_{-t}])`: given what is selected and
    the other outputs as they follow from it, the target's true value must be the one that fits. Inputs and outputs are
    standardised for the networks.

    The paper leaves the weights and the schedule of the two losses open: here they alternate, step by step, after a warm-up
    of the energy. Runs differ: train with several generators and compare.

    Cost: two evaluations of the black box a row of every batch (one in the warm-up), and one a training row; none to
    explain.

    References
    ----------
    Seyyedsalehi, Soleymani and Rabiee (2022), arXiv:2202.09914. Chen, Song, Wainwright and Jordan (2018), Learning to
    Explain, arXiv:1802.07814.

    Examples
    --------
    >>> def black_box(x):  # the second output follows the first
    ...     first = (x[:, 0] > 0).float()
    ...     return torch.stack((first, 1 - first), 1)
    >>> x = torch.randn(500, 3, generator=torch.Generator().manual_seed(0))
    >>> made = SOInter(black_box, 1, 1, hidden=20, n_steps=300, lr=0.01, generator=0).fit(x)
    >>> made.attribute(x).values.mean(0).argmax()
    tensor(0)
    """

    def __init__(
        self,
        model: Oracle | nn.Module | Callable[[Tensor], Tensor],
        target: int,
        n_select: int,
        *,
        hidden: int = 100,
        n_layers: int = 2,
        temperature: float = 0.5,
        baseline: Tensor | float = 0.0,
        others: bool = True,
        warm_up: float = 0.3,
        lr: float = 1e-3,
        n_steps: int = 3000,
        batch_size: int = 128,
        generator: Seed = None,
        progress: ProgressLike = False,
    ) -> None:
        self._oracle = Oracle.wrap(model)
        self.target = checks.integer("target", target, low=0)
        self.n_select = checks.integer("n_select", n_select, low=1)
        self.hidden, self.n_layers = (
            checks.integer("hidden", hidden, low=1),
            checks.integer("n_layers", n_layers, low=1),
        )
        self.temperature, self.lr = checks.positive("temperature", temperature), checks.positive("lr", lr)
        self.warm_up = checks.between("warm_up", warm_up, 0, 1, inclusive="low")
        self.n_steps = checks.integer("n_steps", n_steps, low=1)
        self.batch_size = checks.integer("batch_size", batch_size, low=2)
        self.baseline, self.others, self.generator, self.progress = (
            baseline,
            bool(others),
            generator,
            progress,
        )

    def fit(self, x: Tensor) -> Self:
        """Train both networks on rows, without labels.

        Parameters
        ----------
        x : Tensor, shape (n, features)
            Inputs, floating point, at least two.

        Returns
        -------
        SOInter

        Raises
        ------
        ArgumentError, ArgumentTypeError
            If the inputs are not allowed, or there are too few features or outputs for the options.
        """
        checks.tensor("x", x, ndim=2)
        checks.integer("the number of rows", len(x), low=2)
        checks.integer("n_select", self.n_select, high=x.shape[1])
        self._hidden_value = self._checked_baseline(x)
        g, before = as_generator(self.generator), self._oracle.cost
        with self._oracle.frozen():
            y = self._answers(x)
            checks.integer("target", self.target, high=y.shape[1] - 1)
            # The black box may answer one thing alone on the rows, which has no variance.
            self._x_moments, self._y_moments = moments(x), moments(y)
            widths = [self.hidden] * self.n_layers
            seen = y.shape[1] if self.others else 1
            self._selector = mlp([x.shape[1], *widths, x.shape[1]], g, x)
            self._energy = mlp([x.shape[1] + seen, *widths, 1], g, x)
            # All features alike at the start: only the last layer speaks of a row.
            list(self._selector.parameters())[-2].data.zero_()
            nets = (self._energy, self._selector)
            steps = [torch.optim.Adam(net.parameters(), lr=self.lr) for net in nets]
            blind = round(self.warm_up * self.n_steps)
            for i in track(range(self.n_steps), "SOInter", progress=self.progress):
                rows = randint(0, len(x), (self.batch_size,), generator=g, device=x.device)
                self._step(x[rows], y[rows], g, steps, i < blind)
        for net in nets:
            net.requires_grad_(False)
        self.cost_ = self._oracle.cost - before
        return self

    def attribute(self, x: Tensor) -> Attribution:
        """Return the weights of the features, by one pass of the network.

        Parameters
        ----------
        x : Tensor, shape (n, features)
            Inputs.

        Returns
        -------
        Attribution
            ``values``: chances of a feature in one draw, which add up to 1. ``extras["selected"]``: ones for the ``n_select``
            most likely features, zeros for the others.

        Raises
        ------
        ArgumentError, ArgumentTypeError
            If the inputs are not allowed, or ``fit`` was not called.
        """
        logits = self._logits(self._checked(x))
        top = logits.topk(self.n_select, 1).indices
        selected = torch.zeros_like(logits).scatter(1, top, 1.0)
        target = torch.full((len(x),), self.target, device=x.device)
        return Attribution(logits.softmax(1), target, Cost(), "SOInter", {"selected": selected})

    def energy(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the energy of inputs (n, features) with outputs (n, outputs): low where they belong together; shape (n,)."""
        rows = self._checked(x)
        return self._energies(rows, checks.tensor("y", y, shape=(len(x), len(self._y_moments[0]))))

    def _step(
        self, x: Tensor, y: Tensor, g: torch.Generator, steps: Sequence[Optimizer], blind: bool
    ) -> None:
        """Update the energy, then, unless selections are blind, the selector."""
        with torch.enable_grad():
            hidden = self._masked(x, self._draw(torch.zeros_like(x), g))
            inputs, outputs = [x, hidden], [y, self._answers(hidden)]
            if not blind:
                masked = self._masked(x, self._draw(self._logits(x), g))
                answered = self._answers(masked.detach())
                inputs, outputs = [*inputs, masked.detach()], [*outputs, answered]
            energy = self._hinge(torch.cat(inputs), torch.cat(outputs), g)
            steps[0].zero_grad()
            energy.backward()
            steps[0].step()
            if not blind:
                loss = self._misfit(masked, y, answered)
                steps[1].zero_grad()
                loss.backward()
                steps[1].step()

    def _hinge(self, x: Tensor, y: Tensor, g: torch.Generator) -> Tensor:
        """Return the margin by which the black box's outputs are not below wrong ones."""
        swap = (uniform(y.shape, generator=g) < 0.5).to(y.device)
        wrong = torch.where(swap, y[randint(0, len(y), (len(y),), generator=g, device=y.device)], y)
        distance = ((wrong - y) / self._y_moments[1]).square().mean(1) / 2
        return (distance + self._difference(x, y, wrong)).clamp(min=0).mean()

    def _misfit(self, masked: Tensor, y: Tensor, answered: Tensor) -> Tensor:
        """Return by how much the target's true value fits worse than the value recomputed from the selection."""
        true = answered.clone()
        true[:, self.target] = y[:, self.target]
        return self._difference(masked, true, answered).mean()

    def _difference(self, x: Tensor, y: Tensor, other: Tensor) -> Tensor:
        """Return E(x, y) - E(x, other)."""
        first, second = self._energies(torch.cat((x, x)), torch.cat((y, other))).chunk(2)
        return first - second

    def _energies(self, x: Tensor, y: Tensor) -> Tensor:
        outputs = (y - self._y_moments[0]) / self._y_moments[1]
        if not self.others:
            outputs = outputs[:, self.target : self.target + 1]
        return self._energy(torch.cat((self._standard(x), outputs), 1))[:, 0]

    def _logits(self, x: Tensor) -> Tensor:
        return self._selector(self._standard(x))

    def _standard(self, x: Tensor) -> Tensor:
        return (x - self._x_moments[0]) / self._x_moments[1]

    def _draw(self, logits: Tensor, g: torch.Generator) -> Tensor:
        """Return the maximum of independent one-hot draws, zeros and ones, with the gradient of the relaxed ones."""
        u = uniform((self.n_select, *logits.shape), generator=g, like=logits)
        tiny = torch.finfo(u.dtype).tiny
        gumbel = -(-u.clamp(min=tiny).log()).clamp(min=tiny).log()
        soft = ((logits + gumbel) / self.temperature).softmax(2)
        hard = nn.functional.one_hot(soft.argmax(2), logits.shape[1]).to(soft).amax(0)
        # A black box may look at signs alone, so that a feature must be gone and not merely small.
        return hard + (soft.amax(0) - soft.amax(0).detach())

    def _masked(self, x: Tensor, z: Tensor) -> Tensor:
        return z * x + (1 - z) * self._hidden_value

    def _answers(self, x: Tensor) -> Tensor:
        out = self._oracle(x)
        return checks.tensor("the model's answer", out.to(x.dtype), shape=(len(x), None))

    def _checked(self, x: Tensor) -> Tensor:
        if not hasattr(self, "cost_"):
            raise checks.ArgumentError(
                "nothing is fitted; allowed: an explanation after fit. Call fit first."
            )
        return checks.tensor("x", x, shape=(None, len(self._x_moments[0])))

    def _checked_baseline(self, x: Tensor) -> Tensor:
        given = torch.as_tensor(self.baseline, dtype=x.dtype, device=x.device)
        if given.shape not in ((), x.shape[1:]):
            raise checks.ArgumentError(
                f"baseline has shape {tuple(given.shape)}; allowed: a number or {x.shape[1]} of them. Give one a feature."
            )
        return given
