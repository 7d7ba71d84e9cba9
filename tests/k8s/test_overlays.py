"""The overlays of k8s/, as a cluster would see them: schemas, Pod Security, flows, roles, names, references."""

import argparse
import base64
import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

import pipelines.__main__
from mappo.config import to_json
from mappo.monitoring.metrics import PORT
from mappo.runs.s3_access import s3_access
from pipelines.commands.arguments import site_of
from pipelines.compiling import compile_pipeline
from pipelines.kubeflow.cluster import Call
from pipelines.kubeflow.launcher import STORE_KEYS, Keys, calls, keys_of, root_of
from pipelines.placement import DATABASE_KEY, LAUNCHER_CONFIG_MAP, MONITORING_CONFIG_MAP, POD_LABEL, S3_KEYS
from pipelines.site import Site, check_site, read_site
from tests.conftest import read_json
from tests.support.kubernetes_rules import (
    NEWEST,
    OLDEST,
    Peer,
    check_schema,
    granted,
    is_allowed,
    permits,
    restricted_violations,
)
from tests.support.overlays import (
    IN_NAMESPACES,
    OVERLAYS,
    ROOT,
    Manifest,
    applied,
    containers_of,
    namespace_of,
    of_kind,
    pod_templates,
    rendered,
)
from tests.support.pods import kubeflow_pod

SECRETS = {"mappo-s3": set(S3_KEYS), "mappo-database": {DATABASE_KEY, "password"}}  # which operators make


@pytest.mark.parametrize("version", [OLDEST, NEWEST])
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_manifests_are_what_the_cluster_takes(overlay, version):
    for manifest in rendered(overlay):
        check_schema(manifest, version)


