import json
from dataclasses import replace
from pathlib import Path

import pytest

from mappo.errors import ConfigError
from pipelines.kubernetes_types import require_image
from pipelines.site import Site, StagePod, read_site


def site(tmp_path, text: str) -> Site:
    path = tmp_path / "site.yaml"
    path.write_text(text)
    return read_site(path)


def test_omitted_settings_keep_the_defaults_of_their_stage(tmp_path):
    changed = site(tmp_path, "stages: {train: {gpu_count: 2}, evaluate: {cpu: 8}}")
    default = Site().stages
    assert changed.stages.train.gpu_count == 2
    assert changed.stages.train.retries == default.train.retries > StagePod().retries
    assert changed.stages.evaluate.cpu == "8"
    assert changed.stages.validate == default.validate


def test_example_site_equals_the_defaults_except_for_the_commented_values():
    """The comments of k8s/site.yaml mark the values that are not defaults."""
    example, default = read_site(Path("k8s/site.yaml")), Site()
    gpu = {
        "gpu_count": 1,
        "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
    }
    assert example == replace(
        default, image=example.image, stages=replace(default.stages, train=replace(default.stages.train, **gpu))
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
        ("stages: {train: {memory: 400m}}", "of memory of 1Mi or more"),
        ("stages: {train: {memory: 1.5e}}", "must be an amount of memory"),
        ("stages: {train: {memory: 8ki}}", "must be an amount of memory"),
        ("stages: {train: {memory: -8Gi}}", "must be an amount of memory"),
        ("stages: {train: {memory: 16Ei}}", "must be an amount of memory"),
        ("stages: {train: {cpu: 4Gi}}", "must be a number of cores"),
        ("stages: {train: {gpu_count: 1.5}}", "stages.train.gpu_count = 1.5"),
        ("stages: {train: {gpu_count: true}}", "stages.train.gpu_count = true"),
        ("stages: {train: {retries: 101}}", "stages.train.retries = 101"),
        ("stages: {train: {retries: 20}}", "the last wait would be"),
        (f"stages: {{train: {{backoff_seconds: {'9' * 4000}}}}}", "stages.train.backoff_seconds = 999"),
        (f"stages: {{train: {{timeout_seconds: {'9' * 4000}}}}}", "stages.train.timeout_seconds = 999"),
        ("stages: {train: {timeout_seconds: -1}}", "stages.train.timeout_seconds = -1"),
        ("stages: {train: {tolerations: [{keys: x}]}}", "stages.train.tolerations.0.keys"),
        ("stages: {train: {tolerations: [{operator: Is}]}}", "stages.train.tolerations.0.operator"),
        ("stages: {train: {node_affinity: {required: []}}}", "stages.train.node_affinity.required"),
        ("stages: {train: {node_selector: {a b: c}}}", "must be a Kubernetes label's key"),
        ("pod_labels: {team: a b}", "must be a Kubernetes label's value"),
        ("s3_secret: My_Secret", "must be a Kubernetes name"),
        ("s3_secret: a..b", "must be a Kubernetes name"),
        (f"s3_secret: {'a' * 254}", "must be a Kubernetes name"),
        ("pod_annotations: {a b: c}", "must be an annotation's key"),
        ("run_as_user: -1", "run_as_user = -1"),
        ("run_as_user: 2147483648", "run_as_user = 2147483648"),
        ("run_as_user: 0", "run_as_non_root = true forbids root"),
        ("minio_endpoint: seaweedfs.kubeflow:9000", "must be a URL"),
        ("compiled_code: /tmp/here", "compiled_code: '/tmp/here': not a location"),
        ("minio_endpoint: s3://bucket", "must be a URL"),
        ('minio_endpoint: "http://host:99999"', "minio_endpoint"),
        ('minio_endpoint: "http://host:9000\\n"', "must be a URL"),
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
        ("a: " + "[" * 3000 + "]" * 3000, "nested more than"),
        ("a: " + "[" * 200 + "]" * 200, "nested more than"),
        ("a: &a [*a]", "an alias holds itself"),
        ("pod_labels: &a {a: *a}", "an alias holds itself"),
        (
            "a0: &a0 [x, x]\n" + "\n".join(f"a{n}: &a{n} [{f'*a{n - 1}, ' * 9}]" for n in range(1, 9)),
            "with aliases written out",
        ),
        (f"run_as_user: {'9' * 5000}", "reads like a number or a date and is none"),
        (f"run_as_user: {'9' * 4000}", "run_as_user"),
        (f"stages: {{train: {{cpu: {'9' * 4000}}}}}", "must be a number of cores"),
        ("image: 2001-13-45", "line 1: '2001-13-45': reads like a number or a date and is none"),
        ("pod_labels: !!set {a}", "write it in quotes"),
        ("a: \tb: c", "not YAML"),
    ],
)
def test_wrong_site_is_refused_with_file_and_field(tmp_path, text, reason):
    with pytest.raises(ConfigError) as error:
        site(tmp_path, text)
    assert reason in str(error.value)
    assert all(line.startswith(str(tmp_path / "site.yaml")) for line in str(error.value).splitlines())


