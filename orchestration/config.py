"""One tree of validated settings: preset + file + `key=value` overrides (contract C5).

Each part is declared beside the code that it configures; this file composes the parts, checks what crosses them, and
turns a mistake into one message that names the key, the value, what is allowed and the nearest valid key.
"""

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

import md4
from md4.errors import UserError
from md4.model import ModelConfig
from md4.networks.images import GROUPS
from md4.samplers import SamplingConfig
from md4.samplers.settings import OWN_SETTINGS
from orchestration.optimizer import OptimizerConfig
from orchestration.serving.config import ServingConfig
from pipelines.config import PIXELS, DataConfig
from pipelines.storage import Folder, local
from pipelines.vocabularies import vocabulary

PRESETS = Path(md4.__file__).parent / "presets"
NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"  # of a run, and of what runs are named after


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TrainConfig(_Part):
    """How the run is laid out over time and workers."""

    steps: int = Field(ge=1, description="optimizer updates")
    batch_size: int = Field(ge=1, description="rows of a global batch, whatever the number of workers")
    slices: int = Field(8, ge=1, description="pieces a global batch is dealt out in; the most workers a run can have")
    micro_batch: int | None = Field(
        None, ge=1, description="rows a worker takes through the network at once (the rest accumulates); null = all"
    )
    workers: int | str = Field(
        1, description="Ray Train workers, at most slices: a number, or least..most, such as 2..8, as the cluster has"
    )
    zero_stage: Literal[0, 1, 2, 3] = Field(2, description="DeepSpeed ZeRO stage")
    offload: bool = Field(
        False, description="master weights, moments and moving average in the CPU's memory, updated there; ZeRO 1 to 3"
    )
    precision: Literal["auto", "bfloat16", "float32"] = Field(
        "auto", description="of the network's products; weights, schedules, logits and loss stay float32"
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="auto = cuda where the driver or its cluster has a GPU"
    )
    threads: int = Field(1, ge=1, description="CPU threads of a worker")
    log_every: int = Field(10, ge=1, description="steps between two lines of metrics")
    max_restarts: int = Field(3, ge=0, description="times a failed worker group is started again from a checkpoint")
    patience: float = Field(
        45, ge=0, description="seconds without progress of any worker after which the group is started anew; 0 = never"
    )
    spare: bool = Field(
        True,
        description="keep a process beside each worker that has everything imported and takes its place when it dies: "
        "about 400 MB of memory each, for a recovery in half the time",
    )
    spike: float = Field(
        10, ge=0, description="a loss above so many times its running median is a spike; 0 = only what is not finite"
    )
    on_spike: Literal["stop", "skip"] = Field(
        "stop",
        description="what a step comes to whose loss is a spike, or whose loss or gradient is not finite: stop = the "
        "run ends before the update, skip = the update is left out; either way reports/batch-STEP.json has the batch",
    )
    skips: int = Field(10, ge=1, description="skipped steps in a row after which a run with on_spike=skip stops, too")
    start_from: str | None = Field(
        None,
        description="a run, or the folder of one of its checkpoints, whose weights, average, moments and place in the "
        "data a new run goes on with; optimizer, dropout, schedule and times may be others",
    )
    peak_tflops: float | None = Field(
        None, gt=0, description="of one worker's device, for MFU, at the precision used; null = by the GPU's name"
    )

    @model_validator(mode="after")
    def _spike_is_above_the_median(self) -> "TrainConfig":
        if 0 < self.spike <= 1:
            raise ValueError(f"spike={self.spike:g} must be above 1, or 0 for none")
        return self

    @model_validator(mode="after")
    def _workers_make_sense(self) -> "TrainConfig":
        found = re.fullmatch(r"(\d{1,6})(?:\.\.(\d{1,6}))?", str(self.workers))
        if found is None or not 1 <= self.least_workers <= self.most_workers:
            raise ValueError(f"workers={self.workers!r} must be a number from 1 on, or least..most, such as 2..8")
        return self

    @model_validator(mode="after")
    def _offload_has_a_stage(self) -> "TrainConfig":
        if self.offload and not self.zero_stage:
            raise ValueError("offload=True needs zero_stage 1, 2 or 3: without ZeRO the optimizer works on the network")
        return self

    @property
    def least_workers(self) -> int:
        return int(str(self.workers).partition("..")[0])

    @property
    def most_workers(self) -> int:
        return int(str(self.workers).rpartition("..")[2])


