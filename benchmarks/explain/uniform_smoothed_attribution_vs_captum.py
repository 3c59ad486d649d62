"""A saliency map smoothed over a ball on digits of 28x28, against captum's SmoothGrad with equal evaluations.

Both average the gradient of the class's logit over as many changed copies of each image: ours draws them uniformly from a
ball and brings every gradient to norm 1, which is what the certificate needs; captum's NoiseTunnel adds Gaussian noise,
here with a standard deviation that gives it the same mean square, and averages gradients as they are, so the maps agree
in direction and not in length: the mean cosine is printed and asserted to be above 0.8. captum issues no certificate.
Its default is all draws in one batch; the other row takes them in batches of our size. The floor is the same number of
gradients of the bare model in our batches.
"""

from __future__ import annotations

import torch
from benchmarks._timing import Call, Row, compare, table
from torch import Tensor
from torch.nn import functional

from perturbkit.explain import UniformSmoothedAttribution

SAMPLES, ROWS, RADIUS = 500, 8, 2.0


def main(rounds: int = 3) -> list[Row]:
    """Print the table and return its rows."""
    from captum.attr import NoiseTunnel, Saliency

    from perturbkit.data import digits_classifier, load_digits28

    model = digits_classifier().module.eval().requires_grad_(False)
    x = load_digits28("test").x[:ROWS]
    label = model(x).argmax(1)
    block = max(1, 2**20 // x.numel())

    def gradient(many: Tensor, target: Tensor) -> Tensor:
        leaf = many.detach().requires_grad_(True)
        out = model(leaf).gather(1, target[:, None])
        return torch.autograd.grad(out.sum(), leaf)[0]

    smoothed = UniformSmoothedAttribution(gradient, RADIUS, n_samples=SAMPLES)
    # A uniform draw from a ball of dimension d has mean square r^2 / (d + 2) in each entry.
    deviation = RADIUS / (x[0].numel() + 2) ** 0.5
    tunnel = NoiseTunnel(Saliency(model))

    def ours() -> Tensor:
        return smoothed.attribute(x, label, generator=0).values

    def theirs(batch: int | None) -> Tensor:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            found = tunnel.attribute(
                x, nt_samples=SAMPLES, nt_samples_batch_size=batch, stdevs=deviation, target=label, abs=False
            )
        assert isinstance(found, Tensor)
        return found

    def floor() -> None:
        for start in range(0, SAMPLES, block):
            m = min(block, SAMPLES - start)
            gradient(x.repeat(m, 1, 1, 1), label.repeat(m))

    cosine = functional.cosine_similarity(ours().flatten(1), theirs(None).flatten(1))
    assert float(cosine.mean()) > 0.8, f"the maps' mean cosine is {float(cosine.mean()):.3f}"
    certificate = smoothed.certify(x, label, epsilon=0.01, generator=0)
    print(
        f"  mean cosine of the maps {float(cosine.mean()):.3f}; rows certified at 0.01: "
        f"{float(certificate.valid.float().mean()):.0%}, mean certified cosine "
        f"{float(certificate.cosine_lower[certificate.valid].mean()):.3f}"
    )
    floor()
    theirs(block)
    peers: dict[str, Call] = {
        f"smoothed saliency, {SAMPLES} draws, captum default": lambda: theirs(None),
        f"smoothed saliency, {SAMPLES} draws, captum in batches of {block}": lambda: theirs(block),
    }
    rows = compare(ours, peers, floor, rounds)
    print(table(rows))
    return rows


if __name__ == "__main__":
    main()
