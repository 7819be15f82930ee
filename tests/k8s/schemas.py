"""Manifests against the schemas of their kinds, as an API server would check them.

A Ray kind is checked in three steps: nulls dropped and defaults filled in, the CRD's schema with unknown fields as
errors, then its CEL rules, but for those that compare with an older object.
"""

import copy
import functools
from collections.abc import Iterator
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from tests.k8s.manifests import ROOT, Document, name_of

CRDS = ROOT.parent / "shared" / "kuberay-crds"
KUBERNETES = "1.37"


def core_kinds(documents: list[Document]) -> Iterator[str]:
    """What is wrong with kinds of Kubernetes itself."""
    for document in documents:
        if not document["apiVersion"].startswith("ray.io/"):
            try:
                kubernetes_validate.validate(document, KUBERNETES, strict=True)
            except kubernetes_validate.ValidationError as error:
                yield f"{name_of(document)}: {error.message}"


def ray_kinds(documents: list[Document]) -> Iterator[str]:
    """What is wrong with kinds of KubeRay."""
    for document in documents:
        if document["apiVersion"].startswith("ray.io/"):
            schema = crds()[document["kind"]]
            whole = _complete(copy.deepcopy(document), schema)
            for error in jsonschema.Draft202012Validator(_strict(schema)).iter_errors(whole):
                yield f"{name_of(document)}: {error.json_path}: {error.message}"
            yield from (f"{name_of(document)}: {message}" for message in _broken_rules(whole, schema, "$"))


@functools.cache
def crds() -> dict[str, Document]:
    """The schema of each kind of ray.io/v1."""
    if not CRDS.exists():
        pytest.skip(f"KubeRay's CRDs are not in {CRDS}")
    found = {}
    for path in CRDS.glob("*.yaml"):
        crd = yaml.load(path.read_text(), yaml.CSafeLoader)["spec"]
        (version,) = [version for version in crd["versions"] if version["name"] == "v1"]
        found[crd["names"]["kind"]] = version["schema"]["openAPIV3Schema"]
    return found


def _complete(value: Any, schema: Document) -> Any:
    """`value` without the nulls that its schema forbids and with the defaults that it lacks, in place."""
    if isinstance(value, dict):
        for key, part in schema.get("properties", {}).items():
            if key in value and value[key] is None and not part.get("nullable"):
                del value[key]
            if key not in value and "default" in part:
                value[key] = copy.deepcopy(part["default"])
    for _, child, part in _children(value, schema):
        _complete(child, part)
    return value


def _children(value: Any, schema: Document) -> Iterator[tuple[str, Any, Document]]:
    """Key, value and schema of what lies in an object or a list."""
    if isinstance(value, dict):
        known, others = schema.get("properties", {}), schema.get("additionalProperties")
        for key, child in value.items():
            if isinstance(part := known.get(key, others), dict):
                yield key, child, part
    elif isinstance(value, list):
        yield from ((str(n), child, schema["items"]) for n, child in enumerate(value))


def _strict(schema: Any) -> Any:
    """The schema as plain JSON Schema, in which an object has no fields but those that are named."""
    if isinstance(schema, list):
        return [_strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    plain = {key: _strict(part) for key, part in schema.items() if key != "properties"}
    if "properties" in schema:
        plain["properties"] = {key: _strict(part) for key, part in schema["properties"].items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            plain.setdefault("additionalProperties", False)
    if schema.get("x-kubernetes-int-or-string"):
        plain = {key: part for key, part in plain.items() if key != "anyOf"} | {"type": ["integer", "string"]}
    if schema.get("nullable"):
        plain["type"] = [plain["type"], "null"]
    return plain


def _broken_rules(value: Any, schema: Document, path: str) -> Iterator[str]:
    import cel

    for rule in schema.get("x-kubernetes-validations", []):
        if "oldSelf" not in rule["rule"] and cel.evaluate(rule["rule"], {"self": value}) is not True:
            yield f"{path}: {rule.get('message', rule['rule'])}"
    for key, child, part in _children(value, schema):
        yield from _broken_rules(child, part, f"{path}.{key}")