class EvaluationConfig(_Part):
    """The evaluation during training and of `md4 evaluate`."""

    every: int = Field(500, ge=0, description="steps between evaluations during training; 0 = never")
    rows: int = Field(256, ge=1, description="validation rows used during training (the same ones each time)")
    draws: int = Field(4, ge=1, description="Monte Carlo draws a row, stratified")
    estimator: Literal["mask_count", "continuous"] = Field("mask_count", description="of the negative ELBO")
    suite: str | None = Field(
        None,
        description="run on checkpoints beside the training, which doesn't wait for it: a .yaml file, or the name of a "
        "suite of the package",
    )
    suite_every: int = Field(
        0, ge=0, description="the first checkpoint after every so many steps, and the last; 0 = only the last"
    )
    suite_cpus: float = Field(1, gt=0, description="of the task that runs it, beside those of the workers")
    suite_gpus: float = Field(0, ge=0, description="likewise; 0 = it works on CPUs")
    suite_pending: Literal["newest", "all"] = Field(
        "newest", description="which of the checkpoints are measured that came while an older one was"
    )
    suite_seconds: float = Field(
        3600, gt=0, description="that one may take, and that the end of the run waits for those that are pending"
    )
    suite_results: str | None = Field(
        None, description="table that its figures go to: a folder or s3://...; null = MD4_RESULTS, else results/"
    )

    @model_validator(mode="after")
    def _suite_is_named(self) -> "EvaluationConfig":
        for name, field in type(self).model_fields.items():
            if self.suite is None and name.startswith("suite_") and getattr(self, name) != field.default:
                raise ValueError(f"{name}={getattr(self, name)} is about a suite: name one by evaluation.suite=FILE")
        return self


class CheckpointConfig(_Part):
    """When checkpoints are written, where, and which of them stay."""

    every: int = Field(500, ge=0, description="steps between checkpoints; 0 = by time, or only at the end")
    seconds: float = Field(0, ge=0, description="a checkpoint, too, when this much time has passed since one; 0 = no")
    directory: str | None = Field(
        None, description="folder or s3://bucket/prefix, below which the run's name is put; null = the run's own folder"
    )
    keep: int = Field(3, ge=1, description="newest checkpoints kept")
    keep_every: int = Field(0, ge=0, description="those of every so many steps are kept, too; 0 = none")
    keep_best: int = Field(0, ge=0, description="and so many of those with the smallest validation bound")
    failures: int = Field(3, ge=1, description="checkpoints in a row that could not be written, after which a run ends")


class TrackingConfig(_Part):
    """Where metrics go beside `metrics.jsonl`."""

    tensorboard: bool = True
    wandb: Literal["disabled", "offline", "online"] = "disabled"
    project: str = Field("md4", description="W&B project")
    prometheus_port: int = Field(
        0,
        ge=0,
        le=65535,
        description="HTTP port of the first worker's machine with the figures for Prometheus; 0 = none",
    )


class CardConfig(_Part):
    """What the model card (`md4 card`) says that no measurement can tell."""

    about: str | None = Field(None, description="what the model is for, in a sentence or two")
    weights_licence: str | None = Field(None, description="of the weights, best as SPDX has it: apache-2.0")
    data_licence: str | None = Field(None, description="of the training data")
    limits: tuple[str, ...] = Field((), description="known failures, a sentence each, beside those that are measured")


