"""The checks of every overlay of k8s/: schemas, Pod Security, network policies, roles, names and references."""

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
from mappo.monitoring.metrics import EXPORTER_PORT, PORT
from mappo.runs.s3_access import s3_access
from pipelines.commands.arguments import connection_of, site_of
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
    runner,
)
from tests.support.pods import kubeflow_pod

SECRETS = {"mappo-s3": set(S3_KEYS), "mappo-database": {DATABASE_KEY, "password"}}  # secrets that operators create


@pytest.mark.parametrize("version", [OLDEST, NEWEST])
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_manifests_match_the_schemas_of_kubernetes(overlay, version):
    for manifest in rendered(overlay):
        check_schema(manifest, version)


def test_a_misspelt_field_is_found():
    deployment, _ = of_kind("gpu-cloud", "Deployment")
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
            location = (name, container["name"])
            assert container["securityContext"]["readOnlyRootFilesystem"] is True, location
            resources = container["resources"]
            assert {kind: set(amounts) for kind, amounts in resources.items()} == {
                "requests": {"cpu", "memory"},
                "limits": {"cpu", "memory"},
            }, location
            assert re.fullmatch(r"[a-z0-9.-]+\.[a-z]+/.+:v?\d[\w.-]*", container["image"]), location
            if container.get("ports"):
                assert {"readinessProbe", "livenessProbe"} <= container.keys(), location


def test_our_own_namespace_enforces_the_restricted_standard():
    (namespace,) = of_kind("gpu-cloud", "Namespace")
    labels = namespace["metadata"]["labels"]
    assert {labels[f"pod-security.kubernetes.io/{mode}"] for mode in ("enforce", "warn", "audit")} == {
        "restricted"
    }
    (profile,) = of_kind("gpu-cloud", "Profile")
    assert namespace["metadata"]["annotations"]["owner"] == profile["spec"]["owner"]["name"]
    assert profile["metadata"]["name"] == namespace["metadata"]["name"]
    for overlay in ("laptop", "example"):
        assert not of_kind(overlay, "Namespace", "ResourceQuota", "LimitRange"), (
            "a shared namespace belongs to its owner"
        )


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> dict[str, Path]:
    """Compile the pipelines for a site with default settings."""
    from tests.conftest import TINY

    directory = tmp_path_factory.mktemp("compiled")
    return {name: _compiled(directory, name, TINY, Site(image="registry/mappo:1")) for name in PIPELINES}


PIPELINES = {"training": {}, "seeds": {"seeds": ["0", "1"]}, "tuning": {"study": "s"}}


def _compiled(directory: Path, name: str, config: Any, site: Site) -> Path:
    path = directory / f"{name}.yaml"
    path.write_text(compile_pipeline(name, site, {"config": to_json(config), **PIPELINES[name]}).text)
    return path


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_pods_of_runs_follow_the_restricted_standard(compiled, pipeline):
    for name, spec in _pods(compiled[pipeline]):
        assert restricted_violations(spec) == [], name


def test_pods_of_runs_break_the_restricted_standard_without_run_as_non_root(tiny, tmp_path):
    site = check_site({"image": "registry/mappo:1", "run_as_non_root": None})
    for name, spec in _pods(_compiled(tmp_path, "training", tiny, site)):
        assert restricted_violations(spec) == ["main: runAsNonRoot"], name


def _pods(path: Path) -> Iterator[tuple[str, Manifest]]:
    spec, platform = yaml.safe_load_all(path.read_text())
    executors = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    assert executors.keys() == spec["deploymentSpec"]["executors"].keys()
    return ((name, kubeflow_pod(settings)) for name, settings in executors.items())


# The ends of connections, with the labels that Kubeflow, its store, Prometheus and our manifests give their pods.
RUN = {"pipelines.kubeflow.org/v2_component": "true"}
PROMETHEUS = Peer("monitoring", {"app.kubernetes.io/name": "prometheus"})
DNS = Peer("kube-system", {"k8s-app": "kube-dns"})
KUBERNETES = {"example": "192.0.2.10"}
S3 = {"example": "198.51.100.7"}
SERVERS = {"mappo-postgresql": 5432, "mappo-store": 8333, "mappo-optuna": 8080, "mappo-pushgateway": 9091}
SERVERS |= {"mappo-pipeline-exporter": EXPORTER_PORT}
SCRAPED = ("mappo-pushgateway", "mappo-pipeline-exporter")
NODE_CREDENTIALS, OUTSIDE = Peer(address="169.254.169.254"), Peer(address="203.0.113.5")


