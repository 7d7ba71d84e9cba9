"""A study that many workers share: no trial is lost or trained twice, and no more start than requested."""

import itertools
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import optuna
import pytest

from mappo.config import override
from mappo.errors import ConfigError, DatabaseError, StudyUnreadable, TrialLost
from mappo.evaluation.constraints import Constraint
from mappo.recipes import recipe
from mappo.tuning.catalogue import editions, study_names
from mappo.tuning.database import Database
from mappo.tuning.plan import Plan
from mappo.tuning.search_space import Choices, default_space
from mappo.tuning.study import Study, delete_study
from mappo.tuning.study_config import Ending, RetrainingConfig, TuningConfig, changed_ending
from tests.support.services import postgres, wait

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


DAY = 86_400


class Clock:
    """The clock of a database, which a test sets ahead or corrects, or lets run on instead of waiting."""

    def __init__(self, database: Database, monkeypatch: pytest.MonkeyPatch):
        self.ahead_seconds, right_time = 0.0, database.now
        monkeypatch.setattr(database, "now", lambda: right_time() + self.ahead_seconds)


@pytest.fixture
def clock(database, monkeypatch):
    return Clock(database, monkeypatch)


new_worker = (f"worker-{number}" for number in itertools.count()).__next__  # returns a new worker's name


def finish(study: Study, worker: str = "w", value: float = 1.0) -> int:
    claim = study.claim(worker)
    assert claim
    claim.finish("complete", value)
    return claim.number


def states(study: Study) -> list[str]:
    return [trial.state for trial in study.trials()]


def test_the_first_trial_is_the_plans_configuration_and_the_second_the_warm_start(database):
    warm = {"learner.clip_epsilon": 0.31, "learner.gae_lambda": 0.81, "learner.epochs": 7}
    study = Study.prepare(database, "s", PLAN, 3, warm_start=warm)
    default = {"learner.clip_epsilon": 0.2, "learner.gae_lambda": 0.9, "learner.epochs": 10}
    assert [study.claim(new_worker()).values for _ in range(2)] == [default, warm]
    assert [trial.origin for trial in study.trials()] == ["default", "warm start"]
    assert study.claim(new_worker()).values not in (default, warm)
    assert study.claim(new_worker()) is None


def test_racing_workers_start_each_trial_once_and_no_more_than_requested(url, database):
    Study.prepare(database, "s", PLAN, 9)
    numbers: list[int] = []

    def worker(name: str) -> None:
        connection = Database(url)
        study = Study.load(connection, "s")
        while claim := study.claim(name):
            numbers.append(claim.number)
            claim.finish("complete", claim.number)
        connection.close()

    with ThreadPoolExecutor(4) as workers:
        for future in [workers.submit(worker, f"w{index}") for index in range(4)]:
            future.result()
    study = Study.load(database, "s")
    assert sorted(numbers) == list(range(9))
    assert states(study) == ["complete"] * 9
    assert study.best().number == 8
    assert study.is_settled()


def test_another_worker_continues_the_trial_of_a_silent_worker_with_its_number_values_and_curve(database, clock):
    study = Study.prepare(database, "s", PLAN, 1)
    silent = study.claim("first")
    silent.report_frames(6000, 0.25)
    assert study.claim("second") is None
    assert not study.is_settled()
    clock.ahead_seconds += PLAN.tuning.grace_seconds + 1
    continued = study.claim("second")
    assert (continued.number, continued.values) == (silent.number, silent.values)
    with pytest.raises(TrialLost):
        silent.finish("complete", 1.0)
    with pytest.raises(TrialLost):
        silent.release()
    assert continued.report_frames(6000, 0.99) is False  # the first worker reported this step
    continued.finish("complete", 2.0)
    (trial,) = study.trials()
    assert (trial.state, trial.value, trial.curve) == ("complete", 2.0, {6000: 0.25})
    assert [(turn.worker, turn.outcome) for turn in trial.attempts] == [("first", "lost"), ("second", "complete")]


