"""The endpoint and the credentials of an S3 store, from the environment."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import urlsplit

import yaml
from pydantic import BaseModel, Field, ValidationError

from mappo.errors import StoreError

_KUBEFLOW_STORE = "http://seaweedfs.kubeflow:9000"  # since Kubeflow 2.16; minio-service.kubeflow:9000 before it

# The secret with the keys of Kubeflow's own store. Kubeflow copies it into the namespaces that it manages.
KUBEFLOW_SECRET = "mlpipeline-minio-artifact"  # noqa: S105  (a name, not a secret)

_AWS_CREDENTIALS = ("AWS_ACCESS_KEY_ID", "AWS_SHARED_CREDENTIALS_FILE", "AWS_PROFILE")
AWS_KEYS = "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN, or the mounted credentials file"
_KUBEFLOW_KEYS = (
    "MAPPO_KUBEFLOW_ACCESS_KEY and MAPPO_KUBEFLOW_SECRET_KEY, from Kubeflow's secret "
    f"{KUBEFLOW_SECRET}; "
    "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY replace them where AWS_ENDPOINT_URL is this endpoint"
)
_IN_HEADERS = {
    *("AWS_ACCESS_KEY_ID", "AWS_SESSION_TOKEN", "AWS_SECURITY_TOKEN", "AWS_DEFAULT_REGION"),
    "MAPPO_KUBEFLOW_ACCESS_KEY",
}
_BOTO3 = "boto3; AWS_ENDPOINT_URL names another store than Amazon's"
_PROVIDERS = "key providers of Kubeflow's config map kfp-launcher"
_ANOTHER = "; minio_endpoint of the site's file (MAPPO_MINIO_ENDPOINT) names another store"
_ANOTHER_HERE = "; MAPPO_MINIO_ENDPOINT or AWS_ENDPOINT_URL names another store"


@dataclass(frozen=True)
class S3Access:
    """The endpoint and the keys of an S3 store. None leaves the choice to boto3.

    Messages use `endpoint_origin` and `keys_origin`, which name the settings that endpoint and keys come from.
    """

    endpoint: str | None
    endpoint_origin: str
    keys: tuple[str, str] | None = field(default=None, repr=False)
    keys_origin: str = AWS_KEYS
    region: str | None = None
    secret: str = ""  # the name of the secret with the keys, if Kubeflow's launcher names one


def s3_access(scheme: str, environment: Mapping[str, str]) -> S3Access:
    """Choose the endpoint and the keys of a store at s3:// or minio://.

    For s3://, boto3 chooses both. For minio://, the endpoint is the first of these that is set:

    1. MAPPO_MINIO_ENDPOINT
    2. AWS_ENDPOINT_URL, but only if Kubeflow's keys are not set, as outside of a pod
    3. the endpoint in MAPPO_KUBEFLOW_PROVIDERS, as for Kubeflow's launcher
    4. the endpoint of Kubeflow's own store, as for Kubeflow's launcher

    Kubeflow's keys are MAPPO_KUBEFLOW_ACCESS_KEY and MAPPO_KUBEFLOW_SECRET_KEY. AWS credentials replace them if
    the endpoint is the AWS_ENDPOINT_URL that is set beside these credentials, or if Kubeflow's launcher takes
    the keys from another secret than Kubeflow's. Otherwise AWS credentials are used only if Kubeflow's keys are
    not set.

    Raises:
        StoreError: the endpoint has to come from Kubeflow's providers, which cannot be read, or a variable has a
            line end or another character that no request can carry.
    """
    variable = next((name for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL") if environment.get(name)), "")
    if scheme == "s3":
        _require_plain_variables(environment, "AWS_")
        return S3Access(None, f"from {variable or _BOTO3}")
    keys = (environment.get("MAPPO_KUBEFLOW_ACCESS_KEY", ""), environment.get("MAPPO_KUBEFLOW_SECRET_KEY", ""))
    access = _minio_endpoint("" if all(keys) else variable, environment)
    is_for_aws = access.secret not in ("", KUBEFLOW_SECRET) or _is_same(access.endpoint, environment.get(variable))
    if not all(keys) or (is_for_aws and any(environment.get(name) for name in _AWS_CREDENTIALS)):
        _require_plain_variables(environment, "AWS_", "MAPPO_MINIO_")
        return access
    _require_plain_variables(environment, "MAPPO_KUBEFLOW_ACCESS", "MAPPO_KUBEFLOW_SECRET", "MAPPO_MINIO_")
    return replace(access, keys=keys, keys_origin=_KUBEFLOW_KEYS)


def require_plain(name: str, value: str, ascii_only: bool = True) -> None:
    """Refuse a value that no request can carry, such as a key with a line end. The message leaves the value out.

    Raises:
        StoreError: the value has a character that is not printable, a space at an end, or one beyond ASCII.
    """
    fault = ""
    if "\n" in value or "\r" in value:
        fault = "a line end, which `echo` writes and `printf` does not"
    elif not value.isprintable():
        fault = "a character that cannot be printed"
    elif value != value.strip():
        fault = "a space at an end"
    elif ascii_only and not value.isascii():
        fault = "a letter beyond ASCII"
    if fault:
        raise StoreError(f"{name} contains {fault}: set it again without it")


def _require_plain_variables(environment: Mapping[str, str], *prefixes: str) -> None:
    for name, value in environment.items():
        if name.startswith(prefixes):
            require_plain(name, value, ascii_only=name in _IN_HEADERS)


def _is_same(one: str | None, other: str | None) -> bool:
    """Return whether two URLs name the same endpoint."""
    if not one or not other:
        return False
    try:
        parts = [urlsplit(url) for url in (one, other)]
    except ValueError:  # one of them is no URL, which the client reports
        return False
    return len({(part.scheme, part.netloc.lower()) for part in parts}) == 1


def _minio_endpoint(aws_variable: str, environment: Mapping[str, str]) -> S3Access:
    if endpoint := environment.get("MAPPO_MINIO_ENDPOINT"):
        return S3Access(endpoint, "from MAPPO_MINIO_ENDPOINT")
    if aws_variable:
        return S3Access(environment[aws_variable], f"from {aws_variable}; MAPPO_MINIO_ENDPOINT goes before it")
    provider = _minio_provider(environment.get("MAPPO_KUBEFLOW_PROVIDERS", ""))
    another = _ANOTHER if environment.get("MAPPO_KUBEFLOW_ACCESS_KEY") else _ANOTHER_HERE
    if not provider.endpoint:
        return S3Access(_KUBEFLOW_STORE, f"Kubeflow's default{another}")
    scheme = "" if "://" in provider.endpoint else "http://" if provider.disable_ssl else "https://"
    access = S3Access(f"{scheme}{provider.endpoint}", f"from {_PROVIDERS}{another}", secret=provider.secret)
    return replace(access, region=provider.region or None)


class _Provider(BaseModel):
    """The default of one provider in Kubeflow's config map kfp-launcher."""

    endpoint: str | None = None
    region: str | None = None
    disable_ssl: bool | None = Field(default=None, validation_alias="disableSSL")
    credentials: dict[str, Any] | None = None

    @property
    def secret(self) -> str:
        """The name of the secret with the keys; empty if the provider names none."""
        reference = (self.credentials or {}).get("secretRef")
        return str(reference.get("secretName") or "") if isinstance(reference, dict) else ""


class _Minio(BaseModel):
    default: _Provider | None = None


class _Providers(BaseModel):
    minio: _Minio | None = None


def _minio_provider(text: str) -> _Provider:
    """Read the provider that Kubeflow's launcher uses for minio://.

    No message repeats the text, which may contain keys.
    """
    try:
        providers = _Providers.model_validate(yaml.safe_load(text) or {})
    except (yaml.YAMLError, ValidationError):
        raise StoreError(
            f"MAPPO_KUBEFLOW_PROVIDERS: {_PROVIDERS} is not the YAML that Kubeflow's launcher reads: correct "
            "minio.default.endpoint, region and disableSSL there, or set MAPPO_MINIO_ENDPOINT or AWS_ENDPOINT_URL"
        ) from None
    return (providers.minio and providers.minio.default) or _Provider()
