"""The report on samples: what they measured beside real data, and how they were made."""

from typing import Any, Literal

from pydantic import Field, model_validator

from pipelines.image_quality import ImageQuality
from pipelines.judges import JudgeFacts
from pipelines.quality import NGRAMS, MauveFacts, TextQuality
from pipelines.reports import Report, facts_table

_ROWS = ("perplexity under the judge", "entropy of the histogram, nats")
_ROWS += tuple(f"distinct {n}-grams" for n in range(1, NGRAMS + 1))


class QualityReport(Report):
    """The quality of samples of one setting. Text has `text`, images have `images`; what wasn't measured is None."""

    kind: Literal["quality"] = "quality"
    settings: dict[str, Any] = Field(description="the samplers', as resolved")
    draws: str = Field(description="how tokens were drawn: exact, or the name of another mode")
    samples: int
    length: int = Field(description="tokens of a sample")
    labels: str | None = Field(default=None, description="where the classes come from, of class-conditional models")
    network_calls: int = Field(description="forward passes of the batches that the samples were made in")
    calls_per_sample: float = Field(description="network calls that a sample needed, on average")
    sampling_seconds: float
    references: int = Field(default=0, description="rows of the split that were measured in the same way")
    digest: str = Field(description="short hash of all that was asked for: names the files")
    text: TextQuality | None = None
    data: TextQuality | None = Field(default=None, description="of the references")
    judge: JudgeFacts | None = None
    mauve: MauveFacts | None = None
    images: ImageQuality | None = None

    @model_validator(mode="after")
    def _complete(self) -> "QualityReport":
        """One kind of sample; a perplexity with the judge who gave it (its entropy is there by `TextQuality`)."""
        if (self.text is None) == (self.images is None):
            raise ValueError("a report is on texts or on images")
        if (self.judge is None) != (self.text is None or self.text.perplexity is None):
            raise ValueError("a perplexity stands with its judge, and a judge with its perplexity")
        return self

    @property
    def name(self) -> str:
        steps = self.settings.get("steps")
        setting = f"{f'{steps}-steps-' if steps else ''}temperature-{self.settings.get('temperature', 1):g}"
        return f"{super().name}-{setting}-{self.digest}"

    @property
    def how(self) -> str:
        """The setting in a few words."""
        steps = self.settings.get("steps")
        parts = [f"{self.samples:,} samples", f"{steps:,} steps" if steps else f"{self.calls_per_sample:.0f} calls"]
        return ", ".join([*parts, f"temperature {self.settings.get('temperature', 1):g}"])

    def headline(self) -> str:
        parts = []
        if self.text is not None:
            entropy = f"entropy {self.text.entropy:.3f} +- {self.text.entropy_error:.3f} nats"
            if self.judge is not None:
                perplexity = f"perplexity {self.text.perplexity:.2f} +- {self.text.perplexity_error:.2f}"
                entropy = f"{perplexity} under {self.judge.judge} at {entropy}"
            parts.append(entropy)
            if self.mauve is not None:
                parts.append(f"MAUVE {self.mauve.mauve:.3f}")
            if self.data is not None:
                own = f"{self.data.entropy:.3f} nats"
                parts.append(f"the data's own {f'{self.data.perplexity:.2f} at ' if self.data.perplexity else ''}{own}")
        if self.images is not None:
            parts.append(f"FID {self.images.fid:.2f}, KID {self.images.kid:.4f} ({self.images.features})")
        sentence = "; ".join(parts)
        return f"{sentence[0].upper()}{sentence[1:]} ({self.how})."

    def markdown(self) -> str:
        """The result, the samples' measures beside the data's, then all facts."""
        tree = self.model_dump(mode="json", exclude={"text", "data"})
        parts = [f"# Quality of samples, against {self.split}", self.headline()]
        if self.text is not None:
            parts.append(comparison(self.text, self.data))
        return "\n\n".join([*parts, facts_table(tree)]) + "\n"


def comparison(text: TextQuality, data: TextQuality | None) -> str:
    """The measures of samples and of real texts side by side, as a table in Markdown."""
    columns = [_column(text), ["-"] * len(_ROWS) if data is None else _column(data)]
    lines = [f"| {' | '.join(row)} |" for row in zip(_ROWS, *columns, strict=True)]
    return "\n".join(["| | samples | data |", "|---|---|---|", *lines])


def _column(text: TextQuality) -> list[str]:
    shares = [getattr(text, f"distinct_{n}") for n in range(1, NGRAMS + 1)]
    return [
        _with_error(text.perplexity, text.perplexity_error),
        _with_error(text.entropy, text.entropy_error),
        *("-" if share is None else f"{share:.2%}" for share in shares),
    ]


def _with_error(value: float | None, error: float | None) -> str:
    return "-" if value is None else f"{value:.4g} ± {error:.2g}"