def test_a_worker_that_sends_heartbeats_keeps_its_trial_longer_than_the_grace_period(database):
    study = Study.prepare(database, "s", PLAN, 1)
    with study.claim(new_worker()) as claim:
        deadline = time.monotonic() + 1.5 * PLAN.tuning.grace_seconds
        while time.monotonic() < deadline:
            assert study.claim("other") is None
            assert not claim.is_lost
            time.sleep(0.5)
        claim.finish("complete", 1.0)
    assert states(study) == ["complete"]


def test_a_trial_fails_with_the_reason_when_it_lost_more_workers_than_allowed(database, clock):
    plan = replace(PLAN, tuning=TuningConfig(grace_seconds=3, max_losses=0))
    study = Study.prepare(database, "s", plan, 1)
    study.claim(new_worker())
    clock.ahead_seconds += 4
    assert study.claim(new_worker()) is None
    (trial,) = study.trials()
    assert (trial.state, trial.reason) == (
        "failed",
        "lost workers (no heartbeat in time): 1; tuning.max_losses = 0",
    )
    assert study.is_settled()


def test_a_released_trial_is_requeued_and_does_not_count_as_lost(database):
    plan = replace(PLAN, tuning=TuningConfig(grace_seconds=3, max_losses=0))
    study = Study.prepare(database, "s", plan, 1)
    for _ in range(3):
        claim = study.claim(new_worker())
        assert claim.number == 0
        claim.release()
        assert states(study) == ["waiting"]
    assert finish(study) == 0


def test_the_next_claim_requeues_a_trial_whose_worker_died_while_claiming(database):
    """The worker died between Optuna's `ask` and the note of its turn."""
    study = Study.prepare(database, "s", PLAN, 2)
    orphan = optuna.load_study(study_name="s", storage=database.storage).ask()
    assert orphan.number == 0
    claim = study.claim(new_worker())
    assert (claim.number, claim.values["learner.epochs"]) == (0, 10)


def test_a_repeated_request_adds_no_trials_and_another_session_adds_some(database):
    for _ in range(2):
        study = Study.prepare(database, "s", PLAN, 2)
    assert study.num_trials == 2
    assert Study.prepare(database, "s", PLAN, 3, session="run-1").num_trials == 5
    assert Study.prepare(database, "s", PLAN, 3, session="run-1").num_trials == 5
    assert Study.prepare(database, "s", PLAN, 4).num_trials == 7
    assert len(study.trials()) == 1  # the default, once


def test_concurrent_prepares_create_one_study(url, database):
    def prepare(_: int) -> int:
        connection = Database(url)
        study = Study.prepare(connection, "s", PLAN, 4)
        count = len(study.trials())
        connection.close()
        return count

    with ThreadPoolExecutor(4) as workers:
        assert list(workers.map(prepare, range(4))) == [1] * 4
    assert study_names(database) == ["s"]


def test_another_plan_under_the_same_name_is_refused_with_the_differences(database):
    Study.prepare(database, "s", PLAN, 1)
    other = replace(PLAN, config=override(CONFIG, {"learner": {"discount": 0.5}}))
    with pytest.raises(ConfigError, match=r"study s: .*config\.learner\.discount = 0\.99 -> 0\.5"):
        Study.prepare(database, "s", other, 1)
    with pytest.raises(ConfigError, match=r"tuning\.pruner = \"median\" -> \"none\""):
        Study.prepare(database, "s", replace(PLAN, tuning=replace(PLAN.tuning, pruner="none")), 1)


def test_a_study_of_an_older_version_whose_plan_lacks_a_field_continues(database):
    Study.prepare(database, "s", PLAN, 1)
    old = PLAN.to_dict()
    del old["config"]["networks"]["critic"]
    optuna.load_study(study_name="s", storage=database.storage).set_user_attr("plan", old)
    assert Study.prepare(database, "s", PLAN, 2, session="other").plan == PLAN


def test_no_trial_starts_after_the_deadline_but_a_running_trial_may_end(database, clock):
    study = Study.prepare(database, "s", PLAN, 5, timeout_seconds=60.0)
    claim = study.claim(new_worker())
    clock.ahead_seconds += 61
    study._heartbeat(claim)
    assert study.claim("other") is None
    claim.finish("complete", 1.0)
    assert study.claim(new_worker()) is None
    assert study.is_settled()
    assert finish(Study.prepare(database, "s", PLAN, 5)) == 1  # requested again, without a deadline


