"""Subjects that ship with perturbkit: real models on real data, ready to audit without a download."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from perturbkit.audit.opening._opened import usable_device
from perturbkit.audit.subject import Subject, TextModel
from perturbkit.core import Oracle, checks

__all__ = ["demo_subject"]


def demo_subject(
    kind: str = "image", *, memory: str | int | None = None, device: str | None = None
) -> Subject:
    """Return a bundled model and data.

    Parameters
    ----------
    kind : {"image", "tabular", "text"}
        EfficientNet-lite0 on photographs, a network on breast-cancer measurements, or MiniLM with a linear head on
        short sentences.
    memory, device
        As in :func:`perturbkit.audit.run`.

    Returns
    -------
    Subject

    Raises
    ------
    ArgumentError
        If the kind is unknown, or the device is not here.
    """
    checks.one_of("demo", kind, ("image", "tabular", "text"))
    usable_device(device)
    return {"image": _image, "tabular": _tabular, "text": _text}[kind](memory, device)


def _image(memory: str | int | None, device: str | None) -> Subject:
    from perturbkit.data import image_model, load_photographs

    model, photos = image_model(), load_photographs(n_crops=6)
    # Convolutions on a CPU run a third faster with channels last; the numbers are the same up to rounding.
    module = model.module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    names = photos.group_names
    groups = () if photos.groups is None else tuple(names[int(g)] for g in photos.groups)
    return Subject(
        name=model.name, data_name=f"{len(photos)} crops of {len(names)} photographs", task="image", y=photos.y,
        classes=model.class_names, oracle=_oracle(module, memory, device), x=photos.x, bounds=(0.0, 1.0),
        groups=groups,
        remarks=(
            "Crops of one photograph are alike, so every interval below is narrower than that of as many photographs.",
        ),
    )  # fmt: skip


def _tabular(memory: str | int | None, device: str | None) -> Subject:
    from perturbkit.data import load_breast_cancer, tabular_model

    model, data = tabular_model(), load_breast_cancer("test")
    return Subject(
        name=model.name, data_name=f"{data.name}, the part not trained on", task="tabular", y=data.y,
        classes=model.class_names, oracle=_oracle(model.module, memory, device), x=data.x,
        feature_names=data.feature_names,
    )  # fmt: skip


def _text(memory: str | int | None, device: str | None) -> Subject:
    from perturbkit.data import load_sentences, text_model

    model, data = text_model(), load_sentences("test")
    module: Any = model.module.to(device or "cpu")

    def tokenize(texts: object) -> tuple[Tensor, Tensor]:
        encoded = module.encode(texts)
        return encoded["input_ids"], encoded["attention_mask"]

    def from_embeddings(embedded: Tensor, mask: Tensor) -> Tensor:
        return module(inputs_embeds=embedded, attention_mask=mask)

    return Subject(
        name=model.name, data_name=f"{data.name}, the part not trained on", task="text", y=data.y,
        classes=model.class_names, oracle=_oracle(module, memory, None), texts=list(data.x),
        groups=tuple(str(t) for t in data.extras["topic"]),
        text_model=TextModel(
            predict=lambda texts: module(**module.encode(texts)),
            tokenize=tokenize, embed=module.embeddings, from_embeddings=from_embeddings,
            decode=lambda ids: module.tokenizer.convert_ids_to_tokens(ids.tolist()),
        ),
    )  # fmt: skip


def _oracle(module: torch.nn.Module, memory: str | int | None, device: str | None) -> Oracle:
    return Oracle(module.to(device) if device else module, memory=memory, device=device)