def kubeflow(**labels: str) -> Peer:
    return Peer("kubeflow", labels)


def our_server(overlay: str, name: str) -> Peer:
    """Return one of our servers, with all its labels."""
    templates = dict(pod_templates(overlay))
    return Peer(namespace_of(overlay), templates[name]["metadata"]["labels"])


def needed_connections(overlay: str) -> Iterator[tuple[str, Peer, Peer, int, str]]:
    """Yield every needed connection: its purpose, source, target, port of the target pod, and protocol."""
    driver = Peer(namespace_of(overlay), RUN)
    stage = Peer(namespace_of(overlay), RUN | dict([POD_LABEL]))
    servers = dict(pod_templates(overlay))
    for run in (driver, stage):
        yield "DNS", run, DNS, 53, "UDP"
        yield "long DNS answers", run, DNS, 53, "TCP"
        yield "wait: task results", run, Peer(address=KUBERNETES.get(overlay, "192.0.2.1")), 6443, "TCP"
        yield "wait: task results, by the address of the Service", run, Peer(address="10.96.0.1"), 443, "TCP"
        yield "driver, launcher: metadata", run, kubeflow(component="metadata-grpc-server"), 8080, "TCP"
        yield "driver, launcher: cache", run, kubeflow(app="ml-pipeline"), 8887, "TCP"
        yield "the API", run, kubeflow(app="ml-pipeline"), 8888, "TCP"
        yield "wait: logs; launcher: artifacts", run, kubeflow(app="seaweedfs"), 8333, "TCP"
        yield "S3", run, Peer(address=S3.get(overlay, "203.0.113.9")), 443, "TCP"
    if of_kind(overlay, "PodMonitor"):
        yield "metrics", PROMETHEUS, stage, PORT, "TCP"
    if "mappo-pushgateway" in servers:
        yield "pushed metrics", stage, our_server(overlay, "mappo-pushgateway"), 9091, "TCP"
        yield "scrape of pushed metrics", PROMETHEUS, our_server(overlay, "mappo-pushgateway"), 9091, "TCP"
    if "mappo-pipeline-exporter" in servers:
        exporter = our_server(overlay, "mappo-pipeline-exporter")
        yield "scrape of the exporter", PROMETHEUS, exporter, EXPORTER_PORT, "TCP"
        yield "runs and schedules", exporter, kubeflow(app="ml-pipeline"), 8888, "TCP"
        yield "DNS of the exporter", exporter, DNS, 53, "UDP"
    if "mappo-postgresql" in servers:
        backup = our_server(overlay, "mappo-backup")
        yield "studies", stage, our_server(overlay, "mappo-postgresql"), 5432, "TCP"
        yield "dump", backup, our_server(overlay, "mappo-postgresql"), 5432, "TCP"
        yield "DNS of the dump", backup, DNS, 53, "UDP"
        yield "dump to S3", backup, Peer(address=S3.get(overlay, "203.0.113.9")), 443, "TCP"
    elif overlay == "gpu-cloud":
        yield "studies", stage, Peer(address="10.1.2.3"), 5432, "TCP"
    if "mappo-store" in servers:
        yield "checkpoints", stage, our_server(overlay, "mappo-store"), 8333, "TCP"
        yield (
            "dump to the store",
            our_server(overlay, "mappo-backup"),
            our_server(overlay, "mappo-store"),
            8333,
            "TCP",
        )
    if "mappo-optuna" in servers:
        yield (
            "studies for the dashboard",
            our_server(overlay, "mappo-optuna"),
            our_server(overlay, "mappo-postgresql"),
            5432,
            "TCP",
        )
        yield "DNS of the dashboard", our_server(overlay, "mappo-optuna"), DNS, 53, "UDP"


