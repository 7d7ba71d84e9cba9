"""The refusal, before the first frame, of tasks whose checkpoints could be written and not be read."""

import pytest

from mappo.config import from_dict, override
from mappo.environment import checks
from mappo.environment.validation import validate
from mappo.errors import MappoError
from mappo.runs.checkpoint import MAX_PART_BYTES
from mappo.training.first_iteration import rehearse_first_iteration
from tests.conftest import TINY
from tests.support.runs import iterations, train_here

SCENARIOS = "tests.support.scenarios:"


def task(**environment):
    return override(from_dict(TINY), {"environment": {"scenario_kwargs": {}, **environment}})


@pytest.fixture
def small_limit(monkeypatch):
    """Let 256 KiB of Python's data be too large, which is saved faster than 64 MiB."""
    monkeypatch.setitem(MAX_PART_BYTES, "structure", 1 << 18)


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


UNREADABLE = {
    "numbers": (
        override(task(scenario=f"{SCENARIOS}LargeLists"), {"collection": {"num_envs": 120}}),
        r"the structure of this task takes .* the largest part is scenario\.routes: ",
    ),
    "numbers by process": (
        override(task(scenario=f"{SCENARIOS}LargeLists"), {"collection": {"num_envs": 120, "processes": 2}}),
        r"the structure of this task takes .* the largest part is scenario\.routes: ",
    ),
    "arguments": (
        task(scenario=f"{SCENARIOS}Endless", scenario_kwargs={"reward": 1.0, "map": "x" * 2_000_000}),
        r"the configuration takes \d+ bytes in a checkpoint.* environment\.scenario_kwargs",
    ),
    "integer": (task(scenario=f"{SCENARIOS}LargeInteger"), r"scenario\.key: an integer of \d+ bits cannot be"),
    "tuples": (task(scenario=f"{SCENARIOS}DeepTuples"), r"scenario: tuples in tuples, too deep to be captured"),
}


@pytest.mark.filterwarnings("ignore:environment.scenario_kwargs:UserWarning")
@pytest.mark.parametrize("kind", [kind for kind in UNREADABLE if kind != "numbers by process"])
def test_task_whose_checkpoints_cannot_be_read_is_not_trained(kind, small_limit, tmp_path):
    config, reason = UNREADABLE[kind]
    reports = []
    with pytest.raises(MappoError, match=reason):
        train_here(config, tmp_path, reports.append)
    assert reports == []
    assert iterations(tmp_path) == []


@pytest.mark.filterwarnings("ignore:environment.scenario_kwargs:UserWarning")
@pytest.mark.parametrize("kind", UNREADABLE)
def test_task_whose_checkpoints_cannot_be_read_fails_the_rehearsal(kind, small_limit):
    config, reason = UNREADABLE[kind]
    with pytest.raises(MappoError, match=reason):
        rehearse_first_iteration(config)


@pytest.mark.long
def test_map_of_millions_of_python_numbers_is_not_trained(tmp_path):
    reason = (
        r"takes \d+ bytes in a checkpoint, and at most 67108864 are read; the largest part is scenario\.heights: "
    )
    with pytest.raises(MappoError, match=reason):
        train_here(task(scenario=f"{SCENARIOS}LargeMap"), tmp_path)
    assert iterations(tmp_path) == []


def test_validation_names_what_is_too_large(monkeypatch, small_limit):
    monkeypatch.setattr(checks, "_SPEED_SECONDS", 0.01)
    config = task(scenario=f"{SCENARIOS}LargeLists")
    assert validate(config, print, rehearse_first_iteration).failures == []
    larger = override(config, {"collection": {"num_envs": 120}})
    (failure,) = validate(larger, print, rehearse_first_iteration).failures
    assert failure.name == "training"
    assert "the largest part is scenario.routes" in failure.detail


@pytest.mark.filterwarnings("ignore:environment.scenario_kwargs:UserWarning")
def test_configuration_that_is_nested_as_deep_as_is_accepted_can_be_resumed_or_is_not_trained(tmp_path):
    """A manifest holds the configuration deeper than the configuration's own text does."""
    deepest = max(depth for depth in range(100, 260) if is_accepted(depth))
    reason = refusal(deepest, tmp_path / "first")
    assert not reason or ("can be saved, and not be resumed" in reason and not iterations(tmp_path / "first"))
    assert refusal(deepest, tmp_path / "first") == reason


def refusal(depth, directory):
    """Train a task whose arguments are nested; return the reason if it is refused."""
    try:
        train_here(nested_task(depth), directory)
    except MappoError as error:
        return str(error)
    return ""


def nested_task(depth):
    return task(scenario=f"{SCENARIOS}Endless", scenario_kwargs={"deep": nested(depth)})


def is_accepted(depth):
    try:
        return bool(nested_task(depth))
    except MappoError:
        return False
