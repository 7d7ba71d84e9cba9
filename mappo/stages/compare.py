"""The stage that compares the evaluations of several runs."""

from collections.abc import Sequence
from pathlib import Path

from pydantic import TypeAdapter

from mappo.config import from_dict
from mappo.errors import ConfigError, KeyMissing
from mappo.evaluation import comparison
from mappo.evaluation.comparison import ComparisonReport
from mappo.evaluation.evaluation import EvaluationReport
from mappo.reporting import run_record
from mappo.reporting.tables import comparison_table
from mappo.reporting.terminal import say
from mappo.runs.locations import is_directory, joined
from mappo.runs.run import Run
from mappo.stages.readable_errors import readable_errors
from mappo.stages.runtime import StageResult, estimate_metrics, metadata_of, write_json
from mappo.strict_json import parse_report

_COMPARISON = TypeAdapter(ComparisonReport)


def compare(reports: Sequence[Path | str], output: Path | None = None) -> StageResult:
    """Compare the evaluations of several training seeds; write the `ComparisonReport` as JSON.

    Each is a file, or the location of a run with an evaluation.

    Raises:
        StageFailed: a report cannot be read, or reports cannot be compared.
    """
    with readable_errors("compare"):
        result = compare_reports(reports, output)
        return StageResult(metadata_of(from_dict(result.config)), comparison_metrics(result))


def compare_reports(
    reports: Sequence[Path | str], output: Path | None, names: Sequence[str] = ()
) -> ComparisonReport:
    """Read evaluations and compare them; print the comparison with these names, and write it as JSON.

    Raises:
        ConfigError: a report cannot be read, or reports cannot be compared.
    """
    result = comparison.compare([read_report(path) for path in reports])
    write_json(output, result)
    for line in comparison_table(result, names):
        say("compare", line)
    return result


def read_report(source: Path | str) -> EvaluationReport:
    """Return the evaluation report that a file or a run holds.

    Raises:
        ConfigError: the run has no evaluation, or the content is not an evaluation report.
        StoreError: the store of the run does not answer.
    """
    location = str(source)
    if is_directory(location) and not Path(location).is_dir():
        return run_record.parse_evaluation(location, Path(location).read_bytes())
    try:
        content = Run.at(location).store.read(run_record.EVALUATION, run_record.MAX_BYTES)
    except KeyMissing:
        raise ConfigError(
            f"{location}: this run has no evaluation; `mappo evaluate {location}` makes one"
        ) from None
    return run_record.parse_evaluation(joined(location, run_record.EVALUATION), content)


def read_comparison(path: Path) -> ComparisonReport:
    """Return the comparison that a file holds.

    Raises:
        ConfigError: its content is not a comparison report.
    """
    return parse_report(_COMPARISON, str(path), path.read_bytes(), "a comparison report")


def comparison_metrics(report: ComparisonReport) -> dict[str, float]:
    """Return the numbers of the first configuration, the only one in a pipeline over several seeds."""
    trained = report.configurations[0]
    return {
        "num_seeds": float(len(trained.training_seeds)),
        "random_return_mean": report.random.mean.value,
        **estimate_metrics("trained_return_mean", trained.mean),
        **{f"trained_measured_{name}": measured.mean.value for name, measured in trained.measurements.items()},
    }
