"""What KubeRay's operator refuses in its own code, where no schema says so (reference: its validation.go, v1.7)."""

import re
from collections.abc import Iterator

from tests.k8s.manifests import Document, clusters, groups, name_of, of_kind

NAME_LENGTHS = {"RayCluster": 53, "RayJob": 47, "RayService": 47}  # names of services and clusters are made from them
DNS_1035 = r"[a-z]([-a-z0-9]*[a-z0-9])?"
LABEL_VALUE = r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?"
RESOURCE_PARAMETERS = {"num-cpus", "num-gpus", "memory", "resources"}


def broken(documents: list[Document]) -> Iterator[str]:
    for document in of_kind(documents, *NAME_LENGTHS):
        name = document["metadata"]["name"]
        if len(name) > NAME_LENGTHS[document["kind"]] or not re.fullmatch(DNS_1035, name):
            yield f"{name_of(document)}: the name is too long or no DNS-1035 label"
    for where, spec in clusters(documents).items():
        yield from (f"{where}: {problem}" for problem in _cluster(spec))
    for group in groups(documents):
        if RESOURCE_PARAMETERS & group.spec.get("rayStartParams", {}).keys() and group.spec.get("resources"):
            yield f"{group.where}: resources are both in rayStartParams and in resources"
        if "labels" in group.spec.get("rayStartParams", {}):
            yield f"{group.where}: rayStartParams.labels is refused: use labels"
        if not all(re.fullmatch(LABEL_VALUE, value) for value in group.spec.get("labels", {}).values()):
            yield f"{group.where}: no label value"
    for document in of_kind(documents, "RayJob"):
        yield from (f"{name_of(document)}: {problem}" for problem in _job(document["spec"]))


def _cluster(spec: Document) -> Iterator[str]:
    if spec.get("authOptions", {}).get("mode") == "token":
        version = re.fullmatch(r"(\d+)\.(\d+)\.(\d+)", spec.get("rayVersion", ""))
        if not version or tuple(map(int, version.groups())) < (2, 52, 0):
            yield "token authentication needs rayVersion 2.52.0 or later"
    for group in spec["workerGroupSpecs"]:
        if not group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]:
            yield f"{group['groupName']}: replicas are not between the bounds"


def _job(spec: Document) -> Iterator[str]:
    if spec["submissionMode"] == "SidecarMode":
        for field in ("clusterSelector", "submitterPodTemplate", "submitterConfig"):
            if spec.get(field):
                yield f"SidecarMode excludes {field}"
        if spec["rayClusterSpec"]["headGroupSpec"]["template"]["spec"].get("restartPolicy", "Never") != "Never":
            yield "SidecarMode needs the head's restartPolicy Never"
    if spec["rayClusterSpec"].get("suspend"):
        yield "the job's cluster would never start"
    if spec["rayClusterSpec"]["authOptions"].get("enableK8sTokenAuth"):
        yield "enableK8sTokenAuth is refused in a RayJob"
    if spec.get("ttlSecondsAfterFinished") and not spec.get("shutdownAfterJobFinishes"):
        yield "ttlSecondsAfterFinished needs shutdownAfterJobFinishes"
    if spec.get("shutdownAfterJobFinishes") and spec.get("deletionStrategy"):
        yield "shutdownAfterJobFinishes excludes deletionStrategy"
    if spec.get("backoffLimit", 0) < 0:
        yield "backoffLimit is negative"
