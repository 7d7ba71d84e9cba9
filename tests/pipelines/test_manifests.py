"""The compiled pipelines as objects of Kubernetes, checked as Kubeflow's schemas and its webhook check them."""

import re
from pathlib import Path

import pytest
import yaml

from pipelines.compiling import Compiled, read_compiled
from pipelines.manifests import kubernetes_manifests
from tests.support.kubernetes_rules import NEWEST, check_schema

GOLDEN = Path(__file__).parents[1] / "golden"
SITE = ["--site", str(GOLDEN / "site.yaml")]
MAX_ANNOTATION_BYTES = 262_144  # `kubectl apply` writes the whole object into an annotation


@pytest.mark.parametrize("name", ["training", "seeds", "tuning"])
def test_manifests_hold_the_compiled_pipeline_unchanged(name):
    compiled = read_compiled(GOLDEN / f"{name}.yaml")
    text = kubernetes_manifests(compiled)
    pipeline, version = yaml.safe_load_all(text)
    for manifest in (pipeline, version):
        check_schema(manifest, NEWEST)
        assert re.fullmatch(r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?", manifest["metadata"]["name"])
        assert len(manifest["metadata"]["name"]) <= 253
    assert pipeline["metadata"]["name"] == version["spec"]["pipelineName"] == compiled.name
    assert version["spec"]["pipelineSpec"] == compiled.specification
    assert version["spec"]["platformSpec"] == compiled.documents[1]
    assert len(text.encode()) < MAX_ANNOTATION_BYTES


def test_other_content_has_another_name_since_kubeflow_refuses_to_change_a_version():
    compiled = read_compiled(GOLDEN / "training.yaml")
    other = Compiled(compiled.text.replace("navigation", "balance"))
    first, second = (list(yaml.safe_load_all(kubernetes_manifests(item))) for item in (compiled, other))
    assert first[0] == second[0]
    assert first[1]["metadata"]["name"] != second[1]["metadata"]["name"]


def test_compile_writes_manifests_and_checks_them(kubeflow, cli, tmp_path):
    command = ["compile", *SITE, "--format", "kubernetes", "--pipeline", "training", "--output", "m"]
    assert cli(*command)[0] == 0
    kinds = [manifest["kind"] for manifest in yaml.safe_load_all((tmp_path / "m" / "training.yaml").read_text())]
    assert kinds == ["Pipeline", "PipelineVersion"]
    status, _, err = cli(*command, "--check", "--learner.epochs=7")
    assert status == 1
    assert "PipelineVersion" in err or "mappo-training-" in err


def test_submission_runs_the_version_that_the_manifests_made(kubeflow, read):
    """Play the server that keeps pipelines in Kubernetes: it lists what the manifests describe."""
    pipeline, version = yaml.safe_load_all(kubernetes_manifests(read_compiled(GOLDEN / "training.yaml")))
    added = kubeflow._add_pipeline(pipeline["metadata"]["name"], {"display_name": pipeline["spec"]["displayName"]})
    spec = {"pipeline_spec": version["spec"]["pipelineSpec"], "platform_spec": version["spec"]["platformSpec"]}
    names = {"display_name": version["spec"]["displayName"]}
    kept = kubeflow._add_version(added["pipeline_id"], spec, version["metadata"]["name"], names)
    read("submit", "--file", str(GOLDEN / "training.yaml"), "--upload")
    (run,) = kubeflow.runs.values()
    assert run["pipeline_version_reference"]["pipeline_version_id"] == kept["pipeline_version_id"]
    assert len(kubeflow.versions) == 1, "nothing was uploaded"