def forbidden_connections(overlay: str) -> Iterator[tuple[str, Peer, Peer, int, str]]:
    """Yield connections that must be denied, in the format of `needed_connections`."""
    namespace = namespace_of(overlay)
    stage = Peer(namespace, RUN | dict([POD_LABEL]))
    stranger, neighbour = Peer("elsewhere", {"app": "web"}), Peer(namespace, {"app": "notebook"})
    servers = dict(pod_templates(overlay))
    for port in (80, 443):
        yield "a node's credentials", stage, NODE_CREDENTIALS, port, "TCP"
    for port in (22, 25, 80, 3128, 5432, 8333):
        yield "anything outside", stage, OUTSIDE, port, "TCP"
    yield "foreign DNS server", stage, OUTSIDE, 53, "UDP"
    yield "another namespace", stage, stranger, 8080, "TCP"
    yield "Kubeflow's database", stage, kubeflow(app="mysql"), 3306, "TCP"
    yield "the store's other ports", stage, kubeflow(app="seaweedfs"), 9333, "TCP"
    yield "another run", stage, stage, PORT, "TCP"
    yield "a driver", stranger, Peer(namespace, RUN), 80, "TCP"
    for peer in (stranger, neighbour, OUTSIDE, Peer("monitoring", {"app.kubernetes.io/name": "grafana"})):
        yield "metrics to other clients", peer, stage, PORT, "TCP"
    yield "Prometheus to other ports", PROMETHEUS, stage, 22, "TCP"
    for server, port in SERVERS.items():
        if server in servers:
            for peer in (stranger, neighbour, *([] if server in SCRAPED else [PROMETHEUS])):
                yield f"{server} to other clients", peer, our_server(overlay, server), port, "TCP"
            yield f"{server} to outside", our_server(overlay, server), OUTSIDE, 443, "TCP"
    if "mappo-backup" in servers:
        yield "a backup to another server", our_server(overlay, "mappo-backup"), OUTSIDE, 22, "TCP"
    if of_kind(overlay, "Namespace"):
        yield "another pod of the namespace to outside", neighbour, OUTSIDE, 443, "TCP"
        yield "another namespace to another pod of the namespace", stranger, neighbour, 80, "TCP"
    if "mappo-store" in servers:
        yield "internal ports of the store", stage, our_server(overlay, "mappo-store"), 9333, "TCP"
    if "mappo-optuna" in servers:
        yield "a stage to the dashboard", stage, our_server(overlay, "mappo-optuna"), 8080, "TCP"
    if overlay == "example":
        yield "foreign S3", stage, OUTSIDE, 443, "TCP"


@pytest.mark.parametrize("overlay", IN_NAMESPACES)
def test_needed_connections_are_allowed(overlay):
    policies = of_kind(overlay, "NetworkPolicy")
    for purpose, source, target, port, protocol in needed_connections(overlay):
        assert is_allowed(policies, source, target, port, protocol), (purpose, source, target, port)


@pytest.mark.parametrize("overlay", IN_NAMESPACES)
def test_other_connections_are_denied(overlay):
    policies = of_kind(overlay, "NetworkPolicy")
    for purpose, source, target, port, protocol in forbidden_connections(overlay):
        assert not is_allowed(policies, source, target, port, protocol), (purpose, source, target, port)


@pytest.mark.parametrize("overlay", IN_NAMESPACES)
def test_every_policy_is_needed(overlay):
    """Check that without the policy a needed connection is denied, or a forbidden connection is allowed."""
    policies = of_kind(overlay, "NetworkPolicy")
    for policy in policies:
        other_policies = [other for other in policies if other is not policy]
        denied = [why for why, *flow in needed_connections(overlay) if not is_allowed(other_policies, *flow)]
        opened = [why for why, *flow in forbidden_connections(overlay) if is_allowed(other_policies, *flow)]
        name = policy["metadata"]["name"]
        assert denied or opened or name == "mappo-s3", (
            f"{name} changes nothing"
        )  # mappo-kubernetes-api allows port 443, too


@pytest.mark.parametrize("overlay", ["laptop", "example"])
def test_the_default_denial_does_not_affect_other_pods_of_a_shared_namespace(overlay):
    neighbour = Peer(namespace_of(overlay), {"app": "notebook"})
    assert is_allowed(of_kind(overlay, "NetworkPolicy"), neighbour, OUTSIDE, 443, "TCP")
    assert is_allowed(of_kind(overlay, "NetworkPolicy"), Peer("istio-system"), neighbour, 8888, "TCP")


# The calls of a run's containers to the Kubernetes API, from the audit log of a real run.
AUDIT = read_json(ROOT / "tests" / "data" / "kubeflow" / "calls.json")
FORBIDDEN_CALLS = (
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
        Call(entry["verb"], entry["resource"], entry.get("name", ""), entry["group"])
        for entry in AUDIT["calls"]
        if entry["root"] in ("any", *roots)
    }


