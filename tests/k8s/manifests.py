"""The manifests as kubectl renders them, and their parts by name."""

import functools
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml

ROOT = Path(__file__).resolve().parent.parent.parent
KUBECTL = Path(sys.executable).with_name("kubectl")
KUSTOMIZATIONS = sorted(str(path.parent.relative_to(ROOT)) for path in (ROOT / "k8s").rglob("kustomization.yaml"))
UNITS = {"": 1, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
Document = dict[str, Any]


@functools.cache
def rendered(kustomization: str) -> str:
    done = subprocess.run([KUBECTL, "kustomize", ROOT / kustomization], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def load(kustomization: str) -> list[Document]:
    """What `kubectl apply -k` would send to the API server."""
    return list(yaml.safe_load_all(rendered(kustomization)))


def name_of(document: Document) -> str:
    return f"{document['kind']}/{document['metadata']['name']}"


def of_kind(documents: list[Document], *kinds: str) -> list[Document]:
    return [document for document in documents if document["kind"] in kinds]


def names(documents: list[Document], kind: str) -> set[str]:
    return {document["metadata"]["name"] for document in of_kind(documents, kind)}


def clusters(documents: list[Document]) -> dict[str, Document]:
    """The specification of each Ray cluster, by the document that it is in."""
    specs = {name_of(document): document["spec"] for document in of_kind(documents, "RayCluster")}
    jobs = {name_of(document): document["spec"]["rayClusterSpec"] for document in of_kind(documents, "RayJob")}
    services = {
        name_of(document): document["spec"]["rayClusterConfig"] for document in of_kind(documents, "RayService")
    }
    return specs | jobs | services


class Group(NamedTuple):
    """Pods of one kind in a Ray cluster."""

    where: str
    spec: Document

    @property
    def pod(self) -> Document:
        return self.spec["template"]["spec"]

    @property
    def container(self) -> Document:
        """The one that runs Ray."""
        return self.pod["containers"][0]

    @property
    def mounts(self) -> dict[str, Document]:
        """The volume at each path of the Ray container."""
        volumes = {volume["name"]: volume for volume in self.pod["volumes"]}
        return {mount["mountPath"]: volumes.get(mount["name"], {}) for mount in self.container["volumeMounts"]}


def groups(documents: list[Document]) -> Iterator[Group]:
    """Heads and worker groups of all clusters."""
    for where, spec in clusters(documents).items():
        yield Group(f"{where} head", spec["headGroupSpec"])
        yield from (Group(f"{where} {group['groupName']}", group) for group in spec["workerGroupSpecs"])


def quantity(text: str) -> int:
    """Bytes or whole units of a Kubernetes quantity."""
    number, unit = re.fullmatch(r"(\d+)(\w*)", str(text)).groups()
    return int(number) * UNITS[unit]
