"""The OpenAPI document of routes that read their bodies themselves: what FastAPI cannot know of them is added."""

from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from serve import schemas

PLACE = "#/components/schemas/{model}"
BODIES: tuple[type[schemas.Body], ...] = (
    schemas.RowsBody, schemas.DecodeBody, schemas.ReconstructBody, schemas.FeaturesBody, schemas.SteerBody,
)  # fmt: skip


def posted(body: type[schemas.Body], **others: Any) -> dict[str, Any]:
    """`openapi_extra` of a route that takes this body in JSON, and perhaps other media types."""
    json_body = {"application/json": {"schema": {"$ref": PLACE.format(model=body.__name__)}}}
    return {"requestBody": {"required": True, "content": json_body | others}}


def complete(app: FastAPI) -> None:
    """Adds the schemas that the routes refer to."""
    incomplete = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = incomplete()
            models: list[tuple[type[BaseModel], Any]] = [(body, "validation") for body in BODIES]
            _, definitions = models_json_schema(models, ref_template=PLACE)
            document["components"]["schemas"] |= definitions["$defs"]
        assert app.openapi_schema is not None
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
