"""Running a suite on a model: everything is checked and opened first, then measured, then put into the table at once.

The evaluation's id is a digest of the weights, the suite and the data: asking for the same again finds it in the table.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

from md4.errors import UserError
from orchestration import evaluation, quality, results
from orchestration.evaluation import Data, Evaluation, Subject, ZeroShot, open_subject, sets_of
from orchestration.results import Contributions, Result
from orchestration.run_mirror import deliver
from orchestration.runs import Loaded
from orchestration.suites import figures, prompts
from orchestration.suites.figures import Figure
from orchestration.suites.prompts import Filling
from orchestration.suites.reports import SuiteReport
from orchestration.suites.settings import Likelihood, Prompts, Quality, Suite, ZeroShotSet
from pipelines.evaluate import fingerprint
from pipelines.reports import Provenance, write
from pipelines.shards import ShardSet
from pipelines.storage import Folder, Place

Say = Callable[[str], None]


@dataclass(frozen=True)
class Options:
    """How a suite is run; nothing here changes its figures."""

    step: int | None = None  # of a run's checkpoint; the newest if None
    ema: bool = True
    again: bool = False  # measure what is in the table already
    workers: int = 0
    batch_size: int = 64
    name: str | None = None  # of the model in the table; what its folder says if None


@dataclass(frozen=True)
class Outcome:
    """What became of it."""

    attempt: str
    results: list[Result]
    report: SuiteReport | None  # None: it was in the table already

    @property
    def fresh(self) -> bool:
        """Was it measured just now?"""
        return self.report is not None


def run(path: Place, suite: Suite, table: Place, options: Options = Options(), say: Say = print) -> Outcome:
    """Measure all of `suite` on the model of a run, of an exported folder or of a version in the registry.

    Reports are written into reports/ there, as the single commands do, and one of the whole suite. UserError for a
    folder that holds no model, and for anything that the suite asks for and the model or its data can't give.
    """
    began = perf_counter()
    subject = open_subject(path, options.ema, say, options.step)
    name, version = identity(path, subject, options.name)
    opener = _Opener(path, subject, options, say)
    parts = opener.parts(suite)
    fingerprints = [one for part in parts for one in part.fingerprints]
    content = suite.content()
    asked = [content, name, version, subject.step, subject.provenance.weights_hash, fingerprints]
    attempt = results.digest(asked)
    if results.has(table, attempt):
        if not options.again:
            say(f"{suite.name}: {name} was measured with these weights, settings and data already ({attempt})")
            return Outcome(attempt, results.read(table, attempt=attempt), None)
        attempt = _next(table, attempt)
    found = [figure for part in parts for figure in part.measure()]
    created = datetime.now(UTC)
    rows = [
        Result(
            created=created,
            suite=suite.name,
            model=name,
            version=version,
            step=subject.step,
            weights_hash=subject.provenance.weights_hash or "unknown",
            metric=one.metric,
            value=one.value,
            standard_error=one.error,
            unit=one.unit,
            better=one.better,
            samples=one.samples,
            data_fingerprint=one.fingerprint,
            settings=one.settings,
            report=one.report,
            attempt=attempt,
        )
        for one in found
    ]
    report = SuiteReport(
        created=created,
        suite=suite.name,
        model=Provenance(run=name, step=subject.step, weights_hash=subject.provenance.weights_hash),
        version=version,
        attempt=attempt,
        seconds=perf_counter() - began,
        asked=content,
        results=rows,
        fillings=opener.fillings,
    )
    files = deliver(path, "reports", partial(write, report))
    whole = files[0]
    rows = [one if one.report else one.model_copy(update={"report": whole}) for one in rows]
    kept: dict[str, Contributions] = {one.metric: one.rows for one in found if one.rows is not None}
    results.append(table, rows, kept)
    say(f"written: {files[1]}, {len(rows)} figures to {Folder(table)}")
    return Outcome(attempt, rows, report)


def identity(path: Place, subject: Subject, name: str | None = None) -> tuple[str, int | None]:
    """The name of a model in the table, and its version if the folder is one of a registry (MODEL/versions/00001)."""
    whole = Path(Folder(path).absolute().url)
    if whole.parent.name == "versions" and whole.name.isdecimal():
        return name or whole.parent.parent.name, int(whole.name)
    return name or subject.provenance.run or whole.name, None


def _next(table: Place, attempt: str) -> str:
    """The first id of a repetition that isn't there yet."""
    number = 2
    while results.has(table, f"{attempt}-{number}"):
        number += 1
    return f"{attempt}-{number}"


