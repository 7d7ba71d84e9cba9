import json
import math
import sys
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

from mappo.config import from_dict, override
from mappo.errors import ConfigError
from mappo.evaluation import statistics
from mappo.evaluation.constraints import Constraint
from mappo.promotion.champions import CARD, POLICY, Champions, policy_key, task_name
from mappo.promotion.gate import Gate
from mappo.promotion.promotion import TEST, judge, parse_decision, promote
from mappo.reporting.tables import decision_lines
from mappo.runs.locations import open_store
from tests.conftest import TINY
from tests.support.runs import train_here

QUICK = Gate(num_seeds=5, episodes_per_seed=8)


@pytest.fixture(scope="module")
def policies(tmp_path_factory):
    """A configuration, and three policies: they push to the left, a little to the right, and to the right."""
    config = from_dict(
        {**TINY, "environment": {"scenario": "tests.support.scenarios:PushRight", "max_episode_frames": 10}}
    )
    trained = train_here(config, tmp_path_factory.mktemp("trained"))
    *_, last = (name for name in trained.tensors if name.startswith("policy.") and name.endswith("bias"))

    def pushing(force: float):
        bias = torch.tensor([force, 0.0, 0.0, 0.0])  # means of x and y, then their deviations
        return replace(trained, tensors={**trained.tensors, last: bias})

    return config, [pushing(force) for force in (-3.0, 0.5, 3.0)]


@pytest.fixture(autouse=True)
def _without_onnx(monkeypatch) -> None:
    """Promote as where the packages for ONNX are missing, which takes a second less."""
    monkeypatch.setitem(sys.modules, "onnxscript", None)


@pytest.fixture
def champions(tmp_path, policies):
    return Champions(tmp_path / "champions", task_name(policies[0].environment))


def test_lower_bound_equals_students_t_computed_by_hand():
    """Differences 1, 2, 3: mean 2, standard error 1/sqrt(3), t(2, 95 %, one-sided) = 2.919986."""
    bound = statistics.paired_lower_bound([2.0, 4.0, 6.0], [1.0, 2.0, 3.0], 0.95)
    assert bound == pytest.approx(2 - 2.919986 / 3**0.5, abs=1e-6)
    assert statistics.paired_lower_bound([1.5, 2.5], [1.0, 2.0], 0.95) == 0.5


def test_one_in_twenty_equally_good_candidates_passes():
    generator = torch.Generator().manual_seed(0)
    rounds = torch.randn(2000, 2, 40, generator=generator).double()
    num_passed = sum(statistics.paired_lower_bound(a.tolist(), b.tolist(), 0.95) > 0 for a, b in rounds)
    assert 0.035 < num_passed / 2000 < 0.065


@pytest.mark.parametrize("correlation", [0.0, 0.25, 0.5])
@pytest.mark.parametrize("losses", ["normal", "rare"])
def test_equally_good_policies_pass_no_more_often_than_stated(correlation, losses):
    """Episodes of one seed share a part of their return; rare losses take 10 from one episode in 200.

    With a probability of 5 %, more than 130 of 2,000 gates pass with a probability of 0.1 %.
    """
    generator, gate = np.random.default_rng(0), Gate()
    shape = 2, gate.num_seeds, gate.episodes_per_seed
    num_passed = 0
    for _ in range(2000):
        shared, own = generator.normal(size=(*shape[:2], 1)), generator.normal(size=shape)
        returns = correlation**0.5 * shared + (1 - correlation) ** 0.5 * own
        if losses == "rare":
            returns = 0.01 * returns - 10.0 * (generator.random(shape) < 0.005)
        by_seed = (statistics.by_seed(policy.ravel().tolist(), gate.episodes_per_seed) for policy in returns)
        num_passed += statistics.paired_lower_bound(*by_seed, gate.confidence) > gate.margin
    assert num_passed <= 130


def test_decision_says_when_its_confidence_holds():
    assert "if the differences of seeds are roughly symmetric" in TEST


def test_first_champion_must_beat_the_random_policy(policies, champions):
    config, (worst, middle, _) = policies
    refusal = promote(config, worst, champions, QUICK)
    assert (refusal.action, refusal.opponent, refusal.champion) == ("kept", "random", None)
    assert champions.current() is None
    promotion = promote(config, middle, champions, QUICK)
    assert (promotion.action, promotion.opponent, promotion.champion) == ("promoted", "random", 1)


def test_better_candidate_is_promoted_and_a_worse_one_is_not(policies, champions):
    config, (_, middle, best) = policies
    first = promote(config, best, champions, QUICK)
    second = promote(config, middle, champions, QUICK)
    assert (first.action, first.champion) == ("promoted", 1)
    assert (second.action, second.champion, second.opponent) == ("kept", 1, "champion 1")
    assert second.lower_bound <= second.gate.margin
    current = champions.current()
    assert champions.policy(current).tensors.keys() == best.tensors.keys()
    assert all(torch.equal(value, best.tensors[key]) for key, value in champions.policy(current).tensors.items())