@pytest.mark.parametrize("overlay", IN_NAMESPACES)
def test_role_allows_the_needed_calls_and_no_others(overlay):
    role = runner(overlay, "Role")
    needed = audited() if overlay == "gpu-cloud" else audited("default", "mappo-s3")
    assert set(granted(role)) == needed
    assert all(permits(role, call) for call in needed)
    assert not any(permits(role, call) for call in FORBIDDEN_CALLS)
    assert "*" not in str(role["rules"])
    assert not of_kind(overlay, "ClusterRole", "ClusterRoleBinding")
    binding, account = runner(overlay, "RoleBinding"), runner(overlay, "ServiceAccount")
    assert binding["roleRef"]["name"] == role["metadata"]["name"]
    assert [subject["name"] for subject in binding["subjects"]] == [account["metadata"]["name"]]
    assert binding["subjects"][0]["namespace"] == account["metadata"]["namespace"]


@pytest.mark.parametrize("overlay", ["example", "gpu-cloud"])
def test_the_exporter_may_only_read_runs_and_pipelines_of_kubeflows_api(overlay):
    (role,) = [item for item in of_kind(overlay, "Role") if item["metadata"]["name"] == "mappo-pipeline-exporter"]
    assert {call.verb for call in granted(role)} == {"get", "list"}
    assert {call.group for call in granted(role)} == {"pipelines.kubeflow.org"}
    pod = dict(pod_templates(overlay))["mappo-pipeline-exporter"]["spec"]
    assert pod["serviceAccountName"] == role["metadata"]["name"]
    (volume,) = pod["volumes"]
    (source,) = volume["projected"]["sources"]
    assert source["serviceAccountToken"]["audience"] == "pipelines.kubeflow.org", "no token for Kubernetes itself"


@pytest.mark.parametrize("overlay", ["example", "gpu-cloud"])
def test_the_exporters_command_and_environment_are_those_that_the_program_reads(overlay, monkeypatch):
    (container,) = containers_of(dict(pod_templates(overlay))["mappo-pipeline-exporter"])
    assert container["command"] == ["python3", "-m", "pipelines", "export-metrics"]
    (token,) = container["volumeMounts"]
    for variable in container["env"]:
        monkeypatch.setenv(variable["name"], variable.get("value", "mappo"))
    arguments = pipelines.__main__._parser().parse_args([*container["command"][3:], *container["args"]])
    connection = connection_of(arguments)
    assert arguments.port == EXPORTER_PORT == container["ports"][0]["containerPort"]
    assert connection.endpoint == "http://ml-pipeline.kubeflow:8888"
    assert connection.token_file == f"{token['mountPath']}/token"
    assert connection.namespace == "mappo"


@pytest.mark.parametrize("overlay", IN_NAMESPACES)
def test_commands_of_an_overlay_create_all_rights_and_secrets_of_its_runs(overlay):
    """The account may make every call of the audit log, and every secret that pods mount or read exists."""
    created, submitted = applied(overlay), submission(overlay)
    role = runner(overlay, "Role")
    secrets = created.secrets(namespace_of(overlay)) | secrets_of_kubeflow(overlay)
    root, launcher = root_and_launcher(overlay, submitted)
    keys = keys_of(root, launcher)
    needed = audited("default" if keys == STORE_KEYS else keys.secret if keys else "environment")
    assert set(calls(keys)) == needed
    assert not [call for call in needed if not permits(role, call)]
    for mounted in AUDIT["mounted"]:
        assert secrets[mounted] == set(STORE_KEYS.names), "without this secret every pod waits for ever"
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
    """Return the secrets that Kubeflow creates: those of its own store, in its own namespace and in profiles."""
    is_of_our_own = of_kind(overlay, "Namespace") and not of_kind(overlay, "Profile")
    return {} if is_of_our_own else {STORE_KEYS.secret: set(STORE_KEYS.names)}


def root_and_launcher(overlay: str, submitted: argparse.Namespace) -> tuple[str, dict[str, str]]:
    """Return the pipeline root of a run and the data of kfp-launcher, as far as the overlay decides."""
    config_maps = {item["metadata"]["name"]: item["data"] for item in of_kind(overlay, "ConfigMap")}
    launcher = config_maps.get(LAUNCHER_CONFIG_MAP, {})
    return submitted.pipeline_root or root_of(launcher), launcher


