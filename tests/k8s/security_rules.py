"""What must hold so that nobody but a holder of the token, inside the cluster, can run code on it."""

import ipaddress
import re
from collections.abc import Iterator
from typing import Any

from tests.k8s.manifests import Document, Group, clusters, groups, name_of, of_kind, quantity

RAY_PORTS = {6379, 8265, 10001}
RAY_PODS = {"matchLabels": {"ray.io/is-ray-node": "yes"}}
METADATA_SERVICE = ipaddress.ip_address("169.254.169.254")
SECRET_NAME = re.compile(r"KEY|SECRET|TOKEN|PASSWORD|USERNAME")


def broken(documents: list[Document]) -> Iterator[str]:
    for where, spec in clusters(documents).items():
        auth = spec.get("authOptions", {})
        if auth.get("mode") != "token" or not auth.get("secretName"):
            yield f"{where}: no token authentication with a secret of ours"
    for group in groups(documents):
        for problem in (*_exposed(group.spec), *_privileges(group), *_secrets(group.container), *_resources(group)):
            yield f"{group.where}: {problem}"
    for document in of_kind(documents, "Service"):
        if document["spec"].get("type", "ClusterIP") != "ClusterIP":
            yield f"{name_of(document)}: is reachable from outside"
    for document in of_kind(documents, "ServiceAccount"):
        if document.get("automountServiceAccountToken") is not False:
            yield f"{name_of(document)}: its token is mounted"
    for document in of_kind(documents, "Secret"):
        yield f"{name_of(document)}: a secret lies in the repository"
    for document in of_kind(documents, "ConfigMap"):
        yield from (f"{name_of(document)}: {key} is a secret" for key in document["data"] if SECRET_NAME.search(key))
    yield from network(of_kind(documents, "NetworkPolicy"))


def _exposed(spec: Document) -> Iterator[str]:
    if spec.get("serviceType", "ClusterIP") != "ClusterIP" or spec.get("enableIngress") or spec.get("headService"):
        yield "the head's service is no plain ClusterIP"
    pod = spec["template"]["spec"]
    if any(pod.get(field) for field in ("hostNetwork", "hostPID", "hostIPC")):
        yield "shares the host's namespaces"
    if any("hostPort" in port for container in pod["containers"] for port in container.get("ports", [])):
        yield "a port is the host's"


def _privileges(group: Group) -> Iterator[str]:
    pod, security = group.pod, group.pod.get("securityContext", {})
    if not security.get("runAsNonRoot") or not security.get("runAsUser"):
        yield "may run as root"
    if security.get("seccompProfile") != {"type": "RuntimeDefault"}:
        yield "no seccomp profile"
    if pod.get("automountServiceAccountToken") is not False:
        yield "the service account's token is mounted"
    if any("hostPath" in volume for volume in pod["volumes"]):
        yield "a volume is the host's"
    for container in pod["containers"]:
        own = container.get("securityContext", {})
        if own.get("runAsUser", 1) == 0 or own.get("runAsNonRoot") is False or own.get("privileged"):
            yield "a container runs as root"
        if own.get("allowPrivilegeEscalation") is not False or own.get("capabilities") != {"drop": ["ALL"]}:
            yield "a container can gain privileges"
        if own.get("readOnlyRootFilesystem") is not True:
            yield "a container's root can be written"


def _secrets(container: Document) -> Iterator[str]:
    for variable in container["env"]:
        if SECRET_NAME.search(variable["name"]) and "secretKeyRef" not in variable.get("valueFrom", {}):
            yield f"{variable['name']} is no reference to a secret"


def _resources(group: Group) -> Iterator[str]:
    asked = group.container["resources"]
    if asked["requests"] != asked["limits"] or not {"cpu", "memory"} <= asked["limits"].keys():
        yield "requests and limits of cpu and memory are not the same"
    shared = group.mounts.get("/dev/shm", {}).get("emptyDir", {})
    store = int(group.spec["rayStartParams"]["object-store-memory"])
    if shared.get("medium") != "Memory" or quantity(shared["sizeLimit"]) < store:
        yield "/dev/shm is not in memory or smaller than the object store"
    elif quantity(asked["limits"].get("memory", 0)) < 2 * quantity(shared["sizeLimit"]):
        yield "/dev/shm counts as the container's memory and leaves less than half of it"


def network(policies: list[Document]) -> Iterator[str]:
    """A namespace that denies by default, and Ray's ports open to Ray's pods and, the dashboard, to the operator."""
    everything = {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    if everything not in [policy["spec"] for policy in policies]:
        yield "no policy denies all by default"
    for policy in policies:
        for rule in policy["spec"].get("ingress", []):
            if problem := _opens_ray(rule):
                yield f"{name_of(policy)}: {problem}"
        for rule in policy["spec"].get("egress", []):
            if not rule.get("to"):
                yield f"{name_of(policy)}: anything may be reached"
            yield from (f"{name_of(policy)}: the metadata service may be reached" for _ in _metadata_blocks(rule))


def _opens_ray(rule: Document) -> str | None:
    ports = {port.get("port") for port in rule.get("ports", [])}
    if not rule.get("from"):
        return "open to all"
    for peer in rule["from"]:
        ours = peer == {"podSelector": RAY_PODS}
        operator = ports == {8265} and _names_pods_of_one_namespace(peer)
        reaches_ray = not ports or ports & RAY_PORTS or not all(isinstance(port, int) for port in ports)
        if reaches_ray and not ours and not operator:
            return f"Ray's ports are open to {peer}"
    return None


def _names_pods_of_one_namespace(peer: Document) -> bool:
    chosen: list[Any] = [peer.get(key, {}).get("matchLabels") for key in ("namespaceSelector", "podSelector")]
    return all(chosen) and set(chosen[0]) == {"kubernetes.io/metadata.name"}


def _metadata_blocks(rule: Document) -> Iterator[Document]:
    for peer in rule.get("to", []):
        if block := peer.get("ipBlock"):
            inside = METADATA_SERVICE in ipaddress.ip_network(block["cidr"])
            if inside and not any(METADATA_SERVICE in ipaddress.ip_network(part) for part in block.get("except", [])):
                yield block
