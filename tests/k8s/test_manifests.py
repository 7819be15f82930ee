"""The manifests are what an API server, KubeRay's operator and a careful person accept, and fit the repository."""

import re
import subprocess
import sys

import pytest
import yaml

from cluster import recipe_file
from tests.k8s import operator_rules, reference_rules, schemas, security_rules
from tests.k8s.manifests import KUSTOMIZATIONS, ROOT, Document, load, name_of

RULES = {
    "core": schemas.core_kinds,
    "ray": schemas.ray_kinds,
    "operator": operator_rules.broken,
    "security": security_rules.broken,
    "reference": reference_rules.broken,
}
RECIPES = {
    "k8s/base": "k8s/recipe.yaml",
    "k8s/overlays/cpu": "k8s/overlays/cpu/recipe.yaml",
    "k8s/overlays/serve": "k8s/recipe.yaml",
}
REMOVED = object()


@pytest.mark.parametrize("kustomization", KUSTOMIZATIONS)
@pytest.mark.parametrize("rules", RULES)
def test_manifests__keep(rules: str, kustomization: str) -> None:
    assert list(RULES[rules](load(kustomization))) == []


@pytest.mark.parametrize("kustomization", KUSTOMIZATIONS)
def test_recipe__parses_and_has_room(kustomization: str) -> None:
    loaded = recipe_file.load(str(ROOT / RECIPES[kustomization]))
    assert list(reference_rules.room(loaded, load(kustomization))) == []


def changed(documents: list[Document], name: str, path: str, value: object) -> None:
    """Replaces or removes one value; `path` is dotted, numbers index lists, and `\\.` is a dot in a key."""
    (document,) = [document for document in documents if name_of(document) == name]
    parts = [part.replace("\\.", ".") for part in re.split(r"(?<!\\)\.", path)]
    *parents, last = [int(part) if part.isdigit() else part for part in parts]
    place = document
    for part in parents:
        place = place.setdefault(part, {}) if isinstance(place, dict) else place[part]
    if value is REMOVED:
        del place[last]
    else:
        place[last] = value


