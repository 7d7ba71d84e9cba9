import math

import pytest

from mappo.reporting.diagnosis import diagnose

GOOD = {"kl": 0.01, "clip_fraction": 0.1, "explained_variance": 0.9, "loss_critic": 0.1, "entropy": 1.0}


def rows(returns: list[float], **columns: float) -> list[dict[str, float]]:
    return [{**GOOD, **columns, "episode_return_mean": value} for value in returns]


def states(history: list[dict[str, float]]) -> dict[str, str]:
    return {finding.question.split()[-1].rstrip("?"): finding.state for finding in diagnose(history, 0.2)}


RISING = [float(step) for step in range(20)]


def test_a_good_training_has_good_answers_only():
    assert set(states(rows(RISING)).values()) == {"good"}


@pytest.mark.parametrize(
    ("columns", "returns", "question", "state"),
    [
        ({"kl": 0.2}, RISING, "update", "problem"),
        ({"clip_fraction": 0.4}, RISING, "update", "look"),
        ({"kl": 1e-6, "clip_fraction": 0.0}, RISING, "update", "look"),
        ({"kl": math.nan}, RISING, "update", "look"),
        ({"explained_variance": -0.5}, RISING, "accurate", "problem"),
        ({"explained_variance": 0.3}, RISING, "accurate", "look"),
        ({"explained_variance": math.nan}, RISING, "accurate", "look"),
        ({}, RISING + [0.0] * 10, "best", "problem"),
        ({}, RISING + [13.0] * 10, "best", "look"),
        ({}, [5.0] * 20, "best", "problem"),
        ({}, [math.nan] * 20, "best", "look"),
    ],
)
def test_a_problem_is_found_with_its_evidence(columns, returns, question, state):
    history = rows(returns, **columns)
    assert states(history)[question] == state
    assert all(finding.evidence for finding in diagnose(history, 0.2))


def test_exploration_is_a_problem_when_it_ends_early_but_not_late():
    def with_entropy(entropies: list[float]) -> list[dict[str, float]]:
        return [{**row, "entropy": entropy} for row, entropy in zip(rows(RISING), entropies, strict=True)]

    assert states(with_entropy([1.0, 1.0, -4.0] + [-4.0] * 17))["explore"] == "problem"
    assert states(with_entropy([1.0 - 0.1 * step for step in range(20)]))["explore"] == "good"


def test_too_few_iterations_give_no_answers():
    assert diagnose(rows([1.0] * 4), 0.2) == []
    assert diagnose([], 0.2) == []
