from dataclasses import replace
from pathlib import Path

import pytest

from mappo.config import ConfigError
from pipelines.site import Site, Stage, read_site


def site(tmp_path, text: str) -> Site:
    path = tmp_path / "site.yaml"
    path.write_text(text)
    return read_site(path)


def test_what_a_site_leaves_out_keeps_the_default_of_its_stage(tmp_path):
    found = site(tmp_path, "stages: {train: {gpu_count: 2}, evaluate: {cpu: 8}}")
    default = Site().stages
    assert found.stages.train.gpu_count == 2
    assert found.stages.train.retries == default.train.retries > Stage().retries
    assert found.stages.evaluate.cpu == "8"
    assert found.stages.validate == default.validate


def test_the_example_is_a_site_whose_other_values_are_the_defaults():
    """Its comments say what is no default."""
    found, default = read_site(Path("k8s/site.yaml")), Site()
    gpu = {
        "gpu_count": 1,
        "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
    }
    assert found == replace(
        default, image=found.image, stages=replace(default.stages, train=replace(default.stages.train, **gpu))
    )


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("stages: {train: {cpus: 3}}", "stages.train.cpus = 3: unknown key; did you mean cpu?"),
        ("stages: {tran: {}}", "did you mean train?"),
        ("stages: {train: {cpu: -1}}", "stages.train.cpu = -1: must be a number of cores"),
        ("stages: {train: {cpu: 0}}", "must be a number of cores"),
        ("stages: {train: {memory: 8GB}}", 'stages.train.memory = "8GB": must be an amount of memory'),
        ("stages: {train: {memory: 8}}", "stages.train.memory = 8"),
        ("stages: {train: {gpu_count: 1.5}}", "stages.train.gpu_count = 1.5"),
        ("stages: {train: {gpu_count: true}}", "stages.train.gpu_count = true"),
        ("stages: {train: {retries: 101}}", "stages.train.retries = 101"),
        ("stages: {train: {retries: 20}}", "the last wait would be"),
        ("stages: {train: {timeout_seconds: -1}}", "stages.train.timeout_seconds = -1"),
        ("stages: {train: {tolerations: [{keys: x}]}}", "stages.train.tolerations.0.keys"),
        ("stages: {train: {tolerations: [{operator: Is}]}}", "stages.train.tolerations.0.operator"),
        ("stages: {train: {node_affinity: {required: []}}}", "stages.train.node_affinity.required"),
        ("stages: {train: {node_selector: {a b: c}}}", "must be a Kubernetes label's key"),
        ("pod_labels: {team: a b}", "must be a Kubernetes label's value"),
        ("s3_secret: My_Secret", "must be a Kubernetes name"),
        ("run_as_user: -1", "run_as_user = -1"),
        ("stages: {train: {cpu: 0.0}}", "must be a number of cores"),
        ("stages: {train: {gpu_type: GPU of mine}}", "must be a resource name, such as nvidia.com/gpu"),
        ("stages: {train: {tolerations: [{operator: Exists, value: x}]}}", "operator Exists takes no value"),
        ("stages: {train: {memory: 1Gi, shm: 1025Mi}}", "must fit in it"),
        ("image: mappo", "must be NAME:TAG"),
        ("image: 2020-01-01", "write it in quotes"),
        ("image: a:1\nimage: a:2", "image: given more than once"),
        ("- a", "must hold keys and values"),
        ("", "must hold keys and values"),
        ("a: [", "not YAML"),
        ("a: !!python/object/apply:os.getcwd []", "not YAML"),
    ],
)
def test_a_wrong_site_is_refused_naming_file_and_field(tmp_path, text, reason):
    with pytest.raises(ConfigError) as error:
        site(tmp_path, text)
    assert reason in str(error.value)
    assert all(line.startswith(str(tmp_path / "site.yaml")) for line in str(error.value).splitlines()[:1])


def test_choices_may_be_merged_by_yaml(tmp_path):
    found = site(tmp_path, "pod_labels: &all {a: b}\npod_annotations: {<<: *all, c: d}")
    assert found.pod_annotations == {"a": "b", "c": "d"}


def test_a_file_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "site.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"site\.yaml"):
        read_site(tmp_path / "site.yaml")
