import json
import shlex

import pytest
import yaml

import mappo
from pipelines.__main__ import main
from tests.support.kubeflow_server import KubeflowServer
from tests.support.kubernetes_server import ClusterServer
from tests.support.overlays import IN_NAMESPACES, ROOT, applied, commands_of, namespace_of, of_kind
from tests.support.recordings import manifest_of, raw

NODE = {"status": {"allocatable": {"nvidia.com/gpu": "4"}}, "spec": {}}
GPU_SITE = """
image: mappo:{version}
stages:
  train: {{gpu_count: 2, node_selector: {{pool: gpu}}, tolerations: [{{key: gpu, operator: Exists}}]}}
"""
STORE_SECRET = {"accesskey": "YQ==", "secretkey": "Yg=="}
CONTROLLER = "/api/v1/namespaces/kubeflow/configmaps/workflow-controller-configmap"
# The rights of Kubeflow's own accounts that a run needs.
EDITOR = [
    {"apiGroups": ["", "argoproj.io"], "resources": ["configmaps", "secrets"], "verbs": ["get"]},
    {"apiGroups": ["argoproj.io"], "resources": ["workflowtaskresults"], "verbs": ["create", "patch"]},
]


def stock_defaults() -> str:
    """Return the workflowDefaults of a stock 2.17, which the controller merged into a recorded run."""
    defaults = manifest_of(raw("raw-training"))["spec"]["templateDefaults"]
    return yaml.safe_dump({"spec": {"templateDefaults": {"retryStrategy": defaults["retryStrategy"]}}})


def secret(namespace: str, name: str, **data: str) -> dict:
    return {"kind": "Secret", "metadata": {"namespace": namespace, "name": name}, "data": data}


def bound(namespace: str, account: str, rules: list[dict]) -> list[dict]:
    """Return the manifests of an account, of a role with these rules, and of their binding."""
    metadata = {"namespace": namespace, "name": account}
    subject = {"kind": "ServiceAccount", **metadata}
    return [
        {"kind": "ServiceAccount", "metadata": metadata},
        {"kind": "Role", "metadata": metadata, "rules": rules},
        {"kind": "RoleBinding", "metadata": metadata, "roleRef": {"name": account}, "subjects": [subject]},
    ]


@pytest.fixture
def kubernetes(monkeypatch, tmp_path):
    """Start the API server of a cluster with a stock Kubeflow; profile `team` has all objects."""
    with ClusterServer(tokens={"mine"}, namespaces={"team", "kubeflow"}) as server:
        namespace = "/api/v1/namespaces/team"
        for path in ("secrets/mappo-registry", "configmaps/mappo-monitoring"):
            server.add(f"{namespace}/{path}")
        server.apply(secret(owner, "mlpipeline-minio-artifact", **STORE_SECRET) for owner in ("team", "kubeflow"))
        keys = {"AWS_ACCESS_KEY_ID": "YQ==", "AWS_SECRET_ACCESS_KEY": "Yg=="}
        server.apply([secret("team", "mappo-s3", **keys), secret("team", "mappo-database", url="YQ==")])
        server.apply([*bound("team", "default-editor", EDITOR), *bound("kubeflow", "pipeline-runner", EDITOR)])
        server.add(CONTROLLER, data={"workflowDefaults": stock_defaults()})
        server.add("/api/v1/nodes/big", labels={"pool": "gpu"}, **NODE)
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "here",
            "clusters": [{"name": "c", "cluster": {"server": server.url}}],
            "users": [{"name": "u", "user": {"token": "mine"}}],
            "contexts": [{"name": "here", "context": {"cluster": "c", "user": "u", "namespace": "team"}}],
        }
        path = tmp_path / "kubeconfig"
        path.write_text(json.dumps(config))
        monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(path))
        yield server


@pytest.fixture
def run_doctor(capsys):
    """Return a function that runs `doctor` and returns the exit status and the findings by check."""

    def run(*arguments: str) -> tuple[int, dict[str, dict]]:
        status = main(["doctor", *arguments, "--output", "json"])
        findings = json.loads(capsys.readouterr().out)
        by_check = {finding["check"]: finding for finding in findings}
        assert len(by_check) == len(findings), "each check is shown once"
        fixes = [finding["fix"] for finding in findings if finding["state"] != "ok" and finding["fix"]]
        assert len(set(fixes)) == len(fixes), "each fix is shown once"
        return status, by_check

    return run


