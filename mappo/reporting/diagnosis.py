"""The diagnosis of a run: answers about its training in plain words, with evidence from its history."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from mappo.training.history import by_group

Rows = Sequence[Mapping[str, float]]
MIN_ITERATIONS = 5  # fewer iterations show no trend
_LATE = 0.2  # share of the iterations, at the end of the run, that the answers rest on


@dataclass(frozen=True)
class Diagnosis:
    """The answer to one question about a run.

    state: good, look (worth a look) or problem. evidence: the numbers on which the answer rests.
    """

    question: str
    state: Literal["good", "look", "problem"]
    answer: str
    evidence: str


def diagnose(rows: Rows, clip_epsilon: float) -> list[Diagnosis]:
    """Return the answers for the rows of a history, or an empty list below `MIN_ITERATIONS` rows.

    NaN stands for an empty cell. The bounds are rules of thumb. Source: Huang et al., The 37 Implementation
    Details of Proximal Policy Optimization (2022); Andrychowicz et al., What Matters In On-Policy Reinforcement
    Learning (2020).
    """
    if len(rows) < MIN_ITERATIONS:
        return []
    answers = [_policy(rows, clip_epsilon), _critic(rows), _exploration(rows)]
    # If there are several groups, the return of one also falls because the others have become better.
    return answers if by_group(rows[-1], "episode_return_mean") else [*answers, _return(rows)]


def _policy(rows: Rows, clip_epsilon: float) -> Diagnosis:
    kl, clipped = _late(rows, "kl"), _late(rows, "clip_fraction")
    evidence = (
        f"in the last fifth: KL {kl:.3g} nats per update, {100 * clipped:.0f} % of ratios outside "
        f"1 ± {clip_epsilon:g}"
    )
    question = "Does the policy change too much in an update?"
    if math.isnan(kl) or math.isnan(clipped):
        return Diagnosis(question, "look", "Unknown: KL or clip fraction was not recorded.", evidence)
    if kl > 0.1 or clipped > 0.5:
        answer = "Yes: use fewer epochs, a lower learning rate or target_kl."
        return Diagnosis(question, "problem", answer, evidence)
    if kl > 0.03 or clipped > 0.3:
        return Diagnosis(
            question, "look", "The policy changes a lot; check that the return stays steady.", evidence
        )
    if clipped < 0.005 and kl < 1e-4:
        answer = "The policy hardly changes: training has converged, or the learning rate is too low."
        return Diagnosis(question, "look", answer, evidence)
    return Diagnosis(question, "good", "No.", evidence)


def _critic(rows: Rows) -> Diagnosis:
    explained, question = _late(rows, "explained_variance"), "Is the critic accurate?"
    loss = _late(rows, "loss_critic")
    evidence = f"in the last fifth: explained variance {explained:.2f} (1 is perfect), critic loss {loss:.3g}"
    if math.isnan(explained):
        return Diagnosis(question, "look", "Unknown: the value targets did not vary.", evidence)
    if explained < 0:
        answer = "No: it is worse than a constant. Try more epochs, a larger network or normalise_values."
        return Diagnosis(question, "problem", answer, evidence)
    if explained < 0.5:
        answer = "Partly. This is normal once returns hardly vary; before that, it makes advantages noisy."
        return Diagnosis(question, "look", answer, evidence)
    return Diagnosis(question, "good", "Yes.", evidence)


def _exploration(rows: Rows) -> Diagnosis:
    entropy = _column(rows, "entropy")
    first, last = _mean(entropy[:3]), _late(rows, "entropy")
    question = "Does the policy still explore?"
    evidence = f"entropy {first:.2f} nats at the start, {last:.2f} in the last fifth"
    if math.isnan(last) or math.isnan(first):
        return Diagnosis(question, "look", "Unknown: entropy was not recorded.", evidence)
    drop = first - last
    quarter = entropy[: max(2, len(entropy) // 4)]
    early = float(np.min(quarter, where=np.isfinite(quarter), initial=first))
    if first - early > 3.0:
        answer = "No: it stopped within the first quarter of training. Raise entropy_coefficient."
        return Diagnosis(question, "problem", answer, f"{evidence}; {early:.2f} within the first quarter")
    if drop > 4.0:
        return Diagnosis(question, "look", "Hardly; this is fine if the return is as high as it can be.", evidence)
    return Diagnosis(question, "good", "Yes.", evidence)


def _return(rows: Rows) -> Diagnosis:
    question = "Did the return fall from its best?"
    returns = _column(rows, "episode_return_mean")
    known = returns[np.isfinite(returns)]
    if len(known) < MIN_ITERATIONS:
        return Diagnosis(
            question,
            "look",
            "Unknown: too few episodes ended.",
            f"{len(known)} iterations with a completed episode",
        )
    width = max(1, len(known) // 10)
    smooth = np.convolve(known, np.ones(width) / width, mode="valid")
    best, last, start = float(smooth.max()), float(smooth[-1]), float(smooth[0])
    gain = best - min(start, best)
    smoothed = f"mean of {width} iterations: " if width > 1 else ""
    evidence = f"{smoothed}{start:.3g} at the start, {best:.3g} at its best, {last:.3g} at the end"
    if gain <= 0 or best - start < 1e-9:
        return Diagnosis(question, "problem", "The return never rose above its start.", evidence)
    loss = (best - last) / gain
    if loss > 0.5:
        return Diagnosis(question, "problem", "Yes, by more than half of its gain.", evidence)
    if loss > 0.2:
        return Diagnosis(question, "look", "Yes, by a part of its gain; the best checkpoint is kept.", evidence)
    return Diagnosis(question, "good", "No.", evidence)


def _column(rows: Rows, name: str) -> "np.ndarray[tuple[int], np.dtype[np.float64]]":
    return np.asarray([row.get(name, float("nan")) for row in rows], dtype=np.float64)


def _late(rows: Rows, name: str) -> float:
    """Return the mean of a column over the last fifth of the rows, or NaN if no value there is finite."""
    return _mean(_column(rows, name)[-max(1, round(len(rows) * _LATE)) :])


def _mean(values: "np.ndarray[tuple[int], np.dtype[np.float64]]") -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else float("nan")