def test_the_latest_session_sets_the_deadline_and_a_repeated_request_does_not_postpone_it(database, clock):
    Study.prepare(database, "s", PLAN, 1, session="run-1", timeout_seconds=60.0)
    clock.ahead_seconds += 35
    study = Study.prepare(database, "s", PLAN, 1, session="run-1", timeout_seconds=60.0)
    clock.ahead_seconds += 30
    assert study.claim(new_worker()) is None
    Study.prepare(database, "s", PLAN, 1, session="run-2", timeout_seconds=60.0)
    assert [finish(study, new_worker()), finish(study, new_worker())] == [
        0,
        1,
    ]  # also the trial that run-1 had no time for
    assert study.claim(new_worker()) is None


def test_a_study_continues_after_its_deadline_when_the_terminal_requests_trials(database, clock):
    study = Study.prepare(database, "s", PLAN, 2, timeout_seconds=60.0)
    clock.ahead_seconds += 61
    assert study.claim(new_worker()) is None
    study.request_trials()
    assert [finish(study, new_worker()), finish(study, new_worker())] == [0, 1]
    study.request_trials(num_trials=3)
    assert (finish(study, new_worker()), study.num_trials) == (2, 3)
    study.request_trials(num_trials=4, timeout_seconds=60.0)
    clock.ahead_seconds += 61
    assert study.claim(new_worker()) is None


def test_more_trials_without_a_time_keep_a_deadline_that_has_not_passed(database, clock):
    study = Study.prepare(database, "s", PLAN, 1, timeout_seconds=60.0)
    study.request_trials(num_trials=3)
    assert study.num_trials == 3
    assert finish(study, new_worker()) == 0
    clock.ahead_seconds += 61
    assert study.claim(new_worker()) is None


def test_no_trial_stays_running_when_its_worker_is_lost_near_the_deadline(database, clock):
    study = Study.prepare(database, "s", PLAN, 5, timeout_seconds=60)
    assert study.claim("silent")
    clock.ahead_seconds += 60.1
    assert not study.is_settled()  # other workers keep polling, and requeue the trial
    clock.ahead_seconds += PLAN.tuning.grace_seconds + 0.5
    assert study.claim("other") is None
    assert states(study) == ["waiting"]
    assert study.is_settled()


def test_a_trial_whose_worker_was_killed_while_the_clock_was_ahead_is_requeued(database, clock):
    study = Study.prepare(database, "s", PLAN, 1)
    clock.ahead_seconds = DAY
    assert study.claim("killed").number == 0
    clock.ahead_seconds = 0
    assert study.claim("other").number == 0
    (trial,) = study.trials()
    assert [turn.outcome for turn in trial.attempts] == ["lost", ""]
    assert 0 <= trial.seconds < 60


def test_a_study_whose_worker_was_killed_while_the_clock_was_ahead_can_be_deleted(database, clock):
    study = Study.prepare(database, "s", PLAN, 1)
    clock.ahead_seconds = DAY
    study.claim("killed")
    clock.ahead_seconds = 0
    delete_study(database, "s")


def test_a_live_worker_keeps_its_trial_when_the_clock_is_corrected(database, clock):
    study = Study.prepare(database, "s", PLAN, 1)
    clock.ahead_seconds = DAY
    claim = study.claim("live")
    clock.ahead_seconds = 0
    study._heartbeat(claim)
    assert study.claim("other") is None
    claim.finish("complete", 1.0)
    (trial,) = study.trials()
    assert (trial.state, trial.seconds) == ("complete", 0)


def test_a_deadline_that_was_set_while_the_clock_was_ahead_has_passed(database, clock):
    clock.ahead_seconds = DAY
    study = Study.prepare(database, "s", PLAN, 2, timeout_seconds=60)
    clock.ahead_seconds = 0
    assert study.claim(new_worker()) is None
    assert study.is_settled()
    study = Study.prepare(database, "s", PLAN, 2, timeout_seconds=60)  # the same request sets it anew
    assert study.claim(new_worker()).number == 0