@pytest.fixture
def doctor(kubeflow, kubernetes, monkeypatch, tmp_path, run_doctor):
    """Return a function that runs `doctor` for profile `team` in a Kubeflow of several users."""
    (tmp_path / "site.yaml").write_text(GPU_SITE.format(version=mappo.__version__))

    def run(*arguments: str) -> tuple[int, dict[str, dict]]:
        return run_doctor("--site", str(tmp_path / "site.yaml"), "--namespace", "team", *arguments)

    with KubeflowServer(multi_user=True) as server:
        monkeypatch.setenv("KF_PIPELINES_ENDPOINT", server.url)
        run.server = server
        yield run


def test_a_complete_cluster_passes_all_checks(doctor, s3):
    status, findings = doctor("--store", f"s3://{s3}/runs", "--pipeline-root", f"s3://{s3}/root")
    assert status == 0
    assert {finding["state"] for finding in findings.values()} == {"ok"}
    assert len(findings) == 4 + 9 + 1 + 1 + 2  # Kubeflow; namespace, objects and rights; retries; nodes; stores


def test_stock_kubeflow_without_the_secrets_of_this_project_passes(kubeflow, kubernetes, run_doctor):
    status, findings = run_doctor("--image", f"mappo:{mappo.__version__}")
    assert status == 0
    assert findings["secret mappo-s3"]["state"] == "ok"
    assert "Kubeflow's own store" in findings["secret mappo-s3"]["detail"]
    assert findings["config map kfp-launcher"]["detail"] == (
        "none; artifacts go to minio://mlpipeline/v2/artifacts with the keys of secret mlpipeline-minio-artifact"
    )
    assert findings["rights of pipeline-runner"]["state"] == findings["retries"]["state"] == "ok"


@pytest.mark.parametrize("overlay", IN_NAMESPACES)
def test_no_check_fails_after_the_commands_of_an_overlay(overlay, kubeflow, kubernetes, run_doctor, monkeypatch):
    """Warnings name only the objects that the overlay does not need."""
    namespace, is_multi_user = namespace_of(overlay), namespace_of(overlay) != "kubeflow"
    if not of_kind(overlay, "Namespace") or of_kind(overlay, "Profile"):  # Kubeflow creates it, with the secret
        kubernetes.add(f"/api/v1/namespaces/{namespace}")
        kubernetes.apply([secret(namespace, "mlpipeline-minio-artifact", **STORE_SECRET)])
    kubernetes.apply(applied(overlay).objects)
    site = ROOT / "k8s" / "overlays" / overlay / "site.yaml"
    image = ["--site", str(site)] if site.exists() else ["--image", f"mappo:{mappo.__version__}"]
    with KubeflowServer(multi_user=is_multi_user, namespaces={namespace}) as server:
        monkeypatch.setenv("KF_PIPELINES_ENDPOINT", server.url)
        flags = ["--namespace", namespace] if is_multi_user else []
        status, findings = run_doctor(*image, *flags, "--service-account", "mappo-runner")
    assert status == 0, [finding for finding in findings.values() if finding["state"] == "failed"]
    assert findings["rights of mappo-runner"]["state"] == "ok"
    warnings = {check for check, finding in findings.items() if finding["state"] == "warning"}
    optional = {"secret mappo-registry", "secret mappo-database", "config map mappo-monitoring"}
    optional |= {"nodes for train", "nodes for tune"}
    assert warnings <= optional


def test_the_check_of_a_store_leaves_no_objects_in_the_store(doctor, s3):
    from tests.support.services import s3_client

    doctor("--store", f"s3://{s3}/runs")
    with s3_client() as client:
        assert client.list_objects_v2(Bucket=s3).get("KeyCount") == 0