class Config(_Part):
    """The whole tree of a run."""

    name: str = Field(pattern=NAME, description="the run's name, and folder below `runs`")
    runs: str = Field("runs", description="folder of the run folders, or s3://bucket/prefix")
    seed: int = Field(42, ge=0, lt=2**63)
    data: DataConfig
    model: ModelConfig
    optimizer: OptimizerConfig = OptimizerConfig.model_validate({})
    train: TrainConfig
    evaluation: EvaluationConfig = EvaluationConfig.model_validate({})
    checkpoint: CheckpointConfig = CheckpointConfig.model_validate({})
    tracking: TrackingConfig = TrackingConfig.model_validate({})
    sampling: SamplingConfig = SamplingConfig.model_validate({})
    serving: ServingConfig = ServingConfig.model_validate({})
    card: CardConfig = CardConfig.model_validate({})

    @field_validator("sampling")
    @classmethod
    def _chosen(cls, sampling: SamplingConfig) -> SamplingConfig:
        """A stored configuration states every setting: those that are defaults were not chosen (`Saved.fill`)."""
        return sampling.changed({})

    @field_validator("runs")
    @classmethod
    def _runs_are_a_place(cls, runs: str) -> str:
        try:
            Folder(runs)
        except UserError as error:
            raise ValueError(str(error)) from None
        return runs

    @model_validator(mode="before")
    @classmethod
    def _model_follows_data(cls, tree: Any) -> Any:
        """The vocabulary's size, the row length and the shape of images are stated once, under `data`."""
        if not isinstance(tree, dict) or not all(isinstance(tree.get(part), dict) for part in ("data", "model")):
            return tree
        default = {name: DataConfig.model_fields[name].default for name in ("length", "vocabulary")}
        data = default | DataConfig.filled_in(tree["data"])
        implied = {"length": data["length"]}
        if data["vocabulary"] == PIXELS:
            implied["vocab_size"] = data.get("levels")
            network = tree["model"].get("network")
            if isinstance(network, dict) and network.get("kind") in ("unet", "uvit"):
                implied["shape"] = data.get("shape")
        else:
            words = vocabulary(data["vocabulary"])
            implied["vocab_size"] = words.size
            if tree["model"].get("attention") == "document":
                implied["end_of_text"] = words.end_of_text
        return {**tree, "model": implied | tree["model"]}

    @model_validator(mode="after")
    def _parts_agree(self) -> "Config":
        train, problems = self.train, []
        if train.batch_size % train.slices:
            problems.append(f"train.batch_size={train.batch_size} must be a multiple of train.slices={train.slices}")
        if train.most_workers > train.slices:
            problems.append(f"train.workers={train.workers} is more than train.slices={train.slices} can feed")
        if self.model.length != self.data.length:
            problems.append(f"model.length={self.model.length} must equal data.length={self.data.length}")
        size, end = self.data.tokens.size, self.data.tokens.end_of_text
        if self.model.attention == "document" and self.model.end_of_text != end:
            problems.append(f"model.end_of_text={self.model.end_of_text}: that of {self.data.vocabulary} is {end}")
        if self.model.vocab_size != size:
            problems.append(f"model.vocab_size={self.model.vocab_size}: {self.data.vocabulary} has {size} tokens")
        if self.model.shape is not None and self.model.shape != self.data.shape:
            shape = None if self.data.shape is None else list(self.data.shape)
            problems.append(f"model.shape={list(self.model.shape)} must equal data.shape={shape}")
        if self.model.objective == "genmd4" and self.evaluation.estimator != "continuous":
            problems.append(f"evaluation.estimator={self.evaluation.estimator}: genmd4 has continuous alone")
        if self.model.objective != "genmd4" and self.optimizer.schedule_weight_decay:
            problems.append(
                f"optimizer.schedule_weight_decay={self.optimizer.schedule_weight_decay}: "
                f"model.objective={self.model.objective} has no learned schedule, it must be 0"
            )
        try:
            self.sampling.resolve(self.model.objective)
        except UserError as error:  # begins with the setting
            problems.append(f"sampling.{error}")
        network = self.model.network
        if self.model.classes and network.kind == "unet" and network.feature_dim == GROUPS:
            # One channel in a group: normalising it takes away whatever is added to all of its pixels.
            problems.append(
                f"model.classes={self.model.classes} would not reach the pixels: with "
                f"model.network.feature_dim={GROUPS} the norms remove what classes add; take {2 * GROUPS} or more"
            )
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @property
    def place(self) -> Folder:
        """The run's folder."""
        return Folder(self.runs) / self.name

    @property
    def directory(self) -> Path:
        """The run's folder, if it is one of this machine; UserError for one in S3."""
        return local(self.place)

    @property
    def checkpoints(self) -> Folder:
        """Where the run's checkpoints are."""
        if self.checkpoint.directory is None:
            return self.place / "checkpoints"
        return Folder(self.checkpoint.directory) / self.name

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