@dataclass(frozen=True)
class _Part:
    """A part of a suite whose data are open and whose settings are checked."""

    names: list[str]  # of its figures; of several below one name, that name
    fingerprints: list[str | None]  # of its data
    measure: Callable[[], Iterable[Figure]]


def _kind(data: Data) -> str:
    """What a set that has no other name is called."""
    return data.manifest.source.kind if isinstance(data, ShardSet) else data.name


@dataclass(frozen=True)
class _Opener:
    """Makes parts for one model."""

    path: Place
    subject: Subject
    options: Options
    say: Say
    fillings: list[Filling] = field(default_factory=list)  # of the prompts that were measured

    def parts(self, suite: Suite) -> list[_Part]:
        """All of them; UserError that names the one that can't be had."""
        kinds: dict[str, Callable[[Any], _Part]] = {
            "likelihood": self.likelihood,
            "zero_shot": self.zero_shot,
            "quality": self.quality,
            "prompts": self.prompts,
        }
        found: list[_Part] = []
        owners: dict[str, str] = {}
        for kind, make in kinds.items():
            for place, one in enumerate(getattr(suite, kind)):
                try:
                    found.append(make(one))
                except UserError as error:
                    raise UserError(f"suite {suite.name}, {kind}.{place}: {error}") from None
                for name in found[-1].names:
                    if name in owners:
                        raise UserError(
                            f"suite {suite.name}: {owners[name]} and {kind}.{place} would both give {name}; tell them "
                            "apart by `name: ...` in one of them"
                        )
                    owners[name] = f"{kind}.{place}"
        return found

    def likelihood(self, one: Likelihood) -> _Part:
        wanted = self._estimate(one, data=one.data, split=one.split, sets=one.set)
        sets = sets_of(self.subject, wanted)
        own = one.name or (Folder(one.data).name if one.data else None)
        named = [(own if name is None else name if one.name is None else f"{one.name}-{name}", x) for name, x in sets]
        called = [name or _kind(data) for name, data in named]

        def measure() -> Iterator[Figure]:
            found = evaluation.measure(self.path, self.subject, wanted, named, self.say)
            for name, one in zip(called, found, strict=True):
                yield figures.of_likelihood(name, one)

        names = [figures.bound(name, one.split) for name in called]
        return _Part(names, [fingerprint(data) for _, data in named], measure)

    def zero_shot(self, one: ZeroShotSet) -> _Part:
        foreign = ZeroShot((one.data_set,), one.protocol, one.stride, one.separate, one.tokenizer)
        wanted = self._estimate(one, data=one.data, split=one.split, zero_shot=foreign)
        sets = [(one.name, data) for _, data in sets_of(self.subject, wanted)]

        def measure() -> Iterator[Figure]:
            for found in evaluation.measure(self.path, self.subject, wanted, sets, self.say):
                yield figures.of_zero_shot(one.name, found)

        names = [figures.perplexity(one.name or one.data_set, one.protocol)]
        return _Part(names, [fingerprint(data) for _, data in sets], measure)

    def quality(self, one: Quality) -> _Part:
        facts = one.model_dump(exclude={"name"})
        for key in ("data", "features"):
            facts[key] = facts[key] and Path(facts[key])
        wanted = quality.Wanted(**facts, batch_size=self.options.batch_size, ema=self.options.ema)
        plan = quality.Plan.of(self._to_sample(), wanted, self.say)

        def measure() -> Iterator[Figure]:
            for found in quality.measure(self.path, plan, self.say):
                yield from figures.of_quality(one.name, found)

        return _Part([figures.below("quality", one.name)], [plan.real.fingerprint], measure)

    def prompts(self, one: Prompts) -> _Part:
        plan = prompts.Plan.of(self._to_sample(), one)

        def measure() -> Iterator[Figure]:
            found = plan.fill(self.options.batch_size, self.say)
            self.fillings.extend(found.fillings)
            yield from figures.of_prompts(one.name, found)

        return _Part([figures.below("prompts", one.name)], [], measure)

    def _estimate(self, one: Likelihood | ZeroShotSet, **of: Any) -> Evaluation:
        how = {name: getattr(one, name) for name in ("rows", "draws", "estimator", "timesteps", "seed")}
        options = self.options
        return Evaluation(**how, **of, batch_size=options.batch_size, workers=options.workers, ema=options.ema)

    def _to_sample(self) -> Loaded:
        assert self.subject.to_sample is not None
        return self.subject.to_sample()