@pytest.mark.parametrize(
    ("path", "check", "state", "fix"),
    [
        ("secrets/mappo-registry", "secret mappo-registry", "warning", "docker-registry mappo-registry"),
        ("secrets/mappo-database", "secret mappo-database", "warning", "--from-literal=url="),
        (
            "configmaps/mappo-monitoring",
            "config map mappo-monitoring",
            "warning",
            "create configmap mappo-monitoring",
        ),
        (
            "serviceaccounts/default-editor",
            "service account default-editor",
            "failed",
            "create serviceaccount default-editor",
        ),
        ("", "namespace team", "failed", "--namespace"),
    ],
)
def test_a_missing_object_is_named_with_its_fix(doctor, kubernetes, path, check, state, fix):
    del kubernetes.objects[f"/api/v1/namespaces/team/{path}".rstrip("/")]
    status, findings = doctor()
    assert status == (1 if state == "failed" else 0)
    assert findings[check]["state"] == state
    assert fix in findings[check]["fix"]


def test_a_missing_secret_of_kubeflows_store_fails_with_the_command_that_copies_it(doctor, kubernetes):
    path = "/api/v1/namespaces/team/secrets/mlpipeline-minio-artifact"
    del kubernetes.objects[path]
    status, findings = doctor()
    assert status == 1
    missing = findings["secret mlpipeline-minio-artifact"]
    assert missing["state"] == "failed"
    assert "waits for it for ever" in missing["detail"]
    assert missing["fix"].replace("team", "mappo") in commands_of("base"), (
        "the same command as in the overlay's README"
    )
    kubernetes.add(path, data={"accesskey": "YQ=="})
    assert "without secretkey" in doctor()[1]["secret mlpipeline-minio-artifact"]["detail"]


def test_a_missing_secret_of_kubeflows_store_is_created_and_not_copied_in_kubeflows_own_namespace(
    kubeflow, kubernetes, run_doctor
):
    del kubernetes.objects["/api/v1/namespaces/kubeflow/secrets/mlpipeline-minio-artifact"]
    fix = run_doctor("--image", "mappo:1")[1]["secret mlpipeline-minio-artifact"]["fix"]
    assert "sed" not in fix
    assert "create secret generic mlpipeline-minio-artifact --from-literal=accesskey=" in fix


def test_a_missing_s3_secret_is_a_warning_only_when_the_run_uses_s3(doctor, kubernetes):
    del kubernetes.objects["/api/v1/namespaces/team/secrets/mappo-s3"]
    assert doctor()[1]["secret mappo-s3"]["state"] == "ok"
    finding = doctor("--pipeline-root", "s3://no-such-bucket-here/root")[1]["secret mappo-s3"]
    assert finding["state"] == "warning"
    assert "create secret generic mappo-s3 --from-literal=AWS_ACCESS_KEY_ID=" in finding["fix"]


def own_bucket() -> dict[str, str]:
    """Return the data of the config map kfp-launcher in k8s/components/own-bucket."""
    path = ROOT / "k8s" / "components" / "own-bucket" / "kfp-launcher.yaml"
    return yaml.safe_load(path.read_text())["data"]


def test_a_missing_secret_fails_when_kfp_launcher_names_it(doctor, kubernetes):
    data = own_bucket()
    data["providers"] = data["providers"].replace("mappo-s3", "another")
    kubernetes.add("/api/v1/namespaces/team/configmaps/kfp-launcher", data=data)
    status, findings = doctor()
    assert status == 1
    assert findings["config map kfp-launcher"]["detail"] == (
        "artifacts go to s3://mappo/pipelines with the keys of secret another"
    )
    assert findings["secret another"]["state"] == "failed"
    assert "--from-literal=AWS_ACCESS_KEY_ID=" in findings["secret another"]["fix"]
    assert "get secrets/another" in findings["rights of default-editor"]["detail"]


def test_a_secret_that_stages_and_the_launcher_share_is_checked_once(doctor, kubernetes):
    kubernetes.add("/api/v1/namespaces/team/configmaps/kfp-launcher", data=own_bucket())
    assert doctor()[1]["secret mappo-s3"]["state"] == "ok"
    del kubernetes.objects["/api/v1/namespaces/team/secrets/mappo-s3"]
    assert doctor()[1]["secret mappo-s3"]["state"] == "failed"


