import pytest

from mappo.errors import ConfigError
from pipelines.kubeflow.launcher import STORE_KEYS, Keys, keys_of, root_of

SECRET_REF = """
s3:
  default:
    endpoint: s3.example.org
    credentials: {fromEnv: false, secretRef: {secretName: own, accessKeyKey: a, secretKeyKey: b}}
  overrides:
    - bucketName: other
      keyPrefix: team/
      credentials: {secretRef: {secretName: theirs, accessKeyKey: c, secretKeyKey: d}}
    - bucketName: open
      credentials: {fromEnv: true}
"""
FROM_ENV = "s3: {default: {endpoint: s3.example.org, credentials: {fromEnv: true}}}"
MINIO = "minio: {default: {credentials: {secretRef: {secretName: own, accessKeyKey: a, secretKeyKey: b}}}}"


@pytest.mark.parametrize(
    ("root", "providers", "keys"),
    [
        ("minio://mlpipeline/v2/artifacts", "", STORE_KEYS),
        ("minio://mlpipeline/v2/artifacts", SECRET_REF, STORE_KEYS),
        ("minio://mlpipeline/v2/artifacts", MINIO, Keys("own", ("a", "b"))),
        ("minio://mlpipeline/v2/artifacts?endpoint=http://minio:9000", "", None),
        ("s3://bucket/root", "", None),
        ("s3://bucket/root", FROM_ENV, None),
        ("s3://bucket/root", SECRET_REF, Keys("own", ("a", "b"))),
        ("s3://bucket/root?region=eu-central-1", SECRET_REF, None),
        ("s3://other/team/root", SECRET_REF, Keys("theirs", ("c", "d"))),
        ("s3://other/root", SECRET_REF, Keys("own", ("a", "b"))),
        ("s3://open/root", SECRET_REF, None),
        ("gs://bucket/root", SECRET_REF, None),
    ],
)
def test_keys_of_a_root_are_the_keys_that_kubeflows_launcher_reads(root, providers, keys):
    assert keys_of(root, {"providers": providers}) == keys


@pytest.mark.parametrize(
    ("providers", "problem"),
    [
        ("s3: [", "not YAML"),
        ("- s3", "not YAML with a key"),
        ("s3: true", "must hold `default`"),
        ("s3: {default: {endpoint: s3.example.org}}", "lacks credentials"),
        ("s3: {overrides: []}", "lacks credentials"),
        ("s3: {default: {credentials: {fromEnv: false}}}", "lacks credentials"),
    ],
)
def test_providers_that_kubeflows_launcher_cannot_read_are_refused(providers, problem):
    with pytest.raises(ConfigError, match=problem):
        keys_of("s3://bucket/root", {"providers": providers})


def test_default_root_is_kubeflows_own_store():
    assert root_of({}) == root_of({"defaultPipelineRoot": ""}) == "minio://mlpipeline/v2/artifacts"
    assert root_of({"defaultPipelineRoot": "s3://bucket/root"}) == "s3://bucket/root"
