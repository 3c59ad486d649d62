"""Hugging Face models: a local folder, or a name that the local cache holds; nothing is downloaded."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from perturbkit.audit.opening._opened import OpenedModel, first_line
from perturbkit.audit.subject import TextModel
from perturbkit.core import checks, unwrap_output

_TEXT, _IMAGE = "ForSequenceClassification", "ForImageClassification"


def open_named(name: str, device: str | None = None) -> OpenedModel:
    """Open ``NAME`` or ``NAME@REVISION`` from the local cache of Hugging Face.

    Raises
    ------
    ModelError
        If it is not in the cache, or :func:`open_folder` refuses it.
    """
    from huggingface_hub import constants, snapshot_download

    repository, _, revision = name.partition("@")
    try:
        folder = snapshot_download(repository, revision=revision or None, local_files_only=True)
    except Exception as error:
        raise checks.ModelError(
            f"hf:{name} is not in the local cache {constants.HF_HUB_CACHE} ({type(error).__name__}); allowed: a model that "
            f"was downloaded before, since an audit uses no network. Run hf download {repository} first, or name a folder."
        ) from error
    found = open_folder(Path(folder), device)
    found.name = f"hf:{name}"
    return found


def open_folder(path: Path, device: str | None = None) -> OpenedModel:
    """Open a folder with ``config.json`` and ``model.safetensors``, of a text or an image classifier.

    Raises
    ------
    ModelError
        If it is no such folder, its weights are pickled or incomplete, it needs code of its own, or it does something else.
    """
    config = _config(path)
    kind = _kind(path, config)
    weights = sorted(p.name for p in path.glob("*.safetensors"))
    if not weights:
        pickled = [n for n in ("pytorch_model.bin", "model.bin") if (path / n).exists()]
        pickled += [p.name for p in path.glob("pytorch_model*.bin") if p.name not in pickled]
        what = f"{pickled[0]}, a pickle, which can run code when opened" if pickled else "no weights"
        raise checks.ModelError(
            f"{path} holds {what}; allowed: model.safetensors. Save the model again with "
            "model.save_pretrained(folder, safe_serialization=True)."
        )
    from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification

    maker = AutoModelForSequenceClassification if kind == "text" else AutoModelForImageClassification
    with _quiet():
        try:
            module, info = maker.from_pretrained(
                str(path), local_files_only=True, trust_remote_code=False, use_safetensors=True, output_loading_info=True
            )  # fmt: skip
        except Exception as error:
            raise checks.ModelError(
                f"{path} could not be opened by transformers ({type(error).__name__}: {first_line(error)}); allowed: a "
                "folder as save_pretrained writes it. Save it again with this version of transformers."
            ) from error
    lacking = sorted([*info.get("missing_keys", ()), *map(str, info.get("mismatched_keys", ()))])
    if lacking:
        raise checks.ModelError(
            f"the weights in {path} lack {lacking[0]}"
            + (f" and {len(lacking) - 1} more" if len(lacking) > 1 else "")
            + ", which would be random; allowed: the weights of the whole classifier. Fine-tune it and save it again."
        )
    module = module.eval()
    if device is not None:
        module.to(torch.device(device))
    if int(module.config.num_labels) < 2 or module.config.problem_type in (
        "regression",
        "multi_label_classification",
    ):
        raise checks.ModelError(
            f"{path} is a model of {module.config.num_labels} outputs for {module.config.problem_type or 'a regression'}; "
            "allowed: a classifier with one label an input. Audit another head."
        )
    classes = tuple(str(module.config.id2label[i]) for i in range(module.config.num_labels))
    if all(name == f"LABEL_{i}" for i, name in enumerate(classes)):
        classes = ()
    if kind == "text":
        reader, remarks = _text_model(path, module)
        return OpenedModel(module, path.name, classes=classes, text_model=reader, remarks=remarks)
    picture = _Picture(module, _processor(path)).eval()
    return OpenedModel(picture, path.name, classes=classes, remarks=[picture.remark])


# -- texts ------------------------------------------------------------------------------------------------------


def _text_model(path: Path, module: Any) -> tuple[TextModel, list[str]]:
    from transformers import AutoTokenizer

    with _quiet():
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                str(path), local_files_only=True, trust_remote_code=False
            )
        except Exception as error:
            raise checks.ModelError(
                f"{path} has no tokenizer that can be opened ({type(error).__name__}: {first_line(error)}); allowed: the "
                "files of tokenizer.save_pretrained beside the weights. Save it there."
            ) from error
    remarks = []
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise checks.ModelError(
                f"the tokenizer in {path} has neither a token for padding nor one for the end of a text; allowed: one of "
                "them, since texts are read in batches. Set tokenizer.pad_token and save it again."
            )
        tokenizer.pad_token = tokenizer.eos_token
        remarks = [
            f"The tokenizer has no token for padding: {tokenizer.eos_token!r}, the end of a text, stands for it."
        ]
    if module.config.pad_token_id is None:
        module.config.pad_token_id = tokenizer.pad_token_id
    # Some tokenizers state no limit, and position tables of the RoBERTa family keep two places for themselves.
    longest = min(
        int(tokenizer.model_max_length), int(getattr(module.config, "max_position_embeddings", 512))
    )
    if int(getattr(module.config, "pad_token_id", 0) or 0) == 1:
        longest = min(longest, int(getattr(module.config, "max_position_embeddings", 514)) - 2)
    special = set(tokenizer.all_special_ids)
    table = module.get_input_embeddings()

    def tokenize(texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        encoded = tokenizer(
            list(texts), padding=True, truncation=True, max_length=longest, return_tensors="pt"
        )
        ids, mask = encoded["input_ids"], encoded["attention_mask"]
        if ids.shape[1] == 0:
            # Texts of no tokens at all are read as beside a longer one: as padding.
            ids = torch.full((len(ids), 1), int(tokenizer.pad_token_id or 0))
            mask = torch.zeros_like(ids)
        place = next(module.parameters()).device
        return ids.to(place), mask.to(place)

    def predict(texts: Sequence[str]) -> Tensor:
        ids, mask = tokenize(texts)
        return unwrap_output(module(input_ids=ids, attention_mask=mask)).cpu()

    def from_embeddings(embedded: Tensor, mask: Tensor) -> Tensor:
        return unwrap_output(module(inputs_embeds=embedded, attention_mask=mask))

    def decode(ids: Tensor) -> list[str]:
        # Marks of a new word differ between tokenizers; the letters alone are matched with the words.
        return [
            f"[{i}]" if int(i) in special else str(tokenizer.decode([int(i)])).removeprefix("##").strip()
            for i in ids
        ]

    # Where one token stands for the unknown and for an end as well, it tells nothing.
    others = (getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "cls", "sep", "pad", "mask"))
    unknown = None if tokenizer.unk_token_id in others else tokenizer.unk_token_id
    return TextModel(predict, tokenize, table, from_embeddings, decode, unknown, longest), remarks


# -- images -----------------------------------------------------------------------------------------------------


class _Picture(nn.Module):
    """An image classifier of pictures in [0, 1]: resized, cropped and normalised as its processor says."""

    mean: Tensor
    std: Tensor

    def __init__(self, inner: Any, processor: dict[str, Any]) -> None:
        super().__init__()
        self.inner = inner
        channels = int(getattr(inner.config, "num_channels", 3))
        normal = bool(processor.get("do_normalize", False))
        mean = processor.get("image_mean") or [0.0] if normal else [0.0]
        std = processor.get("image_std") or [1.0] if normal else [1.0]
        mean, std = (list(v) if isinstance(v, list | tuple) else [float(v)] for v in (mean, std))
        place = next(inner.parameters()).device
        self.register_buffer("mean", torch.tensor(mean, device=place).reshape(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std, device=place).reshape(1, -1, 1, 1))
        self.channels = channels
        self.size = _pair(processor.get("size")) if processor.get("do_resize", bool(processor)) else None
        self.shortest = isinstance(processor.get("size"), dict) and "shortest_edge" in processor["size"]
        # The numbers of Pillow: 3 is bicubic, and the rest is near enough to bilinear.
        self.mode = "bicubic" if processor.get("resample") == 3 else "bilinear"
        self.crop = _pair(processor.get("crop_size")) if processor.get("do_center_crop", False) else None
        final = self.crop or self.size or _pair(getattr(inner.config, "image_size", None))
        self.remark = (
            "Pictures are normalised inside the audit as preprocessor_config.json says"
            + (f", and brought to {final[1]}x{final[0]}" if final else "")
            + "; radii are in units of [0, 1]."
            if processor
            else "The folder has no preprocessor_config.json; pictures in [0, 1] reach the model as they are."
        )

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] == 3 and self.channels == 1:
            x = x.mean(1, keepdim=True)
        if self.size is not None:
            height, width = self.size
            if self.shortest:
                ratio = self.size[0] / min(x.shape[2:])
                height, width = (max(1, round(ratio * s)) for s in x.shape[2:])
            if (height, width) != tuple(x.shape[2:]):
                x = nn.functional.interpolate(x, (height, width), mode=self.mode, antialias=True).clamp(0, 1)
        if self.crop is not None:
            top, left = ((s - c) // 2 for s, c in zip(x.shape[2:], self.crop, strict=True))
            x = x[:, :, max(0, top) : max(0, top) + self.crop[0], max(0, left) : max(0, left) + self.crop[1]]
        return unwrap_output(self.inner(pixel_values=(x - self.mean) / self.std))


def _pair(size: Any) -> tuple[int, int] | None:
    if isinstance(size, dict):
        if "shortest_edge" in size:
            return int(size["shortest_edge"]), int(size["shortest_edge"])
        return (int(size["height"]), int(size["width"])) if "height" in size else None
    if isinstance(size, list | tuple) and len(size) == 2:
        return int(size[0]), int(size[1])
    return None if size is None else (int(size), int(size))


def _processor(path: Path) -> dict[str, Any]:
    file = path / "preprocessor_config.json"
    if not file.exists():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else {}
    except ValueError as error:
        raise checks.ModelError(
            f"{file} is not JSON ({first_line(error)}); allowed: the file of save_pretrained. Save the processor again."
        ) from error


# -- folders ----------------------------------------------------------------------------------------------------


def _config(path: Path) -> dict[str, Any]:
    file = path / "config.json"
    if not file.exists():
        raise checks.ModelError(
            f"{path} is a folder without config.json; allowed: a Hugging Face folder with config.json and "
            "model.safetensors. Name the folder that save_pretrained wrote, or the file of the model."
        )
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise checks.ModelError(
            f"{file} is not JSON ({first_line(error)}); allowed: the file of save_pretrained. Save the model again."
        ) from error
    if not isinstance(found, dict):
        raise checks.ModelError(
            f"{file} holds a {type(found).__name__}; allowed: the file of save_pretrained. Save the model again."
        )
    return found


def _kind(path: Path, config: dict[str, Any]) -> str:
    if own := config.get("auto_map"):
        named = list(own.values()) if isinstance(own, dict) else [own]
        raise checks.ModelError(
            f"{path} needs code of its own ({', '.join(map(str, named[:2]))}), which is never "
            "run; allowed: architectures of transformers. Load it yourself and pass a function, as module:function."
        )
    stated = config.get("architectures") or ()
    architectures = [str(a) for a in (stated if isinstance(stated, list | tuple) else [stated])]
    if any(a.endswith(_TEXT) for a in architectures):
        return "text"
    if any(a.endswith(_IMAGE) for a in architectures):
        return "image"
    raise checks.ModelError(
        f"{path} holds a {', '.join(architectures) or 'model of no stated architecture'}; allowed: ...{_TEXT} or "
        f"...{_IMAGE}. Fine-tune it as a classifier and save it again."
    )


class _quiet:
    """Keep transformers from printing bars and reports while a model is opened."""

    def __enter__(self) -> None:
        from transformers.utils import logging

        self.level, self.bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
        logging.set_verbosity_error()
        logging.disable_progress_bar()

    def __exit__(self, *_: object) -> None:
        from transformers.utils import logging

        logging.set_verbosity(self.level)
        if self.bars:
            logging.enable_progress_bar()