def test_a_config_map_that_the_launcher_cannot_read_fails(doctor, kubernetes):
    data = own_bucket() | {"providers": "s3: {default: {endpoint: s3.example.org}}"}
    kubernetes.add("/api/v1/namespaces/team/configmaps/kfp-launcher", data=data)
    status, findings = doctor()
    assert status == 1
    assert "lacks credentials" in findings["config map kfp-launcher"]["detail"]


def test_missing_rights_of_an_account_fail_with_the_commands_that_give_them(doctor, kubernetes):
    kubernetes.apply(bound("team", "mappo-runner", EDITOR[1:]))
    status, findings = doctor("--service-account", "mappo-runner")
    assert status == 1
    rights = findings["rights of mappo-runner"]
    assert rights["detail"] == "may not get configmaps/kfp-launcher, get secrets/mlpipeline-minio-artifact"
    role, binding = rights["fix"].splitlines()[2:]
    name = "mappo-runner-get-mlpipeline-minio-artifact"
    only = "--verb=get --resource=secrets --resource-name=mlpipeline-minio-artifact"
    assert role == f"kubectl -n team create role {name} {only}"
    assert binding == (
        f"kubectl -n team create rolebinding {name} --role={name} --serviceaccount=team:mappo-runner"
    )


def test_rights_that_cannot_be_read_are_a_warning_with_the_commands_for_an_administrator(doctor, kubernetes):
    kubernetes.forbidden = ["localsubjectaccessreviews"]
    status, findings = doctor()
    assert status == 0
    rights = findings["rights of default-editor"]
    assert rights["state"] == "warning"
    assert "cannot be read: 403" in rights["detail"]
    command = "auth can-i create workflowtaskresults.argoproj.io --as=system:serviceaccount:team:default-editor"
    assert f"kubectl -n team {command}" in rights["fix"]


@pytest.mark.parametrize(
    ("defaults", "state", "detail"),
    [
        (stock_defaults(), "ok", "Argo recreates lost pods (OnError)"),
        (
            "spec:\n  templateDefaults:\n    retryStrategy: {limit: 0, retryPolicy: Always}\n",
            "ok",
            "pods that failed (Always)",
        ),
        ("", "warning", "does not recreate lost pods"),
        (
            "spec:\n  ttlStrategy: {secondsAfterCompletion: 3600}\n",
            "warning",
            "has no templateDefaults.retryStrategy",
        ),
        ("spec:\n  templateDefaults:\n    retryStrategy: {limit: 2}\n", "warning", "retryPolicy is OnFailure"),
        (
            "spec:\n  templateDefaults:\n    retryStrategy: {limit: 2, retryPolicy: Always}\n",
            "warning",
            "recreates failed pods at every level",
        ),
        ("spec: {templateDefaults: {retryStrategy: {retryPolicy: Always}}}", "failed", "one line"),
        ("spec:\n  - [\n", "failed", "not YAML"),
        ("- spec\n- spec\n", "failed", "keys and values"),
        ("spec:\n  templateDefaults:\n    - timeout\n", "failed", "keys and values"),
        ("spec:\n  templateDefaults:\n    retryStrategy: 2\n", "failed", "limit and retryPolicy"),
        ("spec:\nmetadata:\n", "warning", "has no templateDefaults.retryStrategy"),
    ],
)
def test_retries_of_argo_are_read_from_its_controllers_config_map(doctor, kubernetes, defaults, state, detail):
    kubernetes.objects[CONTROLLER]["data"] = {"workflowDefaults": defaults} if defaults else None
    finding = doctor()[1]["retries"]
    assert finding["state"] == state
    assert detail in finding["detail"]
    if state != "failed" and "every level" not in detail:
        assert "restarts its process in the pod" in finding["detail"]