def test_a_misspelt_field_would_be_found():
    (deployment,) = of_kind("gpu-cloud", "Deployment")
    (monitor,) = of_kind("gpu-cloud", "PodMonitor")
    wrong = copy.deepcopy(deployment)
    wrong["spec"]["template"]["spec"]["containers"][0]["resource"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        check_schema(wrong, NEWEST)
    wrong = copy.deepcopy(monitor)
    wrong["spec"]["podMetricsEndpoints"][0]["intervall"] = "15s"
    with pytest.raises(jsonschema.ValidationError):
        check_schema(wrong, NEWEST)
    with pytest.raises(kubernetes_validate.SchemaNotFoundError):
        check_schema({"apiVersion": "example.org/v1", "kind": "Unknown"}, NEWEST)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_pod_is_restricted_bounded_and_pinned(overlay):
    for name, template in pod_templates(overlay):
        assert restricted_violations(template["spec"]) == [], name
        assert template["spec"]["automountServiceAccountToken"] is False, name
        for container in containers_of(template):
            where = (name, container["name"])
            assert container["securityContext"]["readOnlyRootFilesystem"] is True, where
            resources = container["resources"]
            assert {kind: set(each) for kind, each in resources.items()} == {
                "requests": {"cpu", "memory"},
                "limits": {"cpu", "memory"},
            }, where
            assert re.fullmatch(r"[a-z0-9.-]+\.[a-z]+/.+:v?\d[\w.-]*", container["image"]), where
            if container.get("ports"):
                assert {"readinessProbe", "livenessProbe"} <= container.keys(), where


def test_the_namespace_of_our_own_enforces_what_its_pods_keep():
    (namespace,) = of_kind("gpu-cloud", "Namespace")
    labels = namespace["metadata"]["labels"]
    assert {labels[f"pod-security.kubernetes.io/{mode}"] for mode in ("enforce", "warn", "audit")} == {
        "restricted"
    }
    (profile,) = of_kind("gpu-cloud", "Profile")
    assert namespace["metadata"]["annotations"]["owner"] == profile["spec"]["owner"]["name"]
    assert profile["metadata"]["name"] == namespace["metadata"]["name"]
    for overlay in ("laptop", "example"):
        assert not of_kind(overlay, "Namespace", "ResourceQuota", "LimitRange"), "others' namespaces are theirs"


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> dict[str, Path]:
    """Compile each pipeline for a site that chooses nothing."""
    from tests.conftest import TINY

    directory = tmp_path_factory.mktemp("compiled")
    return {name: _compiled(directory, name, TINY, Site(image="registry/mappo:1")) for name in PIPELINES}


PIPELINES = {"training": {}, "seeds": {"seeds": ["0", "1"]}, "tuning": {"study": "s"}}


def _compiled(directory: Path, name: str, config: Any, site: Site) -> Path:
    path = directory / f"{name}.yaml"
    path.write_text(compile_pipeline(name, site, {"config": to_json(config), **PIPELINES[name]}).text)
    return path


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_pods_of_runs_keep_the_restricted_standard(compiled, pipeline):
    for name, spec in _pods(compiled[pipeline]):
        assert restricted_violations(spec) == [], name


def test_without_the_sites_default_the_restricted_standard_would_refuse_runs(tiny, tmp_path):
    site = check_site({"image": "registry/mappo:1", "run_as_non_root": None})
    for name, spec in _pods(_compiled(tmp_path, "training", tiny, site)):
        assert restricted_violations(spec) == ["main: runAsNonRoot"], name


def _pods(path: Path) -> Iterator[tuple[str, Manifest]]:
    spec, platform = yaml.safe_load_all(path.read_text())
    placed = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    assert placed.keys() == spec["deploymentSpec"]["executors"].keys()
    return ((name, kubeflow_pod(each)) for name, each in placed.items())


# The ends of connections: pods as Kubeflow, its store, Prometheus and we label them.
RUN = {"pipelines.kubeflow.org/v2_component": "true"}
PROMETHEUS = Peer("monitoring", {"app.kubernetes.io/name": "prometheus"})
DNS = Peer("kube-system", {"k8s-app": "kube-dns"})
KUBERNETES = {"example": "192.0.2.10"}
S3 = {"example": "198.51.100.7"}
SERVERS = {"mappo-postgresql": 5432, "mappo-store": 8333, "mappo-optuna": 8080, "mappo-pushgateway": 9091}
NODE_CREDENTIALS, ELSEWHERE = Peer(address="169.254.169.254"), Peer(address="203.0.113.5")


def kubeflow(**labels: str) -> Peer:
    return Peer("kubeflow", labels)


def own(overlay: str, name: str) -> Peer:
    """Return one of our servers, with all its labels."""
    templates = dict(pod_templates(overlay))
    return Peer(namespace_of(overlay), templates[name]["metadata"]["labels"])


def flows(overlay: str) -> Iterator[tuple[str, Peer, Peer, int, str]]:
    """The connections that are needed: why, from where, to where, port of the pod, protocol."""
    driver = Peer(namespace_of(overlay), RUN)
    stage = Peer(namespace_of(overlay), RUN | dict([POD_LABEL]))
    there = dict(pod_templates(overlay))
    for run in (driver, stage):
        yield "names", run, DNS, 53, "UDP"
        yield "long answers of names", run, DNS, 53, "TCP"
        yield "wait: task results", run, Peer(address=KUBERNETES.get(overlay, "192.0.2.1")), 6443, "TCP"
        yield "the same by the Service's address", run, Peer(address="10.96.0.1"), 443, "TCP"
        yield "driver, launcher: metadata", run, kubeflow(component="metadata-grpc-server"), 8080, "TCP"
        yield "driver, launcher: cache", run, kubeflow(app="ml-pipeline"), 8887, "TCP"
        yield "the API", run, kubeflow(app="ml-pipeline"), 8888, "TCP"
        yield "wait: logs; launcher: artifacts", run, kubeflow(app="seaweedfs"), 8333, "TCP"
        yield "S3", run, Peer(address=S3.get(overlay, "203.0.113.9")), 443, "TCP"
    if of_kind(overlay, "PodMonitor"):
        yield "metrics", PROMETHEUS, stage, PORT, "TCP"
    if "mappo-pushgateway" in there:
        yield "pushed metrics", stage, own(overlay, "mappo-pushgateway"), 9091, "TCP"
        yield "what was pushed", PROMETHEUS, own(overlay, "mappo-pushgateway"), 9091, "TCP"
    if "mappo-postgresql" in there:
        backup = own(overlay, "mappo-backup")
        yield "studies", stage, own(overlay, "mappo-postgresql"), 5432, "TCP"
        yield "dump", backup, own(overlay, "mappo-postgresql"), 5432, "TCP"
        yield "dump's names", backup, DNS, 53, "UDP"
        yield "dump to S3", backup, Peer(address=S3.get(overlay, "203.0.113.9")), 443, "TCP"
    elif overlay == "gpu-cloud":
        yield "studies", stage, Peer(address="10.1.2.3"), 5432, "TCP"
    if "mappo-store" in there:
        yield "checkpoints", stage, own(overlay, "mappo-store"), 8333, "TCP"
        yield "dump to the store", own(overlay, "mappo-backup"), own(overlay, "mappo-store"), 8333, "TCP"
    if "mappo-optuna" in there:
        yield "studies to look at", own(overlay, "mappo-optuna"), own(overlay, "mappo-postgresql"), 5432, "TCP"
        yield "its names", own(overlay, "mappo-optuna"), DNS, 53, "UDP"


def others(overlay: str) -> Iterator[tuple[str, Peer, Peer, int, str]]:
    """The connections that nobody needs."""
    namespace = namespace_of(overlay)
    stage = Peer(namespace, RUN | dict([POD_LABEL]))
    stranger, neighbour = Peer("elsewhere", {"app": "web"}), Peer(namespace, {"app": "notebook"})
    there = dict(pod_templates(overlay))
    for port in (80, 443):
        yield "a node's credentials", stage, NODE_CREDENTIALS, port, "TCP"
    for port in (22, 25, 80, 3128, 5432, 8333):
        yield "anything outside", stage, ELSEWHERE, port, "TCP"
    yield "names of somebody else", stage, ELSEWHERE, 53, "UDP"
    yield "another namespace", stage, stranger, 8080, "TCP"
    yield "Kubeflow's database", stage, kubeflow(app="mysql"), 3306, "TCP"
    yield "the store's other ports", stage, kubeflow(app="seaweedfs"), 9333, "TCP"
    yield "another run", stage, stage, PORT, "TCP"
    yield "a driver", stranger, Peer(namespace, RUN), 80, "TCP"
    for peer in (stranger, neighbour, ELSEWHERE, Peer("monitoring", {"app.kubernetes.io/name": "grafana"})):
        yield "metrics to others", peer, stage, PORT, "TCP"
    yield "Prometheus to other ports", PROMETHEUS, stage, 22, "TCP"
    for server, port in SERVERS.items():
        if server in there:
            scraped = server == "mappo-pushgateway"
            for peer in (stranger, neighbour, *([] if scraped else [PROMETHEUS])):
                yield f"{server} to others", peer, own(overlay, server), port, "TCP"
            yield f"{server} outwards", own(overlay, server), ELSEWHERE, 443, "TCP"
    if "mappo-backup" in there:
        yield "a backup elsewhere", own(overlay, "mappo-backup"), ELSEWHERE, 22, "TCP"
    if of_kind(overlay, "Namespace"):
        yield "whatever else is started there", neighbour, ELSEWHERE, 443, "TCP"
        yield "whatever else is served there", stranger, neighbour, 80, "TCP"
    if "mappo-store" in there:
        yield "the store's insides", stage, own(overlay, "mappo-store"), 9333, "TCP"
    if "mappo-optuna" in there:
        yield "a stage to the dashboard", stage, own(overlay, "mappo-optuna"), 8080, "TCP"
    if overlay == "example":
        yield "S3 of somebody else", stage, ELSEWHERE, 443, "TCP"


@pytest.mark.parametrize("overlay", IN_NAMESPACES)
def test_flows_that_are_needed_are_allowed(overlay):
    policies = of_kind(overlay, "NetworkPolicy")
    for why, source, target, port, protocol in flows(overlay):
        assert is_allowed(policies, source, target, port, protocol), (why, source, target, port)


@pytest.mark.parametrize("overlay", IN_NAMESPACES)
def test_other_flows_are_not(overlay):
    policies = of_kind(overlay, "NetworkPolicy")
    for why, source, target, port, protocol in others(overlay):
        assert not is_allowed(policies, source, target, port, protocol), (why, source, target, port)


@pytest.mark.parametrize("overlay", IN_NAMESPACES)
def test_each_policy_is_needed(overlay):
    """Without it, something that is needed would be refused; but that which denies, and what is said twice."""
    policies = of_kind(overlay, "NetworkPolicy")
    for policy in policies:
        rest = [each for each in policies if each is not policy]
        refused = [why for why, *flow in flows(overlay) if not is_allowed(rest, *flow)]
        opened = [why for why, *flow in others(overlay) if is_allowed(rest, *flow)]
        name = policy["metadata"]["name"]
        assert refused or opened or name == "mappo-s3", (
            f"{name} changes nothing"
        )  # 443 is also the Kubernetes API's


@pytest.mark.parametrize("overlay", ["laptop", "example"])
def test_denying_by_default_leaves_others_in_a_shared_namespace_alone(overlay):
    neighbour = Peer(namespace_of(overlay), {"app": "notebook"})
    assert is_allowed(of_kind(overlay, "NetworkPolicy"), neighbour, ELSEWHERE, 443, "TCP")
    assert is_allowed(of_kind(overlay, "NetworkPolicy"), Peer("istio-system"), neighbour, 8888, "TCP")


# What the containers of a run asked of the Kubernetes API, by the audit log of a real run.
AUDIT = read_json(ROOT / "tests" / "data" / "kubeflow" / "calls.json")
NEVER = (
    Call("get", "secrets", "mappo-database"),
    Call("list", "secrets"),
    Call("get", "configmaps", "another"),
    Call("create", "pods"),
    Call("delete", "pods"),
    Call("delete", "networkpolicies", group="networking.k8s.io"),
    Call("patch", "workflows", group="argoproj.io"),
)


def audited(*roots: str) -> set[Call]:
    """Return the calls of the audit log with these pipeline roots."""
    return {
        Call(each["verb"], each["resource"], each.get("name", ""), each["group"])
        for each in AUDIT["calls"]
        if each["root"] in ("any", *roots)
    }


@pytest.mark.parametrize("overlay", IN_NAMESPACES)
def test_role_allows_what_is_asked_and_no_more(overlay):
    (role,) = of_kind(overlay, "Role")
    needed = audited() if overlay == "gpu-cloud" else audited("default", "mappo-s3")
    assert set(granted(role)) == needed
    assert all(permits(role, call) for call in needed)
    assert not any(permits(role, call) for call in NEVER)
    assert "*" not in str(role["rules"])
    assert not of_kind(overlay, "ClusterRole", "ClusterRoleBinding")
    (binding,) = of_kind(overlay, "RoleBinding")
    (account,) = of_kind(overlay, "ServiceAccount")
    assert binding["roleRef"]["name"] == role["metadata"]["name"]
    assert [each["name"] for each in binding["subjects"]] == [account["metadata"]["name"]]
    assert binding["subjects"][0]["namespace"] == account["metadata"]["namespace"]


@pytest.mark.parametrize("overlay", IN_NAMESPACES)
def test_commands_of_an_overlay_give_its_runs_all_that_they_ask_for(overlay):
    """The account may make every call of the audit log, and every secret that is mounted or read is there."""
    made, submitted = applied(overlay), submission(overlay)
    (role,) = of_kind(overlay, "Role")
    secrets = made.secrets(namespace_of(overlay)) | secrets_of_kubeflow(overlay)
    root, launcher = root_and_launcher(overlay, submitted)
    keys = keys_of(root, launcher)
    asked = audited("default" if keys == STORE_KEYS else keys.secret if keys else "environment")
    assert set(calls(keys)) == asked
    assert not [call for call in asked if not permits(role, call)]
    for mounted in AUDIT["mounted"]:
        assert secrets[mounted] == set(STORE_KEYS.names), "without it every pod waits for ever"
    if keys:
        assert set(keys.names) <= secrets[keys.secret]
    for name, template in pod_templates(overlay):
        for kind, referred, read in _references(template["spec"]):
            assert kind != "Secret" or read <= secrets[referred], name


def submission(overlay: str) -> argparse.Namespace:
    """Return the arguments of `submit` in the commands of an overlay."""
    words = applied(overlay).submit
    assert words[:3] == ["-m", "pipelines", "submit"]
    return pipelines.__main__._parser().parse_args(words[2:])


def secrets_of_kubeflow(overlay: str) -> dict[str, set[str]]:
    """Return the secrets that Kubeflow makes: of its own store, in its own namespace and in profiles."""
    is_of_our_own = of_kind(overlay, "Namespace") and not of_kind(overlay, "Profile")
    return {} if is_of_our_own else {STORE_KEYS.secret: set(STORE_KEYS.names)}


def root_and_launcher(overlay: str, submitted: argparse.Namespace) -> tuple[str, dict[str, str]]:
    """Return the pipeline root of a run and the data of kfp-launcher, as far as the overlay decides."""
    config_maps = {each["metadata"]["name"]: each["data"] for each in of_kind(overlay, "ConfigMap")}
    launcher = config_maps.get(LAUNCHER_CONFIG_MAP, {})
    return submitted.pipeline_root or root_of(launcher), launcher


@pytest.mark.parametrize("overlay", IN_NAMESPACES)
def test_commands_of_an_overlay_submit_to_its_namespace_with_its_account_and_a_store_that_is_there(overlay):
    submitted = submission(overlay)
    (account,) = of_kind(overlay, "ServiceAccount")
    assert submitted.service_account == account["metadata"]["name"]
    assert (submitted.namespace or "kubeflow") == account["metadata"]["namespace"]
    assert site_of(submitted).image
    secrets = applied(overlay).secrets(namespace_of(overlay))
    stores = [each for each in submitted.parameter if each.startswith("store=")]
    assert bool(stores) == ("mappo-s3" in secrets), "a bucket of its own is for runs"


@pytest.mark.parametrize("overlay", IN_NAMESPACES)
def test_stages_of_an_overlay_reach_the_store_of_its_artifacts(overlay, tiny, tmp_path):
    """They keep checkpoints and the count of attempts where the launcher keeps artifacts."""
    submitted = submission(overlay)
    environment = stage_environment(_compiled(tmp_path, "training", tiny, site_of(submitted)), overlay)
    root, _ = root_and_launcher(overlay, submitted)
    access = s3_access(root.partition(":")[0], environment)
    if root.startswith("minio:"):
        assert access.endpoint == "http://seaweedfs.kubeflow:9000"
        assert access.keys == ("a", "b"), "those of Kubeflow's own secret"
    else:
        assert access.endpoint is None
        assert "AWS_ACCESS_KEY_ID" not in environment, "the account of the pods has rights of its own"


def stage_environment(path: Path, overlay: str) -> dict[str, str]:
    """Return the environment of a training pod, with the secrets of the namespace."""
    spec, platform = yaml.safe_load_all(path.read_text())
    given = {"accesskey": "a", "secretkey": "b"}
    for made in applied(overlay).objects:
        if made["kind"] == "Secret" and made["metadata"]["name"] == "mappo-s3":
            given |= {key: base64.b64decode(value).decode() for key, value in made["data"].items()}
    container = spec["deploymentSpec"]["executors"]["exec-train"]["container"]
    placed = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]["exec-train"]
    return {each["name"]: each["value"] for each in container.get("env", [])} | {
        each["envVar"]: given[each["secretKey"]]
        for source in placed["secretAsEnv"]
        for each in source["keyToEnv"]
        if each["secretKey"] in given
    }