def test_trials_that_repeat_the_values_of_a_complete_one_are_not_trained(database):
    space = {"networks.activation": Choices("categorical", ("tanh", "relu"))}
    study = Study.prepare(database, "s", Plan(CONFIG, space, PLAN.tuning), 12)
    values = {"tanh": 0.5, "relu": 0.25}
    trained = []
    while claim := study.claim(new_worker()):
        trained.append(claim.values["networks.activation"])
        claim.finish("complete", values[trained[-1]])
    assert sorted(trained) == ["relu", "tanh"]
    trials = study.trials()
    assert len(trials) == 12
    assert all(trial.value == values[trial.values["networks.activation"]] for trial in trials)
    assert {trial.reason for trial in trials if not trial.attempts} == {
        "the same values as trial 0",
        f"the same values as trial {next(trial.number for trial in trials[1:] if trial.attempts)}",
    }
    assert study.best().number == 0


def test_a_trial_that_repeats_a_pruned_one_is_pruned_and_one_that_repeats_a_failed_one_is_trained(database):
    space = {"networks.activation": Choices("categorical", ("tanh", "relu"))}
    study = Study.prepare(database, "s", Plan(CONFIG, space, PLAN.tuning), 12)
    ends = {"tanh": [("failed", None), ("complete", 1.0)], "relu": [("pruned", None)]}
    while claim := study.claim(new_worker()):
        if claim.values["networks.activation"] == "relu":
            claim.report_frames(100, -3.0)
        claim.finish(*ends[claim.values["networks.activation"]].pop(0), reason="a test")
    assert ends == {"tanh": [], "relu": []}
    relu = [trial for trial in study.trials() if trial.values["networks.activation"] == "relu"]
    assert len(relu) > 1
    assert {trial.state for trial in relu} == {"pruned"}
    assert all(trial.curve == {100: -3.0} for trial in relu)  # the sampler judges pruned trials by their curve


def test_a_trial_that_waits_is_not_trained_when_its_twin_has_ended(database):
    space = {"networks.activation": Choices("categorical", ("tanh", "relu"))}
    study = Study.prepare(database, "s", Plan(CONFIG, space, PLAN.tuning), 3)
    claims = [study.claim(new_worker()) for _ in range(3)]  # no value is known yet: two are equal
    twins = [claim for claim in claims if [each.values for each in claims].count(claim.values) > 1]
    first, second = twins[:2]
    second.release()
    first.finish("complete", 0.75)
    assert study.claim(new_worker()) is None
    twin = study.trials()[second.number]
    assert (twin.state, twin.value, twin.reason) == ("complete", 0.75, f"the same values as trial {first.number}")


def test_trials_with_other_batches_are_pruned_at_the_last_value_before_the_same_frame(database):
    """Trials with other numbers of environments report at frames that rarely meet."""
    no_losses = replace(PLAN, tuning=TuningConfig(grace_seconds=120))
    study = Study.prepare(database, "s", no_losses, 16)
    ended: Counter[str] = Counter()
    for index in range(16):
        claim = study.claim(new_worker())
        is_hopeless = index >= 10
        batch = 10_000 + 130 * index
        for frames in range(batch, 84_000 + batch, batch):
            value = -1.0 if is_hopeless else frames / 84_000
            if claim.report_frames(frames, value) and frames < 84_000:
                claim.finish("pruned", reason="bad")
                assert 21_000 <= frames < 34_000
                break
        else:
            claim.finish("complete", 0.0)
        ended["hopeless" if is_hopeless else "good", study.trials()[claim.number].state] += 1
    assert ended["hopeless", "pruned"] == 6
    assert ended["good", "pruned"] <= 5


def test_a_plan_that_was_stored_without_a_field_has_its_default(database):
    study = Study.prepare(database, "s", PLAN, 1)
    stored = study.plan.to_dict()
    del stored["tuning"]["trial_hours"]
    study._study.set_user_attr("plan", stored)
    assert Study.prepare(database, "s", PLAN, 2).num_trials == 2


