"""Reports: what was measured, on which weights and data, and how; for programs as JSON, for people as Markdown.

`Report` is what all kinds share; each kind adds its results, and the sentence that sums them up.
"""

from abc import ABC, abstractmethod
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, Protocol
from urllib.parse import quote

from pydantic import BaseModel, ConfigDict, Field

from pipelines.storage import write_atomically


class Provenance(BaseModel):
    """Which weights were looked at."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    run: str | None = Field(default=None, description="name of the run")
    step: int | None = Field(default=None, description="training step of the checkpoint")
    weights_hash: str | None = Field(default=None, description="of the checkpoint's tensors")


class Report(BaseModel, ABC):
    """What every report says; each kind adds its own results."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: str
    created: datetime
    model: Provenance
    data_fingerprint: str = Field(description="of the prepared set, or of the rows themselves")
    split: str
    vocabulary: str
    seed: int
    seconds: float

    @property
    def name(self) -> str:
        """Stem of the report's files: a later checkpoint, another split or another seed doesn't overwrite it."""
        step = "" if self.model.step is None else f"-step-{self.model.step:08d}"
        return f"{self.kind}-{self.split}{step}-seed-{self.seed}"

    @abstractmethod
    def headline(self) -> str:
        """The result in one sentence."""

    def markdown(self) -> str:
        """The report for people: the result, then all facts."""
        table = facts_table(self.model_dump(mode="json"))
        return f"# {self.kind.capitalize()} on {self.split}\n\n{self.headline()}\n\n{table}\n"


class ZeroShotFacts(BaseModel):
    """How a data set became rows (`pipelines.zero_shot`): numbers of different protocols are not to be compared."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    data_set: str
    protocol: str
    detokenizer: str
    stride: int | None = Field(description="new tokens of a window where windows overlap")
    separate_documents: bool = Field(description="does every document begin a window of its own?")
    dropped_tokens: int = Field(description="tokens that didn't fill a window and were left out")


class LikelihoodReport(Report):
    """The negative ELBO, an upper bound on the negative log-likelihood."""

    kind: Literal["likelihood"] = "likelihood"
    data_set: str | None = Field(default=None, description="its name, of several sets that the run was trained on")
    zero_shot: ZeroShotFacts | None = Field(default=None, description="of data sets that are not a prepared one")
    estimator: str = Field(description="of the bound, see md4.likelihood; different ones are not to be compared")
    draws: int = Field(description="Monte Carlo draws for each row, stratified")
    rows: int = Field(description="rows evaluated")
    rows_available: int
    clusters: int = Field(description="documents that the rows are from, taken as independent; rows, if not known")
    tokens: int = Field(description="tokens scored in these rows")
    window: int = Field(description="tokens of a row: what the model sees at once")
    bits_per_token: float = Field(description="of text8's characters: bits per character")
    standard_error: float = Field(description="of bits_per_token, from the spread between rows")
    perplexity: float = Field(description="per token: 2 ^ bits_per_token")
    perplexity_error: float = Field(description="standard error of the perplexity")
    characters_per_token: float | None = Field(default=None, description="of the text; None for images and arrays")
    bits_per_character: float | None = None
    bits_per_character_error: float | None = None
    bits_per_dimension: float | None = Field(default=None, description="of images: a token is a dimension")
    bits_per_dimension_error: float | None = None

    @property
    def name(self) -> str:
        parts = [super().name]
        if self.data_set is not None:
            parts.append(f"set-{quote(self.data_set, safe='')}")
        if self.zero_shot is not None:
            overlap = "" if self.zero_shot.stride is None else f"-stride-{self.zero_shot.stride}"
            parts.append(f"{self.zero_shot.data_set}-{self.zero_shot.protocol}{overlap}")
        if self.estimator != "mask_count":
            parts.append(self.estimator.replace(",", "").replace(" = ", "").replace(" ", "-").lower())
        return "-".join(parts)

    def headline(self) -> str:
        bits = f"{self.bits_per_token:.4f} +- {self.standard_error:.4f} bits per"
        number = f"At most {bits} token"
        if self.bits_per_dimension is not None:
            number = f"At most {bits} dimension"
        elif self.zero_shot is not None or (self.characters_per_token or 1) != 1:
            number = f"Perplexity at most {self.perplexity:.2f} +- {self.perplexity_error:.2f}, {bits} token"
        elif self.bits_per_character is not None:
            number = f"At most {bits} character"
        how = f"{self.estimator}, {self.rows:,} rows, {self.draws} draws each"
        if self.data_set is not None:
            how = f"{self.data_set}, {how}"
        if self.zero_shot is not None:
            how = f"{self.zero_shot.data_set} {self.split}, protocol {self.zero_shot.protocol}, {how}"
        return f"{number} ({how})."


class Written(Protocol):
    """What can be written as a report."""

    @property
    def name(self) -> str: ...

    def markdown(self) -> str: ...

    def model_dump_json(self, *, indent: int | None = None) -> str: ...


def write(report: Written, folder: str | Path) -> tuple[Path, Path]:
    """Put a report into `folder` (made if need be) as NAME.json and NAME.md; returns both paths."""
    stem = Path(folder) / report.name
    json_file, markdown_file = stem.with_name(f"{stem.name}.json"), stem.with_name(f"{stem.name}.md")
    write_atomically(json_file, (report.model_dump_json(indent=2) + "\n").encode())
    write_atomically(markdown_file, report.markdown().encode())
    return json_file, markdown_file


def facts_table(tree: dict[str, Any]) -> str:
    """All facts of a report as a table in Markdown, those of its parts behind its own."""
    parts = [part for part in tree.values() if isinstance(part, dict)]
    facts = {name: value for part in (tree, *parts) for name, value in part.items() if not isinstance(value, dict)}
    rows = "\n".join(f"| {name.replace('_', ' ')} | {_show(value)} |" for name, value in facts.items())
    return f"| | |\n|---|---|\n{rows}"


def _show(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else str(value)