def train(tmp_path, **fields) -> StagePod:
    return site(tmp_path, json.dumps({"stages": {"train": fields}})).stages.train


@pytest.mark.parametrize(
    "memory",
    [
        "0.5Gi",
        "1Pi",
        "2E",
        "1.5e9",
        "1E9",
        "128974848",
        128974848,
        "128974848000m",
        "129M",
        "1048576k",
        "1.Gi",
        "+2Gi",
    ],
)
def test_memory_may_be_any_kubernetes_quantity(tmp_path, memory):
    assert train(tmp_path, memory=memory, shm=None).memory == str(memory)


def test_shm_must_fit_in_memory_in_any_unit(tmp_path):
    assert train(tmp_path, memory="1Gi", shm="1073741824").shm
    with pytest.raises(ConfigError, match="must fit in it"):
        train(tmp_path, memory="1e9", shm="1Gi")


@pytest.mark.parametrize("cpu", ["0.5", "500m", 2, 1.5, "1e1", ".5", "0.1k"])
def test_cpu_may_be_any_kubernetes_quantity(tmp_path, cpu):
    assert train(tmp_path, cpu=cpu).cpu == str(cpu)


DIGEST = "sha256:" + "0a" * 32


@pytest.mark.parametrize(
    "image",
    [
        "mappo:1.0",
        f"mappo@{DIGEST}",
        f"ghcr.io/you/mappo:1.0@{DIGEST}",
        "GHCR.io/you/mappo:1.0_a-B",
        "localhost:5000/a__b/c--d.e:1",
        "[::1]:5000/a:1",
    ],
)
def test_image_that_kubernetes_can_pull_is_accepted(image):
    assert require_image(image) == image


@pytest.mark.parametrize(
    "image",
    [
        "mappo",
        "ghcr.io/you/mappo",
        "GHCR.io/You/Mappo:1.0",
        "Mappo:1.0",
        "ghcr.io/you//mappo:1.0",
        "a/-b:1",
        "a:",
        "a:-1",
        "a:1:2",
        f"a:{'x' * 129}",
        f"{'a/' * 128}b:1",
        "a@sha256:abc",
        f"a@{DIGEST.upper()}",
        f"a@{DIGEST}:1",
        "a:1\n",
        " a:1",
        "https://ghcr.io/a:1",
    ],
)
def test_image_that_kubernetes_refuses_is_refused(image):
    with pytest.raises(ConfigError, match="must be NAME:TAG"):
        require_image(image)


@pytest.mark.parametrize(
    ("toleration", "reason"),
    [
        ({"operator": "Exists", "value": "x"}, "takes no value"),
        ({"key": "a", "operator": "Exists", "tolerationSeconds": 5}, "needs effect NoExecute"),
        (
            {"key": "a", "operator": "Exists", "effect": "NoSchedule", "tolerationSeconds": 5},
            "needs effect NoExecute",
        ),
        ({"operator": "Equal", "value": "x"}, "needs a key"),
        ({"effect": "NoSchedule"}, "needs a key"),
        ({"key": "a b", "operator": "Exists"}, "must be a Kubernetes label's key"),
        ({"key": "a", "value": "x y"}, "must be a Kubernetes label's value"),
        ({"key": "a", "effect": "NoRun"}, "effect"),
        ({"key": "a", "operator": "Gt"}, "operator"),
        ({"key": "a", "effect": "NoExecute", "tolerationSeconds": 2**63}, "tolerationSeconds"),
    ],
)
def test_toleration_that_kubernetes_refuses_is_refused(tmp_path, toleration, reason):
    with pytest.raises(ConfigError, match=reason):
        train(tmp_path, tolerations=[toleration])