CLUSTER, JOB = "RayCluster/scopeworks", "RayJob/sweep"
HEAD, FIT = "spec.headGroupSpec.template.spec", "spec.workerGroupSpecs.1.template.spec"
INSIDE = "NetworkPolicy/ray-among-itself"
OUTSIDE = "NetworkPolicy/ray-to-outside"
OPERATOR = "NetworkPolicy/operator-to-dashboard"
# (document, field to change, value, rules that must notice, part of what they say)
SABOTAGES = {
    "a misspelt field of a policy": (INSIDE, "spec.ingres", [], "core", "ingres"),
    "a port as a text": ("NetworkPolicy/operator-to-dashboard", "spec.ingress.0.ports.0.port", [8265], "core", "8265"),
    "a misspelt field of a job": (JOB, "spec.backofLimit", 3, "ray", "backofLimit"),
    "a number as a text": (JOB, "spec.backoffLimit", "3", "ray", "integer"),
    "a misspelt field of a pod": (CLUSTER, f"{FIT}.toleration", [], "ray", "toleration"),
    "a number where Ray wants a text": (CLUSTER, "spec.headGroupSpec.rayStartParams.num-cpus", 0, "ray", "string"),
    "a CEL rule": (CLUSTER, "spec.managedBy", "nobody", "ray", "managedBy"),
    "a long name": (JOB, "metadata.name", "s" * 48, "operator", "too long"),
    "a name that begins with a number": (CLUSTER, "metadata.name", "1st", "operator", "DNS-1035"),
    "resources in two places": (CLUSTER, "spec.headGroupSpec.resources", {"CPU": "1"}, "operator", "both"),
    "labels as a parameter": (CLUSTER, "spec.headGroupSpec.rayStartParams.labels", "a=b", "operator", "refused"),
    "no label value": (CLUSTER, "spec.workerGroupSpecs.0.labels.ray-subcluster", "a b", "operator", "label value"),
    "an old Ray": (CLUSTER, "spec.rayVersion", "2.51.0", "operator", "2.52.0"),
    "more replicas than the bound": (CLUSTER, "spec.workerGroupSpecs.0.replicas", 9, "operator", "bounds"),
    "a submitter pod in SidecarMode": (JOB, "spec.submitterPodTemplate", {"spec": {}}, "operator", "excludes"),
    "a head that restarts": (JOB, f"spec.rayClusterSpec.{HEAD[5:]}.restartPolicy", "Always", "operator", "Never"),
    "a job that sleeps": (JOB, "spec.rayClusterSpec.suspend", True, "operator", "never start"),
    "Kubernetes' tokens": (JOB, "spec.rayClusterSpec.authOptions.enableK8sTokenAuth", True, "operator", "refused"),
    "a cluster that stays": (JOB, "spec.shutdownAfterJobFinishes", False, "operator", "ttlSeconds"),
    "two ways to delete": (JOB, "spec.deletionStrategy", {"deletionRules": [{}]}, "operator", "deletionStrategy"),
    "a negative backoff": (JOB, "spec.backoffLimit", -1, "operator", "negative"),
    "no token": (CLUSTER, "spec.authOptions.mode", "disabled", "security", "token authentication"),
    "a token of the operator's": (JOB, "spec.rayClusterSpec.authOptions.secretName", REMOVED, "security", "token"),
    "a load balancer": (CLUSTER, "spec.headGroupSpec.serviceType", "LoadBalancer", "security", "ClusterIP"),
    "an ingress": (JOB, "spec.rayClusterSpec.headGroupSpec.enableIngress", True, "security", "ClusterIP"),
    "the host's network": (CLUSTER, f"{FIT}.hostNetwork", True, "security", "host's namespaces"),
    "the host's port": (CLUSTER, f"{HEAD}.containers.0.ports.0.hostPort", 6379, "security", "port is the host's"),
    "root": (CLUSTER, f"{HEAD}.securityContext.runAsNonRoot", False, "security", "root"),
    "root in one container": (CLUSTER, f"{FIT}.containers.0.securityContext.runAsUser", 0, "security", "root"),
    "no seccomp": (CLUSTER, f"{FIT}.securityContext.seccompProfile", REMOVED, "security", "seccomp"),
    "a mounted token": (CLUSTER, f"{HEAD}.automountServiceAccountToken", True, "security", "token is mounted"),
    "an account's token": ("ServiceAccount/scopeworks", "automountServiceAccountToken", REMOVED, "security", "mounted"),
    "a volume of the host": (CLUSTER, f"{FIT}.volumes.1.hostPath", {"path": "/"}, "security", "host's"),
    "a writable root": (
        CLUSTER, f"{FIT}.containers.0.securityContext.readOnlyRootFilesystem", REMOVED, "security", "written",
    ),
    "capabilities": (CLUSTER, f"{HEAD}.containers.0.securityContext.capabilities", REMOVED, "security", "privileges"),
    "a secret in plain": (CLUSTER, f"{HEAD}.containers.0.env.2", {"name": "HF_TOKEN", "value": "x"}, "security", "HF_"),
    "a secret among the settings": ("ConfigMap/scopeworks-settings", "data.HF_TOKEN", "x", "security", "HF_TOKEN"),
    "no memory limit": (CLUSTER, f"{FIT}.containers.0.resources.limits.memory", REMOVED, "security", "requests"),
    "shared memory on disk": (CLUSTER, f"{FIT}.volumes.0.emptyDir.medium", REMOVED, "security", "/dev/shm"),
    "little shared memory": (CLUSTER, f"{FIT}.volumes.0.emptyDir.sizeLimit", "1Gi", "security", "/dev/shm"),
    "much shared memory": (CLUSTER, f"{HEAD}.volumes.0.emptyDir.sizeLimit", "9Gi", "security", "/dev/shm counts"),
    "no default": ("NetworkPolicy/deny-all", "spec.policyTypes", ["Ingress"], "security", "no policy denies"),
    "open to all": (INSIDE, "spec.ingress.0.from", [], "security", "open to all"),
    "open to the namespace": (INSIDE, "spec.ingress.0.from.0", {"podSelector": {}}, "security", "are open to"),
    "open to all namespaces": (OPERATOR, "spec.ingress.0.from.0.namespaceSelector", {}, "security", "are open to"),
    "the operator at the GCS": (OPERATOR, "spec.ingress.0.ports.0.port", 6379, "security", "are open to"),
    "the operator at all ports": (OPERATOR, "spec.ingress.0.ports", REMOVED, "security", "are open to"),
    "to anywhere": (OUTSIDE, "spec.egress.0.to", REMOVED, "security", "anything"),
    "the metadata service": (OUTSIDE, "spec.egress.1.to.0.ipBlock.except", REMOVED, "security", "metadata"),
    "an unlisted secret": (
        CLUSTER, f"{HEAD}.containers.0.env.2.valueFrom.secretKeyRef.name", "aws", "reference", "'aws'",
    ),
    "an unlisted key": (CLUSTER, f"{HEAD}.containers.0.env.2.valueFrom.secretKeyRef.key", "id", "reference", "'id'"),
    "another namespace": (INSIDE, "metadata.namespace", "default", "reference", "namespace"),
    "another account": (CLUSTER, f"{HEAD}.serviceAccountName", "default", "reference", "no such service account"),
    "another claim": (
        CLUSTER, f"{FIT}.volumes.2.persistentVolumeClaim.claimName", "runs", "reference", "no volume claim runs",
    ),
    "a mount without a volume": (CLUSTER, f"{FIT}.containers.0.volumeMounts.0.name", "x", "reference", "differ"),
    "another config map": (
        CLUSTER, f"{FIT}.containers.0.envFrom.0.configMapRef.name", "settings", "reference", "no config map settings",
    ),
    "runs that end with the pod": (
        "ConfigMap/scopeworks-settings", "data.SCOPEWORKS_HOME", "/tmp/runs", "reference", "outlives",
    ),
    "a home that is read-only": (CLUSTER, f"{FIT}.containers.0.env.0.value", "/root", "reference", "/tmp"),
    "a head that sees GPUs": (CLUSTER, f"{HEAD}.containers.0.env.1.value", "all", "reference", "GPUs"),
    "another image": (CLUSTER, f"{FIT}.containers.0.image", "scopeworks:latest", "reference", "not this version's"),
    "another folder": (CLUSTER, f"{HEAD}.containers.0.workingDir", "/app", "reference", "workingDir"),
    "another user": (CLUSTER, f"{HEAD}.securityContext.runAsUser", 1001, "reference", "runAsUser"),
    "a script that is not there": (JOB, "spec.entrypoint", "python jobs/swep.py s3://b/r.yaml", "reference", "swep"),
    "a script outside the image": (
        JOB, "spec.entrypoint", "python tests/check_demo.py s3://b/r.yaml", "reference", "check_demo",
    ),
    "a recipe on no store": (JOB, "spec.entrypoint", "python jobs/sweep.py demo.yaml", "reference", "no recipe on S3"),
    "pods of its own": (JOB, "spec.rayClusterSpec.workerGroupSpecs.0.replicas", 1, "reference", "standing"),
    "another Ray": (CLUSTER, "spec.rayVersion", "2.59.0", "reference", "constraints.txt"),
}  # fmt: skip


