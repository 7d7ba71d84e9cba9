"""The search for what a scenario measures, before anything is trained."""

from collections.abc import Iterable, Mapping
from difflib import get_close_matches

import torch

from mappo.config import EnvironmentConfig
from mappo.environment.environment import make_environment
from mappo.environment.random_streams import Stream, private_random_streams
from mappo.environment.reductions import Reduction, declared_reductions, guess_reductions
from mappo.environment.vmas_environment import GroupEnvironment, place_of_mistake
from mappo.errors import ConfigError, Preempted

_ENVS, _FRAMES = 2, 8
_CPU = torch.device("cpu")


@torch.no_grad()
def find_measurements(config: EnvironmentConfig) -> dict[str, Reduction]:
    """Return the reductions of what a scenario measures, by name: as declared, or as in a few random frames.

    The function changes no random state of the caller.

    Raises:
        ConfigError: the scenario does not exist, or declares measurements wrongly.
    """
    with private_random_streams(0, Stream.VALIDATION, _CPU):
        environment = make_environment(config, _ENVS, 0, Stream.VALIDATION, _CPU)
        declared = declared_reductions(environment.base_env._env.scenario)
        if declared is not None:
            return declared
        try:
            return _guessed(environment.base_env)
        except Preempted:
            raise
        except (Exception, SystemExit) as error:  # a scenario is foreign code
            raise ConfigError(
                f"environment.scenario = {config.scenario!r}: {type(error).__name__}: "
                f"{error}{place_of_mistake(error)}"
            ) from error


def _guessed(simulator: GroupEnvironment) -> dict[str, Reduction]:
    found: dict[str, Reduction] = {}
    simulator.reset()
    for _ in range(_FRAMES):
        simulator.rand_step()
        guess_reductions(found, simulator.measured())
    return found


def require_measured(names: Iterable[str], config: EnvironmentConfig, field: str) -> None:
    """Check that a scenario measures all these names; `field` holds them and begins the message.

    Raises:
        ConfigError: it does not measure one; the message has the names that there are.
    """
    if not (names := list(names)):
        return
    measured = find_measurements(config)
    if unknown := [name for name in names if name not in measured]:
        raise ConfigError("\n".join(_unknown(name, measured, config.scenario, field) for name in unknown))


def _unknown(name: str, measured: Mapping[str, Reduction], scenario: str, field: str) -> str:
    close = get_close_matches(name, measured, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    listed = ", ".join(f"{known} ({reduction})" for known, reduction in sorted(measured.items())) or "nothing"
    return f"{field}: {name!r} is not measured; {hint}{scenario} measures {listed}"
