"""Representations that stay the same along a diffusion path, so that one pass classifies what noise has covered.

Use it where a certificate by randomized smoothing is wanted, unlabelled data are at hand, and denoising every noisy copy
before it is classified costs too much. Lei, Berner, Wang, Chen, Ba, Ren, Zhu and Anandkumar (2025), Robust
Representation Consistency Model via Contrastive Denoising, arXiv:2501.13094.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.lr_scheduler import LambdaLR

from perturbkit.core import EDMSchedule, Oracle, checks, keeping_modes
from perturbkit.core.progress import ProgressLike
from perturbkit.core.random import Seed, as_generator, randint, randn
from perturbkit.robust.training._representation import (
    Augment,
    RepresentationHistory,
    augmented,
    batches_of,
    check_augment,
    descend,
    disagreement,
    layers_of,
)

__all__ = ["RepresentationHistory", "RobustRepresentationConsistency", "info_nce"]


class RobustRepresentationConsistency:
    """Train an encoder without labels to answer alike along diffusion paths, then a classifier of noisy inputs on it.

    Parameters
    ----------
    encoder : nn.Module
        ``encoder(z, t)`` with inputs ``z`` (n, ...) scaled to about unit size and ``t`` (n,), 250 times the logarithm of the
        noise level, to be embedded; answers representations (n, features).
    projector : nn.Module
        Small network of the representations, through which the clean end is contrasted; answers (n, any). It is not used
        after pre-training.
    sigma_min, sigma_max : float
        Noise levels of the ends of the paths, in input units, above 0 and increasing.
    rho : float
        Exponent of the grid of noise levels, above 0.
    sigma_data : float
        Standard deviation of the data, above 0.
    temperature : float
        Of the contrast, above 0.
    n_scales : (int, int)
        Levels of the grid at the start of pre-training and at its end, at least 1, not decreasing.
    ema : (float, float)
        How much of the target network is kept in a step, at the start and at the end, in [0, 1). The default is for hundreds
        of thousands of steps.
    generator : torch.Generator, int or None
        Source of batches, noise, levels and augmentations, advanced from call to call.

    Attributes
    ----------
    encoder, projector : nn.Module
        As given; trained in place.
    head : nn.Linear or None
        The classifier on the representations, once :meth:`finetune` has run.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If an option is not allowed.

    Notes
    -----
    With ``f(x, t) = encoder(x / sqrt(t^2 + sigma_data^2), 250 log t)``, the projector ``g`` and a target network of averaged
    weights, marked by a bar, a step of pre-training descends

    ``NCE(f(x + t_i e, t_i), sg f(x + t_{i+1} e, t_{i+1})) + NCE(g f(a_0), sg g' f'(b_0)) + NCE(g f(b_0), sg g' f'(a_0))``

    for neighbouring levels ``t_i > t_{i+1}``, i uniform and one for the batch; two augmentations ``a, b`` at the least noise,
    ``a_0 = a + sigma_min e``; ``g' f'`` the target network; ``sg`` without gradient; and one noise e for all. The first term
    carries what is known at little noise to more noise; the others see to it that something is known there, since the noise,
    which both points of a pair share, would tell them from the others just as well.

    The number of levels is doubled from the first to the second of ``n_scales`` in stages of equal length, plus one, as in
    consistency training; the averaging rate rises by a sigmoid. Fine-tuning descends cross-entropy on two noisy copies and
    the consistency of Jeong and Shin, ``c mean_j KL(m || p_j) + h H(m)`` for the mean m of the two answers ``p_j``.

    Cost: six encoder passes a step of pre-training, three of them with gradient; two a step of fine-tuning; one an answer.

    References
    ----------
    Lei et al. (2025), arXiv:2501.13094; Song and Dhariwal (2023), arXiv:2310.14189, for the growth of the grid; Jeong and Shin
    (2020), arXiv:2006.04062, for the consistency of the classifier.

    Examples
    --------
    >>> class Encoder(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.body = nn.Linear(2, 4)
    ...     def forward(self, z, t):
    ...         return self.body(z)
    >>> x = torch.tensor([[0.5, 0.5], [-0.5, -0.5]]).repeat(8, 1)
    >>> method = RobustRepresentationConsistency(Encoder(), nn.Linear(4, 3), generator=0)
    >>> _ = method.pretrain(x, steps=3, augment=lambda rows, generator: rows)
    >>> _ = method.finetune(x, torch.tensor([0, 1]).repeat(8), sigma=0.3, steps=60, lr=0.05)
    >>> method.predict(x[:2], 0.3).argmax(1).tolist()
    [0, 1]

    Certify ``method.classifier(0.3)`` with :func:`~perturbkit.robust.randomized_smoothing` at the same noise.
    """

    def __init__(
        self, encoder: nn.Module, projector: nn.Module, *, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0,
        sigma_data: float = 0.5, temperature: float = 0.2, n_scales: tuple[int, int] = (20, 80),
        ema: tuple[float, float] = (0.99, 0.9999), generator: Seed = None,
    ) -> None:  # fmt: skip
        for name, module in (("encoder", encoder), ("projector", projector)):
            if not isinstance(module, nn.Module):
                raise checks.ArgumentTypeError(
                    f"{name} is a {type(module).__name__}; allowed: an nn.Module, whose weights can be trained. Pass the network."
                )
        self.encoder, self.projector = encoder, projector
        self.head: nn.Linear | None = None
        self.sigma_min = checks.positive("sigma_min", sigma_min)
        self.sigma_max = checks.between("sigma_max", sigma_max, self.sigma_min, math.inf, inclusive="neither")
        self.rho, self.sigma_data = checks.positive("rho", rho), checks.positive("sigma_data", sigma_data)
        self.temperature = checks.positive("temperature", temperature)
        for name, pair in (("n_scales", n_scales), ("ema", ema)):
            if not isinstance(pair, Sequence) or len(pair) != 2:
                raise checks.ArgumentTypeError(
                    f"{name} is {pair!r}; allowed: two numbers. Pass (at the start, at the end)."
                )
        first = checks.integer("n_scales[0]", n_scales[0], low=1)
        self.n_scales = first, checks.integer("n_scales[1]", n_scales[1], low=first)
        low = checks.between("ema[0]", ema[0], 0, 1, inclusive="low")
        self.ema = low, checks.between("ema[1]", ema[1], low, 1, inclusive="low")
        self.generator = as_generator(generator)

    def times(self, n: int) -> Tensor:
        """Return ``n`` noise levels, decreasing, both ends exact; float64, shape (n,), n at least 2."""
        checks.integer("n", n, low=2)
        schedule = EDMSchedule(self.sigma_max)
        return schedule.times(n - 1, t_end=self.sigma_min, spacing="karras", rho=self.rho)

    def schedule(self, step: int, steps: int) -> tuple[int, float]:
        """Return the number of noise levels and the averaging rate at a step, from 0, of so many."""
        checks.integer("steps", steps, low=1)
        checks.integer("step", step, low=0, high=steps)
        first, last = self.n_scales
        stages = 1 + math.ceil(math.log2(last / first))
        levels = min(first * 2 ** int(step / steps * stages), last) + 1
        low, high = self.ema
        # As the authors' code has it: a sigmoid, of slope 15, of where the squares' line has arrived.
        place = (math.sqrt(low**2 + step / steps * (high**2 - low**2)) - low) / ((high - low) or 1.0)
        share = 2 / (1 + math.exp(-15 * place)) - 1
        return levels, share * high + (1 - share) * low

    def represent(self, x: Tensor, sigma: Tensor | float) -> Tensor:
        """Return the representations of inputs at a noise level above 0, one for all or one a row, with a graph."""
        checks.tensor("x", x)
        levels = torch.as_tensor(sigma)
        if levels.shape not in ((), (len(x),)) or not bool((levels > 0).all() and levels.isfinite().all()):
            raise checks.ArgumentError(
                f"sigma has shape {tuple(levels.shape)} and least value {float(levels.min()):.4g}; allowed: a finite number above "
                f"0, or one for each of {len(x)} rows. Pass the level of the noise."
            )
        return self._represent(x, levels)

    def _represent(self, x: Tensor, sigma: Tensor | float) -> Tensor:
        t = torch.as_tensor(sigma, dtype=x.dtype, device=x.device).expand(len(x))
        scale = (t.square() + self.sigma_data**2).rsqrt()
        found = self.encoder(x * scale.reshape(-1, *[1] * (x.ndim - 1)), 250 * t.log())
        if found.ndim != 2 or len(found) != len(x):
            raise checks.ModelError(
                f"the encoder answered shape {tuple(found.shape)} to {len(x)} rows; allowed: ({len(x)}, features). "
                "Flatten or pool its answer."
            )
        return found

    def pretrain(
        self, x: Tensor, *, steps: int, augment: Augment, batch_size: int = 128, lr: float = 1e-4, weight_decay: float = 0.0,
        max_norm: float = 2.0, progress: ProgressLike = False,
    ) -> RepresentationHistory:  # fmt: skip
        """Train encoder and projector without labels.

        Parameters
        ----------
        x : Tensor, shape (n, ...)
            Inputs, floating point, of a standard deviation of about ``sigma_data``; at least two.
        steps : int
            Steps of AdamW, at least 1, the rate rising over the first thirtieth.
        augment : callable
            ``augment(x, generator)`` returns a random version of each row, in the same shape.
        batch_size : int
            Rows a step, at least 2: the others of the batch are the negatives.
        lr, weight_decay, max_norm : float
            Rate, decay of the weights, and largest norm of a gradient.
        progress : Progress, bool or None
            Reports steps.

        Returns
        -------
        RepresentationHistory

        Raises
        ------
        ArgumentError, ArgumentTypeError, ModelError
            If an argument or what the encoder or ``augment`` answers is not allowed.
        """
        n = checks.integer("the number of rows of x", len(checks.tensor("x", x)), low=2)
        checks.integer("steps", steps, low=1)
        checks.integer("batch_size", batch_size, low=2)
        checks.positive("lr", lr)
        checks.nonnegative("weight_decay", weight_decay)
        checks.positive("max_norm", max_norm)
        check_augment(augment)
        both = nn.ModuleList([self.encoder, self.projector])
        target = copy.copy(self)
        averaged = copy.deepcopy(both).requires_grad_(False).train()
        target.encoder, target.projector = averaged

        def loss(rows: Tensor, step: int) -> tuple[Tensor, Tensor]:
            levels, rate = self.schedule(step, steps)
            for kept, new in zip(averaged.parameters(), both.parameters(), strict=True):
                kept.lerp_(new.detach(), 1 - rate)
            batch = x[rows]
            a, b = (augmented(augment, batch, self.generator) for _ in range(2))
            noise = randn(batch.shape, generator=self.generator, like=batch)
            return self._losses(target, batch, a, b, noise, levels)

        optimizer = torch.optim.AdamW(both.parameters(), lr, weight_decay=weight_decay)
        rates = LambdaLR(optimizer, lambda step: min(1.0, 30 * (step + 1) / steps))
        with keeping_modes(both):
            both.train()
            batches = batches_of(n, batch_size, steps, self.generator)
            return descend(rates, loss, batches, steps, max_norm, x, progress)

    def finetune(
        self, x: Tensor, y: Tensor, *, sigma: float, steps: int, consistency: float = 20.0, entropy: float = 0.5,
        batch_size: int = 128, lr: float = 1.5e-4, layer_decay: float = 0.85, weight_decay: float = 0.0,
        augment: Augment | None = None, progress: ProgressLike = False,
    ) -> RepresentationHistory:  # fmt: skip
        """Add a linear classifier and train it with the encoder on noisy inputs, nothing frozen.

        Parameters
        ----------
        x : Tensor, shape (n, ...)
            Inputs.
        y : Tensor of int64, shape (n,)
            Labels, from 0; there are as many classes as the largest says.
        sigma : float
            Standard deviation of the noise, in input units, from ``sigma_min`` to ``sigma_max``.
        steps : int
            Steps of AdamW, at least 1; the rate rises over the first tenth, under a cosine that falls.
        consistency, entropy : float
            Weights c and h of the consistency of two noisy copies, zero or above. Both zero: cross-entropy of one copy.
        batch_size : int
            Rows a step, at least 1.
        lr : float
            Rate of the classifier.
        layer_decay : float
            Factor of the rate from the classifier to the last child of the encoder, and on from each child to the one
            before it, in (0, 1].
        weight_decay : float
            Decay of the weights.
        augment : callable, optional
            As in :meth:`pretrain`.
        progress : Progress, bool or None
            Reports steps.

        Returns
        -------
        RepresentationHistory

        Raises
        ------
        ArgumentError, ArgumentTypeError, ModelError
            If an argument or what the encoder or ``augment`` answers is not allowed.
        """
        checks.tensor("x", x)
        labels = checks.labels("y", y, n=len(x)).to(x.device)
        checks.between("sigma", sigma, self.sigma_min, self.sigma_max)
        checks.integer("steps", steps, low=1)
        checks.nonnegative("consistency", consistency)
        checks.nonnegative("entropy", entropy)
        checks.nonnegative("weight_decay", weight_decay)
        checks.integer("batch_size", batch_size, low=1)
        checks.positive("lr", lr)
        checks.between("layer_decay", layer_decay, 0, 1, inclusive="high")
        if augment is not None:
            check_augment(augment)
        head = self.head = self._new_head(x, int(labels.max()) + 1)
        n_copies = 1 if consistency == entropy == 0 else 2

        def loss(rows: Tensor, step: int) -> tuple[Tensor, Tensor]:
            batch = x[rows] if augment is None else augmented(augment, x[rows], self.generator)
            copies = torch.cat([batch] * n_copies)
            noisy = copies + sigma * randn(copies.shape, generator=self.generator, like=copies)
            logits = head(self._represent(noisy, sigma))
            fit = functional.cross_entropy(logits, labels[rows].repeat(n_copies))
            return fit, disagreement(logits.unflatten(0, (n_copies, -1)), consistency, entropy)

        def rate(step: int) -> float:
            return min((step + 1) / max(1, steps // 10), 0.5 * (1 + math.cos(math.pi * step / steps)))

        optimizer = torch.optim.AdamW(
            layers_of(self.encoder, head, lr, layer_decay), weight_decay=weight_decay
        )
        batches = batches_of(len(x), batch_size, steps, self.generator)
        with keeping_modes(self.encoder):
            self.encoder.train()
            return descend(LambdaLR(optimizer, rate), loss, batches, steps, math.inf, x, progress)

    def classifier(self, sigma: float) -> nn.Module:
        """Return the classifier of inputs with noise of a standard deviation ``sigma``, as a module that answers logits."""
        if self.head is None:
            raise checks.ArgumentError(
                "there is no classifier yet; allowed: after fine-tuning. Call finetune(x, y, sigma=..., steps=...) first."
            )
        return _NoisyClassifier(
            self, self.head, checks.between("sigma", sigma, self.sigma_min, self.sigma_max)
        )

    def predict(self, x: Tensor, sigma: float) -> Tensor:
        """Return the logits (n, classes) of inputs that carry noise of a standard deviation ``sigma``, by one pass."""
        return Oracle(self.classifier(sigma))(checks.tensor("x", x))

    def _losses(
        self, target: RobustRepresentationConsistency, x: Tensor, a: Tensor, b: Tensor, noise: Tensor, levels: int
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Return the contrast at the clean end and the consistency of two neighbours of a path, means over the batch."""
        i = int(randint(0, levels - 1, (), generator=self.generator))
        more, less = self.times(levels)[i : i + 2].tolist()
        clean, tau = self.sigma_min, self.temperature
        views = a + clean * noise, b + clean * noise
        with torch.no_grad():
            target_a, target_b = (target.projector(target._represent(view, clean)) for view in views)
            nearer = self._represent(x + less * noise, less)
        found_a, found_b = (self.projector(self._represent(view, clean)) for view in views)
        contrast = info_nce(found_a, target_b, tau) + info_nce(found_b, target_a, tau)
        agreement = info_nce(self._represent(x + more * noise, more), nearer, tau)
        return contrast.mean(), agreement.mean()

    def _new_head(self, x: Tensor, n_classes: int) -> nn.Linear:
        """Return a linear layer of zeros that fits the encoder."""
        with torch.no_grad(), keeping_modes(self.encoder):
            self.encoder.eval()
            features = self._represent(x[:1], self.sigma_min)
        head = nn.utils.skip_init(nn.Linear, features.shape[1], n_classes, dtype=x.dtype, device=x.device)
        nn.init.zeros_(head.weight), nn.init.zeros_(head.bias)
        return head


def info_nce(f: Tensor, target: Tensor, temperature: float) -> Tensor:
    """Return how badly each row can be told to belong to its target among the targets of the batch.

    Parameters
    ----------
    f, target : Tensor, shape (n, features)
        Rows and what they belong to; brought to unit length.
    temperature : float
        Above 0.

    Returns
    -------
    Tensor, shape (n,)
        Zero for a batch of one; log n where all targets are the same.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If shapes differ or the temperature is not allowed.

    Notes
    -----
    ``log sum_k exp(<f_i, g_k> / tau) - <f_i, g_i> / tau``.

    References
    ----------
    van den Oord, Li and Vinyals (2018), arXiv:1807.03748; Lei et al. (2025), arXiv:2501.13094.

    Examples
    --------
    >>> info_nce(torch.eye(3), torch.ones(3, 2) @ torch.ones(2, 3), 0.2)
    tensor([1.0986, 1.0986, 1.0986])
    """
    checks.tensor("f", f, ndim=2, finite=False)
    checks.same_shape("target", target, "f", f)
    checks.positive("temperature", temperature)
    logits = functional.normalize(f, dim=1) @ functional.normalize(target, dim=1).T / temperature
    return logits.logsumexp(1) - logits.diagonal()


class _NoisyClassifier(nn.Module):
    def __init__(self, method: RobustRepresentationConsistency, head: nn.Module, sigma: float) -> None:
        super().__init__()
        self.encoder, self.head = method.encoder, head
        self._method, self._sigma = method, sigma

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self._method._represent(x, self._sigma))