@pytest.mark.parametrize("name", SABOTAGES)
def test_sabotage__is_noticed(name: str) -> None:
    document, path, value, rules, part = SABOTAGES[name]
    documents = load("k8s/base")
    changed(documents, document, path, value)
    problems = list(RULES[rules](documents))
    assert any(part in problem for problem in problems), problems


@pytest.mark.parametrize(
    ("path", "value", "rules", "part"),
    [
        ("spec.serveConfigV2", "applications: []", "reference", "config.yaml"),
        ("spec.serveConfig", "x", "ray", "serveConfig"),
        ("spec.rayClusterConfig.workerGroupSpecs.0.maxReplicas", 2, "reference", "no room"),
        (
            "spec.rayClusterConfig.workerGroupSpecs.0.template.spec.containers.0.env.3.name",
            "X",
            "reference",
            "no token",
        ),
        ("spec.rayClusterConfig.authOptions.mode", "disabled", "security", "token authentication"),
        ("spec.rayClusterConfig.rayVersion", "2.59.0", "reference", "constraints.txt"),
        ("metadata.name", "e" * 48, "operator", "too long"),
    ],
)
def test_sabotaged_endpoint__is_noticed(path: str, value: object, rules: str, part: str) -> None:
    documents = load("k8s/overlays/serve")
    changed(documents, "RayService/endpoint", path, value)
    problems = list(RULES[rules](documents))
    assert any(part in problem for problem in problems), problems


@pytest.mark.parametrize(
    ("path", "value", "part"),
    [
        ("spec.workerGroupSpecs.0.labels.ray-subcluster", "model", "harvest wants 2"),
        ("spec.workerGroupSpecs.1.template.spec.containers.0.resources.limits.cpu", "7", "fit wants 2"),
        ("spec.workerGroupSpecs.1.template.spec.containers.0.resources.limits.nvidia\\.com/gpu", "1", "fit wants 2"),
        ("spec.headGroupSpec.rayStartParams.num-cpus", "4", "on the head"),
    ],
)
def test_room__is_missed_where_it_is_not(path: str, value: str, part: str) -> None:
    documents = load("k8s/base")
    changed(documents, CLUSTER, path, value)
    loaded = recipe_file.load(str(ROOT / RECIPES["k8s/base"]))
    assert any(part in problem for problem in reference_rules.room(loaded, documents))


def test_service__that_opens_a_port_is_noticed() -> None:
    service = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "head"}, "spec": {"type": "NodePort"}}
    assert next(security_rules.broken([service])) == "Service/head: is reachable from outside"


def test_image__holds_what_runs() -> None:
    assert list(reference_rules.dockerfile()) == []


def test_image__installs_the_projects_dependencies() -> None:
    (script,) = re.findall(r'python -c "(.*?)"', reference_rules.DOCKERFILE)
    printed = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert printed.stdout.splitlines() == reference_rules.PROJECT["project"]["dependencies"]


def test_readme__names_every_file_and_only_paths_that_exist() -> None:
    named = re.findall(r"(?:-f|-k) (\S+)", reference_rules.README)
    assert {"k8s/Dockerfile", "k8s/base", "k8s/base/namespace.yaml"} == set(named)
    assert all((ROOT / path).exists() for path in named)
    top = {path.name for path in (ROOT / "k8s").iterdir()} | {path.name for path in (ROOT / "k8s/overlays").iterdir()}
    assert all(name in reference_rules.README for name in top - {"README.md"})
    (patch,) = re.findall(r"-p '(.*)'", reference_rules.README)
    documents = load("k8s/base")
    changed(documents, CLUSTER, "spec.suspend", yaml.safe_load(patch)["spec"]["suspend"])
    assert list(schemas.ray_kinds(documents)) == []
