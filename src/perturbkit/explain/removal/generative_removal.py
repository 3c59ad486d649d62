"""Removal by inpainting: occlusion, LIME and optimised masks in which removed pixels are painted from the rest.

Use it where grey or blurred patches are unlike anything that the model was trained on. Agarwal and Nguyen (2020), Explaining image
classifiers by removing input features using generative models, arXiv:1910.04256: SP-G, LIME-G and MP-G.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from perturbkit.core import Attribution, Oracle, checks, target_rows, track
from perturbkit.core.progress import ProgressLike
from perturbkit.core.random import Seed, as_generator, uniform
from perturbkit.explain.removal._inpainters import ConvInpainter, GaussianInpainter
from perturbkit.explain.removal._lime import lime_fit, lime_masks
from perturbkit.explain.removal._parts import segment_numbers, window_masks

__all__ = ["ConvInpainter", "GaussianInpainter", "GenerativeRemoval"]

Inpainter = Callable[[Tensor, Tensor], Tensor]
Method = Literal["occlusion", "lime", "meaningful"]


class GenerativeRemoval:
    """Attributions that remove pixels by painting them from the pixels that stay.

    Parameters
    ----------
    inpainter : callable (images, masks) -> images
        Gets images (n, channels, height, width) and masks (n, 1, height, width), which are 1 where pixels stay, and returns images
        in which the others are painted; what it returns elsewhere is not used. For instance a fitted
        :class:`GaussianInpainter` or :class:`ConvInpainter`, a classical inpainting in a loop, or a constant.
    method : {"occlusion", "lime", "meaningful"}
        A sliding patch (SP-G), superpixels and a linear model (LIME-G), or an optimised mask (MP-G).
    window, stride : int or (int, int)
        Of the patch, in pixels; the stride is the window by default. The last patches are moved back inside.
    segments : int or Tensor of int
        About how many superpixels to cut each image into (SLIC), or the superpixel of each pixel, as in ``lime_stratified``.
    n_samples : int
        Masks of LIME an image, the first of which keeps everything; at least 2.
    kernel_width, ridge : float
        Width of LIME's kernel of the cosine distance, and penalty of its coefficients.
    grid : int
        Pixels of the image for one of the optimised mask, at least 1.
    steps : int
        Steps of the optimisation.
    lr, l1, tv : float
        Step size of Adam, and weights of the mask's removed share and of its roughness.
    value_range : (float, float) or None
        Painted pixels are clipped to it; ``None`` leaves them.

    Notes
    -----
    All rest on ``r(x, m) = m x + (1 - m) I(x, m)``, painted anew from the original image for every mask.

    SP-G: a pixel's score is the mean over patches p that cover it of ``f(x) - f(r(x, m_p))``. LIME-G: the coefficients of ``min_b sum_z
    k(z) (b_0 + <b, z> - f(r(x, m(z))))^2 + ridge ||b||^2``, with ``k = exp(-d^2 / (2 width^2))``, d the cosine distance to the full mask. MP-G: a mask
    on a coarse grid, uniform at random at first, is enlarged bilinearly and cut at one half; Adam minimises ``f(r(x, m)) + l1
    ||1 - m||_1 + tv sum |grad m|^3`` with the slope of the soft mask for that of the cut one, ``I`` held fixed in each step, as in the authors'
    program; the score is 1 - m.

    Cost: the evaluations of the plain method, each with one call of the inpainter: patches + 1, ``n_samples``, or ``steps``
    gradients an image.

    References
    ----------
    Agarwal and Nguyen (2020), arXiv:1910.04256.

    Examples
    --------
    >>> f = lambda z: z.flatten(1).sum(1)
    >>> x = torch.tensor([[[[3.0, 1.0], [0.5, 2.0]]]])
    >>> GenerativeRemoval(lambda images, masks: torch.ones_like(images), value_range=None).attribute(f, x).values
    tensor([[[[ 2.0000,  0.0000],
              [-0.5000,  1.0000]]]])
    """

    def __init__(
        self,
        inpainter: Inpainter,
        method: Method = "occlusion",
        *,
        window: int | tuple[int, int] = 1,
        stride: int | tuple[int, int] | None = None,
        segments: int | Tensor = 50,
        n_samples: int = 500,
        kernel_width: float = 0.25,
        ridge: float = 1.0,
        grid: int = 1,
        steps: int = 300,
        lr: float = 0.1,
        l1: float = 0.01,
        tv: float = 0.2,
        value_range: tuple[float, float] | None = (0.0, 1.0),
    ) -> None:
        if not callable(inpainter):
            raise checks.ArgumentTypeError(
                f"inpainter is a {type(inpainter).__name__}; allowed: a function of images and masks that returns images. Pass for "
                "instance GaussianInpainter().fit(images)."
            )
        self.inpainter = inpainter
        self.method: Method = checks.one_of("method", method, ("occlusion", "lime", "meaningful"))
        self.window, self.stride, self.segments = window, stride, segments
        self.n_samples = checks.integer("n_samples", n_samples, low=2)
        self.kernel_width = checks.positive("kernel_width", kernel_width)
        self.ridge = checks.nonnegative("ridge", ridge)
        self.grid, self.steps = checks.integer("grid", grid, low=1), checks.integer("steps", steps, low=1)
        self.lr, self.l1, self.tv = (
            checks.positive("lr", lr), checks.nonnegative("l1", l1), checks.nonnegative("tv", tv),
        )  # fmt: skip
        self.value_range = value_range
        if value_range is not None:
            checks.between("value_range[0]", value_range[0], -float("inf"), value_range[1])

    def attribute(
        self,
        model: Oracle | nn.Module | Callable[[Tensor], Tensor],
        x: Tensor,
        target: Tensor | int | None = None,
        *,
        generator: Seed = None,
        progress: ProgressLike = False,
    ) -> Attribution:
        """Attribute an output of the model to the pixels of images.

        Parameters
        ----------
        model : Oracle, nn.Module or callable
            Function of a batch of images, answering (n, outputs) or (n,); probabilities, as a rule.
        x : Tensor, shape (n, channels, height, width)
            Images, floating point.
        target : Tensor of shape (n,), int or None
            The output explained.
        generator : torch.Generator, int or None
            Source of LIME's masks, and of the mask that the optimisation starts with.
        progress : Progress, bool or None
            Reports chunks, images or steps.

        Returns
        -------
        Attribution
            ``values`` in the shape of ``x``, alike in all channels. ``extras`` holds ``n_windows``; or ``coefficients`` and
            ``score``; or ``history``, the objective, shape (n, steps).

        Raises
        ------
        ArgumentError, ArgumentTypeError
            If an argument is not allowed, or the inpainter returns images of another shape.
        """
        checks.image_batch("x", x)
        oracle, source = Oracle.wrap(model), as_generator(generator)
        rows = target_rows(target, x)
        before = oracle.cost
        run = {"occlusion": self._occlusion, "lime": self._lime, "meaningful": self._meaningful}[self.method]
        with oracle.frozen():
            values, extras = run(oracle, x, rows, source, progress)
        shaped = values.to(x.dtype).expand_as(x).contiguous()
        name = {"occlusion": "SP-G", "lime": "LIME-G", "meaningful": "MP-G"}[self.method]
        return Attribution(shaped, rows, oracle.cost - before, name, extras)

    def remove(self, x: Tensor, masks: Tensor) -> Tensor:
        """Return images (n, channels, height, width) with the pixels painted where the masks, (n, 1, height, width), are 0."""
        kept = masks > 0.5
        painted = checks.same_shape("what inpainter returns", self.inpainter(x, kept), "x", x)
        if self.value_range is not None:
            painted = painted.clamp(*self.value_range)
        return torch.where(kept, x, painted.to(x.dtype))

    def _occlusion(
        self, oracle: Oracle, x: Tensor, rows: Tensor | None, source: torch.Generator, progress: ProgressLike
    ) -> tuple[Tensor, dict[str, object]]:
        masks = window_masks(x, self.window, self.stride)
        n, m = len(x), len(masks)
        whole, place = oracle.value(x, rows), 0
        falls = whole.new_empty(m * n)
        for size in track(list(oracle.chunks(n * m, like=x)), "SP-G", progress=progress):
            # Images with the same mask come together, since inpainters may share work among them.
            index = torch.arange(place, place + size, device=x.device)
            which, row = index // n, index % n
            shown = self.remove(x[row], ~masks[which])
            falls[index] = whole[row] - oracle.value(shown, None if rows is None else rows[row])
            place += size
        flat = masks.flatten(1).to(falls.dtype)
        values = falls.reshape(m, n).T @ flat / flat.sum(0)
        return values.reshape(n, 1, *x.shape[2:]), {"n_windows": m}

    def _lime(
        self, oracle: Oracle, x: Tensor, rows: Tensor | None, source: torch.Generator, progress: ProgressLike
    ) -> tuple[Tensor, dict[str, object]]:
        numbers, values = segment_numbers(self.segments, x), torch.empty_like(x[:, :1])
        coefficients, scores = [], []
        for i in track(range(len(x)), "LIME-G", progress=progress):
            z = lime_masks(int(numbers[i].max()) + 1, self.n_samples, source, x)
            answers, place = [], 0
            for size in oracle.chunks(self.n_samples, like=x[i : i + 1]):
                kept = z[place : place + size][:, numbers[i]][:, None] > 0
                shown = self.remove(x[i].expand(size, -1, -1, -1), kept)
                answers.append(oracle.value(shown, None if rows is None else rows[i].expand(size)))
                place += size
            b, _, score = lime_fit(z, torch.cat(answers).double(), self.kernel_width, self.ridge)
            values[i] = b[numbers[i]].to(x.dtype)
            coefficients.append(b.to(x.dtype))
            scores.append(score.to(x.dtype))
        return values, {"coefficients": coefficients, "score": torch.stack(scores)}

    def _meaningful(
        self, oracle: Oracle, x: Tensor, rows: Tensor | None, source: torch.Generator, progress: ProgressLike
    ) -> tuple[Tensor, dict[str, object]]:
        cells = [-(-side // self.grid) for side in x.shape[2:]]
        mask = uniform((len(x), 1, *cells), generator=source, like=x).requires_grad_(True)
        optimiser, history = torch.optim.Adam([mask], self.lr), []
        for _ in track(range(self.steps), "MP-G", progress=progress):
            with torch.enable_grad():
                soft = self._enlarged(mask, x)
                rough = sum(mask.diff(dim=d).abs().pow(3).flatten(1).sum(1) for d in (2, 3))
                penalty = self.l1 * (1 - mask).abs().flatten(1).sum(1) + self.tv * rough
            shown = self.remove(x, soft.detach())
            value, slope = oracle.value_and_gradient(shown, rows)
            # With I held fixed the slope in m is that in the image times x - I, which is x - shown: zero where x stays.
            pull = (slope * (x - shown)).sum(1, keepdim=True)
            (mask.grad,) = torch.autograd.grad((soft * pull).sum() + penalty.sum(), mask)
            history.append(value + penalty.detach())
            optimiser.step()
            with torch.no_grad():
                mask.clamp_(0, 1)
        return 1 - self._enlarged(mask.detach(), x), {"history": torch.stack(history, 1)}

    def _enlarged(self, mask: Tensor, x: Tensor) -> Tensor:
        if self.grid == 1:
            return mask
        return functional.interpolate(mask, tuple(x.shape[2:]), mode="bilinear", align_corners=False)
