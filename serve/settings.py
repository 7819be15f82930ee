"""What a deployment is told: `args` of the Serve config file, or the command line of `python -m serve`."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, NonNegativeFloat, PositiveFloat, PositiveInt

from serve.limits import Limits


class Settings(BaseModel):
    """An unknown key is an error. Tokens come from the environment (`serve.tokens`), never from here."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    catalog: str
    """A folder of published dictionaries, or s3://bucket/prefix."""
    cache: str = "/tmp/scopeworks-dictionaries"
    """Where the files of a bucket are kept."""
    refresh_seconds: PositiveFloat = 2.0
    """Between two looks for new versions."""
    memory_gib: PositiveFloat = 4.0
    """Of dictionaries that one replica holds; beyond it, those used longest ago are given up."""
    batch_rows: PositiveInt = 4096
    """Most rows that are computed together, of several requests."""
    replicas: PositiveInt = 1
    """That hold dictionaries, where the config file has no `autoscaling_config`."""
    near_mib: NonNegativeFloat = 32.0
    """Rows times a dictionary's weights up to which a request is computed where it arrives, and holds up all others
    meanwhile: that takes less time than the way to a replica."""
    threads: PositiveInt = 1
    """Of torch, in a replica."""
    model: str | None = None
    """A folder or Hugging Face name of the Gemma 3 that reads texts; without it there are no routes for texts."""
    model_name: str | None = None
    """As dictionaries name their model, if that is not `model`."""
    model_dtype: Literal["float32", "bfloat16"] = "float32"
    """bfloat16 halves its memory and is as fast or faster on a GPU; many CPUs have no products in it."""
    model_ranks: PositiveInt = 1
    """Devices of one machine, or on CPUs processes, that share every layer of a model that is larger than one."""
    insecure_local: bool = False
    """Needs no token, and answers the loopback address only."""
    limits: Limits = Limits()
