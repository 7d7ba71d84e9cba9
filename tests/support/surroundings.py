"""The surroundings of the tests, the same wherever the test command starts: signals and environment variables."""

import os
import signal

_SETTINGS = (
    "AWS_",
    "MAPPO_",
    "KF_PIPELINES_",
    "KFP_",
    "KUBE",
    "MLFLOW_",
)  # prefixes of variables that commands read
_SETTINGS_OF_TESTS = ("MAPPO_REQUIRE_SERVICES",)


def set_surroundings() -> None:
    """Let SIGINT and SIGTERM end this process and its children, and remove the user's settings.

    A shell script starts commands with & so that they, and all their children, ignore SIGINT.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGCHLD})
    for name in [name for name in os.environ if name.startswith(_SETTINGS) and name not in _SETTINGS_OF_TESTS]:
        del os.environ[name]