@pytest.mark.parametrize("overlay", IN_NAMESPACES)
def test_commands_of_an_overlay_make_its_namespace_before_what_is_in_it(overlay):
    kinds = [each["kind"] for each in applied(overlay).objects]
    if "Namespace" in kinds:
        assert kinds[0] == "Namespace"


def test_secret_of_kubeflows_store_is_copied_without_what_belongs_to_the_original():
    (copied,) = [each for each in applied("base").objects if each["kind"] == "Secret"]
    assert copied["metadata"]["namespace"] == "mappo"
    assert copied["data"] == {"accesskey": "YQ==", "secretkey": "Yg=="}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_what_is_referred_to_is_there_or_is_said_to_be_made_first(overlay):
    there = {(each["kind"], each["metadata"]["name"]) for each in rendered(overlay)}
    guide = (ROOT / "docs" / "operations.md").read_text()
    for name, template in pod_templates(overlay):
        for kind, referred, keys in _references(template["spec"]):
            if kind == "Secret":
                assert keys <= SECRETS[referred], (name, referred, keys)
                assert f"create secret generic {referred}" in guide
                assert all(f"--from-literal={key}=" in guide for key in keys)
            else:
                assert (kind, referred) in there, (name, kind, referred)
                for key in keys:
                    (config,) = (
                        each for each in of_kind(overlay, "ConfigMap") if each["metadata"]["name"] == referred
                    )
                    assert key in config["data"]


