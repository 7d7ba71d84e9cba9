"""A study that many workers share: no trial is lost, worked on twice or started beyond what was asked for."""

import itertools
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import optuna
import pytest

from mappo.config import override
from mappo.errors import ConfigError, DatabaseError, TrialLost
from mappo.recipes import recipe
from mappo.tuning.catalogue import editions, study_names
from mappo.tuning.database import Database
from mappo.tuning.database_url import database_url
from mappo.tuning.plan import Plan
from mappo.tuning.search_space import Choices, TuningConfig, default_space
from mappo.tuning.study import Study, delete_study
from tests.support.services import postgres

CONFIG = recipe("navigation")
PLAN = Plan(CONFIG, default_space(CONFIG), TuningConfig(grace_seconds=3, max_losses=1))


@pytest.fixture(scope="module")
def server():
    with postgres() as server:
        yield server


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request, tmp_path):
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/studies.db"
    return request.getfixturevalue("server").create(f"study-{time.monotonic_ns()}")


@pytest.fixture
def database(url):
    database = Database(url, patience_seconds=20)
    yield database
    database.close()


fresh = (f"worker-{number}" for number in itertools.count()).__next__  # the name of another worker


def finish(study: Study, worker: str = "w", value: float = 1.0) -> int:
    claim = study.claim(worker)
    assert claim
    claim.finish("complete", value)
    return claim.number


def states(study: Study) -> list[str]:
    return [trial.state for trial in study.trials()]


def test_the_first_trial_is_the_configuration_itself_and_the_second_the_warm_start(database):
    warm = {"learner.clip_epsilon": 0.31, "learner.gae_lambda": 0.81, "learner.epochs": 7}
    study = Study.prepare(database, "s", PLAN, 3, warm_start=warm)
    own = {"learner.clip_epsilon": 0.2, "learner.gae_lambda": 0.9, "learner.epochs": 10}
    assert [study.claim(fresh()).values for _ in range(2)] == [own, warm]
    assert [trial.origin for trial in study.trials()] == ["default", "warm start"]
    assert study.claim(fresh()).values not in (own, warm)
    assert study.claim(fresh()) is None


def test_workers_that_race_start_each_trial_once_and_none_too_many(url, database):
    Study.prepare(database, "s", PLAN, 9)
    numbers: list[int] = []

    def worker(name: str) -> None:
        own = Database(url)
        study = Study.load(own, "s")
        while claim := study.claim(name):
            numbers.append(claim.number)
            claim.finish("complete", claim.number)
        own.close()

    with ThreadPoolExecutor(4) as workers:
        for done in [workers.submit(worker, f"w{index}") for index in range(4)]:
            done.result()
    study = Study.load(database, "s")
    assert sorted(numbers) == list(range(9))
    assert states(study) == ["complete"] * 9
    assert study.best().number == 8
    assert study.is_settled()


def test_the_trial_of_a_silent_worker_goes_on_with_another_and_keeps_number_values_and_curve(database):
    study = Study.prepare(database, "s", PLAN, 1)
    silent = study.claim("first")
    silent.report(6000, 0.25)
    assert study.claim("second") is None
    assert not study.is_settled()
    time.sleep(PLAN.tuning.grace_seconds + 1)
    again = study.claim("second")
    assert (again.number, again.values) == (silent.number, silent.values)
    with pytest.raises(TrialLost):
        silent.finish("complete", 1.0)
    with pytest.raises(TrialLost):
        silent.release()
    assert again.report(6000, 0.99) is False  # reported before
    again.finish("complete", 2.0)
    (trial,) = study.trials()
    assert (trial.state, trial.value, trial.curve) == ("complete", 2.0, {6000: 0.25})
    assert [(each.worker, each.outcome) for each in trial.attempts] == [("first", "lost"), ("second", "complete")]


def test_a_worker_that_beats_keeps_its_trial_however_long_it_takes(database):
    study = Study.prepare(database, "s", PLAN, 1)
    with study.claim(fresh()) as claim:
        deadline = time.monotonic() + 2 * PLAN.tuning.grace_seconds
        while time.monotonic() < deadline:
            assert study.claim("other") is None
            assert not claim.is_lost
            time.sleep(0.5)
        claim.finish("complete", 1.0)
    assert states(study) == ["complete"]


