"""A scenario is either simulated exactly as VMAS does, or refused: tests with scenarios that are easily got wrong.

Policies of these tests are deterministic and resets draw no random numbers, so a plain and a fast rollout must
agree to the last bit, through natural ends, time limits and first observations.
"""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import stats
from tensordict.nn import TensorDictModule

from mappo.config import EnvironmentConfig
from mappo.environment.environment import make_environment
from mappo.environment.keys import ACTION, DONE, OBSERVATION, REWARD, next_key
from mappo.environment.plain_simulation import PlainSimulation
from mappo.environment.random_streams import Stream, private_random_streams
from mappo.errors import NotFaithful, SimulationDiffers
from mappo.fast_simulation.fast_simulation import FastEnvironment
from mappo.fast_simulation.making import make_fast_simulation
from tests.conftest import CPU
from tests.support import memories

_COMPARED = OBSERVATION, next_key(REWARD), next_key(OBSERVATION), next_key(DONE)


class _PushRight(torch.nn.Module):
    """Push with force 1, or with less in the first environments."""

    def __init__(self, least):
        super().__init__()
        self._least = least

    def forward(self, observation):
        force = torch.linspace(self._least, 1, len(observation))[:, None].expand(observation.shape[:-1])
        return torch.stack([force, torch.zeros_like(force)], -1)


def _policy(least=1.0):
    return TensorDictModule(_PushRight(least), in_keys=[OBSERVATION], out_keys=[ACTION])


def _rollout(scenario, kwargs, is_fast, num_envs=5, frames=60, limit=25, least_force=1.0):
    """Return a batch [envs, frames] of a scenario in `tests.support.memories`, or the reason of a refusal."""
    config = EnvironmentConfig(
        scenario=f"tests.support.memories:{scenario}", scenario_kwargs=kwargs, max_episode_frames=limit
    )
    with private_random_streams(3, Stream.TRAINING, CPU):
        environment = make_environment(config, num_envs, 3, Stream.TRAINING, CPU)
        simulation = PlainSimulation(environment)
        if is_fast:
            simulation = FastEnvironment(make_fast_simulation(config, environment, False), environment, limit)
        return simulation.collect(_policy(least_force), frames, simulation.reset())[0]


def _assert_same_or_refused(scenario, kwargs, **options):
    """Compare both paths; return the reason if the scenario is refused, and an empty text otherwise."""
    plain = _rollout(scenario, kwargs, False, **options)
    try:
        fast = _rollout(scenario, kwargs, True, **options)
    except NotFaithful as reason:
        return str(reason)
    for key in _COMPARED:
        assert torch.equal(plain[key].nan_to_num(7.0), fast[key].nan_to_num(7.0)), (key, kwargs)
    return ""


def _long(cases):
    """Mark cases long whose kind another case covers."""
    return [pytest.param(*case, marks=pytest.mark.long) for case in cases]


ACCEPTED = [
    *(("Remembering", {"place": place}) for place in ("in place", "other name")),
    *_long(("Remembering", {"place": place}) for place in ("dict", "list", "object", "double")),
    *(("Remembering", {"change": change}) for change in ("where", "mask")),
    *_long(("Remembering", changes) for changes in ({}, {"change": "least"}, {"change": "sum"})),
    ("Remembering", {"change": "least", "initial": "inf"}),
    *_long(("Remembering", {"change": "least", "initial": initial}) for initial in (2.0**24, "nan", "-inf")),
    ("Remembering", {"change": "sum", "reset": "keep"}),
    *_long([("Remembering", {"change": "sum", "reset": "all", "use": "reward"})]),
    ("Remembering", {"change": "sum", "reset": "all", "use": "done"}),
    ("Remembering", {"reset": "staggered", "use": "done"}),
    *_long([("Remembering", {"reset": "staggered", "use": "reward"})]),
    ("Remembering", {"place": "number", "change": "nothing", "reset": "keep", "use": "nothing"}),
    ("OwnGoal", {"source": "torch"}),
    *_long(("OwnGoal", {"source": source}) for source in ("numpy", "python")),
    ("OwnGoal", {"shape": True}),
    ("OwnWorld", {"method": "collisions"}),
    *_long(("OwnWorld", {"method": method}) for method in ("attribute", "none", "forces", "distance")),
    *_long([("Posts", {})]),
    ("Posts", {"names": ["left", "right"]}),
    ("FromOutside", {}),
]


@pytest.mark.parametrize(("scenario", "kwargs"), ACCEPTED, ids=str)
def test_accepted_scenario_is_simulated_exactly(scenario, kwargs):
    assert _assert_same_or_refused(scenario, kwargs, num_envs=6) == ""