def test_the_settings_of_what_follows_the_trials_stay_with_the_study(database):
    study = Study.prepare(database, "s", PLAN, 1)
    assert study.ending == Ending()
    study.keep_ending(Ending(RetrainingConfig(num_seeds=7), champions="champions"))
    ending = Study.load(database, "s").ending
    assert (ending.retraining.num_seeds, ending.champions) == (7, "champions")
    changed = changed_ending(ending, {"gate": {"margin": 0.5}})
    assert (changed.retraining.num_seeds, changed.gate.margin, changed.champions) == (7, 0.5, "champions")


@pytest.mark.parametrize("scenario", ["os:abort", "sys:exit", "this:Scenario"])
def test_a_scenario_that_only_the_database_names_is_refused(database, scenario):
    config = override(CONFIG, {"environment": {"scenario": scenario, "scenario_kwargs": {}}})
    study = Study.prepare(database, "s", replace(PLAN, config=config), 1)
    for named in ("", "navigation", "os:other"):
        with pytest.raises(ConfigError, match="is code outside VMAS, which runs only if you name it"):
            study.require_named(named)
    study.require_named(scenario)


def test_one_process_at_a_time_holds_a_long_lock(url, database):
    other, waits = Database(url), []
    held = threading.Event()

    def wait_for_lock() -> None:
        with other.long_lock("s", lambda: waits.append(held.is_set())):
            assert not held.is_set()

    with ThreadPoolExecutor(1) as threads:
        with database.long_lock("s", lambda: waits.append("nobody holds it")):
            held.set()
            future = threads.submit(wait_for_lock)
            wait(lambda: bool(waits), 20, "no wait")
            time.sleep(0.2)
            assert not future.done()
            held.clear()
        future.result(timeout=20)
    assert waits == [True]
    with other.lock("s"), other.long_lock("s", lambda: waits.append("nobody holds it")):  # two different locks
        assert waits == [True]
    other.close()


def test_a_worker_reclaims_a_trial_whose_claim_it_never_received_without_a_loss(database):
    study = Study.prepare(database, "s", PLAN, 3)
    assert [study.claim("w").number, study.claim("w").number] == [0, 0]
    assert [turn.outcome for turn in study.trials()[0].attempts] == ["released", ""]
    study.abandon("w")
    assert states(study)[0] == "waiting"


def test_an_interrupted_study_samples_the_same_values_as_an_undisturbed_one(tmp_path):
    def sampled(name: str, is_interrupted: bool) -> list[dict]:
        database = Database(f"sqlite:///{tmp_path}/{name}.db")
        study, values = Study.prepare(database, "s", PLAN, 14), []
        while claim := study.claim(new_worker()):
            if is_interrupted and claim.number % 3 == 2:
                claim.release()
                study = Study.load(database, "s")
                claim = study.claim(new_worker())
            values.append(claim.values)
            claim.finish("complete", -abs(claim.values["learner.clip_epsilon"] - 0.1))
        return values

    assert sampled("one", False) == sampled("other", True)


def test_a_frozen_database_is_given_up_and_used_again_when_it_answers(server, monkeypatch):
    monkeypatch.setattr("mappo.tuning.database._ANSWER_SECONDS", 1.0)
    database = Database(server.create("frozen"), patience_seconds=1)
    study = Study.prepare(database, "s", PLAN, 1)
    claim = study.claim(new_worker())
    with server.frozen():
        started = time.monotonic()
        with pytest.raises(DatabaseError, match="no answer within 1 s|timeout"):
            claim.finish("complete", 1.0)
        assert time.monotonic() - started < 30
    claim.finish("complete", 1.0)
    assert states(study) == ["complete"]
    database.close()


@pytest.mark.parametrize("pruner", ["median", "halving", "hyperband"])
def test_a_bad_trial_is_pruned_and_a_good_one_is_not(database, pruner):
    study = Study.prepare(database, "s", replace(PLAN, tuning=TuningConfig(pruner=pruner)), 20)
    rungs = [10_000, 30_000, 60_000, 84_000]
    ended: Counter[str] = Counter()
    for index in range(20):
        claim = study.claim(new_worker())
        is_bad = index > 8 and index % 2
        for frames in rungs:
            if claim.report_frames(frames, -1.0 if is_bad else 1.0):
                claim.finish("pruned", reason="bad")
                break
        else:
            claim.finish("complete", 0.0)
        ended["bad" if is_bad else "good", study.trials()[claim.number].state] += 1
    assert ended["bad", "pruned"] + ended["bad", "complete"] == 6
    assert ended["bad", "pruned"] >= 3
    assert ended["good", "pruned"] == 0