def _references(pod: Manifest) -> Iterator[tuple[str, str, set[str]]]:
    """Yield the kind and the name of each object that a pod needs in its namespace, and the keys."""
    if "priorityClassName" in pod:
        yield "PriorityClass", pod["priorityClassName"], set()
    for volume in pod.get("volumes", []):
        if "configMap" in volume:
            yield "ConfigMap", volume["configMap"]["name"], set()
    for container in [*pod.get("initContainers", []), *pod["containers"]]:
        for each in container.get("env", []):
            source = each.get("valueFrom", {})
            for kind, key in (("Secret", "secretKeyRef"), ("ConfigMap", "configMapKeyRef")):
                if key in source:
                    yield kind, source[key]["name"], {source[key]["key"]}
        for each in container.get("envFrom", []):
            yield "Secret", each["secretRef"]["name"], set()


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_services_find_their_pods_and_policies_name_pods_that_are_there(overlay):
    templates = dict(pod_templates(overlay))
    for service in of_kind(overlay, "Service"):
        labels = service["spec"]["selector"].items()
        found = [each for each in templates.values() if labels <= each["metadata"]["labels"].items()]
        assert len(found) == 1, service["metadata"]["name"]
        ports = {port["name"]: port for each in containers_of(found[0]) for port in each.get("ports", [])}
        for port in service["spec"]["ports"]:
            assert ports[port["targetPort"]]["containerPort"] == port["port"]
    names = {each["metadata"]["labels"]["app.kubernetes.io/name"] for each in templates.values()}
    for policy in of_kind(overlay, "NetworkPolicy"):
        selected = policy["spec"]["podSelector"].get("matchLabels", {}).get("app.kubernetes.io/name")
        assert selected is None or selected in names or selected == "mappo-backup", policy["metadata"]["name"]