def test_difference_and_bound_are_computed_from_the_returns(policies, champions):
    config, (_, _, best) = policies
    decision = judge(config, best, champions, None, QUICK)
    assert len(decision.seeds) == len(set(decision.seeds)) == QUICK.num_seeds
    assert len(decision.candidate_returns) == len(decision.opponent_returns) == 40
    differences = (
        torch.tensor(decision.candidate_returns).double() - torch.tensor(decision.opponent_returns).double()
    )
    differences = differences.reshape(5, 8).mean(1)  # by seed
    assert decision.difference == pytest.approx(differences.mean().item(), rel=1e-6)
    deviation = differences.std() / 5**0.5  # t(4, 95 %, one-sided) = 2.131847
    assert decision.lower_bound == pytest.approx((differences.mean() - 2.131847 * deviation).item(), rel=1e-4)


def test_evidence_of_a_champion_has_the_measurements_of_both_policies_on_the_gates_episodes(tmp_path, policies):
    config = override(policies[0], {"environment": {"scenario": "tests.support.scenarios:PushRightAndMeasure"}})
    champions = Champions(tmp_path, task_name(config.environment))
    candidate = replace(policies[1][2], config=config)
    decision = promote(config, candidate, champions, QUICK)
    assert decision.action == "promoted"
    assert decision.candidate_measurements["reward_sum"].episode_values == pytest.approx(
        decision.candidate_returns, rel=1e-5
    )
    assert decision.opponent_measurements["reward_sum"].mean.value == pytest.approx(
        decision.opponent_mean.value, rel=1e-5
    )
    evidence = champions.current().evidence
    assert evidence["candidate_measurements"]["reward_sum"]["reduction"] == "sum"
    card = open_store(champions.policy_location(champions.current())).read("model-card.md", 10_000).decode()
    assert f"| reward_sum, sum over an episode (95 %) | {decision.candidate_measurements['reward_sum']} |" in card
    del evidence["candidate_measurements"], evidence["opponent_measurements"]  # as evidence before 0.6
    assert parse_decision("old", json.dumps(evidence).encode()).candidate_measurements == {}


def test_promotion_without_the_packages_for_onnx_says_so_and_exports_the_rest(policies, champions):
    config, (_, _, best) = policies
    messages: list[str] = []
    assert promote(config, best, champions, QUICK, messages.append).action == "promoted"
    assert [*champions.current().files] == [POLICY, CARD]
    assert messages[-1].startswith("policy.onnx is not made; missing packages: onnxscript: after pip install")


@pytest.fixture(scope="module")
def reckless(policies):
    """Return a configuration whose task measures collisions, and the maker of a policy that pushes so hard."""
    config = override(policies[0], {"environment": {"scenario": "tests.support.scenarios:Reckless"}})
    trained = replace(policies[1][0], config=config)
    *_, last = (name for name in trained.tensors if name.startswith("policy.") and name.endswith("bias"))

    def pushing(force: float):
        return replace(trained, tensors={**trained.tensors, last: torch.tensor([force, 0.0, 0.0, 0.0])})

    return config, pushing


SAFE = Gate(num_seeds=3, episodes_per_seed=14, constraints={"collisions": Constraint(at_most=0.1)})


def test_unsafe_candidates_are_refused_every_time_however_good_their_return_is(tmp_path, reckless):
    config, pushing = reckless
    champions = Champions(tmp_path, task_name(config.environment))
    first = promote(config, pushing(0.5), champions, SAFE)
    assert (first.action, first.keeps_constraints) == ("promoted", True)
    generator = torch.Generator().manual_seed(0)
    for force in (0.9 + 2 * torch.rand(8, generator=generator)).tolist():
        decision = promote(config, pushing(force), champions, SAFE)
        assert decision.is_better
        assert (decision.action, decision.keeps_constraints, decision.champion) == ("kept", False, 1)
        assert decision.candidate_measurements["collisions"].mean.value > 0.1
    assert len(champions.history()) == 1
    assert promote(config, pushing(3.0), champions, QUICK).action == "promoted"  # only the constraint refused it


