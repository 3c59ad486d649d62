"""Where noise comes from: the operating system's secure source, or a generator that the caller seeded.

Every draw is made of uniform 64-bit words, so both sources give the same distributions. Integers are exact: uniform
ones by rejection, discrete Laplace and Gaussian ones by the samplers of Canonne, Kamath and Steinke (2020),
arXiv:2004.00010, which use integers only and therefore have no floating-point gaps to attack.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import scipy.special
import torch

from perturbkit.core.random import Seed, as_generator

__all__ = ["Noise"]

Integers = np.ndarray[Any, np.dtype[np.int64]]

# Products below this fit int64 with room for the denominators k = 1, 2, ... of the series of exp.
_WORD = 2**62
_TERMS = 64


class Noise:
    """Random numbers from one source.

    Parameters
    ----------
    generator : torch.Generator, int or None
        ``None``: ``os.urandom``. Otherwise that generator; repeatable, hence not private against one who knows it.

    Attributes
    ----------
    secure : bool
        Whether the source is the operating system's.
    """

    def __init__(self, generator: Seed = None) -> None:
        self.secure = generator is None
        self._generator = None if generator is None else as_generator(generator)

    def words(self, n: int) -> np.ndarray:
        """Return ``n`` uniform 64-bit words."""
        if self._generator is None:
            return np.frombuffer(os.urandom(8 * n), dtype=np.uint64)
        drawn = torch.empty(n, dtype=torch.int64, device=self._generator.device)
        drawn.random_(-(2**63), None, generator=self._generator)
        return drawn.cpu().numpy().view(np.uint64)

    def below(self, bounds: Integers) -> Integers:
        """Return exactly uniform integers in 0 .. bound - 1, one for each bound in 1 .. 2**63 - 1."""
        limits = bounds.astype(np.uint64)
        out = np.empty(len(limits), dtype=np.int64)
        todo = np.arange(len(limits))
        while len(todo):
            words, limit = self.words(len(todo)), limits[todo]
            rest = words % limit
            # A word is kept if its whole block of `limit` values lies below 2**64.
            kept = words - rest <= np.uint64(2**64 - 1) - (limit - np.uint64(1))
            out[todo[kept]] = rest[kept].astype(np.int64)
            todo = todo[~kept]
        return out

    def below_int(self, bound: int) -> int:
        """Return an exactly uniform integer in 0 .. bound - 1, of any size."""
        bits = (bound - 1).bit_length()
        while True:
            value = int.from_bytes(self.words(bits // 64 + 1).tobytes(), "little") >> (
                64 * (bits // 64 + 1) - bits
            )
            if value < bound:
                return value

    def uniform(self, shape: Sequence[int]) -> np.ndarray:
        """Return doubles in (0, 1), the middles of 2**53 cells."""
        words = self.words(math.prod(shape)) >> np.uint64(11)
        return ((words.astype(np.float64) + 0.5) * 2.0**-53).reshape(tuple(shape))

    def normal(self, shape: Sequence[int]) -> np.ndarray:
        """Return standard normal doubles by inversion of 63 bits and a sign."""
        words = self.words(math.prod(shape))
        tail = ((words >> np.uint64(1)).astype(np.float64) + 0.5) * 2.0**-64
        sign = 1.0 - 2.0 * (words & np.uint64(1)).astype(np.float64)
        return (-sign * scipy.special.ndtri(tail)).reshape(tuple(shape))

    def exponential(self, shape: Sequence[int]) -> np.ndarray:
        """Return standard exponential doubles."""
        return -np.log(self.uniform(shape))

    def laplace(self, shape: Sequence[int]) -> np.ndarray:
        """Return standard Laplace doubles."""
        return self.exponential(shape) - self.exponential(shape)

    def direction(self, n: int, d: int) -> np.ndarray:
        """Return ``n`` uniform unit vectors of dimension ``d``."""
        z = self.normal((n, d))
        return z / np.linalg.norm(z, axis=1, keepdims=True)

    def discrete_laplace(self, scale: Fraction, n: int) -> Integers:
        """Return ``n`` integers y with chance proportional to exp(-abs(y) / scale), exactly."""
        t, s = scale.numerator, scale.denominator
        out = np.zeros(n, dtype=np.int64)
        todo = np.arange(n)
        while len(todo):
            m = len(todo)
            u = self.below(np.full(m, t))
            kept = self._bernoulli_exp(u, np.full(m, t))
            # The number of successes of exp(-1) before the first failure.
            v, going = np.zeros(m, dtype=np.int64), np.flatnonzero(kept)
            while len(going):
                ones = np.ones(len(going), dtype=np.int64)
                going = going[self._bernoulli_exp(ones, ones)]
                v[going] += 1
            y = (u + t * v) // s
            negative = self.below(np.full(m, 2)) == 1
            kept &= ~(negative & (y == 0))
            out[todo[kept]] = np.where(negative, -y, y)[kept]
            todo = todo[~kept]
        return out

    def discrete_gaussian(self, variance: Fraction, n: int) -> Integers:
        """Return ``n`` integers y with chance proportional to exp(-y**2 / (2 variance)), exactly."""
        p, q = variance.numerator, variance.denominator
        t = math.isqrt(p // q) + 1
        out = np.zeros(n, dtype=np.int64)
        todo = np.arange(n)
        while len(todo):
            y = self.discrete_laplace(Fraction(t), len(todo))
            # (|y| - variance/t)**2 / (2 variance) over one denominator.
            bottom = 2 * p * q * t * t
            largest = int(np.abs(y).max()) * t * q + p
            if largest**2 < _WORD and bottom * _TERMS < _WORD:
                top = (np.abs(y) * (t * q) - p) ** 2
                kept = self._bernoulli_exp(top, np.full(len(y), bottom))
            else:
                kept = np.array(
                    [self._bernoulli_exp_int((abs(v) * t * q - p) ** 2, bottom) for v in y.tolist()]
                )
            out[todo[kept]] = y[kept]
            todo = todo[~kept]
        return out

    def exponential_mechanism(self, scores: Integers, rate: Fraction) -> int:
        """Return an index j with chance proportional to exp(rate * scores[j]), exactly, by rejection."""
        gaps = int(scores.max()) - scores
        top, bottom = rate.numerator, rate.denominator
        while True:
            j = self.below_int(len(scores))
            if self._bernoulli_exp_int(top * int(gaps[j]), bottom):
                return j

    def _bernoulli_exp(self, top: Integers, bottom: Integers) -> np.ndarray:
        """Return true with chance exp(-top/bottom), exactly; top >= 0, bottom >= 1."""
        whole, rest = np.divmod(top, bottom)
        alive = np.ones(len(top), dtype=bool)
        going = np.flatnonzero(whole > 0)
        passed = np.zeros(len(top), dtype=np.int64)
        while len(going):
            ones = np.ones(len(going), dtype=np.int64)
            ok = self._bernoulli_exp_unit(ones, ones)
            alive[going[~ok]] = False
            passed[going] += 1
            going = going[ok & (passed[going] < whole[going])]
        left = np.flatnonzero(alive)
        alive[left] = self._bernoulli_exp_unit(rest[left], bottom[left])
        return alive

    def _bernoulli_exp_unit(self, top: Integers, bottom: Integers) -> np.ndarray:
        """Return true with chance exp(-top/bottom) for top/bottom in [0, 1]: an odd first failure of top/(k bottom)."""
        k = np.ones(len(top), dtype=np.int64)
        going = np.arange(len(top))
        while len(going):
            ok = self.below(bottom[going] * k[going]) < top[going]
            going = going[ok]
            k[going] += 1
        return k % 2 == 1

    def _bernoulli_exp_int(self, top: int, bottom: int) -> bool:
        """Return true with chance exp(-top/bottom) for integers of any size."""
        while top > 0:
            part = min(top, bottom)
            k = 1
            while self.below_int(bottom * k) < part:
                k += 1
            if k % 2 == 0:
                return False
            top -= part
        return True


def rational_above(value: float, bits: int = 10) -> Fraction:
    """Return the smallest fraction with denominator ``2**bits`` that is at least ``value``, above zero."""
    return Fraction(max(math.ceil(Fraction(value) * 2**bits), 1), 2**bits)


def gaussian_variance(value: float) -> Fraction:
    """Return a fraction at least ``value`` whose sampler fits machine integers where that is possible."""
    bits = 10
    while bits > 0 and value * 2**bits > 2**24:
        bits -= 1
    return rational_above(value, bits)
