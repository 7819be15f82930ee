"""The bodies in JSON, as the OpenAPI document has them: the contract of every route."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, NonNegativeInt

from serve.catalog import Entry

# After the first wrong number nothing more is looked at: there may be millions.
Row = Annotated[list[FiniteFloat], Field(fail_fast=True)]
Matrix = Annotated[list[Row], Field(fail_fast=True, min_length=1)]
Sites = Annotated[dict[str, Matrix], Field(min_length=1, description="Rows by site, such as resid_post.9")]


class Body(BaseModel):
    """What is posted: unknown keys and texts for numbers are refused."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class RowsBody(Body):
    """Rows to encode: a list of rows for a dictionary that reads one site, else rows by site."""

    rows: Matrix | Sites


class ReconstructBody(RowsBody):
    """Rows to rebuild."""

    targets: Matrix | Sites | None = Field(
        None, description="What is to be rebuilt, where it is not what is read; without it there is no fvu"
    )


class RowFeatures(Body):
    """Active latents of one row, each once."""

    indices: Annotated[list[NonNegativeInt], Field(fail_fast=True)]
    values: Row


class DecodeBody(Body):
    """Features, sparse or dense."""

    features: Annotated[list[RowFeatures], Field(fail_fast=True, min_length=1)] | None = None
    latents: Matrix | None = Field(None, description="In place of features: every latent of every row")
    rows: Matrix | Sites | None = Field(None, description="What was encoded: needed, and allowed, if affine is true")


class Message(Body):
    """A turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


class PromptBody(Body):
    """A text or a conversation."""

    text: str | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = Field(
        None, description="In place of text: rendered with the model's chat template"
    )


class FeaturesBody(PromptBody):
    """A text, and the dictionaries that read it."""

    dictionaries: Annotated[list[str], Field(min_length=1, description="Ids or digests")]
    top_k: Annotated[int, Field(ge=1, le=2**31)] | None = Field(None, description="The largest of a token")
    threshold: Annotated[FiniteFloat, Field(ge=0, description="Only values above it")] = 0.0


class ChangeBody(Body):
    """One latent to be changed."""

    dictionary: str
    feature: NonNegativeInt
    change: Literal["add", "clamp", "ablate"] = Field(description="Adds `value` to it, sets it to `value`, or to 0")
    value: Annotated[FiniteFloat, Field(ge=-1e6, le=1e6)] = 0.0


class SteerBody(PromptBody):
    """What is to be answered, with which latents changed."""

    changes: Annotated[list[ChangeBody], Field(min_length=1)]
    new_tokens: Annotated[int, Field(ge=1)] = 64
    temperature: Annotated[FiniteFloat, Field(ge=0, le=10, description="0: the likeliest token each time")] = 0.0
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] = 0


class Token(BaseModel):
    """A position of the text."""

    id: int
    text: str
    masked: bool = Field(description="No dictionary is trained on its rows, and it has no features")


class TextFeatures(BaseModel):
    """What one dictionary finds."""

    dictionary: str
    digest: str
    features: list[RowFeatures] = Field(description="By token")


class Read(BaseModel):
    """A text's tokens, and what each dictionary finds at them."""

    model: str
    tokens: list[Token]
    dictionaries: list[TextFeatures]


class Said(BaseModel):
    """A line of a steered answer: what one more token adds, then, last, the whole of both."""

    steered: str
    plain: str = Field(description="The answer with nothing changed")
    done: bool = False


class Feature(BaseModel):
    """One latent of a dictionary."""

    dictionary: str
    digest: str
    feature: int
    threshold: float = Field(description="Its pre-activation must be above it")
    bias: float
    norms: dict[str, float] = Field(description="Of its decoder row, by site that it writes")
    evidence: dict[str, Any] | None = Field(None, description="Where it was seen active, if that was published")


class Answered(BaseModel):
    """Which dictionary answered."""

    dictionary: str
    digest: str


class Encoded(Answered):
    """Active latents, by row."""

    features: list[RowFeatures]


class Decoded(Answered):
    """Rebuilt rows, by site."""

    rows: dict[str, list[list[float]]]


class Reconstructed(Decoded):
    """Rebuilt rows, and how much of each is not explained."""

    fvu: list[float | None] | None = Field(
        description="Squared error over squared distance to b_dec, a row, averaged over sites"
    )


class Listing(BaseModel):
    """One page."""

    dictionaries: list[Entry]
    total: int
    next: str | None = Field(description="`after` of the next page")


class ProblemDocument(BaseModel):
    """RFC 9457."""

    type: str
    title: str
    status: int
    detail: str
    request_id: str


BINARY: dict[str, Any] = {
    "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
    "application/vnd.apache.arrow.stream": {"schema": {"type": "string", "format": "binary"}},
}