def test_a_trial_that_loses_worker_after_worker_fails_with_the_reason(database):
    plan = replace(PLAN, tuning=TuningConfig(grace_seconds=3, max_losses=0))
    study = Study.prepare(database, "s", plan, 1)
    study.claim(fresh())
    time.sleep(4)
    assert study.claim(fresh()) is None
    (trial,) = study.trials()
    assert (trial.state, trial.reason) == ("failed", "1 workers fell silent over it")
    assert study.is_settled()


def test_a_released_trial_waits_and_does_not_count_as_lost(database):
    plan = replace(PLAN, tuning=TuningConfig(grace_seconds=3, max_losses=0))
    study = Study.prepare(database, "s", plan, 1)
    for _ in range(3):
        claim = study.claim(fresh())
        assert claim.number == 0
        claim.release()
        assert states(study) == ["waiting"]
    assert finish(study) == 0


def test_a_claim_that_was_cut_short_is_found_by_the_next(database):
    """The worker died between Optuna's trial and the note of who has it."""
    study = Study.prepare(database, "s", PLAN, 2)
    orphan = optuna.load_study(study_name="s", storage=database.storage).ask()
    assert orphan.number == 0
    claim = study.claim(fresh())
    assert (claim.number, claim.values["learner.epochs"]) == (0, 10)


def test_asking_again_adds_nothing_and_another_session_adds_to_it(database):
    for _ in range(2):
        study = Study.prepare(database, "s", PLAN, 2)
    assert study.num_trials == 2
    assert Study.prepare(database, "s", PLAN, 3, session="run-1").num_trials == 5
    assert Study.prepare(database, "s", PLAN, 3, session="run-1").num_trials == 5
    assert Study.prepare(database, "s", PLAN, 4).num_trials == 7
    assert len(study.trials()) == 1  # the default, once


def test_two_that_prepare_at_once_make_one_study(url, database):
    def prepare(_: int) -> int:
        own = Database(url)
        study = Study.prepare(own, "s", PLAN, 4)
        count = len(study.trials())
        own.close()
        return count

    with ThreadPoolExecutor(4) as workers:
        assert list(workers.map(prepare, range(4))) == [1] * 4
    assert study_names(database) == ["s"]


def test_another_plan_under_the_same_name_is_refused_with_what_differs(database):
    Study.prepare(database, "s", PLAN, 1)
    other = replace(PLAN, config=override(CONFIG, {"learner": {"discount": 0.5}}))
    with pytest.raises(ConfigError, match=r"study s: .*config\.learner\.discount = 0\.99 -> 0\.5"):
        Study.prepare(database, "s", other, 1)
    with pytest.raises(ConfigError, match=r"tuning\.pruner = \"median\" -> \"none\""):
        Study.prepare(database, "s", replace(PLAN, tuning=replace(PLAN.tuning, pruner="none")), 1)


def test_no_trial_is_started_after_the_deadline_but_one_that_runs_may_end(database):
    study = Study.prepare(database, "s", PLAN, 5, timeout_seconds=1.0)
    claim = study.claim(fresh())
    time.sleep(1.1)
    assert study.claim("other") is None
    claim.finish("complete", 1.0)
    assert study.claim(fresh()) is None
    assert study.is_settled()
    assert finish(Study.prepare(database, "s", PLAN, 5)) == 1  # asked again, without a limit


def test_the_deadline_is_that_of_the_latest_session_and_is_not_put_off_by_asking_again(database):
    Study.prepare(database, "s", PLAN, 1, session="run-1", timeout_seconds=2.0)
    time.sleep(1.2)
    study = Study.prepare(database, "s", PLAN, 1, session="run-1", timeout_seconds=2.0)
    time.sleep(1.0)
    assert study.claim(fresh()) is None
    Study.prepare(database, "s", PLAN, 1, session="run-2", timeout_seconds=60.0)
    assert [finish(study, fresh()), finish(study, fresh())] == [0, 1]  # what run-1 had no time for, too
    assert study.claim(fresh()) is None


