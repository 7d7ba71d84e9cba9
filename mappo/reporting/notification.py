"""The message that a run, a pipeline run or a study sends when it ends, in the formats of webhooks."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import mappo
from mappo.errors import one_line
from mappo.reporting.webhook import Webhook

Outcome = Literal["succeeded", "failed", "interrupted", "ended"]
_MAX_REASON, _MAX_LINE = 1500, 300  # characters
_CARD = "application/vnd.microsoft.card.adaptive"
_HEADLINES = {  # names of metrics: words; in the order of importance
    "trained_return_mean": "mean return, trained",
    "heuristic_return_mean": "mean return, heuristic",
    "random_return_mean": "mean return, random",
    "best_return_mean": "mean return, best of the study",
    "default_return_mean": "mean return, default",
    "gain": "gain of the best over the default",
    "candidate_return_mean": "mean return, candidate",
    "opponent_return_mean": "mean return, opponent of the gate",
    "is_promoted": "promoted",
    "best_value": "value of the best trial",
    "num_complete_trials": "complete trials",
    "evaluation_return_mean": "mean return, last evaluation in training",
    "episode_return_mean": "mean return, last iteration",
    "training_frames": "frames of training",
    "frames": "frames of training",
    "num_seeds": "seeds",
}
_MEASURED = "trained_measured_"


@dataclass(frozen=True)
class Message:
    """The end of something.

    subject: what ended, such as `run first`. reason: why it failed; empty if it did not. results: headline numbers
    as text, by name. links: addresses and locations by name.
    """

    subject: str
    outcome: Outcome
    reason: str = ""
    results: Mapping[str, str] = field(default_factory=dict)
    links: Mapping[str, str] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """The message in one line."""
        return one_line(f"mappo: {self.subject} {self.outcome}", _MAX_LINE)

    def body(self, webhook: Webhook) -> dict[str, Any]:
        """Return the JSON object that a webhook takes."""
        if webhook.format == "slack":
            return {"text": self._slack_text()}
        if webhook.format == "teams":
            return {"type": "message", "attachments": [{"contentType": _CARD, "content": self._card()}]}
        return {
            "text": self._plain_text(),
            "title": self.title,
            **asdict(self),
            "mappo_version": mappo.__version__,
        }

    def _lines(self) -> list[str]:
        reason = [self.reason[:_MAX_REASON]] if self.reason else []
        return [*reason, *(f"{name}: {value}" for name, value in self.results.items())]

    def _plain_text(self) -> str:
        links = [f"{name}: {target}" for name, target in self.links.items()]
        return "\n".join([self.title, *self._lines(), *links])

    def _slack_text(self) -> str:
        links = [
            f"<{_slack(target)}|{_slack(name)}>" if _is_url(target) else f"{_slack(name)}: {_slack(target)}"
            for name, target in self.links.items()
        ]
        return "\n".join([f"*{_slack(self.title)}*", *map(_slack, self._lines()), *links])

    def _card(self) -> dict[str, Any]:
        colour = {"succeeded": "Good", "failed": "Attention"}.get(self.outcome, "Default")
        title = {"text": self.title, "weight": "Bolder", "size": "Medium", "color": colour}
        places = [f"{name}: {target}" for name, target in self.links.items() if not _is_url(target)]
        texts = [title, *({"text": line} for line in [*self._lines(), *places])]
        return {
            "$schema": "http://adaptivecards.io/schemas/adaptive-card.json",
            "type": "AdaptiveCard",
            "version": "1.4",
            "body": [{"type": "TextBlock", "wrap": True, **text} for text in texts],
            "actions": [
                {"type": "Action.OpenUrl", "title": name, "url": target}
                for name, target in self.links.items()
                if _is_url(target)
            ],
        }


def headlines(metrics: Mapping[str, float]) -> dict[str, str]:
    """Return the numbers that a message shows of a stage's metrics, with their intervals, by name."""
    words = {name: text for name, text in _HEADLINES.items() if name in metrics}
    measured = [name for name in metrics if name.startswith(_MEASURED) and not name.endswith(("_low", "_high"))]
    words |= {name: f"{name.removeprefix(_MEASURED)}, trained" for name in measured}
    return {text: _with_interval(name, metrics) for name, text in words.items()}


def _with_interval(name: str, metrics: Mapping[str, float]) -> str:
    ends = [metrics.get(f"{name}{end}") for end in ("_low", "_high")]
    interval = f" [{ends[0]:.4g}, {ends[1]:.4g}]" if ends[0] is not None and ends[1] is not None else ""
    value = metrics[name]
    return f"{f'{value:,.0f}' if value == int(value) else f'{value:.4g}'}{interval}"


def _is_url(target: str) -> bool:
    return target.startswith(("https://", "http://"))


def _slack(text: str) -> str:
    """Escape the three characters that Slack reads as markup."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
