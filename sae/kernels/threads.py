"""Loops over a batch's rows or a dictionary's latents, cut over threads, and the buffers that they share.

The threads are our own: torch's must not spin meanwhile, which takes their cores (OMP_WAIT_POLICY=PASSIVE before torch
is imported; *measured here*: a step in four fifths of the time).
"""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor


def spread(loop: Callable[..., None], n_items: int, *arguments: Any) -> None:
    """Runs a loop over [0, n_items), cut over torch's threads."""
    plain = [array(one) if isinstance(one, Tensor) else one for one in arguments]
    n_parts = min(torch.get_num_threads(), n_items)
    if n_parts <= 1:
        loop(*plain, 0, n_items)
        return
    ends = [n_items * part // n_parts for part in range(n_parts + 1)]
    others = [_pool().submit(loop, *plain, *ends[part : part + 2]) for part in range(1, n_parts)]
    loop(*plain, 0, ends[1])
    for other in others:
        other.result()


def array(tensor: Tensor) -> np.ndarray:
    """Of bfloat16 the bits."""
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(thread_name_prefix="kernels")


class Scratch(threading.local):
    """Buffers of a thread, reused by all dictionaries: fresh ones cost page faults."""

    def __init__(self) -> None:
        self.buffers: dict[str, Tensor] = {}

    def get(self, name: str, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        """[rows, columns], of undefined content"""
        size = rows * columns
        held = self.buffers.get(name)
        if held is None or held.dtype != dtype or len(held) < size:
            self.buffers[name] = held = torch.empty(size, dtype=dtype)
        return held[:size].view(rows, columns)

    def wide(self, name: str, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        """As `get`, with all columns that there is room for, at least so many."""
        self.get(name, rows, columns, dtype)
        most = len(self.buffers[name]) // rows
        return self.buffers[name][: rows * most].view(rows, most)


SCRATCH = Scratch()
