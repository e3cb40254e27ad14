"""What is in ops/deploy, held to the schemas of those who will read it, and to what the code says of itself.

No cluster, Docker or Grafana runs here: manifests are checked against Kubernetes' schemas and the operators' models, every
unknown field included; the Dockerfile and scripts by linters; configurations by the programs that read them. That the
Slurm script does what it says is shown in tests/distributed/test_slurm.py.
"""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from compose_spec import PyCompose
from gristmill.ops.deploy.prometheus_rule import MANIFEST, prometheus_rule
from gristmill.ops.launch_place import environment
from gristmill.ops.recipe import load_recipe
from kubeflow_trainer_api import models
from pydantic import ValidationError

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "ops" / "deploy"
KUBERNETES, COMPOSE = DEPLOY / "kubernetes", DEPLOY / "compose"
TOOLS = Path(sys.executable).parent
OBJECTS = sorted(p for p in KUBERNETES.glob("*/*.yaml") if p.name != "kustomization.yaml")
# Kinds that Kubernetes itself does not know, and the models of those who do.
MODELS = {
    "JobSet": models.JobsetV1alpha2JobSet,
    "TrainJob": models.TrainerV1alpha1TrainJob,
    "TrainingRuntime": models.TrainerV1alpha1TrainingRuntime,
}


def read(path: Path) -> dict[str, Any]:
    (found,) = yaml.safe_load_all(path.read_text())
    return found


def pod_of(manifest: dict[str, Any]) -> dict[str, Any] | None:
    """The template of the training pods; None where a manifest has none."""
    match manifest["kind"]:
        case "Job":
            return manifest["spec"]["template"]
        case "JobSet":
            jobs = manifest["spec"]["replicatedJobs"]
        case "TrainingRuntime":
            jobs = manifest["spec"]["template"]["spec"]["replicatedJobs"]
        case _:
            return None
    (job,) = jobs
    return job["template"]["spec"]["template"]


PODS = {path.stem: pod for path in OBJECTS if (pod := pod_of(read(path)))}


def unknown(given: Any, kept: Any, path: str = "") -> Iterator[str]:
    """What a model dropped without a word because it has no such field."""
    if isinstance(given, dict) and isinstance(kept, dict):
        for key, value in given.items():
            if key not in kept:
                yield f"{path}.{key}"
            else:
                yield from unknown(value, kept[key], f"{path}.{key}")
    elif isinstance(given, list) and isinstance(kept, list):
        for number, (one, other) in enumerate(zip(given, kept, strict=True)):
            yield from unknown(one, other, f"{path}[{number}]")


def complaints(manifest: dict[str, Any]) -> list[str]:
    """What is wrong with a manifest; the pods inside others' kinds are checked as Kubernetes' own."""
    kind = manifest["kind"]
    if kind in MODELS:
        try:
            kept = MODELS[kind].from_dict(manifest)
        except ValidationError as error:
            return [str(error)]
        found = list(unknown(manifest, kept.to_dict() if kept else {}))
        pod = pod_of(manifest)
        whole = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"} | pod["metadata"]} if pod else None
        return found + (complaints(whole | {"spec": pod["spec"] | image(pod)}) if whole and pod else [])
    try:
        kubernetes_validate.validate(manifest, "1.33", strict=True)
    except kubernetes_validate.ValidationError as error:
        return [str(error)]
    return []


def image(pod: dict[str, Any]) -> dict[str, Any]:
    """A runtime leaves its container's image to the TrainJob."""
    return {"containers": [{"image": "x"} | container for container in pod["spec"]["containers"]]}


@pytest.mark.parametrize("path", OBJECTS, ids=lambda path: path.stem)
def test_manifests_are_what_their_readers_know(path: Path):
    manifest = read(path)
    if manifest["apiVersion"] == "monitoring.coreos.com/v1":
        assert manifest["kind"] in ("PodMonitor", "PrometheusRule")  # looked at below
        return
    assert complaints(manifest) == []
    assert manifest["metadata"]["labels"]["app.kubernetes.io/name"] == "gristmill"