@pytest.mark.parametrize("overlay", IN_NAMESPACES)
def test_commands_of_an_overlay_submit_to_its_namespace_with_its_account_and_an_existing_store(overlay):
    submitted = submission(overlay)
    account = runner(overlay, "ServiceAccount")
    assert submitted.service_account == account["metadata"]["name"]
    assert (submitted.namespace or "kubeflow") == account["metadata"]["namespace"]
    assert site_of(submitted).image
    secrets = applied(overlay).secrets(namespace_of(overlay))
    stores = [parameter for parameter in submitted.parameter if parameter.startswith("store=")]
    assert bool(stores) == ("mappo-s3" in secrets), "runs go to the overlay's own bucket if it has one"


@pytest.mark.parametrize("overlay", IN_NAMESPACES)
def test_stages_of_an_overlay_reach_the_store_of_its_artifacts(overlay, tiny, tmp_path):
    """Check that stages keep checkpoints and the count of attempts in the store of the artifacts."""
    submitted = submission(overlay)
    environment = stage_environment(_compiled(tmp_path, "training", tiny, site_of(submitted)), overlay)
    root, _ = root_and_launcher(overlay, submitted)
    access = s3_access(root.partition(":")[0], environment)
    if root.startswith("minio:"):
        assert access.endpoint == "http://seaweedfs.kubeflow:9000"
        assert access.keys == ("a", "b"), "the keys of Kubeflow's own secret"
    else:
        assert access.endpoint is None
        assert "AWS_ACCESS_KEY_ID" not in environment, "the account of the pods has rights of its own"


def stage_environment(path: Path, overlay: str) -> dict[str, str]:
    """Return the environment of a training pod, with the secrets of the namespace."""
    spec, platform = yaml.safe_load_all(path.read_text())
    secret_values = {"accesskey": "a", "secretkey": "b"}
    for created in applied(overlay).objects:
        if created["kind"] == "Secret" and created["metadata"]["name"] == "mappo-s3":
            secret_values |= {key: base64.b64decode(value).decode() for key, value in created["data"].items()}
    container = spec["deploymentSpec"]["executors"]["exec-train"]["container"]
    settings = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]["exec-train"]
    return {variable["name"]: variable["value"] for variable in container.get("env", [])} | {
        key["envVar"]: secret_values[key["secretKey"]]
        for source in settings["secretAsEnv"]
        for key in source["keyToEnv"]
        if key["secretKey"] in secret_values
    }


@pytest.mark.parametrize("overlay", IN_NAMESPACES)
def test_commands_of_an_overlay_create_its_namespace_before_the_objects_in_it(overlay):
    kinds = [created["kind"] for created in applied(overlay).objects]
    if "Namespace" in kinds:
        assert kinds[0] == "Namespace"


def test_secret_of_kubeflows_store_is_copied_without_the_metadata_of_the_original():
    (copied,) = [created for created in applied("base").objects if created["kind"] == "Secret"]
    assert copied["metadata"]["namespace"] == "mappo"
    assert copied["data"] == {"accesskey": "YQ==", "secretkey": "Yg=="}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_references_exist_in_the_overlay_or_the_guide_creates_them(overlay):
    existing = {(manifest["kind"], manifest["metadata"]["name"]) for manifest in rendered(overlay)}
    guide = (ROOT / "docs" / "operations.md").read_text()
    for name, template in pod_templates(overlay):
        for kind, referred, keys in _references(template["spec"]):
            if kind == "Secret":
                assert keys <= SECRETS[referred], (name, referred, keys)
                assert f"create secret generic {referred}" in guide
                assert all(f"--from-literal={key}=" in guide for key in keys)
            else:
                assert (kind, referred) in existing, (name, kind, referred)
                for key in keys:
                    (config,) = (
                        item for item in of_kind(overlay, "ConfigMap") if item["metadata"]["name"] == referred
                    )
                    assert key in config["data"]