_OUTSIDE = "keeps state outside of tensors|cannot be read|a tensor where it cannot"
_FIXED = "a tensor where it cannot be replaced|keeps state outside of tensors"
_NUMBERS = sorted(memories.PLACES_OF_NUMBERS)
REFUSED = [
    *(("Remembering", {"place": place}, _OUTSIDE) for place in _NUMBERS[::8]),
    *_long(("Remembering", {"place": place}, _OUTSIDE) for place in _NUMBERS if place not in _NUMBERS[::8]),
    ("Remembering", {"place": "tuple"}, _FIXED),
    *_long(("Remembering", {"place": place}, _FIXED) for place in ("closure", "named tuple", "deque", "class")),
    ("Remembering", {"place": "new object"}, "replaces objects"),
    ("Remembering", {"place": "one number"}, "environments share state"),
    *(
        ("Remembering", {"place": place}, "shares memory|changes others|differ in the first frame")
        for place in ("alias", "part")
    ),
    ("Remembering", {"reset": "keep", "use": "observation"}, "first observation after a reset depends on what"),
    ("Remembering", {"reset": "only full"}, "a reset of one environment differs from a reset of all"),
    ("Remembering", {"reset": "only one"}, "a reset of one environment|depends on the state before it"),
    ("Remembering", {"reset": "halve"}, "a reset depends on the state before it"),
    ("Remembering", {"reset": "by number"}, "environments differ"),
    ("Remembering", {"use": "start", "reset": "keep"}, "a reset depends on the state before it"),
    ("OwnGoal", {"source": "unseeded"}, "each environment has a value of its own: scenario.goal"),
    ("FirstFrame", {"what": "number"}, "of its own: scenario.first"),
    ("FirstFrame", {"what": "tensor"}, "of its own: scenario.first|environments differ"),
    *_long(("Noisy", {"source": source}, "draws random numbers") for source in ("python", "numpy")),
    ("Noisy", {"source": "own torch"}, "draws random numbers"),
    ("Noisy", {"source": "torch"}, "Python depends on a tensor's value"),
    ("NoisyReward", {"kind": "seeded"}, "cannot be drawn again"),
    ("NoisyReward", {"kind": "own"}, "from a generator of its own"),
    *(
        ("NoisyReward", {"kind": kind}, "the same random numbers|depends on the")
        for kind in ("by state", "by time")
    ),
    *_long(("Noisy", {"source": source}, "outside of tensors") for source in ("own numpy", "own python")),
    ("Noisy", {"source": "python", "probability": 1e-3}, "random numbers"),
    *_long([("Noisy", {"source": "numpy", "probability": 1e-3}, "random numbers")]),
    ("Noisy", {"source": "own numpy", "probability": 1e-3}, "outside of"),
    *_long([("Noisy", {"source": "own python", "probability": 1e-3}, "outside of")]),
    ("Noisy", {"source": "system"}, r"reads something outside of the simulation: posix.urandom, memories.py:\d+"),
    ("Noisy", {"source": "clock"}, r"reads something outside of the simulation: time.monotonic"),
    ("Noisy", {"source": "file"}, r"reads something outside of the simulation: .*memories.py"),
    ("AsksWhetherNear", {}, "uses an answer of World.collides for more than skipping a pair"),
    ("CountsSelected", {}, r"numel of x\[mask\] depends on how many elements it selects"),
    ("Graduating", {"level": "tensor"}, "a reset depends on the state before it"),
    ("Graduating", {"level": "number"}, "outside of tensors: scenario.level"),
    *(
        ("ByNumber", {"kind": kind, "use": use}, "environments differ")
        for kind, use in (("list", "reward"), ("closure", "start"))
    ),
    *_long(
        ("ByNumber", {"kind": kind, "use": use}, "environments differ")
        for kind, use in (
            *(("list", "done"), ("list", "start"), ("tensor", "done")),
            *(("array", "reward"), ("column", "reward"), ("arange", "done")),
        )
    ),
]


@pytest.mark.parametrize(("scenario", "kwargs", "reason"), REFUSED, ids=str)
def test_scenario_that_could_become_another_task_is_refused_with_the_reason(scenario, kwargs, reason):
    with pytest.raises(NotFaithful, match=reason):
        _rollout(scenario, kwargs, True)


def test_write_through_one_of_two_names_of_a_tensor_is_refused():
    """Where a reset of one environment is one of all, nothing but the trace can tell the two names apart."""
    kwargs = {"place": "alias", "change": "mask", "reset": "all"}
    reason = _assert_same_or_refused("Remembering", kwargs, num_envs=1, frames=30, limit=9)
    assert reason == "a step writes into scenario.memory, which shares memory with scenario.alias"


def test_write_into_a_tensor_of_which_another_slot_is_a_part_is_refused():
    kwargs = {"place": "part", "change": "mask", "reset": "all"}
    reason = _assert_same_or_refused("Remembering", kwargs, num_envs=1, frames=30, limit=9)
    assert reason == "a frame or a reset writes into scenario.memories, which shares memory with scenario.part"


