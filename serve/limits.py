"""How much one request and all of them together may ask for."""

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveFloat, PositiveInt

from serve.problems import Problem

T = TypeVar("T")


class Limits(BaseModel):
    """Of one ingress replica. A full house holds about (`concurrent` + `burst`) × `body_bytes` in bodies."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    body_bytes: PositiveInt = 2**24
    """Of a request's body, after it is decompressed too."""
    body_seconds: PositiveFloat = 20.0
    """Until the whole body is there."""
    idle_seconds: PositiveFloat = 5.0
    """Between two parts of it."""
    json_depth: PositiveInt = 8
    rows: PositiveInt = 4096
    """Of a request; each with all the columns of its dictionary."""
    numbers: PositiveInt = 2**22
    """Active (row, latent) pairs of an answer, or posted; and columns of all rows of an answer."""
    named_features: PositiveInt = 1024
    """Latents that a request may choose by number: they stand in its URL."""
    text_tokens: PositiveInt = 1024
    """Of a text or conversation."""
    text_dictionaries: PositiveInt = 32
    """That read one text."""
    new_tokens: PositiveInt = 256
    """Of an answer."""
    changes: PositiveInt = 32
    """Latents that are changed in one answer."""
    concurrent: PositiveInt = 16
    """Requests in the house; the next is refused at once, but for `burst`. What is let in takes at most about the time
    of so many: few keep answers fast under overload, many keep callers who come together from being sent away."""
    burst: NonNegativeInt = 8
    """Requests more than these: so many in the house at once after a pause, six a minute in the long run."""
    answer_seconds: PositiveFloat = Field(30.0)
    """Until a replica has answered."""
    retry_seconds: PositiveInt = 1
    """What a refused request is told to wait."""


async def in_time(answer: Awaitable[T], limits: Limits) -> T:
    """Problem if no replica gives it before the request has waited long enough."""
    try:
        async with asyncio.timeout(limits.answer_seconds):  # wait_for would make a task of its own
            return await answer
    except TimeoutError:
        raise Problem(503, "no replica answered in time", retry_after=limits.retry_seconds) from None