class _Loader(yaml.SafeLoader):
    """YAML with the scalars of version 1.2: `1e-4` is a number, `no` a word, and a key may stand only once."""

    yaml_implicit_resolvers: dict = {}  # noqa: RUF012 - PyYAML's own registry, filled below

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = sorted({str(key) for key in keys if keys.count(key) > 1})
        if twice:
            raise yaml.constructor.ConstructorError(None, None, f"key {twice[0]!r} stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


for _tag, _pattern, _first in [
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("int", r"[-+]?[0-9]+|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
]:
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), list(_first))


def read_yaml(text: str, origin: str) -> Any:
    """Parse YAML text; UserError with `origin`, line and column when it can't be read."""
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise UserError(f"{origin}{place}: not valid YAML ({getattr(error, 'problem', error)})") from None


def preset_names() -> list[str]:
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def _read_tree(path: Path) -> dict:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"can't read configuration {path}: {error}") from None
    tree = read_yaml(text, str(path))
    if not isinstance(tree, dict):
        raise UserError(f"{path}: a configuration is a mapping of keys to values, found {type(tree).__name__}")
    return tree


def _find_preset(name: str) -> Path:
    if name in preset_names():
        return PRESETS / f"{name}.yaml"
    if Path(name).suffix in {".yaml", ".yml"}:
        if Path(name).is_file():
            return Path(name)
        raise UserError(f"no such configuration file: {name}")
    near = difflib.get_close_matches(name, preset_names(), 1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise UserError(f"unknown preset {name!r}; {hint}presets: {', '.join(preset_names())}; or the path of a .yaml file")


def _merge(base: dict, over: Mapping) -> dict:
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        merged[key] = _merge(below, value) if isinstance(below, dict) and isinstance(value, Mapping) else value
    return merged


def _lay(base: dict, over: Mapping) -> dict:
    """`over` on top of `base`; where it changes objective or sampler, the settings of the sampler below go with it."""
    merged = _merge(base, over)
    below, above = base.get("sampling"), over.get("sampling")
    if isinstance(below, dict) and _chosen(merged) != _chosen(base):
        kept = {key: value for key, value in below.items() if key not in OWN_SETTINGS}
        merged["sampling"] = _merge(kept, above) if isinstance(above, Mapping) else kept
    return merged


def _chosen(tree: Mapping) -> tuple:
    """What decides which settings of its own a sampler has: objective and sampler."""
    model, sampling = (part if isinstance(part, Mapping) else {} for part in (tree.get("model"), tree.get("sampling")))
    return model.get("objective", "md4"), sampling.get("sampler")


def _override(tree: dict, assignment: str) -> dict:
    key, equals, text = assignment.partition("=")
    if not equals or not key or not all(key.split(".")):
        raise UserError(f"override {assignment!r} is not of the form key=value, for instance train.steps=100")
    value: Any = read_yaml(text, f"value of {key}")
    for part in reversed(key.split(".")):
        value = {part: value}
    return _merge(tree, value)


def load(preset: str, overrides: Sequence[str] = (), file: str | Path | None = None) -> Config:
    """Resolve a configuration: preset (a name, or a .yaml file), then `file`, then `key=value` overrides.

    Raises:
        UserError: naming every wrong key, its value, what is allowed and the nearest valid key.
    """
    return validate(load_tree(preset, overrides, file))


def load_tree(preset: str, overrides: Sequence[str] = (), file: str | Path | None = None) -> dict[str, Any]:
    """What `load` validates: the settings that were given, as a plain tree. What follows from them is not in it."""
    path = _find_preset(preset)
    tree = {"name": path.stem, **_read_tree(path)}
    if file:
        tree = _lay(tree, _read_tree(Path(file)))
    return _lay(tree, read_assignments(overrides))


def lay(tree: dict[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """A plain tree with values by dotted key laid over it."""
    over: dict[str, Any] = {}
    for key, value in values.items():
        for part in reversed(key.split(".")):
            value = {part: value}
        over = _merge(over, value)
    return _lay(tree, over)


def read_assignments(assignments: Sequence[str]) -> dict[str, Any]:
    """`key=value` with dotted keys, values being YAML, as a tree. Raises `UserError` for what is not of this form."""
    assigned: dict = {}
    for assignment in assignments:
        assigned = _override(assigned, assignment)
    return assigned


def validate(tree: Any) -> Config:
    """A Config from a plain tree; UserError with one line for each mistake."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise UserError("\n".join(_describe(problem) for problem in error.errors())) from None


def serving_config(tree: Mapping[str, Any]) -> ServingConfig:
    """Settings of a service whose model has no configuration of a run that says them; UserError as of `validate`."""
    try:
        return ServingConfig.model_validate(tree)
    except ValidationError as error:
        problems = ({**problem, "loc": ("serving", *problem["loc"])} for problem in error.errors())
        raise UserError("\n".join(map(_describe, problems))) from None


def override(config: Config, changes: Mapping[str, Any]) -> Config:
    """`config` with the settings of a tree laid over it; UserError as of `validate`."""
    return validate(_lay(config.model_dump(), changes))


def keys(model: type[BaseModel] = Config, prefix: str = "") -> Iterator[str]:
    """Every valid key, dotted."""
    for name, field in model.model_fields.items():
        choices = get_args(field.annotation) or (field.annotation,)
        parts = [part for part in choices if isinstance(part, type) and issubclass(part, BaseModel)]
        below = [key for part in parts for key in keys(part, f"{prefix}{name}.")]  # of a network: those of each kind
        yield from dict.fromkeys(below or [f"{prefix}{name}"])


def _describe(problem: Any) -> str:
    where, value = problem["loc"], problem["input"]
    kind = where[2] if where[:2] == ("model", "network") and len(where) > 3 else None
    key = ".".join(str(part) for part in (where if kind is None else where[:2] + where[3:]))  # the kind is no key
    if problem["type"] == "union_tag_invalid":
        return f"{key}.kind={problem['ctx']['tag']!r}: must be one of {problem['ctx']['expected_tags']}"
    if problem["type"] == "extra_forbidden":
        if kind and key in keys():
            return f"{key}: a network of kind {kind} has no such setting"
        near = difflib.get_close_matches(key, list(keys()), 1) or [
            full for full in keys() if full.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]
        ]
        return f"unknown key {key!r}" + (
            f"; did you mean {near[0]!r}?" if near else "; see `md4 config PRESET` for all keys"
        )
    if problem["type"] == "missing":
        return f"key {key!r} is missing and has no default"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error" and isinstance(value, dict):  # a whole part, whose settings disagree
        return f"{key}: {message}" if key else message
    return f"{key}={value!r}: {message[0].lower()}{message[1:]}"
