"""The exceptions of the pipelines: the branch of the tree of `mappo.errors` that talks of Kubernetes."""

from mappo.errors import MappoError


class PipelineFailed(MappoError):
    """A failed stage stopped the pipeline, so later stages did not run; the message has stage and reason."""


class UnreachableError(MappoError):
    """The Kubernetes API is unreachable: no kubeconfig, no answer, or credentials that it does not accept."""


class MissingError(MappoError):
    """A Kubernetes object does not exist."""


class ForbiddenError(MappoError):
    """The user lacks the right to read a Kubernetes object."""


class ApiError(MappoError):
    """The API refused a request or failed; the message holds its answer and a remedy.

    `status` is the HTTP status, or 0 without one.
    """

    def __init__(self, message: str, status: int = 0):
        super().__init__(message)
        self.status = status
