"""AtMan on the sentence classifier against captum's integrated gradients at the embeddings, 50 steps as is its default.

The floor is AtMan's own: one forward pass a token and one more. What AtMan saves is memory: no graph is kept.
"""

from __future__ import annotations

import torch
from benchmarks._timing import Row, compare, table

from perturbkit.core import Oracle
from perturbkit.explain import atman


def main(rounds: int = 5) -> list[Row]:
    """Print the table and return its rows."""
    from captum.attr import IntegratedGradients

    from perturbkit.data import text_model

    module = text_model().module.requires_grad_(False)
    text = "The room was clean and bright, the staff were kind, and breakfast alone was worth the journey to the coast."
    encoded = module.encode([text])
    ids, mask = encoded["input_ids"], encoded["attention_mask"]
    label = int(module(ids, mask).argmax(1))
    n = ids.shape[1]
    embedded = module.embeddings(ids)

    def ours() -> object:
        return atman(Oracle(module), ids, label, attention_mask=mask, cosine_threshold=None)

    def forward(embeddings: torch.Tensor) -> torch.Tensor:
        return module(inputs_embeds=embeddings, attention_mask=mask.expand(len(embeddings), -1))

    def theirs() -> object:
        return IntegratedGradients(forward).attribute(
            embedded, torch.zeros_like(embedded), target=label, n_steps=50
        )

    def floor() -> None:
        with torch.no_grad():
            module(ids.expand(n + 1, -1), mask.expand(n + 1, -1))

    ours(), theirs(), floor()
    rows = compare(ours, {f"AtMan, {n} tokens, captum integrated gradients": theirs}, floor, rounds)
    print(table(rows))
    return rows


if __name__ == "__main__":
    main()
