"""Generate files from other files: dashboards as JSON, the PrometheusRule, the tables of docs/metrics.md.

python -m k8s.generate            write the files
python -m k8s.generate --check    write nothing; exit with status 1 if a file is out of date
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from textwrap import indent
from typing import Any

import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder

from k8s.dashboards.fleet import fleet
from k8s.dashboards.training_run import training_run
from k8s.dashboards.tuning_study import tuning_study
from mappo.monitoring.metrics import EVALUATION, OUTCOME, PROBLEMS, STUDY, TRAINING, VALIDATION, Metric

ROOT = Path(__file__).parent.parent
COMPONENTS = ROOT / "k8s" / "components"
RULES = COMPONENTS / "alerts" / "rules.yaml"
_MARK = "<!-- made by `make generate` from here on -->\n"
_PROMETHEUS_RULE = """# Generated from rules.yaml by `make generate`.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: mappo
  labels:
    app.kubernetes.io/part-of: mappo
spec:
"""
_TABLES = {
    "Training": TRAINING,
    "Validation": VALIDATION,
    "Evaluation": EVALUATION,
    "Studies": STUDY,
    "All stages": (*PROBLEMS, *OUTCOME),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Write the generated files, or check them; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m k8s.generate", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit with status 1 if a file is out of date"
    )
    arguments = parser.parse_args(argv)
    outdated = [path for path, text in files().items() if not path.exists() or path.read_text() != text]
    for path in outdated:
        if not arguments.check:
            path.write_text(files()[path])
        print(f"{'differs' if arguments.check else 'wrote'}: {path.relative_to(ROOT)}")
    return int(bool(outdated and arguments.check))


def files() -> dict[Path, str]:
    """Return the content of every generated file."""
    page = ROOT / "docs" / "metrics.md"
    return {
        COMPONENTS / "dashboards" / "training-run.json": _dashboard(training_run()),
        COMPONENTS / "dashboards" / "fleet.json": _dashboard(fleet()),
        COMPONENTS / "dashboards" / "tuning-study.json": _dashboard(tuning_study()),
        COMPONENTS / "alerts" / "prometheusrule.yaml": _prometheus_rule(),
        page: page.read_text().partition(_MARK)[0] + _MARK + _metrics_tables() + _alerts_table(),
    }


def _dashboard(dashboard: Any) -> str:
    return json.dumps(dashboard, cls=JSONEncoder, indent=1, sort_keys=True) + "\n"


def _prometheus_rule() -> str:
    _, groups, rules = RULES.read_text().partition("groups:\n")
    return _PROMETHEUS_RULE + indent(groups + rules, "  ", lambda line: bool(line.strip()))


def _metrics_tables() -> str:
    return "".join(
        f"\n## {title}\n\n| metric | type | labels | meaning |\n|---|---|---|---|\n"
        + "".join(_row(metric) for metric in metrics)
        for title, metrics in _TABLES.items()
    )


def _row(metric: Metric) -> str:
    labels_with_values = [f"{name}: {', '.join(values)}" for name, values in metric.labels.items()]
    labels = "; ".join(metric.label_names[2:]) if metric.is_info else "; ".join(labels_with_values)
    return f"| `{metric.name}` | {metric.kind} | {labels} | {metric.description} |\n"


def _alerts_table() -> str:
    groups = yaml.safe_load(RULES.read_text())["groups"]
    alerts = [rule for group in groups for rule in group["rules"] if "alert" in rule]
    return "\n# Alerts\n" + "".join(
        f"\n## {alert['alert']}\n\nSeverity {alert['labels']['severity']}. {alert['annotations']['summary']}.\n\n"
        f"{alert['annotations']['runbook']}"
        for alert in alerts
    ).replace("{{ $labels.", "<").replace(" }}", ">")


if __name__ == "__main__":
    sys.exit(main())
