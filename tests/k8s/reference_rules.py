"""What the manifests name must exist: files in the image, secrets in the README, labels and room for the recipe."""

import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import PurePosixPath

import yaml

from cluster.recipe import Recipe
from tests.k8s.manifests import ROOT, Document, Group, clusters, groups, name_of, names, of_kind, quantity

DOCKERFILE = (ROOT / "k8s" / "Dockerfile").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
README = (ROOT / "k8s" / "README.md").read_text()
GPU = "nvidia.com/gpu"


def instruction(name: str) -> list[str]:
    """Arguments of each instruction of the Dockerfile of one name."""
    joined = DOCKERFILE.replace("\\\n", " ")
    return [line.removeprefix(name).strip() for line in joined.splitlines() if line.startswith(f"{name} ")]


def copied() -> dict[str, str]:
    """What the image takes from the repository, and where it lies there."""
    into: dict[str, str] = {}
    for arguments in instruction("COPY"):
        *sources, target = arguments.split()
        for source in sources:
            into[source] = f"{target}{source}" if target.endswith("/") else target
    return into


def secrets_in_readme() -> dict[str, set[str]]:
    """Keys of each secret that the README's commands create."""
    commands = README.replace("\\\n", " ")
    found = re.findall(r"create secret generic (\S+) +(--from.*)", commands)
    return {name: set(re.findall(r"--from-literal=(\w+)=", options)) for name, options in found}


def secrets_named(documents: list[Document]) -> dict[str, set[str]]:
    """Keys of each secret that the manifests refer to."""
    found: dict[str, set[str]] = {}
    for spec in clusters(documents).values():
        found.setdefault(spec["authOptions"]["secretName"], set()).add("auth_token")  # KubeRay's own key
    for group in groups(documents):
        for variable in group.container["env"]:
            if reference := variable.get("valueFrom", {}).get("secretKeyRef"):
                found.setdefault(reference["name"], set()).add(reference["key"])
    return found


