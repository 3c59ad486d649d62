"""Retrain every reference network that ships as a file: ``python -m perturbkit.data.rebuild``.

Deterministic on one machine: every generator is local and seeded. The denoiser takes a quarter of an hour on two cores,
the others under two minutes together.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from perturbkit.core import Preconditioned, fit
from perturbkit.core.random import as_generator, randint, randperm, seeded_init
from perturbkit.data import digits, tabular
from perturbkit.data._files import build, initialise, save_network
from perturbkit.data.types import Dataset

__all__ = ["rebuild_networks"]


def rebuild_networks() -> dict[str, float]:
    """Train and write every reference network, and return their accuracies on the test parts.

    Returns
    -------
    dict of str to float
        Held-out accuracy by file name; of the denoiser, the held-out loss.
    """
    made = {
        "digits8_classifier": _digits(8, epochs=60),
        "digits28_classifier": _digits(28, epochs=12),
        "breast_cancer_mlp": _breast_cancer(),
        "sentiment_head": _sentiment(),
    }
    accuracies = {}
    for name, (module, accuracy) in made.items():
        save_network(module, name, accuracy)
        accuracies[name] = accuracy
    denoiser, loss = _digits_denoiser()
    save_network(denoiser, "digits28_denoiser", loss, torch.float16)
    return accuracies | {"digits28_denoiser": loss}


def _digits(size: int, epochs: int) -> tuple[nn.Module, float]:
    load = digits.load_digits8 if size == 8 else digits.load_digits28
    train, test = load("train"), load("test")
    module = build(partial(digits._network, size))
    _fit(module, train, epochs=epochs, shift=1 if size == 8 else 2, weight_decay=1e-2)
    return module, _accuracy(module, test)


def _digits_denoiser(steps: int = 4000, checkpoint: str | None = None) -> tuple[nn.Module, float]:
    with seeded_init(0):
        module = digits._denoising_network()

    def loss(module: Preconditioned, x0: Tensor, *, generator: torch.Generator) -> Tensor:
        return module.loss(2 * x0 - 1, generator=generator, levels="log-normal")

    fit(module, loss, digits.load_digits28("train").x, steps=steps, batch_size=64, lr=1e-3, average=0.999, generator=0,
        checkpoint=checkpoint)  # fmt: skip
    with torch.no_grad():
        held = loss(module.eval(), digits.load_digits28("test").x, generator=as_generator(1))
    return module, float(held)


def _breast_cancer() -> tuple[nn.Module, float]:
    train, test = tabular.load_breast_cancer("train"), tabular.load_breast_cancer("test")
    module = build(tabular._network)
    standardise = module.get_submodule("0")
    standardise.load_state_dict({"mean": train.x.mean(0), "scale": train.x.std(0)})
    _fit(module, train, epochs=40, weight_decay=1e-1)
    return module, _accuracy(module, test)


def _sentiment() -> tuple[nn.Module, float]:
    """Fit a logistic regression on frozen embeddings, as a linear layer of two logits."""
    from sklearn.linear_model import LogisticRegression

    from perturbkit.data import text

    train, test = text.load_sentences("train"), text.load_sentences("test")
    encoder = text._encoder()
    embed = partial(text._embed_texts, encoder, text._tokenizer())
    # C by ten-fold cross-validation within the train part, which gives 0.81 right.
    fitted = LogisticRegression(C=0.03, max_iter=5000).fit(embed(train.x).numpy(), train.y.numpy())
    head = build(text._head)
    weight, bias = torch.from_numpy(fitted.coef_[0]).float() / 2, float(fitted.intercept_[0]) / 2
    with torch.no_grad():
        head.weight.copy_(torch.stack([-weight, weight]))
        head.bias.copy_(torch.tensor([-bias, bias]))
        accuracy = float((head(embed(test.x)).argmax(1) == test.y).float().mean())
    return head, accuracy


def _fit(module: nn.Module, data: Dataset, *, epochs: int, shift: int = 0, weight_decay: float = 0.0) -> None:
    """Train with AdamW, a cosine schedule and, for images, random shifts by up to ``shift`` pixels."""
    generator = as_generator(0)
    initialise(module, generator)
    optimizer = torch.optim.AdamW(module.parameters(), lr=2e-3, weight_decay=weight_decay)
    steps = epochs * -(-len(data) // 64)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    module.train()
    for _ in range(epochs):
        for batch in randperm(len(data), generator=generator).split(64):
            x = _shifted(data.x[batch], shift, generator) if shift else data.x[batch]
            loss = nn.functional.cross_entropy(module(x), data.y[batch], label_smoothing=0.02)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    module.eval()


def _shifted(x: Tensor, shift: int, generator: torch.Generator) -> Tensor:
    """Move a batch of images by one random offset, filling with zeros."""
    right, down = randint(0, 2 * shift + 1, (2,), generator=generator).tolist()
    padded = nn.functional.pad(x, (shift, shift, shift, shift))
    return padded[..., down : down + x.shape[-2], right : right + x.shape[-1]]


@torch.no_grad()
def _accuracy(module: nn.Module, data: Dataset) -> float:
    return float((module(data.x).argmax(1) == data.y).float().mean())


if __name__ == "__main__":
    for name, accuracy in rebuild_networks().items():
        print(f"{name}: {accuracy:.4f} on the test part")