@pytest.mark.parametrize(
    "toleration",
    [
        {"operator": "Exists"},
        {"key": "a", "value": "x"},
        {"key": "example.org/a", "operator": "Equal", "value": "", "effect": ""},
        {"key": "a", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 0},
    ],
)
def test_toleration_that_kubernetes_accepts_is_accepted(tmp_path, toleration):
    assert train(tmp_path, tolerations=[toleration]).tolerations == [toleration]


REQUIRED, PREFERRED = (f"{kind}DuringSchedulingIgnoredDuringExecution" for kind in ("required", "preferred"))


def term(**expression) -> dict:
    return {"matchExpressions": [expression]}


@pytest.mark.parametrize(
    ("term", "reason"),
    [
        (term(key="a", operator="In"), "operator In takes at least one value"),
        (term(key="a", operator="NotIn", values=[]), "operator NotIn takes at least one value"),
        (term(key="a", operator="Exists", values=["x"]), "operator Exists takes no values"),
        (term(key="a", operator="DoesNotExist", values=["x"]), "operator DoesNotExist takes no values"),
        (term(key="a", operator="Gt", values=["1", "2"]), "operator Gt takes one value"),
        (term(key="a", operator="Lt", values=["many"]), "operator Lt takes a whole number"),
        (term(key="a", operator="Is", values=["x"]), "operator"),
        (term(key="a b", operator="Exists"), "label's key"),
        (term(key="a", operator="In", values=["x y"]), "label's value"),
        (term(operator="Exists"), "key"),
        (term(key="a", operator="Exists", value="x"), "value"),
        ({"matchLabels": {"a": "b"}}, "matchLabels"),
        ({"matchFields": [{"key": "metadata.uid", "operator": "In", "values": ["x"]}]}, "metadata.name"),
        ({"matchFields": [{"key": "metadata.name", "operator": "In", "values": ["x", "y"]}]}, "values"),
    ],
)
def test_node_affinity_that_kubernetes_refuses_is_refused(tmp_path, term, reason):
    for affinity in (
        {REQUIRED: {"nodeSelectorTerms": [term]}},
        {PREFERRED: [{"weight": 1, "preference": term}]},
    ):
        with pytest.raises(ConfigError, match=reason):
            train(tmp_path, node_affinity=affinity)


@pytest.mark.parametrize(
    "affinity",
    [
        {REQUIRED: {"nodeSelectorTerms": []}},
        {REQUIRED: {}},
        {PREFERRED: [{"weight": 101, "preference": {}}]},
        {PREFERRED: [{"weight": 0, "preference": {}}]},
        {PREFERRED: [{"preference": {}}]},
        {PREFERRED: [{"weight": 1}]},
        {PREFERRED: {}},
    ],
)
def test_node_affinity_without_term_or_weight_is_refused(tmp_path, affinity):
    with pytest.raises(ConfigError, match=r"stages\.train\.node_affinity"):
        train(tmp_path, node_affinity=affinity)


def test_node_affinity_that_kubernetes_accepts_is_accepted(tmp_path):
    affinity = {
        REQUIRED: {
            "nodeSelectorTerms": [
                term(key="nvidia.com/gpu.count", operator="Gt", values=["3"]),
                {"matchFields": [{"key": "metadata.name", "operator": "NotIn", "values": ["node-1"]}]},
            ]
        },
        PREFERRED: [{"weight": 100, "preference": term(key="spot", operator="DoesNotExist")}],
    }
    assert train(tmp_path, node_affinity=affinity).node_affinity == affinity


def test_minio_endpoint_must_be_a_url_without_credentials(tmp_path):
    url = "http://minio.team:9000"
    assert site(tmp_path, f"minio_endpoint: {url}").minio_endpoint == url
    with pytest.raises(ConfigError, match="no user and no password") as error:
        site(tmp_path, "minio_endpoint: http://me:secret@minio.team:9000")
    assert "secret" not in str(error.value).replace("they belong into a secret", "")


def test_settings_may_be_merged_by_yaml(tmp_path):
    merged = site(tmp_path, "pod_labels: &all {a: b}\npod_annotations: {<<: *all, c: d}")
    assert merged.pod_annotations == {"a": "b", "c": "d"}


def test_binary_file_is_refused(tmp_path):
    (tmp_path / "site.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"site\.yaml"):
        read_site(tmp_path / "site.yaml")
