import pytest
import torch

from mappo.config import EnvironmentConfig
from mappo.environment.draws import episodes_share_draws, least_probability, numbers_of
from tests.conftest import CPU


@pytest.mark.parametrize(
    ("scenario", "kwargs", "expected"),
    [
        ("navigation", {}, False),
        ("balance", {}, False),
        ("swarm", {}, False),
        ("passage", {}, True),  # one order of passages for all environments that are reset together
        ("ball_passage", {}, True),
        ("tests.support.memories:DrawnStarts", {}, False),
        ("tests.support.memories:DrawnStarts", {"shared": True}, True),
        ("tests.support.memories:OwnGoal", {}, True),  # drawn when the world is made
        ("tests.support.scenarios:Endless", {}, False),
    ],
)
def test_shared_draws_are_found(scenario, kwargs, expected):
    config = EnvironmentConfig(scenario=scenario, scenario_kwargs=kwargs)
    assert episodes_share_draws(config, CPU) == expected


def test_probability_is_that_of_kruskal_and_wallis():
    """Ranks 1, 2, 3 against 4, 5, 6: H = 3.857, p = 0.0495; spread is compared, too, which doubles p."""
    groups = [numbers_of({"x": torch.tensor(values)}) for values in ([1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [2.5, 3.5])]
    assert least_probability(groups[:2]) == pytest.approx(3 * 0.0495, abs=1e-3)