CONSTRAINTS = {"collisions": Constraint(at_most=0.5), "rescued": Constraint(at_least=0.9)}
CONSTRAINED = replace(PLAN, tuning=replace(PLAN.tuning, constraints=CONSTRAINTS))


def end_measured(study: Study, value: float, collisions: float | None, rescued: float | None = 1.0) -> None:
    claim = study.claim(new_worker())
    claim.finish("complete", value, measured={"collisions": collisions, "rescued": rescued})


def test_the_best_trial_is_the_best_feasible_one_by_optunas_own_rule(url, database):
    study = Study.prepare(database, "s", CONSTRAINED, 8)
    end_measured(study, 5.0, 0.75)
    assert study.best() is None
    with pytest.raises(ValueError, match="No feasible trials"):
        _ = study.optuna_study.best_trial
    end_measured(study, 1.0, 0.5)
    end_measured(study, 2.0, 0.25, 0.9)
    end_measured(study, 3.0, 0.0, 0.5)
    end_measured(study, 4.0, None)
    study.claim(new_worker()).finish("failed", reason="a test")
    other = Database(url)  # as another worker and a resumed study read them
    trials = Study.load(other, "s").trials()
    assert [trial.broken for trial in trials] == [["collisions"], [], [], ["rescued"], ["collisions"], []]
    assert [trial.is_feasible for trial in trials] == [False, True, True, False, False, False]
    assert trials[4].measured == {"collisions": None, "rescued": 1.0}
    assert Study.load(other, "s").best().number == study.optuna_study.best_trial.number == 2
    assert study.optuna_study.trials[3].constraints == {"collisions": -0.5, "rescued": pytest.approx(0.4)}
    assert study.claim(new_worker())  # the sampler takes them
    other.close()


def test_an_end_whose_answer_was_lost_is_repeated_without_a_change_of_the_constraints(database):
    study = Study.prepare(database, "s", CONSTRAINED, 1)
    claim = study.claim(new_worker())
    claim.trial.set_constraint("collisions", -0.5)  # as a first try that the database stopped
    for _ in range(2):
        claim.finish("complete", 1.0, measured={"collisions": 0.0, "rescued": 1.0})
    assert study.best().measured == {"collisions": 0.0, "rescued": 1.0}


def test_a_twin_of_an_infeasible_trial_is_infeasible(database):
    space = {"networks.activation": Choices("categorical", ("tanh", "relu"))}
    study = Study.prepare(database, "s", replace(CONSTRAINED, space=space), 8)
    while claim := study.claim(new_worker()):
        is_reckless = claim.values["networks.activation"] == "relu"
        claim.finish(
            "complete", 2.0 if is_reckless else 1.0, measured={"collisions": 9.0 * is_reckless, "rescued": 1}
        )
    relu = [trial for trial in study.trials() if trial.values["networks.activation"] == "relu"]
    assert len(relu) > 1
    assert all(trial.measured["collisions"] == 9.0 and trial.broken == ["collisions"] for trial in relu)
    assert study.best().values == {"networks.activation": "tanh"}


def test_infeasible_trials_prune_no_feasible_one(database):
    study = Study.prepare(database, "s", CONSTRAINED, 12)
    for index in range(11):
        claim, is_reckless = study.claim(new_worker()), index < 6
        value = 2.0 if is_reckless else 1.0
        assert not any(claim.report_frames(frames, value) for frames in (30_000, 60_000))
        claim.finish("complete", value, measured={"collisions": 9.0 * is_reckless, "rescued": 1.0})
    claim = study.claim(new_worker())
    assert claim.report_frames(30_000, 0.5)  # worse than the feasible ones


def test_a_complete_trial_without_its_constraints_is_refused(database):
    study = Study.prepare(database, "s", CONSTRAINED, 1)
    study._study.tell(study._study.ask(study._distributions).number, 1.0)
    with pytest.raises(StudyUnreadable, match="trial 0: is complete, but has no number for its constraint"):
        study.trials()