def test_names_and_keys_are_those_of_the_code():
    site = Site()
    assert {site.s3_secret, site.database_secret} == set(SECRETS)
    (launcher,) = (
        each for each in of_kind("gpu-cloud", "ConfigMap") if each["metadata"]["name"] == "kfp-launcher"
    )
    own_bucket = yaml.safe_load((ROOT / "k8s" / "components" / "own-bucket" / "kfp-launcher.yaml").read_text())
    keys = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    assert keys_of(root_of(own_bucket["data"]), own_bucket["data"]) == Keys(site.s3_secret, keys)
    assert set(keys) <= set(S3_KEYS)
    assert keys_of(root_of(launcher["data"]), launcher["data"]) is None, "the rights of the service account"
    assert [each["metadata"]["name"] for each in of_kind("example", "ConfigMap")].count(MONITORING_CONFIG_MAP) == 1


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_no_service_makes_a_variable_that_the_program_reads(overlay):
    """Kubernetes gives every pod variables for each Service of its namespace, such as MAPPO_STORE_PORT."""
    read = {
        name
        for path in [*ROOT.glob("mappo/**/*.py"), *ROOT.glob("pipelines/**/*.py")]
        for name in re.findall(r"\bMAPPO_[A-Z_]+", path.read_text())
    }
    assert {"MAPPO_DATABASE", "MAPPO_METRICS_PORT"} <= read
    for service in of_kind(overlay, "Service"):
        prefix = service["metadata"]["name"].replace("-", "_").upper()
        assert not {name for name in read if re.fullmatch(rf"{prefix}_(PORT|SERVICE)(_.*)?", name)}


