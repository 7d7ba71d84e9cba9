"""The stage that writes the page of runs, or of a study."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mappo.reporting import run_page, run_record, study_page
from mappo.reporting.terminal import say
from mappo.stages.compare import compare
from mappo.stages.runtime import StageResult, metadata_of, readable_errors
from mappo.tuning.database import open_database
from mappo.tuning.search_space import applied
from mappo.tuning.study import Study


def report(runs_: Sequence[str], output: Path) -> None:
    """Write one HTML page of one run, or of several side by side.

    Raises:
        StageFailed: a run cannot be read.
    """
    with readable_errors("report"):
        write_page(output, run_record.of_runs(runs_))
        say("report", f"wrote {output} ({output.stat().st_size / 1e6:.1f} MB)")


def write_page(path: Path, shown: Sequence[run_record.RunRecord]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(run_page.build(shown))


def report_study(
    name: str, trial: int, evaluations: Sequence[Path], decision: Path, comparison: Path, page: Path
) -> StageResult:
    """Compare the chosen trial's configuration with the default, and write one page of the study.

    `evaluations` are those of the default from each fresh seed, then those of the best.

    Raises:
        StageFailed: something cannot be read.
    """
    with readable_errors("report"), open_database() as database:
        study = Study.load(database, name)
        chosen = study.trials()[trial]
        best = applied(study.plan.config, chosen.values)
        found = list(evaluations)
        if best == study.plan.config:
            found = found[: len(found) // 2]  # the best is the default: both are the same trainings
        compare(found, comparison)
        compared, decided = json.loads(comparison.read_text()), json.loads(decision.read_text())
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(study_page.build(study, chosen, compared, decided))
        return StageResult(metadata_of(best), _final_numbers(compared))


def _final_numbers(comparison: Mapping[str, Any]) -> dict[str, float]:
    """Of a ComparisonReport of the default and, unless that is the best, of the best."""
    default, best = comparison["configurations"][0], comparison["configurations"][-1]
    numbers = {"default_return_mean": default["mean"]["value"], "best_return_mean": best["mean"]["value"]}
    gain = best["gain"] or {"value": 0.0, "low": None, "high": None}
    numbers |= {"gain": gain["value"], "gain_low": gain["low"], "gain_high": gain["high"]}
    return {name: value for name, value in numbers.items() if value is not None}
