"""The exceptions of the pipelines, below `mappo.errors.MappoError`."""


class PipelineFailed(Exception):
    """A stage failed, and the stages after it did not run; the message names stage and reason."""


class UnreachableError(Exception):
    """Kubernetes cannot be asked at all: no kubeconfig, no answer, or credentials that it does not know."""


class MissingError(Exception):
    """An object does not exist."""


class ForbiddenError(Exception):
    """This user may not look at an object."""


class ApiError(Exception):
    """The API did not do what was asked; the message says what it answered and what can be done."""

    def __init__(self, message: str, status: int = 0):
        super().__init__(message)
        self.status = status
