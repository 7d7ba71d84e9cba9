"""Check the effect of a site's settings in the compiled pipelines of tests/golden."""

import json
import re
from pathlib import Path

import pytest
import yaml

from mappo.monitoring.metrics import PORT
from pipelines.__main__ import main
from pipelines.compiling import NAMES, compile_pipeline
from pipelines.placement import GPU_STAGES
from pipelines.site import Site, read_site

GOLDEN = Path("tests/golden")
COMPILE = [
    "compile",
    "--site",
    str(GOLDEN / "site.yaml"),
    "--seeds=0,1",
    "--matrix=tests/data/matrix.yaml",
    "--parallel-seeds=1",
    "--output",
    str(GOLDEN),
]


def documents(name: str) -> tuple[dict, dict]:
    specification, platform = yaml.safe_load_all((GOLDEN / f"{name}.yaml").read_text())
    return specification, platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]


def test_compiled_pipelines_equal_the_golden_files(capsys):
    """After an intended change, update the golden files and read the difference:

    python -m pipelines compile --site tests/golden/site.yaml --seeds=0,1 --matrix=tests/data/matrix.yaml \\
        --parallel-seeds=1 --output tests/golden
    """
    assert main([*COMPILE, "--check"]) == 0, capsys.readouterr().err


@pytest.mark.parametrize("name", ["training", "seeds", "tuning"])
def test_every_setting_of_the_site_is_a_default_or_is_fixed(name):
    specification, executors = documents(name)
    defaults = {
        key: definition.get("defaultValue")
        for key, definition in specification["root"]["inputDefinitions"]["parameters"].items()
    }
    site = read_site(GOLDEN / "site.yaml")
    assert defaults["image"] == site.image
    assert defaults["image_pull_secret"] == "team-registry"
    assert defaults["s3_secret"] == "team-s3"
    assert defaults["train_cpu"] == "7.5"
    assert defaults["train_gpu_count"] == "2"
    assert defaults["train_tolerations"] == site.stages.train.tolerations
    assert defaults["train_node_affinity"] == site.stages.train.node_affinity
    if name == "tuning":
        assert defaults["database_secret"] == "team-database"
        assert defaults["tune_memory"] == "12Gi"
        assert executors["exec-tune"]["podMetadata"]["annotations"]["prometheus.io/port"] == str(PORT)
    else:
        assert "database_secret" not in defaults
        assert defaults["validate_node_selector"] == {"pool": "cheap"}
    train = executors["exec-train"]
    assert train["activeDeadlineSeconds"] == "86400"
    assert train["emptyDirMounts"] == [
        {"volumeName": "shm", "mountPath": "/dev/shm", "medium": "Memory", "sizeLimit": "2Gi"}
    ]
    assert train["podMetadata"]["labels"] == {
        "app.kubernetes.io/part-of": "mappo",
        "kueue.x-k8s.io/queue-name": "team",
    }
    assert train["podMetadata"]["annotations"] == {
        "prometheus.io/port": str(PORT),
        "sidecar.istio.io/inject": "false",
    }
    assert train["securityContext"] == {"runAsUser": "1000", "runAsGroup": "1001", "runAsNonRoot": True}
    dags = [specification["root"], *specification["components"].values()]
    policies = [
        component["dag"]["tasks"]["train"]["retryPolicy"]
        for component in dags
        if "train" in component.get("dag", {}).get("tasks", {})
    ]
    year = "31536000s"  # Argo ends every attempt that runs longer than this after the first began
    policy = {"maxRetryCount": 9, "backoffDuration": "5s", "backoffFactor": 3.0, "backoffMaxDuration": year}
    assert policies
    assert all(actual == policy for actual in policies)
    assert "activeDeadlineSeconds" not in executors.get("exec-compare", {})


@pytest.mark.parametrize("name", NAMES)
def test_every_stage_gets_only_the_parameters_of_that_stage(name):
    """The resources of a component and the nodes of an executor come from the parameters of the same stage."""
    specification, executors = documents(name)
    for label, executor in specification["deploymentSpec"]["executors"].items():
        stage = re.sub(r"-\d+$", "", label.removeprefix("exec-"))
        resources = json.dumps(executor["container"]["resources"])
        for field in ("cpu", "memory", *(["gpu_type", "gpu_count"] if stage in GPU_STAGES else [])):
            assert f"pipelinechannel--{stage}_{field}'" in resources
        assert all(f"--{stage}_" in part for part in resources.split("pipelinechannel")[1:])
        kubernetes = executors[label]
        assert kubernetes["nodeSelector"]["nodeSelectorJson"]["componentInputParameter"].endswith(
            f"{stage}_node_selector"
        )
        (toleration,) = kubernetes["tolerations"]
        assert toleration["tolerationJson"]["componentInputParameter"].endswith(f"{stage}_tolerations")
        (affinity,) = kubernetes["nodeAffinity"]
        assert affinity["nodeAffinityJson"]["componentInputParameter"].endswith(f"{stage}_node_affinity")