def test_the_fix_of_retries_is_a_patch_that_keeps_the_controllers_other_defaults(doctor, kubernetes):
    kubernetes.objects[CONTROLLER]["data"] = {
        "workflowDefaults": "spec:\n  ttlStrategy: {secondsAfterFailure: 60}\n"
    }
    words = shlex.split(doctor()[1]["retries"]["fix"])
    assert words[:6] == ["kubectl", "-n", "kubeflow", "patch", "configmap", "workflow-controller-configmap"]
    patched = yaml.safe_load(words[words.index("--patch") + 1])["data"]
    assert len(patched["workflowDefaults"].splitlines()) > 5, "the controller reads it line by line"
    spec = yaml.safe_load(patched["workflowDefaults"])["spec"]
    assert spec["ttlStrategy"] == {"secondsAfterFailure": 60}
    kubernetes.objects[CONTROLLER]["data"] = patched
    assert doctor()[1]["retries"]["state"] == "ok"


def test_the_fix_of_retries_keeps_the_limit_and_backoff_of_the_controller(doctor, kubernetes):
    strategy = {"limit": 10, "retryPolicy": "OnFailure", "backoff": {"duration": "1m"}}
    defaults = yaml.safe_dump({"spec": {"templateDefaults": {"retryStrategy": strategy}}})
    kubernetes.objects[CONTROLLER]["data"] = {"workflowDefaults": defaults}
    words = shlex.split(doctor()[1]["retries"]["fix"])
    patched = yaml.safe_load(yaml.safe_load(words[words.index("--patch") + 1])["data"]["workflowDefaults"])
    assert patched["spec"]["templateDefaults"]["retryStrategy"] == {**strategy, "retryPolicy": "Always"}


def test_only_the_namespace_fails_and_none_is_guessed_when_several_users_give_no_namespace(
    kubernetes, run_doctor, monkeypatch
):
    with KubeflowServer(multi_user=True) as server:
        monkeypatch.setenv("KF_PIPELINES_ENDPOINT", server.url)
        status, findings = run_doctor("--image", f"mappo:{mappo.__version__}")
    assert status == 1
    assert [check for check, finding in findings.items() if finding["state"] == "failed"] == ["namespace"]
    assert not any(check.startswith(("secret", "service account", "rights")) for check in findings)


@pytest.mark.parametrize("is_missing", [True, False])
def test_a_controller_that_cannot_be_read_is_a_warning(doctor, kubernetes, is_missing):
    if is_missing:
        del kubernetes.objects[CONTROLLER]
    else:
        kubernetes.forbidden = ["workflow-controller-configmap"]
    finding = doctor()[1]["retries"]
    assert finding["state"] == "warning"
    assert ("does not exist" if is_missing else "cannot be read") in finding["detail"]


def test_a_secret_without_the_needed_keys_is_a_warning(doctor, kubernetes):
    kubernetes.objects["/api/v1/namespaces/team/secrets/mappo-s3"]["data"] = {"accesskey": "YQ=="}
    finding = doctor()[1]["secret mappo-s3"]
    assert finding["state"] == "warning"
    assert "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" in finding["detail"]


def test_objects_that_the_user_may_not_read_are_a_warning(doctor, kubernetes):
    kubernetes.forbidden = ["secrets", "nodes"]
    status, findings = doctor()
    assert status == 0
    assert findings["secret mappo-s3"]["state"] == findings["nodes for train"]["state"] == "warning"
    assert "403" in findings["nodes for train"]["detail"]


def test_gpus_labels_and_taints_of_nodes_are_compared_with_the_site(doctor, kubernetes):
    node = kubernetes.objects["/api/v1/nodes/big"]
    node["spec"] = {"taints": [{"key": "gpu", "value": "yes", "effect": "NoSchedule"}]}
    assert doctor()[1]["nodes for train"]["state"] == "ok"
    node["spec"] = {"taints": [{"key": "spot", "value": "yes", "effect": "NoSchedule"}]}
    status, findings = doctor()
    assert status == 1
    assert "spot=yes:NoSchedule" in findings["nodes for train"]["detail"]
    node["spec"], node["status"] = {}, {"allocatable": {"nvidia.com/gpu": "1"}}
    assert "none with 2 x nvidia.com/gpu" in doctor()[1]["nodes for train"]["detail"]
    node["status"], node["metadata"]["labels"] = NODE["status"], {}
    assert doctor()[1]["nodes for train"]["state"] == "warning"


def test_refused_credentials_fail_with_the_reason(doctor):
    doctor.server.tokens = {"another"}
    status, findings = doctor()
    assert status == 1
    assert "missing, wrong or expired" in findings["API"]["detail"]