@pytest.mark.parametrize("path", sorted(ROOT.glob("k8s/**/site.yaml")), ids=lambda path: path.parent.name)
def test_a_sites_file_compiles_to_pods_that_are_restricted(path, tiny, tmp_path):
    site = read_site(path)
    for name in PIPELINES:
        for stage, spec in _pods(_compiled(tmp_path, name, tiny, site)):
            assert restricted_violations(spec) == [], stage


def test_a_quota_comes_with_defaults_for_containers_that_ask_for_nothing():
    (limits,) = of_kind("gpu-cloud", "LimitRange")
    (each,) = limits["spec"]["limits"]
    assert set(each["default"]) == set(each["defaultRequest"]) == {"cpu", "memory"}
    quotas = {each["metadata"]["name"]: each["spec"]["hard"] for each in of_kind("gpu-cloud", "ResourceQuota")}
    assert quotas["mappo-gpus"] == {"requests.nvidia.com/gpu": "8"}


def test_training_pods_join_the_queue_that_is_there(tiny, tmp_path):
    site = read_site(ROOT / "k8s" / "overlays" / "gpu-cloud" / "site.yaml")
    (queue,) = of_kind("gpu-cloud", "LocalQueue")
    assert site.pod_labels == {"kueue.x-k8s.io/queue-name": queue["metadata"]["name"]}
    assert queue["metadata"]["name"] != "default", "which would take drivers, too"