def test_placement_parameters_reach_into_the_loop_over_seeds():
    """Follow a parameter from the pipeline through the inner pipeline and the loop to the task that trains."""
    specification, _ = documents("seeds")
    components = specification["components"]
    (loop,) = components["comp-mappo-each-seed"]["dag"]["tasks"].values()
    inside = components[loop["componentRef"]["name"]]["dag"]["tasks"]["train"]["inputs"]["parameters"]
    outer = specification["root"]["dag"]["tasks"]["mappo-each-seed"]["inputs"]["parameters"]
    name = inside["pipelinechannel--train_cpu"]["componentInputParameter"]
    assert name in components[loop["componentRef"]["name"]]["inputDefinitions"]["parameters"]
    name = loop["inputs"]["parameters"][name]["componentInputParameter"]
    assert outer[name] == {"componentInputParameter": "train_cpu"}


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_cached_at_any_level(name):
    specification, _ = documents(name)
    dags = [specification["root"], *specification["components"].values()]
    tasks = [task for component in dags for task in component.get("dag", {}).get("tasks", {}).values()]
    assert len(tasks) >= 3
    assert not any(task.get("cachingOptions", {}).get("enableCache") for task in tasks)


@pytest.mark.parametrize("name", NAMES)
def test_parameters_are_described_and_named_after_their_stage(name):
    specification, _ = documents(name)
    parameters = specification["root"]["inputDefinitions"]["parameters"]
    assert all(parameter["description"].endswith(".") for parameter in parameters.values())
    general = {"config", "store", "image", "image_pull_secret", "s3_secret"}
    stages = ("validate_", "train_", "evaluate_", *(["compare_"] if name == "seeds" else []))
    if name == "tuning":
        general |= {"study", "edition", "study_config", "session", "workers", "champions", "database_secret"}
        stages = ("prepare_", "tune_", "choose_", "train_", "evaluate_", "promote_", "report_")
    elif name == "matrix":
        general |= {"matrix", "cells"}
        stages = ("cell_", "summarise_")
    else:
        general |= {"run", "seeds"}
    assert all(key in general or key.startswith(stages) for key in parameters)


def test_secrets_are_referenced_and_not_contained():
    _, executors = documents("training")
    secret, kubeflow_secret = executors["exec-train"]["secretAsEnv"]
    assert secret["secretNameParameter"] == {"componentInputParameter": "s3_secret"}
    assert secret["optional"]
    assert {"secretKey": "AWS_SECRET_ACCESS_KEY", "envVar": "AWS_SECRET_ACCESS_KEY"} in secret["keyToEnv"]
    assert kubeflow_secret["secretName"] == "mlpipeline-minio-artifact"
    assert kubeflow_secret["optional"]
    assert {"secretKey": "secretkey", "envVar": "MAPPO_KUBEFLOW_SECRET_KEY"} in kubeflow_secret["keyToEnv"]


@pytest.mark.parametrize(
    ("setting", "value", "variable"),
    [
        ("minio_endpoint", "http://minio-service.kubeflow:9000", "MAPPO_MINIO_ENDPOINT"),
        ("compiled_code", "s3://bucket/compiled", "MAPPO_COMPILED"),
    ],
)
def test_setting_of_the_site_becomes_a_variable_of_every_stage(setting, value, variable):
    site = Site(image="a/b:1", **{setting: value})
    compiled = compile_pipeline("training", site, {"config": "{}"})
    executors = compiled.specification["deploymentSpec"]["executors"]
    values = [
        item["value"]
        for executor in executors.values()
        for item in executor["container"]["env"]
        if item["name"] == variable
    ]
    assert values == [value] * 3


def test_only_stages_of_studies_are_given_the_database():
    _, executors = documents("tuning")
    stages = {
        label.removeprefix("exec-")
        for label, executor in executors.items()
        for secret in executor.get("secretAsEnv", [])
        if {"secretKey": "url", "envVar": "MAPPO_DATABASE"} in secret["keyToEnv"]
    }
    assert stages == {"prepare", "tune", "choose", "promote", "report"}
    assert "MAPPO_DATABASE" not in (GOLDEN / "training.yaml").read_text()