def test_wilcoxon_prunes_a_trial_that_is_worse_than_the_best_over_training_seeds(database):
    tuning = TuningConfig(pruner="wilcoxon", training_seeds=tuple(range(8)))
    study = Study.prepare(database, "s", replace(PLAN, tuning=tuning), 2)
    noise = [0.1, -0.2, 0.15, 0.3, -0.25, 0.05, 0.2, -0.1]
    good, bad = study.claim(new_worker()), study.claim("v")
    assert not any(good.report_seed(seed, 1.0 + noise[seed]) for seed in range(8))
    good.finish("complete", 1.03)
    pruned = [bad.report_seed(seed, 0.5 + noise[-seed]) for seed in range(8)]
    assert not any(pruned[:2])
    assert any(pruned)


def test_claims_and_plans_return_choices_of_lists_as_lists(database):
    config = CONFIG
    space = {"networks.hidden_sizes": Choices("categorical", ([256, 256], [64, 64]))}
    study = Study.prepare(database, "s", Plan(config, space, PLAN.tuning), 6)
    sizes = [study.claim(new_worker()).values["networks.hidden_sizes"] for _ in range(6)]
    assert sizes[0] == [256, 256]
    assert [64, 64] in sizes
    assert Study.load(database, "s").plan == study.plan


def test_studies_are_listed_and_deleted_by_name(database):
    Study.prepare(database, "one", PLAN, 1)
    Study.prepare(database, "other", PLAN, 1)
    delete_study(database, "one")
    assert study_names(database) == ["other"]
    for call in (delete_study, Study.load):
        with pytest.raises(ConfigError, match="no study 'one'.* its studies: other"):
            call(database, "one")


def test_a_study_with_busy_workers_is_not_deleted_and_idle_workers_get_an_error_afterwards(database):
    study = Study.prepare(database, "s", PLAN, 1)
    with study.claim("busy-one") as claim:
        with pytest.raises(ConfigError, match="workers hold its trials: busy-one; delete the study 3 s after"):
            delete_study(database, "s")
        claim.finish("complete", 1.0)
    delete_study(database, "s")
    with pytest.raises(ConfigError, match="study s: the study was deleted"):
        study.claim(new_worker())


def test_editions_returns_the_studies_of_a_series_the_newest_first(database):
    for name, series in (("w-9", "w"), ("w-10", "w"), ("w-x", "other"), ("w-b", "w")):
        Study.prepare(database, name, PLAN, 1, series=series)
    assert editions(database, "w") == ["w-b", "w-10", "w-9"]


def test_a_study_that_mappo_did_not_make_is_refused(database):
    optuna.create_study(storage=database.storage, study_name="theirs").add_trial(
        optuna.create_trial(value=1.0, params={}, distributions={})
    )
    with pytest.raises(ConfigError, match="not made by mappo"):
        Study.prepare(database, "theirs", PLAN, 1)
    with pytest.raises(ConfigError, match="not made by mappo"):
        Study.load(database, "theirs")


def test_claims_survive_a_restart_of_the_database(server):
    database = Database(server.create("restarted"), patience_seconds=30)
    study = Study.prepare(database, "s", PLAN, 2)
    with study.claim(new_worker()) as claim:
        server.stop()
        starting = threading.Timer(2, server.start)
        starting.start()
        claim.report_frames(100, 0.5)
        starting.join()
        claim.finish("complete", 1.0)
    assert states(study) == ["complete"]
    assert finish(study) == 1
    database.close()


def test_the_error_about_a_stopped_database_hides_its_password(server):
    url = server.create("away")
    database = Database(url, patience_seconds=1)
    study = Study.prepare(database, "s", PLAN, 2)
    claim = study.claim(new_worker())
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


def test_the_location_hides_a_password_in_the_query_of_the_url(server):
    database = Database(f"{server.create('query')}?password=hidden-word")
    assert "hidden-word" not in database.location
    database.close()


def test_an_unknown_database_is_an_error_without_retries(server):
    started = time.monotonic()
    with pytest.raises(DatabaseError, match='"unknown" does not exist'):
        Database(server.url("unknown"))
    assert time.monotonic() - started < 10
