"""AtMan: which tokens an answer rests on, from the rise of its loss when attention to each of them is turned down.

Use it for transformers where gradients are too expensive or do not reach the input: forward passes only. Deiseroth, Deb,
Weinbach, Brack, Schramowski and Kersting (2023), AtMan: Understanding Transformer Predictions Through Memory Efficient
Attention Manipulation, arXiv:2301.08110.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from perturbkit.core import Attribution, Oracle, checks, target_rows, track, unwrap_output
from perturbkit.core.progress import ProgressLike
from perturbkit.explain.attention._parts import Edit, is_attention, suppressed

__all__ = ["atman", "attention_hooks", "suppress_attention"]

_IGNORED = -100
# Numbers of the inputs held at once, in copies, one a token.
_BLOCK = 2**22


def atman(
    model: Oracle | nn.Module,
    x: Tensor,
    target: Tensor | int,
    *,
    suppression: float = 0.9,
    cosine_threshold: float | None = 0.7,
    attention_mask: Tensor | None = None,
    embed: Callable[[Tensor], Tensor] | None = None,
    attention: Callable[[nn.Module], bool] | None = None,
    progress: ProgressLike = False,
) -> Attribution:
    """Attribute an answer of a transformer to its input tokens.

    Parameters
    ----------
    model : Oracle or nn.Module
        A transformer of batches that answers logits, (n, classes) or, a decoder, (n, length, vocabulary), or an object
        with ``.logits``. Any whose attention is ``nn.MultiheadAttention``, ``scaled_dot_product_attention`` or a
        softmax over scores inside a module named for attention.
    x : Tensor, shape (n, length) or (n, length, width)
        Token numbers, or embeddings.
    target : Tensor or int
        The class, one a row, shape (n,); for a decoder shape (n, length): the token that the logits at each position
        should predict, -100 at positions that are not scored.
    suppression : float
        Share of the attention taken away, in [0, 1].
    cosine_threshold : float or None
        Tokens whose embeddings have at least this cosine with the token in question are turned down with it, by
        ``suppression`` times the cosine; ``None`` turns down one token at a time.
    attention_mask : Tensor, shape (n, length), optional
        1 for a token, 0 for padding; handed to the model by keyword.
    embed : callable, optional
        Maps token numbers to embeddings, for the cosines. Default: the model's ``get_input_embeddings()``, or ``x``
        itself where it holds embeddings.
    attention : callable, optional
        Tells attention modules from others; see :func:`attention_hooks`.
    progress : Progress, bool or None
        Reports blocks of tokens.

    Returns
    -------
    Attribution
        ``values`` in the shape of ``x`` (a token's score at each of its coordinates, for embeddings): the rise of the
        loss. ``extras["base_loss"]``, shape (n,), and ``extras["suppressed_losses"]``, shape (n, length).

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If an argument is not allowed.
    ModelError
        If the model has no attention that can be turned down.

    Notes
    -----
    ``S_i = L(target | f_i) - L(target | 1)``, with L the cross-entropy summed over scored positions and f_i the factors
    of :func:`suppress_attention`: ``f_ij = 1 - suppression c_ij`` where ``c_ij >= cosine_threshold``, else 1.

    Cost: ``length + 1`` evaluations a row, in chunks, without a graph; beyond a forward pass, memory is a small part
    of the attention scores.

    References
    ----------
    Deiseroth et al. (2023), arXiv:2301.08110.

    Examples
    --------
    >>> from perturbkit.core.random import as_generator, randn
    >>> class Mean(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.attention = nn.MultiheadAttention(4, 1, batch_first=True)
    ...         with torch.no_grad():
    ...             for p in self.parameters():
    ...                 p.copy_(randn(p.shape, generator=as_generator(0)))
    ...
    ...     def forward(self, x):
    ...         return self.attention(x, x, x)[0].mean(1)
    >>> with torch.random.fork_rng():
    ...     model = Mean()
    >>> atman(model, torch.eye(4)[None], 0, cosine_threshold=None).extras["suppressed_losses"].shape
    torch.Size([1, 4])
    """
    checks.tensor("x", x, ndim=(2, 3), floating=x.ndim == 3 if isinstance(x, Tensor) else False)
    checks.between("suppression", suppression, 0, 1)
    oracle = Oracle.wrap(model)
    module = _module(oracle.fun)
    wanted = _targets(target, x)
    if attention_mask is not None:
        checks.tensor("attention_mask", attention_mask, shape=x.shape[:2], floating=False)
    before, (n, length) = oracle.cost, x.shape[:2]
    factors = 1 - suppression * _neighbours(module, x, cosine_threshold, embed)
    # The first variant of each row is left as it is: its loss is what the others are compared with.
    factors = torch.cat([torch.ones_like(factors[:, :1]), factors], 1)

    def losses(ids: Tensor, labels: Tensor, edit: Tensor, *mask: Tensor) -> Tensor:
        options = {"attention_mask": mask[0]} if mask else {}
        with attention_hooks(module, edit, attention=attention):
            return _loss(unwrap_output(module(ids, **options)), labels)

    inner = Oracle(losses, memory=oracle.memory, chunk_size=oracle.chunk_size, device=oracle.device)
    found, group = [], max(1, _BLOCK // ((length + 1) * x[0].numel()))
    with oracle.frozen():
        for start in track(range(0, n, group), "AtMan", progress=progress):
            rows = torch.arange(start, min(start + group, n), device=x.device).repeat_interleave(length + 1)
            masks = () if attention_mask is None else (attention_mask[rows],)
            edit = factors[start : start + group].flatten(0, 1)
            found.append(inner(x[rows], wanted[rows], edit, *masks))
    oracle.nfev += inner.nfev
    every = torch.cat(found).reshape(n, length + 1)
    base, others = every[:, 0], every[:, 1:]
    values = others - base[:, None]
    if x.ndim == 3:
        values = values[..., None].expand_as(x).contiguous()
    return Attribution(
        values, wanted, oracle.cost - before, "AtMan", {"base_loss": base, "suppressed_losses": others}
    )


def suppress_attention(scores: Tensor, factors: Tensor, mask: Tensor | None = None) -> Tensor:
    """Turn down attention to some keys, before the softmax.

    Parameters
    ----------
    scores : Tensor, shape (n, ..., queries, keys)
        Scores of attention.
    factors : Tensor, shape (n, keys)
        1 leaves a key as it is, 0 moves it to the smallest score of each query.
    mask : Tensor of bool, broadcastable to ``scores``, optional
        True where a query must not see a key.

    Returns
    -------
    Tensor, shape of ``scores``
        The new scores, -1e4 where masked.

    Raises
    ------
    ArgumentError
        If the factors have another shape or are negative.

    Notes
    -----
    ``H' = (H - min_k H) f``, with the minimum over the keys that the query sees, and the mask applied afterwards.
    Without the shift a negative score would shrink towards zero, so that a key turned down would gain attention.

    References
    ----------
    Deiseroth et al. (2023), arXiv:2301.08110, section 3.2.

    Examples
    --------
    >>> suppress_attention(torch.tensor([[[-1.0, -3.0]]]), torch.tensor([[0.5, 1.0]]))
    tensor([[[1., 0.]]])
    """
    checks.tensor("factors", factors, shape=(scores.shape[0], scores.shape[-1]))
    if float(factors.min()) < 0:
        raise checks.ArgumentError(
            f"factors has a smallest value of {float(factors.min()):g}; allowed: numbers from 0. Use 0 to silence a key."
        )
    return suppressed(scores, factors, mask)


@contextmanager
def attention_hooks(
    model: nn.Module, factors: Tensor, *, attention: Callable[[nn.Module], bool] | None = None
) -> Iterator[None]:
    """Turn down attention to some tokens in every layer and head of a transformer while the context is open.

    Parameters
    ----------
    model : nn.Module
        A transformer; also a single ``nn.MultiheadAttention``.
    factors : Tensor, shape (n, length)
        Factors of :func:`suppress_attention`, one row for each row of the batch that the model will be given.
    attention : callable, optional
        Tells attention modules from others. Default: ``nn.MultiheadAttention``, and every module whose class name
        contains "attention" or "attn".

    Yields
    ------
    None

    Raises
    ------
    ModelError
        If there is no attention module, or one ran without scores of ``length`` keys that could be turned down.

    Notes
    -----
    Inside attention modules, calls of ``scaled_dot_product_attention`` and of softmax over the last dimension are
    answered with the edited scores, in blocks of queries. Nothing of the model is replaced; the hooks that mark the
    inside of attention modules come off when the context closes, also after an exception.

    References
    ----------
    Deiseroth et al. (2023), arXiv:2301.08110.

    Examples
    --------
    >>> with torch.random.fork_rng():
    ...     layer = nn.MultiheadAttention(4, 1, batch_first=True)
    >>> x = torch.eye(4)[None]
    >>> with torch.no_grad(), attention_hooks(layer, torch.tensor([[0.0, 1.0, 1.0, 1.0]])):
    ...     weights = layer(x, x, x)[1]
    >>> bool((weights[..., 0] <= weights.amin(-1) + 1e-6).all())
    True
    """
    checks.tensor("factors", factors, ndim=2)
    chosen = [m for m in _module(model).modules() if (attention or is_attention)(m)]
    if not chosen:
        raise checks.ModelError(
            f"the model, a {type(model).__name__}, has no attention module; allowed: one whose class name contains "
            "'attention', or nn.MultiheadAttention. Pass attention=, a function that tells attention modules."
        )
    edit = Edit(factors)
    with ExitStack() as stack:
        for module in chosen:
            stack.callback(module.register_forward_pre_hook(edit.enter).remove)
            stack.callback(module.register_forward_hook(edit.leave).remove)
        stack.callback(model.register_forward_hook(edit.finish).remove)
        stack.enter_context(edit)
        yield


def _module(fun: Any) -> nn.Module:
    if not isinstance(fun, nn.Module):
        raise checks.ArgumentTypeError(
            f"model is a {type(fun).__name__}; allowed: an nn.Module, or an Oracle of one: attention is turned down "
            "inside it. Pass the module itself."
        )
    return fun


def _targets(target: Tensor | int, x: Tensor) -> Tensor:
    rows = torch.as_tensor(target, device=x.device)
    if rows.ndim < 2:
        return target_rows(rows, x)
    checks.tensor("target", rows, shape=x.shape[:2], floating=False)
    if not bool((rows != _IGNORED).any(1).all()):
        raise checks.ArgumentError(
            "target is -100 at every position of a row; allowed: at least one token to be scored a row. Set the next "
            "token at the positions whose prediction is explained."
        )
    return rows.long()


def _neighbours(
    module: nn.Module, x: Tensor, threshold: float | None, embed: Callable[[Tensor], Tensor] | None
) -> Tensor:
    """Return how far each token is turned down with each, shape (n, length, length)."""
    one = torch.eye(x.shape[1], device=x.device, dtype=x.dtype if x.is_floating_point() else None)
    if threshold is None:
        return one.expand(len(x), -1, -1)
    checks.between("cosine_threshold", threshold, -1, 1)
    if embed is None and x.ndim == 2:
        known = next((m for m in module.modules() if hasattr(m, "get_input_embeddings")), None)
        if known is None:
            raise checks.ArgumentError(
                "embed is None and the model has no get_input_embeddings; allowed: a function from token numbers to "
                "embeddings. Pass embed=, or cosine_threshold=None to turn down one token at a time."
            )
        embed = known.get_input_embeddings()  # type: ignore[operator]
    with torch.no_grad():
        states = functional.normalize(x if embed is None else embed(x), dim=-1)
    cosine = (states @ states.mT).clamp(max=1)
    return torch.maximum(torch.where(cosine >= threshold, cosine.clamp(min=0), torch.zeros_like(cosine)), one)


def _loss(logits: Tensor, target: Tensor) -> Tensor:
    """Return the cross-entropy of each row, summed over its scored positions."""
    if logits.ndim != target.ndim + 1 or int(target.max()) >= logits.shape[-1]:
        raise checks.ArgumentError(
            f"target has shape {tuple(target.shape)} and a largest value of {int(target.max())} for logits of shape "
            f"{tuple(logits.shape)}; allowed: (n,) for (n, classes), (n, length) for (n, length, vocabulary). "
            "Pass an index of an output."
        )
    flat = functional.cross_entropy(
        logits.flatten(0, -2), target.flatten(), reduction="none", ignore_index=_IGNORED
    )
    return flat.reshape(len(target), -1).sum(1)