_generated = given(
    place=st.sampled_from(sorted(memories.PLACES)),
    change=st.sampled_from(sorted(memories.CHANGES)),
    reset=st.sampled_from(sorted(memories.RESETS)),
    use=st.sampled_from(["reward", "observation", "done", "start", "nothing"]),
    initial=st.sampled_from([0.0, 3.0, -1e9, "inf", "nan"]),
    num_envs=st.integers(1, 9),
)


@settings(max_examples=5, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@_generated
def test_generated_scenario_is_simulated_exactly_or_refused(place, change, reset, use, initial, num_envs):
    kwargs = {"place": place, "change": change, "reset": reset, "use": use, "initial": initial}
    _assert_same_or_refused("Remembering", kwargs, num_envs=num_envs, frames=30, limit=9)


@pytest.mark.long
@settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@_generated
def test_many_generated_scenarios_are_simulated_exactly_or_refused(place, change, reset, use, initial, num_envs):
    kwargs = {"place": place, "change": change, "reset": reset, "use": use, "initial": initial}
    _assert_same_or_refused("Remembering", kwargs, num_envs=num_envs, frames=30, limit=9)


@pytest.mark.parametrize("shared", [True, False])
def test_fresh_states_are_as_independent_as_those_of_vmas(shared):
    """All environments end together here, and are reset together: what such a reset shares, they share."""
    for is_fast in (False, True):
        batch = _rollout("DrawnStarts", {"shared": shared}, is_fast, num_envs=8, frames=40, limit=4)
        starts = batch[OBSERVATION][:, 4::4, 0, 0]  # the first observation of each episode but the first
        assert starts.shape == (8, 9)
        assert len(starts.flatten().unique()) == (9 if shared else 72), is_fast


@pytest.mark.parametrize("shared", [True, False])
def test_fresh_states_of_environments_that_end_alone_are_independent(shared):
    options = {"num_envs": 8, "frames": 150, "limit": 1000, "least_force": 0.5}
    batch = _rollout("DrawnStarts", {"shared": shared, "ends": 0.0}, True, **options)
    has_ended = batch[next_key(DONE)][:, :-1, 0]
    starts = batch[OBSERVATION][:, 1:, 0, 0][has_ended]
    assert len(starts) > 20
    assert not has_ended.all(0).any()
    assert len(starts.unique()) == len(starts)


@pytest.mark.parametrize(
    "kind",
    [
        *("rand", "shared", "distribution", "integer"),
        *(pytest.param(kind, marks=pytest.mark.long) for kind in ("in place", "column", "like", "coin")),
    ],
)
def test_random_numbers_of_steps_have_the_distribution_of_vmas(kind):
    def noise(is_fast):
        batch = _rollout("NoisyReward", {"kind": kind}, is_fast, num_envs=40, frames=50)
        return batch[next_key(REWARD)].flatten(1) - batch[next_key(OBSERVATION)][..., 0, 0]

    plain, fast = noise(False), noise(True)
    assert not torch.equal(plain, fast)
    columns = 1 if kind == "shared" else 40  # independent numbers of one frame
    assert stats.ks_2samp(plain[:columns].flatten(), fast[:columns].flatten()).pvalue > 1e-3
    assert (fast.std(0).mean() > 0.1) == (kind != "shared")  # among environments
    assert abs(stats.pearsonr(fast[0, 1:], fast[0, :-1]).statistic) < 0.5  # of one frame and the next


def test_audit_finds_a_branch_that_appears_late(monkeypatch):
    config = EnvironmentConfig(scenario="tests.support.memories:FromOutside", max_episode_frames=25)
    with private_random_streams(3, Stream.TRAINING, CPU):
        environment = make_environment(config, 4, 3, Stream.TRAINING, CPU)
        simulation = FastEnvironment(make_fast_simulation(config, environment, False), environment, 25)
        carried = simulation.reset()
        for _ in range(4):
            _, carried = simulation.collect(_policy(), 300, carried)
        monkeypatch.setattr(memories, "WIND", 1.0)
        with pytest.raises(SimulationDiffers, match=r"reward: .* instead of .*; the last checkpoint is"):
            for _ in range(4):
                _, carried = simulation.collect(_policy(), 300, carried)


def test_audit_puts_a_state_into_all_names_of_a_tensor():
    """Only one of the names is part of the state, because a step reads no other; a reset reads the other."""
    assert _rollout("DrawnGoals", {}, True)[next_key(REWARD)].std() > 0


def test_audit_changes_nothing(monkeypatch):
    def batch(interval):
        monkeypatch.setattr("mappo.fast_simulation.audit.INTERVAL_FRAMES", interval)
        return _rollout("DrawnStarts", {}, True, frames=60)

    often, never = batch(2), batch(10**9)
    assert all(torch.equal(often[key], never[key]) for key in _COMPARED)
