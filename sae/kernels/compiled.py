"""What loops are compiled by and calculate with: numba, where they first run, so that no compiler is needed.

Arrays of bfloat16 come as their bits, uint16: numba has no such type. What is kept on disk is told by a loop's own file
alone: after a change here, remove sae/kernels/__pycache__.
"""

from collections.abc import Callable

import numba
import numpy as np
from numba import types
from numba.extending import overload


def compiled(function: Callable) -> Callable:
    """Without Python's check of divisors, which keeps loops from becoming vectors; kept on disk for later processes."""
    return numba.njit(function, nogil=True, cache=True, error_model="numpy", fastmath={"reassoc", "contract", "nsz"})


def wide(value):
    """A number to calculate with."""
    raise NotImplementedError


@overload(wide, inline="always")
def _wide(value):
    if isinstance(value, types.Float):
        return lambda value: value
    return lambda value: np.uint32(np.uint32(value) << np.uint32(16)).view(np.float32)


def key(value):
    """An integer of its size, larger for a larger number; of bfloat16, the upper half of that of a float32."""
    raise NotImplementedError


@overload(key, inline="always")
def _key(value):
    if value == types.uint16:
        return lambda value: np.int16(_ordered(np.int16(value), np.int16(15), np.int16(0x7FFF)))
    if value == types.float32:
        return lambda value: np.int32(_ordered(np.float32(value).view(np.int32), np.int32(31), np.int32(0x7FFFFFFF)))
    return lambda value: _ordered(np.float64(value).view(np.int64), np.int64(63), np.int64(0x7FFFFFFFFFFFFFFF))


def stored(value, entries):
    """A number as an array's entries hold it: of bfloat16 the bits."""
    raise NotImplementedError


@overload(stored, inline="always")
def _stored(value, entries):
    if entries.dtype == types.uint16:
        return lambda value, entries: narrow(value)
    return lambda value, entries: value


@compiled
def _ordered(bits, last, others):
    """Of the sign and the magnitude that the other bits are."""
    sign = bits >> last
    return ((bits & others) ^ sign) - sign


@compiled
def part_of(first, by_part, items):
    """Which part of all items it is, as `threads.spread` cuts them, that begins with the first."""
    return (first * by_part.shape[0] + items.shape[0] - 1) // items.shape[0]


@compiled
def narrow(value):
    """The bits of the nearest bfloat16, of two equally near the even one."""
    bits = np.float32(value).view(np.uint32)
    return np.uint16(np.uint32(bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))
