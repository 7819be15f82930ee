"""Who may call: bearer tokens, of which the service keeps only SHA-256.

A token has 256 random bits, so that a plain hash cannot be searched. The list is YAML or JSON:

    - {name: interpretability, sha256: 9f86…, scopes: [read], requests_per_second: 50, burst: 100}
"""

import hashlib
import hmac
import os
import secrets
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, TypeAdapter

from serve.bucket import Bucket

FILE, TEXT = "SCOPEWORKS_TOKENS_FILE", "SCOPEWORKS_TOKENS"
Scope = Literal["read", "steer", "admin"]


class NoTokens(ValueError):
    """The service would be open to everybody."""


class Caller(BaseModel):
    """A named token."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")]
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    scopes: frozenset[Scope] = Field(min_length=1)
    requests_per_second: PositiveFloat = 100.0
    burst: PositiveInt = 200
    """Requests that may come at once after a pause."""


ANYBODY = Caller(
    name="local", sha256="0" * 64, scopes=frozenset({"read", "steer", "admin"}), requests_per_second=1e9, burst=10**9
)


def new() -> tuple[str, str]:
    """A token and its hash."""
    token = f"sw_{secrets.token_urlsafe(32)}"
    return token, sha256(token)


def sha256(token: str) -> str:
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).hexdigest()


def load(environment: Mapping[str, str] = os.environ) -> list[Caller]:
    """From the file or text that the environment names; NoTokens without any, ValueError if they are not sound."""
    if path := environment.get(FILE):
        text = Path(path).read_text()
    elif not (text := environment.get(TEXT, "")):
        raise NoTokens(f"no token is configured: set {FILE} or {TEXT}; python -m serve token NAME makes one")
    callers = TypeAdapter(list[Caller]).validate_python(yaml.safe_load(text) or [])
    if not callers:
        raise NoTokens(f"the list of {FILE if path else TEXT} is empty: python -m serve token NAME makes a token")
    for field in ("name", "sha256"):
        values = [getattr(caller, field) for caller in callers]
        if len(set(values)) < len(values):
            raise ValueError(f"{field}: two tokens have the same")
    return callers


class Tokens:
    """The callers by their tokens, and how fast each has been calling."""

    def __init__(self, callers: list[Caller], now: Callable[[], float] = time.monotonic):
        self.callers = callers
        self.buckets = {caller.name: Bucket(caller.burst, caller.requests_per_second, now) for caller in callers}

    def find(self, token: str) -> Caller | None:
        """Compares with every hash, each to its end, whichever is right."""
        digest, found = sha256(token), None
        for caller in self.callers:
            if hmac.compare_digest(digest, caller.sha256):
                found = caller
        return found

    def wait(self, caller: Caller) -> float:
        """0 if this one may call now; else the seconds until it may."""
        return self.buckets[caller.name].take()