def test_a_study_goes_on_past_its_deadline_when_somebody_says_so(database):
    study = Study.prepare(database, "s", PLAN, 2, timeout_seconds=0.5)
    time.sleep(0.6)
    assert study.claim(fresh()) is None
    study.go_on()
    assert [finish(study, fresh()), finish(study, fresh())] == [0, 1]
    study.go_on(num_trials=3)
    assert (finish(study, fresh()), study.num_trials) == (2, 3)
    study.go_on(num_trials=4, timeout_seconds=0.5)
    time.sleep(0.6)
    assert study.claim(fresh()) is None


def test_a_worker_that_falls_silent_near_the_deadline_leaves_no_trial_running(database):
    study = Study.prepare(database, "s", PLAN, 5, timeout_seconds=2)
    assert study.claim("silent")
    time.sleep(2.1)
    assert not study.is_settled()  # others stay, and find it
    time.sleep(PLAN.tuning.grace_seconds + 0.5)
    assert study.claim("other") is None
    assert states(study) == ["waiting"]
    assert study.is_settled()


def test_a_claim_whose_answer_was_lost_is_taken_again_and_is_no_loss(database):
    study = Study.prepare(database, "s", PLAN, 3)
    assert [study.claim("w").number, study.claim("w").number] == [0, 0]
    assert [attempt.outcome for attempt in study.trials()[0].attempts] == ["released", ""]
    study.abandon("w")
    assert states(study)[0] == "waiting"


def test_an_interrupted_study_samples_what_it_would_have(tmp_path):
    def sampled(name: str, is_interrupted: bool) -> list[dict]:
        database = Database(f"sqlite:///{tmp_path}/{name}.db")
        study, values = Study.prepare(database, "s", PLAN, 14), []
        while claim := study.claim(fresh()):
            if is_interrupted and claim.number % 3 == 2:
                claim.release()
                study = Study.load(database, "s")
                claim = study.claim(fresh())
            values.append(claim.values)
            claim.finish("complete", -abs(claim.values["learner.clip_epsilon"] - 0.1))
        return values

    assert sampled("one", False) == sampled("other", True)


@pytest.mark.parametrize("pruner", ["median", "halving", "hyperband"])
def test_a_bad_trial_is_pruned_and_a_good_one_is_not(database, pruner):
    study = Study.prepare(database, "s", replace(PLAN, tuning=TuningConfig(pruner=pruner)), 20)
    rungs = [10_000, 30_000, 60_000, 84_000]
    ended: Counter[str] = Counter()
    for index in range(20):
        claim = study.claim(fresh())
        is_bad = index > 8 and index % 2
        for frames in rungs:
            if claim.report(frames, -1.0 if is_bad else 1.0):
                claim.finish("pruned", reason="bad")
                break
        else:
            claim.finish("complete", 0.0)
        ended["bad" if is_bad else "good", study.trials()[claim.number].state] += 1
    assert ended["bad", "pruned"] + ended["bad", "complete"] == 6
    assert ended["bad", "pruned"] >= 3
    assert ended["good", "pruned"] == 0


def test_wilcoxon_prunes_what_is_worse_than_the_best_over_training_seeds(database):
    tuning = TuningConfig(pruner="wilcoxon", training_seeds=tuple(range(8)))
    study = Study.prepare(database, "s", replace(PLAN, tuning=tuning), 2)
    noise = [0.1, -0.2, 0.15, 0.3, -0.25, 0.05, 0.2, -0.1]
    good, bad = study.claim(fresh()), study.claim("v")
    assert not any(good.report(seed, 1.0 + noise[seed]) for seed in range(8))
    good.finish("complete", 1.03)
    pruned = [bad.report(seed, 0.5 + noise[-seed]) for seed in range(8)]
    assert not any(pruned[:2])
    assert any(pruned)


