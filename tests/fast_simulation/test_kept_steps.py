"""The cache of checked steps: a step is checked once, and again as soon as anything differs that may decide it."""

import shutil
import subprocess
import sys

import pytest

from mappo.compute.library_cache import cache_directory
from mappo.config import EnvironmentConfig
from mappo.environment.environment import make_environment
from mappo.environment.keys import ACTION
from mappo.environment.random_streams import Stream, private_random_streams
from mappo.environment.state_walk import same_bits
from mappo.errors import NotFaithful
from mappo.fast_simulation import making
from mappo.fast_simulation.making import make_fast_simulation
from mappo.fast_simulation.python_state import find_slots, read_python_state
from mappo.fast_simulation.watch import digest_of
from tests.conftest import CPU

CONFIG = EnvironmentConfig("dispersion", {"n_agents": 1, "n_food": 1}, max_episode_frames=25)


def _environment(seed=0, config=CONFIG):
    return make_environment(config, 4, seed, Stream.TRAINING, CPU)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """Yield a cache in which the step of `CONFIG` was kept."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        cache_directory.cache_clear()
        make_fast_simulation(CONFIG, _environment())
        yield cache_directory() / "libraries"
    cache_directory.cache_clear()


@pytest.fixture
def num_checked(monkeypatch):
    """Return a list with one item for each step that is traced and checked."""
    checked, check = [], making._checked_step
    monkeypatch.setattr(making, "_checked_step", lambda *args: checked.append(1) or check(*args))
    return checked


def _rollout():
    with private_random_streams(1, Stream.VALIDATION, CPU):
        environment = _environment()
        simulation = make_fast_simulation(CONFIG, environment)
        state, observation, _ = simulation.begin()
        results = [observation]
        for _ in range(5):
            state, observation, reward, _ = simulation.step(state, environment.rand_action()[ACTION])
            results += [observation, reward]
        _, observation, _, _ = simulation._step.as_graph()(state, environment.rand_action()[ACTION])
        return [*results, observation]


def test_kept_step_gives_the_same_bits_and_is_not_checked_again(num_checked, cache, tmp_path, monkeypatch):
    kept = _rollout()
    assert not num_checked
    shutil.copytree(cache, tmp_path / "libraries")
    for file in (tmp_path / "libraries").glob("*/step.pickle"):
        file.unlink()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    cache_directory.cache_clear()
    checked = _rollout()
    monkeypatch.undo()
    cache_directory.cache_clear()
    assert all(same_bits(one, other) for one, other in zip(kept, checked, strict=True))


def test_steps_are_kept_in_one_process_too(num_checked, cache):
    with making.kept_simulations():
        make_fast_simulation(CONFIG, _environment())
        [file] = cache.glob("*/step.pickle")
        hidden = file.rename(file.with_suffix(".hidden"))
        make_fast_simulation(CONFIG, _environment())
        hidden.rename(file)
    assert not num_checked


def test_step_is_kept_for_other_seeds(num_checked):
    make_fast_simulation(CONFIG, _environment(seed=5))
    assert not num_checked


@pytest.mark.parametrize("damage", [lambda file: file.write_bytes(b"\x80\x05garbage"), lambda file: file.unlink()])
def test_damaged_step_is_checked_again(num_checked, cache, damage, caplog):
    [file] = cache.glob("*/step.pickle")
    damage(file)
    make_fast_simulation(CONFIG, _environment())
    assert num_checked == [1]
    assert "a checked step in the cache is damaged" in caplog.text
    make_fast_simulation(CONFIG, _environment())
    assert num_checked == [1], "it was kept again"


def test_step_is_checked_again_with_other_machine_code(num_checked, cache):
    [file] = cache.glob("*/*.so")
    other = file.with_suffix(".other")
    other.write_bytes(file.read_bytes() + b"\0")  # the code still runs
    other.replace(file)
    make_fast_simulation(CONFIG, _environment())
    assert num_checked == [1]


def test_step_is_checked_again_if_a_constant_differs(num_checked):
    """It is refused then: the twin environment, in which it is checked, has the old constant."""
    constants, environment = make_fast_simulation(CONFIG, _environment())._step.constants, _environment()
    slots = find_slots(environment)
    path = next(path for path in sorted(constants & slots.keys()) if slots[path].get().is_floating_point())
    slots[path].put(slots[path].get() + 1)
    with pytest.raises(NotFaithful, match="numbers of its own"):
        make_fast_simulation(CONFIG, environment)
    assert num_checked == [1]


def test_python_that_reads_the_same_has_the_same_digest_in_every_process():
    code = (
        "from tests.fast_simulation.test_kept_steps import _environment;"
        "from mappo.fast_simulation.python_state import read_python_state;"
        "from mappo.fast_simulation.watch import digest_of;"
        "print(digest_of(read_python_state(_environment())))"
    )
    other = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONHASHSEED": "1"}, capture_output=True, text=True, check=True
    ).stdout
    assert other.strip() == str(digest_of(read_python_state(_environment())))


def test_step_of_an_own_scenario_is_checked_in_every_process(cache):
    """Its code may change where no reading finds it."""
    environment = _environment(config=EnvironmentConfig(scenario="tests.support.scenarios:MaskedWrites"))
    assert making.step_name("key", read_python_state(environment)) is None
    assert making.step_name("key", read_python_state(_environment())) is not None