@pytest.mark.parametrize("name", ["jobset", "job", "trainjob", "trainingruntime", "networkpolicy"])
def test_a_mistyped_field_is_seen(name: str):
    """At every depth where our manifests have one."""
    (path,) = (p for p in OBJECTS if p.stem == name)
    manifest = read(path)

    def mistyped(tree: Any, depth: int) -> bool:
        children = tree if isinstance(tree, list) else []
        if isinstance(tree, dict):  # whose labels may be called anything
            children = [value for key, value in tree.items() if key != "metadata"]
        if depth == 0 and isinstance(tree, dict):
            tree["mistyped"] = 1
            return True
        return any(mistyped(child, depth - 1) for child in children)

    depths = {"jobset": 9, "job": 5, "trainjob": 2, "trainingruntime": 11, "networkpolicy": 2}[name]
    for depth in (1, depths):
        broken = json.loads(json.dumps(manifest))
        assert mistyped(broken, depth)
        assert complaints(broken), depth


@pytest.mark.parametrize("name", PODS)
def test_pods_are_safe_and_have_time_to_save(name: str):
    pod = PODS[name]["spec"]
    (container,) = pod["containers"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] > 0
    assert pod["automountServiceAccountToken"] is False
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]},
    }  # fmt: skip
    assert pod["terminationGracePeriodSeconds"] >= 120
    env = {one["name"]: one for one in container["env"]}
    if "TORCH_ELASTIC_SHUTDOWN_TIMEOUT" in env:  # torchrun kills ranks, the kubelet torchrun
        assert 60 <= int(env["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]["value"]) < pod["terminationGracePeriodSeconds"]
    for key, one in env.items():  # keys by name only
        assert ("secretKeyRef" in one.get("valueFrom", {})) == bool(re.search("KEY|SECRET|TOKEN|PASSWORD", key))
    mounted = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert volumes[mounted["/dev/shm"]]["emptyDir"]["medium"] == "Memory"
    assert "emptyDir" in volumes[mounted["/tmp"]]  # its root is read-only
    assert env["HOME"]["value"] == "/tmp"
    assert [port["name"] for port in container["ports"]] == ["metrics"]


def test_every_way_gives_each_process_its_place():
    """What the manifests set is what the code reads, and gives ranks of one group that meet at the first pod."""
    job, jobset = read(KUBERNETES / "job" / "job.yaml"), read(KUBERNETES / "jobset" / "jobset.yaml")
    assert job["spec"]["completions"] == job["spec"]["parallelism"]
    for index in range(job["spec"]["completions"]):
        env = {e["name"]: e["value"] for e in PODS["job"]["spec"]["containers"][0]["env"] if "value" in e}
        hostname = f"{job['metadata']['name']}-{index}"
        place = environment(env | {"JOB_COMPLETION_INDEX": str(index), "HOSTNAME": hostname})
        assert (place.rank, place.world, place.launcher) == (index, job["spec"]["completions"], "kubernetes")
        assert place.address == f"{job['metadata']['name']}-0.{PODS['job']['spec']['subdomain']}"
    env = {e["name"]: e.get("value") for e in PODS["jobset"]["spec"]["containers"][0]["env"]}
    (nodes,) = jobset["spec"]["replicatedJobs"]
    pods = nodes["template"]["spec"]["completions"]
    assert pods == nodes["template"]["spec"]["parallelism"] == int(env["PET_NNODES"])
    subdomain = jobset["spec"]["network"]["subdomain"]
    assert env["PET_MASTER_ADDR"] == f"{jobset['metadata']['name']}-{nodes['name']}-0-0.{subdomain}"
    assert env["PET_NPROC_PER_NODE"] == PODS["jobset"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"]
    service = read(KUBERNETES / "base" / "service.yaml")
    assert service["metadata"]["name"] == subdomain == PODS["job"]["spec"]["subdomain"]
    assert service["spec"]["clusterIP"] == "None"
    for pod in PODS.values():
        assert service["spec"]["selector"].items() <= pod["metadata"]["labels"].items()
    train = read(KUBERNETES / "trainjob" / "trainjob.yaml")["spec"]
    runtime = read(KUBERNETES / "trainjob" / "trainingruntime.yaml")
    assert train["runtimeRef"]["name"] == runtime["metadata"]["name"]
    assert train["runtimeRef"]["kind"] == runtime["kind"]


@pytest.mark.parametrize("path", [p for p in OBJECTS if p.stem in ("job", "jobset", "trainjob")], ids=lambda p: p.stem)
def test_the_commands_are_ours(path: Path):
    """The recipe and the fields behind it exist, and torchrun is told nothing that it does not know."""
    manifest = read(path)
    pod = pod_of(manifest)
    container = pod["spec"]["containers"][0] if pod else manifest["spec"]["trainer"]
    assert container["command"] in (["gristmill"], ["torchrun", "-m", "gristmill.ops.cli"])
    train, recipe, *fields = container["args"]
    assert train == "train"
    out = fields.index("--out")
    resolved = load_recipe(recipe, tuple(fields[:out]))
    assert resolved.metrics.address == "0.0.0.0"
    if pod:
        assert pod["spec"]["containers"][0]["ports"][0]["containerPort"] == resolved.metrics.port
    folders = (resolved.data, Path(fields[out + 1]))
    assert all(str(folder).startswith(("/shards", "/runs")) for folder in folders)


def test_kustomizations_name_every_file_and_nothing_else():
    for path in KUBERNETES.glob("*/kustomization.yaml"):
        wanted = {p.name for p in path.parent.glob("*.yaml")} - {"kustomization.yaml"}
        named = set(read(path)["resources"])
        assert named - {"../base"} == wanted
        assert ("../base" in named) == (path.parent.name != "base")


def test_the_pod_monitor_says_what_prometheus_without_operator_is_told():
    monitor = read(KUBERNETES / "base" / "podmonitor.yaml")["spec"]
    assert set(monitor) == {"selector", "podMetricsEndpoints"}
    (endpoint,) = monitor["podMetricsEndpoints"]
    assert set(endpoint) == {"port", "path", "interval", "scrapeTimeout", "honorLabels", "relabelings"}
    (job,) = read(DEPLOY / "prometheus" / "kubernetes.yml")["scrape_configs"]
    assert (endpoint["path"], endpoint["honorLabels"]) == (job["metrics_path"], job["honor_labels"])
    ours = {(tuple(r.get("sourceLabels", ())), r["targetLabel"]) for r in endpoint["relabelings"]}
    theirs = {
        (tuple(r.get("source_labels", ())), r["target_label"]) for r in job["relabel_configs"] if "target_label" in r
    }
    assert theirs - {(("__meta_kubernetes_pod_name",), "pod")} <= ours  # the operator adds the pod by itself
    for pod in PODS.values():
        assert monitor["selector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()
        assert endpoint["port"] in [port["name"] for port in pod["spec"]["containers"][0]["ports"]]


def test_kubernetes_gets_the_same_rules():
    assert MANIFEST.read_text() == prometheus_rule(), "python -m gristmill.ops.deploy.prometheus_rule"
    manifest = yaml.safe_load(MANIFEST.read_text())
    assert manifest["kind"] == "PrometheusRule"
    assert manifest["spec"] == read(ROOT / "ops" / "monitor" / "rules" / "gristmill.yml")


def mounts(service: dict[str, Any]) -> dict[str, Path]:
    """Files and folders of ours, by where a container sees them."""
    found = {}
    for volume in service["volumes"]:
        source, target, *_ = volume.split(":")
        if source.startswith("."):
            found[target] = (COMPOSE / source).resolve()
    return found


def composed() -> str:
    """The compose file with its variables at their defaults, as Compose reads it."""
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", (COMPOSE / "docker-compose.yml").read_text())


def test_the_compose_file_follows_the_specification():
    text = composed()
    compose = PyCompose.from_yaml(text)
    compose.validate()
    assert sorted(compose.service_names()) == ["alertmanager", "grafana", "prometheus"]
    with pytest.raises(ValueError, match="mistyped"):
        PyCompose.from_yaml(text.replace("    restart: ", "    mistyped: ", 1))


def test_compose_mounts_what_is_there_and_listens_on_loopback_only():
    services = yaml.safe_load(composed())["services"]
    for service in services.values():
        for place in mounts(service).values():
            assert place.exists() or place == COMPOSE / "targets"
        assert re.fullmatch(r"[\w./-]+:v?\d+\.\d+\.\d+", service["image"])  # not whatever is newest today
        assert service["cap_drop"] == ["ALL"]
        listens = [word for word in service.get("command", ()) if word.startswith("--web.listen-address=")]
        listens += [value for key, value in service.get("environment", {}).items() if key == "GF_SERVER_HTTP_ADDR"]
        assert [word.split("=")[-1].split(":")[0] for word in listens] == ["127.0.0.1"]
    grafana = mounts(services["grafana"])
    source = read(grafana["/etc/grafana/provisioning/datasources"] / "prometheus.yml")
    assert source["datasources"][0]["url"].endswith(_listens(services["prometheus"]))
    provider = read(grafana["/etc/grafana/provisioning/dashboards"] / "gristmill.yml")["providers"][0]
    boards = grafana[provider["options"]["path"]]
    assert boards == ROOT / "ops" / "monitor" / "dashboards"
    assert len(list(boards.glob("*.json"))) > 3
    home = Path(services["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"])
    assert (boards / home.name).is_file()
    (manager,) = read(DEPLOY / "prometheus" / "prometheus.yml")["alerting"]["alertmanagers"]
    assert manager["static_configs"][0]["targets"] == [_listens(services["alertmanager"])]


def _listens(service: dict[str, Any]) -> str:
    (word,) = (word for word in service["command"] if word.startswith("--web.listen-address="))
    return word.partition("=")[2]


@pytest.mark.program("promtool")
@pytest.mark.program("amtool")
def test_prometheus_and_alertmanager_take_what_compose_gives_them(tmp_path: Path):
    """The folders as their containers see them."""
    services = yaml.safe_load(composed())["services"]
    for target, source in mounts(services["prometheus"]).items():
        if source.is_file():
            place = tmp_path / target.lstrip("/")
            place.parent.mkdir(parents=True, exist_ok=True)
            place.symlink_to(source)
    config = tmp_path / "etc" / "prometheus" / "prometheus.yml"
    checked = subprocess.run(["promtool", "check", "config", config], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert re.search(r"[1-9]\d* rules found", checked.stdout)
    alertmanager = mounts(services["alertmanager"])["/etc/alertmanager/alertmanager.yml"]
    checked = subprocess.run(["amtool", "check-config", alertmanager], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_the_dockerfile_and_scripts_are_clean():
    def run(*command: object) -> str:
        done = subprocess.run(
            [TOOLS / str(command[0]), *map(str, command[1:])], capture_output=True, text=True, check=False
        )
        return done.stdout + done.stderr if done.returncode else ""

    assert run("hadolint", DEPLOY / "Dockerfile") == ""
    scripts = [*DEPLOY.glob("slurm/*"), *DEPLOY.rglob("*.sh")]
    assert scripts
    assert run("shellcheck", "--severity=style", *scripts) == ""


def test_the_dockerfile_copies_what_the_package_needs():
    text = (DEPLOY / "Dockerfile").read_text()
    project = (ROOT / "pyproject.toml").read_text()
    copied = {word for line in re.findall(r"^COPY (?!--from)(.*)$", text, re.MULTILINE) for word in line.split()}
    folders = set(re.findall(r'^"gristmill\.\w+" = "(\w+)"$', project, re.MULTILINE))
    assert len(folders) == 5
    assert folders | {"pyproject.toml", "constraints.txt", "README.md", "LICENSE"} <= copied
    allowed = {line[1:] for line in (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines() if line[:1] == "!"}
    assert copied - {"./"} == allowed
    assert re.search(r"^USER (?!0|root)\d+", text, re.MULTILINE)


def test_what_compose_is_given_is_nobody_elses():
    """The password and targets lie beside our files: neither git, nor an image, nor a package takes them along."""
    given = ["ops/deploy/compose/grafana-password", "ops/deploy/compose/targets"]
    ignored = [line.strip("/") for line in (ROOT / ".gitignore").read_text().splitlines()]
    assert set(given) <= set(ignored)
    assert set(given) <= set((DEPLOY / "Dockerfile.dockerignore").read_text().splitlines())
    assert "file: ${GRAFANA_PASSWORD_FILE:-./grafana-password}" in (COMPOSE / "docker-compose.yml").read_text()


def test_no_package_holds_what_compose_is_given(tmp_path: Path):
    copy = tmp_path / "copy"
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, copy / name)
    for name in ("shards", "pipeline", "models", "objectives", "ops"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("grafana-password", "targets/run.json"):
        place = copy / "ops" / "deploy" / "compose" / name
        place.parent.mkdir(exist_ok=True)
        place.write_text("secret")
    code = "from setuptools import setup; setup()"
    command = [sys.executable, "-c", code, "-q", "build", "--build-lib", str(tmp_path / "built")]
    subprocess.run(command, cwd=copy, capture_output=True, text=True, check=True)
    compose = tmp_path / "built" / "gristmill" / "ops" / "deploy" / "compose"
    assert sorted(path.name for path in compose.iterdir()) == ["docker-compose.yml", "grafana"]


def test_the_slurm_script_asks_for_what_it_relies_on():
    text = (DEPLOY / "slurm" / "train.sbatch").read_text()
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", text, re.MULTILINE))
    assert {"requeue": "", "signal": "B:USR1@120", "open-mode": "append"}.items() <= asked.items()
    (recipe,) = set(re.findall(r"train\.sbatch ([\w-]+) data=", text))
    assert load_recipe(recipe, ("data=/shards",)).name == recipe
