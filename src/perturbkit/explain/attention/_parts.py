"""Attention with edited scores: what goes on inside the attention modules of a transformer, on hooks that come off."""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from perturbkit.core import checks

# Scores below this are blocked by a mask that was added before (-1e4, the smallest number, or -inf).
_BLOCKED = -5e3
_FILL = -1e4
_SOFTMAX = {functional.softmax, torch.softmax, Tensor.softmax, torch.special.softmax}


class Edit(TorchFunctionMode):
    """Answers attention's own operations with edited scores while an attention module runs."""

    def __init__(self, factors: Tensor) -> None:
        super().__init__()
        self.factors = factors
        self.depth = self.count = self.seen = 0

    def enter(self, module: nn.Module, args: Any) -> None:
        if self.depth == 0:
            self.seen = self.count
        self.depth += 1

    def leave(self, module: nn.Module, args: Any, out: Any) -> None:
        self.depth -= 1
        if self.depth == 0 and self.count == self.seen:
            raise checks.ModelError(
                f"a {type(module).__name__} ran without scores over {self.factors.shape[1]} keys; allowed: attention "
                "over the input's own tokens by scaled_dot_product_attention or a softmax. Load the model with "
                "attn_implementation='eager', or pass attention= to leave this module out."
            )

    def finish(self, module: nn.Module, args: Any, out: Any) -> None:
        if self.count == 0:
            raise checks.ModelError(
                f"the {type(module).__name__} answered without its attention modules; allowed: a model that calls them. "
                "Pass attention=, a function that tells the modules that it does call."
            )

    def __torch_function__(self, func: Any, types_: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = kwargs or {}
        if self.depth:
            if func is functional.scaled_dot_product_attention:
                return self.attend(*args, **options)
            if func in _SOFTMAX:
                return self.softmax(*args, **options)
            if func is functional.multi_head_attention_forward:
                # It would hand itself to this mode for ever; its own steps go to the two functions above instead.
                inside = {"scaled_dot_product_attention": self.attend, "softmax": self.softmax}
                return _inside(func, has_torch_function=lambda _: False, **inside)(*args, **options)
        return func(*args, **options)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
        is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
    ) -> Tensor:  # fmt: skip
        """Do what scaled_dot_product_attention does, with edited scores."""
        queries, keys = query.shape[-2], key.shape[-2]
        factors = self.rows(query.shape[0], keys)
        if factors is None:
            return functional.scaled_dot_product_attention(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )
        if enable_gqa:
            key, value = (z.repeat_interleave(query.shape[1] // z.shape[1], 1) for z in (key, value))
        out = query.new_empty(*query.shape[:-1], value.shape[-1])
        # Blocks of queries, so that the scores held at once are few beside the queries themselves.
        step = max(1, queries * query.shape[-1] // (8 * keys))
        place = torch.arange(keys, device=query.device)
        for a in range(0, queries, step):
            part = slice(a, a + step)
            scores = (query[..., part, :] * (scale or query.shape[-1] ** -0.5)) @ key.mT
            blocked = place > torch.arange(queries, device=query.device)[part, None] if is_causal else None
            if attn_mask is not None:
                given = attn_mask if attn_mask.shape[-2] == 1 else attn_mask[..., part, :]
                if given.dtype != torch.bool:
                    scores = scores + given
                hidden = ~given if given.dtype == torch.bool else scores < _BLOCKED
                blocked = hidden if blocked is None else hidden | blocked
            weights = suppressed(scores, factors, blocked).softmax(-1)
            out[..., part, :] = functional.dropout(weights, dropout_p) @ value
        return out

    def softmax(
        self, input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: Any = None
    ) -> Tensor:
        """Do what softmax does, with edited scores, if these are over the tokens."""
        last = dim in (-1, input.ndim - 1) and input.ndim >= 3
        factors = self.rows(input.shape[0], input.shape[-1]) if last else None
        if factors is None:
            return torch.softmax(input, dim, dtype=dtype)  # type: ignore[arg-type]
        out = torch.empty_like(input, dtype=dtype or input.dtype)
        step = max(1, input.shape[-2] // 16)
        for a in range(0, input.shape[-2], step):
            scores = input[..., a : a + step, :].to(out.dtype)
            out[..., a : a + step, :] = suppressed(scores, factors, scores < _BLOCKED).softmax(-1)
        return out

    def rows(self, n: int, keys: int) -> Tensor | None:
        """Return the factors of ``n`` rows (of heads, where they lie in the batch), or None if they are for others."""
        if keys != self.factors.shape[1] or n % len(self.factors):
            return None
        self.count += 1
        return self.factors.repeat_interleave(n // len(self.factors), 0)


def suppressed(scores: Tensor, factors: Tensor, mask: Tensor | None) -> Tensor:
    """Shift scores so that the smallest seen is zero, multiply by the factors, and mask."""
    seen = scores if mask is None else scores.masked_fill(mask, torch.inf)
    wide = factors.to(scores.dtype).reshape(len(factors), *[1] * (scores.ndim - 2), -1)
    edited = (scores - seen.amin(-1, keepdim=True)) * wide
    return edited if mask is None else edited.masked_fill(mask, _FILL)


def _inside(func: Any, **replaced: Any) -> Any:
    """Return a Python function with other meanings for some of the global names that it uses."""
    made = types.FunctionType(
        func.__code__, {**func.__globals__, **replaced}, func.__name__, func.__defaults__, func.__closure__
    )
    made.__kwdefaults__ = func.__kwdefaults__
    return made


def is_attention(module: nn.Module) -> bool:
    """Tell attention modules by their class."""
    name = type(module).__name__.lower()
    return isinstance(module, nn.MultiheadAttention) or "attention" in name or "attn" in name