def broken(documents: list[Document]) -> Iterator[str]:
    if secrets_named(documents) != secrets_in_readme():
        yield f"the manifests name the secrets {secrets_named(documents)}, the README {secrets_in_readme()}"
    for document in documents:
        if document["metadata"].get("namespace", "scopeworks") not in names(documents, "Namespace"):
            yield f"{name_of(document)}: its namespace is not among the manifests"
    for group in groups(documents):
        yield from (f"{group.where}: {problem}" for problem in (*_pod(group, documents), *_image(group)))
    for document in of_kind(documents, "RayJob"):
        yield from (f"{name_of(document)}: {problem}" for problem in _entrypoint(document["spec"]["entrypoint"]))
    pods = ("headGroupSpec", "workerGroupSpecs", "authOptions", "rayVersion")
    standing, of_job, *of_services = clusters(documents).values()
    if any(standing[part] != of_job[part] for part in pods):
        yield "the job's cluster is not the standing one"
    yield from _services(documents)
    pinned = re.search(r"^ray==(.*)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    if pinned is None or {spec["rayVersion"] for spec in (standing, of_job, *of_services)} != {pinned[1]}:
        yield "rayVersion is not that of constraints.txt"


def _services(documents: list[Document]) -> Iterator[str]:
    """What differs between a RayService and serve/config.yaml, or has no room."""
    for document in of_kind(documents, "RayService"):
        config = yaml.safe_load(document["spec"]["serveConfigV2"])
        if config != yaml.safe_load((ROOT / "serve" / "config.yaml").read_text()):
            yield f"{name_of(document)}: serveConfigV2 is not serve/config.yaml"
            continue
        (group,) = document["spec"]["rayClusterConfig"]["workerGroupSpecs"]
        container = group["template"]["spec"]["containers"][0]
        if "SCOPEWORKS_TOKENS" not in [variable["name"] for variable in container["env"]]:
            yield f"{name_of(document)}: the ingress would know no token"
        (application,) = config["applications"]
        replicas = {one["name"]: one for one in application["deployments"]}["Dictionaries"]
        room = group["maxReplicas"] * int(container["resources"]["limits"]["cpu"])
        if room < replicas["autoscaling_config"]["max_replicas"] * replicas["ray_actor_options"]["num_cpus"] + 1:
            yield f"{name_of(document)}: no room for the most replicas that it may have"


def _pod(group: Group, documents: list[Document]) -> Iterator[str]:
    if group.pod["serviceAccountName"] not in names(documents, "ServiceAccount"):
        yield "no such service account"
    if {mount["name"] for mount in group.container["volumeMounts"]} != {v["name"] for v in group.pod["volumes"]}:
        yield "volumes and mounts differ"
    for volume in group.pod["volumes"]:
        claim = volume.get("persistentVolumeClaim")
        if claim and claim["claimName"] not in names(documents, "PersistentVolumeClaim"):
            yield f"no volume claim {claim['claimName']}"
    maps = {document["metadata"]["name"]: document["data"] for document in of_kind(documents, "ConfigMap")}
    settings = {variable["name"]: variable.get("value", "") for variable in group.container["env"]}
    for source in group.container["envFrom"]:
        if (name := source["configMapRef"]["name"]) not in maps:
            yield f"no config map {name}"
        settings |= maps.get(name, {})
    kept = [path for path, volume in group.mounts.items() if "persistentVolumeClaim" in volume]
    for name in ("SCOPEWORKS_HOME", "XDG_CACHE_HOME", "HF_HOME"):
        if not any(PurePosixPath(settings.get(name, "")).is_relative_to(path) for path in kept):
            yield f"{name} is not on a volume that outlives the pod"
    if "/tmp" not in group.mounts or settings.get("HOME") != "/tmp":
        yield "Ray's files and the home folder need /tmp, for the root is read-only"
    if settings.get("NVIDIA_VISIBLE_DEVICES") != "void" and "head" in group.where:
        yield "the head would see a GPU node's GPUs"


def _image(group: Group) -> Iterator[str]:
    if group.container["image"] != f"scopeworks:{PROJECT['project']['version']}":
        yield f"the image {group.container['image']} is not this version's"
    if [group.container["workingDir"]] != instruction("WORKDIR"):
        yield "workingDir is not the image's"
    user = group.pod["securityContext"]
    if [f"{user['runAsUser']}:{user['runAsGroup']}"] != instruction("USER"):
        yield "runAsUser and runAsGroup are not the image's"


def _entrypoint(command: str) -> Iterator[str]:
    program, script, recipe = shlex.split(command)
    if program != "python" or not (ROOT / script).is_file() or PurePosixPath(script).parts[0] not in copied():
        yield f"{command!r} does not run a file of the image"
    if not re.fullmatch(r"s3://[\w.-]+/\S+\.yaml", recipe):
        yield f"{recipe} is no recipe on S3"


def dockerfile() -> Iterator[str]:
    """What is wrong with the image's description."""
    (folder,) = instruction("WORKDIR")
    if f"PYTHONPATH={folder}" not in " ".join(instruction("ENV")).split():
        yield "the workers of Ray would not find the packages"
    for source in copied():
        if not (ROOT / source).exists():
            yield f"{source} is not in the repository"
    for package in {name.split(".")[0] for name in PROJECT["tool"]["setuptools"]["packages"]}:
        if copied().get(package) != package:
            yield f"the package {package} is not copied"
    if not re.search(rf"-t scopeworks:{re.escape(PROJECT['project']['version'])} ", DOCKERFILE):
        yield "the tag is not this version's"


def room(recipe: Recipe, documents: list[Document]) -> Iterator[str]:
    """What the recipe asks of nodes that the cluster does not have."""
    wanted = {
        "harvest": (recipe.harvest.label_selector, recipe.harvest.actors, recipe.harvest.cpus, recipe.harvest.gpus),
        "fit": (recipe.fit.label_selector, recipe.fit.workers, recipe.fit.cpus_per_worker, int(recipe.fit.gpu)),
    }
    sweeps = {where: spec for where, spec in clusters(documents).items() if not where.startswith("RayService")}
    for where, spec in sweeps.items():
        if spec["headGroupSpec"]["rayStartParams"].get("num-cpus") != "0":
            yield f"{where}: work may land on the head"
        for stage, (labels, processes, cpus, gpus) in wanted.items():
            nodes = [g for g in spec["workerGroupSpecs"] if labels and labels.items() <= g.get("labels", {}).items()]
            places = 0
            for node in nodes:
                has = Group(where, node).container["resources"]["limits"]
                by_gpu = [quantity(has.get(GPU, 0)) // gpus] if gpus else []
                places += node["replicas"] * min([int(quantity(has["cpu"]) / cpus), *by_gpu])
            if places < processes:
                yield f"{where}: {stage} wants {processes} processes on nodes {labels}, there is room for {places}"