def _references(pod: Manifest) -> Iterator[tuple[str, str, set[str]]]:
    """Yield the objects that a pod needs in its namespace: kind, name and keys."""
    if "priorityClassName" in pod:
        yield "PriorityClass", pod["priorityClassName"], set()
    for volume in pod.get("volumes", []):
        if "configMap" in volume:
            yield "ConfigMap", volume["configMap"]["name"], set()
    for container in [*pod.get("initContainers", []), *pod["containers"]]:
        for variable in container.get("env", []):
            source = variable.get("valueFrom", {})
            for kind, key in (("Secret", "secretKeyRef"), ("ConfigMap", "configMapKeyRef")):
                if key in source:
                    yield kind, source[key]["name"], {source[key]["key"]}
        for source in container.get("envFrom", []):
            yield "Secret", source["secretRef"]["name"], set()


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_services_and_policies_select_existing_pods(overlay):
    templates = dict(pod_templates(overlay))
    for service in of_kind(overlay, "Service"):
        labels = service["spec"]["selector"].items()
        selected = [
            template for template in templates.values() if labels <= template["metadata"]["labels"].items()
        ]
        assert len(selected) == 1, service["metadata"]["name"]
        ports = {
            port["name"]: port for container in containers_of(selected[0]) for port in container.get("ports", [])
        }
        for port in service["spec"]["ports"]:
            assert ports[port["targetPort"]]["containerPort"] == port["port"]
    names = {template["metadata"]["labels"]["app.kubernetes.io/name"] for template in templates.values()}
    for policy in of_kind(overlay, "NetworkPolicy"):
        selected = policy["spec"]["podSelector"].get("matchLabels", {}).get("app.kubernetes.io/name")
        assert selected is None or selected in names or selected == "mappo-backup", policy["metadata"]["name"]


def test_names_and_keys_match_the_code():
    site = Site()
    assert {site.s3_secret, site.database_secret} == set(SECRETS)
    (launcher,) = (
        item for item in of_kind("gpu-cloud", "ConfigMap") if item["metadata"]["name"] == "kfp-launcher"
    )
    own_bucket = yaml.safe_load((ROOT / "k8s" / "components" / "own-bucket" / "kfp-launcher.yaml").read_text())
    keys = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    assert keys_of(root_of(own_bucket["data"]), own_bucket["data"]) == Keys(site.s3_secret, keys)
    assert set(keys) <= set(S3_KEYS)
    assert keys_of(root_of(launcher["data"]), launcher["data"]) is None, (
        "the launcher uses the rights of the service account"
    )
    assert [item["metadata"]["name"] for item in of_kind("example", "ConfigMap")].count(MONITORING_CONFIG_MAP) == 1


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_no_service_sets_a_variable_that_the_program_reads(overlay):
    """Check the variables that Kubernetes sets in every pod for each Service, such as MAPPO_STORE_PORT."""
    read = {
        name
        for path in [*ROOT.glob("mappo/**/*.py"), *ROOT.glob("pipelines/**/*.py")]
        for name in re.findall(r"\bMAPPO_[A-Z_]+", path.read_text())
    }
    assert {"MAPPO_DATABASE", "MAPPO_METRICS_PORT"} <= read
    for service in of_kind(overlay, "Service"):
        prefix = service["metadata"]["name"].replace("-", "_").upper()
        assert not {name for name in read if re.fullmatch(rf"{prefix}_(PORT|SERVICE)(_.*)?", name)}


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, marks=[] if path.parent.name == "k8s" else pytest.mark.long, id=path.parent.name)
        for path in sorted(ROOT.glob("k8s/**/site.yaml"))
    ],
)
def test_a_sites_file_compiles_to_restricted_pods(path, tiny, tmp_path):
    site = read_site(path)
    for name in PIPELINES:
        for stage, spec in _pods(_compiled(tmp_path, name, tiny, site)):
            assert restricted_violations(spec) == [], stage


def test_a_quota_comes_with_defaults_for_containers_without_resources():
    (limits,) = of_kind("gpu-cloud", "LimitRange")
    (limit,) = limits["spec"]["limits"]
    assert set(limit["default"]) == set(limit["defaultRequest"]) == {"cpu", "memory"}
    quotas = {quota["metadata"]["name"]: quota["spec"]["hard"] for quota in of_kind("gpu-cloud", "ResourceQuota")}
    assert quotas["mappo-gpus"] == {"requests.nvidia.com/gpu": "8"}


def test_training_pods_join_the_existing_queue(tiny, tmp_path):
    site = read_site(ROOT / "k8s" / "overlays" / "gpu-cloud" / "site.yaml")
    (queue,) = of_kind("gpu-cloud", "LocalQueue")
    assert site.pod_labels == {"kueue.x-k8s.io/queue-name": queue["metadata"]["name"]}
    assert queue["metadata"]["name"] != "default", "a queue of that name would take drivers, too"