def test_constraints_their_numbers_and_verdicts_are_in_the_decision_its_lines_and_the_model_card(
    tmp_path, reckless
):
    config, pushing = reckless
    champions = Champions(tmp_path, task_name(config.environment))
    decision = promote(config, pushing(0.5), champions, SAFE)
    verdict = decision.constraints["collisions"]
    assert (verdict.mean, verdict.is_kept, verdict.reduction) == (0.0, True, "sum")
    assert verdict.bound == pytest.approx(-math.log(0.05) / 42)  # 42 independent episodes, and no collision
    evidence = champions.current().evidence
    assert evidence["constraints"]["collisions"]["constraint"]["at_most"] == 0.1
    assert evidence["constraints"]["collisions"]["bound"] == verdict.bound
    assert parse_decision("it", json.dumps(evidence).encode()) == decision
    line = f"constraint on collisions: {verdict}"
    assert line in decision_lines(decision)
    card = open_store(champions.policy_location(champions.current())).read("model-card.md", 10_000).decode()
    assert f"| constraint on collisions | {verdict} |" in card
    refused = promote(config, pushing(3.0), champions, SAFE)
    reason = "because these episodes do not show that it keeps the constraint on collisions"
    assert decision_lines(refused)[-1].startswith(f"the candidate is not promoted, {reason}")
    del evidence["constraints"], evidence["gate"]["constraints"]  # as evidence of versions without constraints
    assert parse_decision("old", json.dumps(evidence).encode()).keeps_constraints


def test_champion_is_judged_again_when_other_constraints_are_asked_for(tmp_path, reckless):
    config, pushing = reckless
    champions = Champions(tmp_path, task_name(config.environment))
    promote(config, pushing(3.0), champions, QUICK)
    again = promote(config, pushing(3.0), champions, SAFE)
    assert (again.action, again.champion, again.keeps_constraints) == ("kept", 1, False)
    assert len(champions.history()) == 1


def test_margin_that_is_not_reached_keeps_the_champion(policies, champions):
    config, (_, _, best) = policies
    decision = promote(config, best, champions, replace(QUICK, margin=1e6))
    assert (decision.is_better, decision.action) == (False, "kept")
    assert decision.difference > 0


def test_seeds_are_new_for_each_decision_and_the_same_for_both_policies(policies, champions):
    """Judge a policy against itself: its returns are the same in every episode."""
    config, (_, _, best) = policies
    promote(config, best, champions, QUICK)
    current = champions.current()
    first, second = (judge(config, best, champions, current, QUICK) for _ in range(2))
    assert first.candidate_returns == first.opponent_returns
    assert first.lower_bound == 0.0
    assert not first.is_better
    assert not set(first.seeds) & set(second.seeds)


def test_promoting_the_champion_again_changes_nothing_and_returns_its_decision(policies, champions):
    config, (_, _, best) = policies
    messages: list[str] = []
    first = promote(config, best, champions, QUICK)
    assert promote(config, best, champions, QUICK, messages.append) == first
    assert messages == ["the candidate is already the champion, by decision 1"]
    assert len(champions.history()) == 1


@pytest.mark.parametrize(("slower", "faster", "action"), [(2, 1, "promoted"), (1, 2, "kept")])
def test_promotion_that_lost_a_race_is_judged_again_against_the_new_champion(
    policies, champions, slower, faster, action
):
    """Let both promotions find no champion, and let the faster one finish before the slower one decides."""
    config, candidates = policies
    read_current, messages = champions.current, []

    def read_current_and_lose_the_race():
        champions.current = read_current
        current = read_current()
        assert promote(config, candidates[faster], champions, QUICK).opponent == "random"
        return current

    champions.current = read_current_and_lose_the_race
    decision = promote(config, candidates[slower], champions, QUICK, messages.append)
    assert "another decision came first: the gate is repeated against the new champion" in messages
    assert (decision.opponent, decision.action) == ("champion 1", action)
    assert len(champions.history()) == (2 if action == "promoted" else 1)
    assert champions.current().policy == policy_key(candidates[2])


def test_candidate_of_another_task_is_refused(policies, champions, checkpoint):
    config, _ = policies
    assert task_name(config.environment) != task_name(checkpoint.config.environment)
    with pytest.raises(ConfigError, match=r"trained on another task: environment\.scenario"):
        promote(config, checkpoint, champions, QUICK)


@pytest.mark.parametrize("change", [{"margin": -1.0}, {"confidence": 1.0}, {"num_seeds": 0}, {"num_seeds": 1}])
def test_gate_that_cannot_decide_is_refused(change):
    with pytest.raises((ConfigError, ValueError)):
        Gate(**{**asdict(QUICK), **change})


def test_networks_of_other_sizes_may_compete(policies, champions, tmp_path):
    config, (_, _, best) = policies
    promote(config, best, champions, QUICK)
    wider = override(config, {"networks": {"hidden_sizes": [8, 8]}})
    decision = promote(wider, train_here(wider, tmp_path / "wider"), champions, QUICK)
    assert decision.opponent == "champion 1"
