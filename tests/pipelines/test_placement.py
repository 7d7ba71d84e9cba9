"""What becomes of a site's choices, read in the compiled pipelines of tests/golden."""

import json
import re
from pathlib import Path

import pytest
import yaml

from mappo.monitoring.metrics import PORT
from pipelines.__main__ import main
from pipelines.compiling import compile_pipeline
from pipelines.placement import GPU_STAGES
from pipelines.site import Site, read_site

GOLDEN = Path("tests/golden")
COMPILE = [
    "compile",
    "--site",
    str(GOLDEN / "site.yaml"),
    "--seeds=0,1",
    "--parallel-seeds=1",
    "--output",
    str(GOLDEN),
]


def documents(name: str) -> tuple[dict, dict]:
    specification, platform = yaml.safe_load_all((GOLDEN / f"{name}.yaml").read_text())
    return specification, platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]


def test_compiled_pipelines_are_what_they_were(capsys):
    """After a change that is meant: python -m pipelines compile --site tests/golden/site.yaml --seeds=0,1
    --parallel-seeds=1 --output tests/golden; and read the difference.
    """
    assert main([*COMPILE, "--check"]) == 0, capsys.readouterr().err


@pytest.mark.parametrize("name", ["training", "seeds", "tuning"])
def test_every_choice_of_the_site_is_a_default_or_fixed(name):
    specification, executors = documents(name)
    defaults = {
        key: each.get("defaultValue")
        for key, each in specification["root"]["inputDefinitions"]["parameters"].items()
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
        each["dag"]["tasks"]["train"]["retryPolicy"]
        for each in dags
        if "train" in each.get("dag", {}).get("tasks", {})
    ]
    year = "31536000s"  # Argo ends every attempt so long after the first began
    policy = {"maxRetryCount": 9, "backoffDuration": "5s", "backoffFactor": 3.0, "backoffMaxDuration": year}
    assert policies
    assert all(each == policy for each in policies)
    assert "activeDeadlineSeconds" not in executors.get("exec-compare", {})


@pytest.mark.parametrize("name", ["training", "seeds", "tuning"])
def test_every_stage_gets_its_own_parameters_and_only_those(name):
    """Each component's resources and each executor's nodes come from the parameters of its own stage."""
    specification, executors = documents(name)
    for label, executor in specification["deploymentSpec"]["executors"].items():
        stage = re.sub(r"-\d+$", "", label.removeprefix("exec-"))
        resources = json.dumps(executor["container"]["resources"])
        for field in ("cpu", "memory", *(["gpu_type", "gpu_count"] if stage in GPU_STAGES else [])):
            assert f"pipelinechannel--{stage}_{field}'" in resources
        assert all(f"--{stage}_" in part for part in resources.split("pipelinechannel")[1:])
        placed = executors[label]
        assert placed["nodeSelector"]["nodeSelectorJson"]["componentInputParameter"].endswith(
            f"{stage}_node_selector"
        )
        (toleration,) = placed["tolerations"]
        assert toleration["tolerationJson"]["componentInputParameter"].endswith(f"{stage}_tolerations")
        (affinity,) = placed["nodeAffinity"]
        assert affinity["nodeAffinityJson"]["componentInputParameter"].endswith(f"{stage}_node_affinity")


def test_placement_reaches_into_the_loop_over_seeds():
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


@pytest.mark.parametrize("name", ["training", "seeds", "tuning"])
def test_nothing_is_cached_at_any_level(name):
    specification, _ = documents(name)
    dags = [specification["root"], *specification["components"].values()]
    tasks = [task for each in dags for task in each.get("dag", {}).get("tasks", {}).values()]
    assert len(tasks) >= 3
    assert not any(task.get("cachingOptions", {}).get("enableCache") for task in tasks)


@pytest.mark.parametrize("name", ["training", "seeds", "tuning"])
def test_parameters_are_described_and_named_after_their_stage(name):
    specification, _ = documents(name)
    parameters = specification["root"]["inputDefinitions"]["parameters"]
    assert all(each["description"].endswith(".") for each in parameters.values())
    own = {"config", "store", "image", "image_pull_secret", "s3_secret"}
    stages = ("validate_", "train_", "evaluate_", *(["compare_"] if name == "seeds" else []))
    if name == "tuning":
        own |= {
            "study",
            "edition",
            "session",
            "num_trials",
            "hours",
            "workers",
            "retrain_seeds",
            "space",
            "tuning",
        }
        own |= {"champions", "gate", "database_secret"}
        stages = ("prepare_", "tune_", "choose_", "train_", "evaluate_", "promote_", "report_")
    else:
        own |= {"run", "seeds"}
    assert all(key in own or key.startswith(stages) for key in parameters)


def test_secrets_are_referred_to_and_never_held():
    _, executors = documents("training")
    secret, of_kubeflow = executors["exec-train"]["secretAsEnv"]
    assert secret["secretNameParameter"] == {"componentInputParameter": "s3_secret"}
    assert secret["optional"]
    assert {"secretKey": "AWS_SECRET_ACCESS_KEY", "envVar": "AWS_SECRET_ACCESS_KEY"} in secret["keyToEnv"]
    assert of_kubeflow["secretName"] == "mlpipeline-minio-artifact"
    assert of_kubeflow["optional"]
    assert {"secretKey": "secretkey", "envVar": "MAPPO_KUBEFLOW_SECRET_KEY"} in of_kubeflow["keyToEnv"]


def test_endpoint_of_kubeflows_store_is_the_sites(tmp_path):
    site = Site(image="a/b:1", minio_endpoint="http://minio-service.kubeflow:9000")
    compiled = compile_pipeline("training", site, {"config": "{}"})
    executors = compiled.specification["deploymentSpec"]["executors"]
    endpoints = [
        each["value"]
        for executor in executors.values()
        for each in executor["container"]["env"]
        if each["name"] == "MAPPO_MINIO_ENDPOINT"
    ]
    assert endpoints == ["http://minio-service.kubeflow:9000"] * 3


def test_only_stages_of_studies_are_given_the_database():
    _, executors = documents("tuning")
    given = {
        label.removeprefix("exec-")
        for label, executor in executors.items()
        for secret in executor.get("secretAsEnv", [])
        if {"secretKey": "url", "envVar": "MAPPO_DATABASE"} in secret["keyToEnv"]
    }
    assert given == {"prepare", "tune", "choose", "promote", "report"}
    assert "MAPPO_DATABASE" not in (GOLDEN / "training.yaml").read_text()
