"""The comparison of what resets draw: whether draws have one distribution, and whether episodes share draws."""

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchrl.envs import EnvBase

from mappo.config import EnvironmentConfig
from mappo.environment.environment import make_environment
from mappo.environment.random_streams import Stream, private_random_streams
from mappo.environment.simulation_state import capture
from mappo.environment.state_walk import tensors_by_path

_ENVS, _RESETS = 8, 12
_SUSPICIOUS = 1e-4  # probability by chance below which draws count as shared; by mistake, intervals are only wider


def episodes_share_draws(config: EnvironmentConfig, device: torch.device) -> bool:
    """Return whether episodes of one evaluation seed depend on each other.

    They do if a scenario draws something when it is made, such as a map, or if its reset of all environments
    draws something once for all of them.
    """
    environments = []
    for seed in (0, 1):
        with private_random_streams(seed, Stream.VALIDATION, device):
            environments.append(make_environment(config, _ENVS, seed, Stream.VALIDATION, device))
    one, other = (_without_rows(environment) for environment in environments)
    if one != other:
        return True
    with private_random_streams(0, Stream.VALIDATION, device):
        resets = []
        for _ in range(_RESETS):
            environments[0].base_env._env.reset(return_observations=False)
            resets.append({path: tensor.clone() for path, tensor in tensors_by_path(environments[0]).items()})
    paths = sorted(set.intersection(*(set(reset) for reset in resets)))
    groups = [numbers_of({path: reset[path] for path in paths}) for reset in resets]
    return least_probability(groups) < _SUSPICIOUS


def _without_rows(environment: EnvBase) -> tuple[object, dict[str, object]]:
    """Return what an environment holds, apart from tensors [envs, ...] and random states, in comparable form."""
    state = capture(environment)
    objects = {
        path: content for path, (kind, content) in state.structure["objects"].items() if "andom" not in str(kind)
    }
    views = state.structure["views"]
    constants: dict[str, object] = {}
    for index, view in enumerate(views):
        if not view["size"] or view["size"][0] != _ENVS:
            memory = state.tensors[view["memory"]]
            values = memory.as_strided(view["size"], view["stride"], view["offset"])
            constants[str(index)] = values.nan_to_num(7.0).tolist()
    return objects, constants


def numbers_of(state: Mapping[str, Tensor]) -> NDArray[np.float64]:
    """Return the numbers of tensors [rows, ...] as [rows, numbers], with finite ones for infinity and NaN."""
    flat = [
        value.reshape(len(value), -1).double().cpu().nan_to_num(-1e30, 1e30, -1e31) for value in state.values()
    ]
    numbers: NDArray[np.float64] = torch.cat(flat, 1).numpy()
    return numbers


def least_probability(groups: list[NDArray[np.float64]]) -> float:
    """Return the least probability, over all numbers, that groups [draws, numbers] come from one distribution.

    The probability is corrected for the number of comparisons. Location and spread are compared by ranks
    (Kruskal and Wallis 1952), of two groups also the whole distribution (Kolmogorov and Smirnov).
    """
    from scipy import stats  # imported here: it takes a second, and few callers need it

    groups = [group for group in groups if len(group)]
    everything = np.concatenate(groups)
    varying = (everything != everything[0]).any(0)
    if len(groups) < 2 or not varying.any():
        return 1.0
    groups = [group[:, varying] for group in groups]
    constant = [(group == group[0]).all(0) for group in groups]
    if np.all(constant, 0).any():  # each group has one number, and groups differ
        return 0.0
    centre = np.median(everything[:, varying], 0)
    with np.errstate(invalid="ignore"):  # of equal distances from the centre, the probability is NaN
        probabilities = [
            stats.kruskal(*groups).pvalue,
            stats.kruskal(*(abs(group - centre) for group in groups)).pvalue,
        ]
    if len(groups) == 2:
        probabilities.append(stats.ks_2samp(*groups).pvalue)
    least = float(np.nanmin(np.stack(probabilities), initial=1.0))
    return min(1.0, least * len(probabilities) * int(varying.sum()))