def test_choices_of_lists_come_back_as_lists(database):
    config = CONFIG
    space = {"networks.hidden_sizes": Choices("categorical", ([256, 256], [64, 64]))}
    study = Study.prepare(database, "s", Plan(config, space, PLAN.tuning), 6)
    seen = [study.claim(fresh()).values["networks.hidden_sizes"] for _ in range(6)]
    assert seen[0] == [256, 256]
    assert [64, 64] in seen
    assert Study.load(database, "s").plan == study.plan


def test_studies_are_listed_and_deleted_by_name(database):
    Study.prepare(database, "one", PLAN, 1)
    Study.prepare(database, "other", PLAN, 1)
    delete_study(database, "one")
    assert study_names(database) == ["other"]
    for call in (delete_study, Study.load):
        with pytest.raises(ConfigError, match="no study 'one'.* there: other"):
            call(database, "one")


def test_a_study_that_somebody_works_on_is_not_deleted_and_idle_workers_are_told(database):
    study = Study.prepare(database, "s", PLAN, 1)
    with study.claim("busy-one") as claim:
        with pytest.raises(ConfigError, match="busy with its trials: busy-one; delete it 3 s after"):
            delete_study(database, "s")
        claim.finish("complete", 1.0)
    delete_study(database, "s")
    with pytest.raises(ConfigError, match="study s: it was deleted"):
        study.claim(fresh())


def test_editions_are_known_by_their_series_and_in_the_order_of_their_making(database):
    for name, series in (("w-9", "w"), ("w-10", "w"), ("w-x", "other"), ("w-b", "w")):
        Study.prepare(database, name, PLAN, 1, series=series)
    assert editions(database, "w") == ["w-b", "w-10", "w-9"]


def test_a_study_of_somebody_else_is_not_touched(database):
    optuna.create_study(storage=database.storage, study_name="theirs").add_trial(
        optuna.create_trial(value=1.0, params={}, distributions={})
    )
    with pytest.raises(ConfigError, match="not made by mappo"):
        Study.prepare(database, "theirs", PLAN, 1)
    with pytest.raises(ConfigError, match="not made by mappo"):
        Study.load(database, "theirs")


def test_a_database_that_is_restarted_is_waited_for(server):
    database = Database(server.create("restarted"), patience_seconds=30)
    study = Study.prepare(database, "s", PLAN, 2)
    with study.claim(fresh()) as claim:
        server.stop()
        starting = threading.Timer(2, server.start)
        starting.start()
        claim.report(100, 0.5)
        starting.join()
        claim.finish("complete", 1.0)
    assert states(study) == ["complete"]
    assert finish(study) == 1
    database.close()


def test_a_database_that_stays_away_is_said_without_its_password(server):
    url = server.create("away")
    database = Database(url, patience_seconds=1)
    study = Study.prepare(database, "s", PLAN, 2)
    claim = study.claim(fresh())
    server.stop()
    try:
        with pytest.raises(DatabaseError, match=r"mappo:\*\*\*@127.0.0.1") as error:
            claim.finish("complete", 1.0)
        assert "a-password" not in str(error.value)
    finally:
        server.start()
    claim.finish("complete", 1.0)
    assert states(study) == ["complete"]
    database.close()


@pytest.mark.parametrize(
    "url", ["mysql://host/name", "sqlite://", "sqlite:///:memory:", "postgresql:///name", "nonsense", "file.db"]
)
def test_a_url_that_cannot_be_is_refused_and_not_shown(url):
    with pytest.raises(ConfigError, match="MAPPO_DATABASE: must be"):
        Database(url)


def test_a_password_in_the_query_of_a_url_is_not_shown(server):
    database = Database(f"{server.create('query')}?password=hidden-word")
    assert "hidden-word" not in database.place
    database.close()


def test_an_unknown_database_is_said_at_once(server):
    began = time.monotonic()
    with pytest.raises(DatabaseError, match='"unknown" does not exist'):
        Database(server.url("unknown"))
    assert time.monotonic() - began < 10


def test_the_url_comes_from_the_environment_or_is_a_file(tmp_path):
    assert database_url(tmp_path, {}) == f"sqlite:///{tmp_path}/studies.db"
    assert database_url(tmp_path, {"MAPPO_DATABASE": "postgresql://host/name"}) == "postgresql://host/name"