def test_a_foreign_namespace_fails_with_the_reason(doctor):
    status, findings = doctor("--namespace", "foreign")
    assert status == 1
    assert "may not do that here" in findings["namespace"]["detail"]


@pytest.mark.parametrize(
    ("server", "state", "detail"),
    [
        ("2.17.0", "ok", "server 2.17.0, SDK 2.17.3: tested on a real cluster"),
        ("2.16.1", "warning", "known only from its sources"),
        ("2.15.0", "warning", "known only from its sources"),
        ("2.5.0", "warning", "server 2.5.0, SDK 2.17.3: never tested"),
        ("unknown", "warning", "server does not tell its version"),
    ],
)
def test_untested_versions_are_a_warning(doctor, monkeypatch, server, state, detail):
    monkeypatch.setattr(KubeflowServer, "_healthz", lambda self: {"tag_name": server, "multi_user": True})
    finding = doctor()[1]["versions"]
    assert finding["state"] == state
    assert detail in finding["detail"]


def test_an_unreachable_api_is_one_failure_that_tells_how_to_reach_it(
    kubeflow, kubernetes, run_doctor, monkeypatch
):
    kubeflow.stop()
    monkeypatch.setattr("pipelines.commands.doctor._PATIENCE_SECONDS", 0.0)
    status, findings = run_doctor("--image", f"mappo:{mappo.__version__}")
    assert status == 1
    assert [check for check, finding in findings.items() if finding["state"] == "failed"] == ["API"]
    assert "kubectl -n kubeflow port-forward svc/ml-pipeline 8888:8888" in findings["API"]["fix"]
    assert "--namespace" not in str(findings)
    assert findings["secret mlpipeline-minio-artifact"]["state"] == "ok", "the rest is checked"


def test_an_unreachable_cluster_is_one_failure_without_an_endpoint(kubeflow, kubernetes, run_doctor, monkeypatch):
    """Without an endpoint, Kubeflow is reached through the Kubernetes API."""
    kubernetes.stop()
    monkeypatch.delenv("KF_PIPELINES_ENDPOINT")
    monkeypatch.setattr("pipelines.commands.doctor._PATIENCE_SECONDS", 0.0)
    status, findings = run_doctor("--image", f"mappo:{mappo.__version__}")
    assert status == 1
    assert set(findings) == {"image", "API"}


def test_an_image_of_another_version_is_a_warning(doctor):
    assert doctor("--image", "mappo:0.0.1")[1]["image"]["state"] == "warning"


def test_a_store_that_cannot_be_written_fails_with_the_reason(doctor, s3):
    status, findings = doctor("--store", "s3://no-such-bucket-here/runs")
    assert status == 1
    assert "no-such-bucket-here" in findings["store"]["detail"]


def test_the_other_checks_run_when_there_is_no_kubeconfig(doctor, monkeypatch, tmp_path):
    monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "none"))
    status, findings = doctor()
    assert status == 0
    assert findings["Kubernetes"]["state"] == "warning"
    assert findings["credentials"]["state"] == "ok"


def test_an_unreachable_kubernetes_is_one_warning(doctor, kubernetes):
    kubernetes.stop()
    findings = doctor()[1]
    assert findings["Kubernetes"]["state"] == "warning"
    assert "secret mappo-s3" not in findings


def test_the_table_shows_the_fix_below_each_finding(doctor, capsys, tmp_path):
    assert main(["doctor", "--image", "mappo:latest", "--namespace", "team"]) == 0
    output = capsys.readouterr().out
    assert "warning  image: the tag latest names changing images" in output
    assert "\n         use a tag that stays" in output


def test_a_fix_of_several_lines_can_be_copied_into_a_shell(doctor, kubernetes, capsys):
    kubernetes.objects[CONTROLLER]["data"] = None
    main(["doctor", "--image", "mappo:1", "--namespace", "team"])
    output = capsys.readouterr().out
    command = output[output.index("kubectl -n kubeflow patch") :].partition("\nwarning")[0]
    patch = shlex.split(command)[-1]
    assert "retryPolicy: OnError" in yaml.safe_load(patch)["data"]["workflowDefaults"]
