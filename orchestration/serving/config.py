"""What the sampling service can be told. Apart from `app`, so that reading a configuration doesn't import Ray Serve."""

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, model_validator

_MOVING_S = 5.0


class EngineConfig(BaseModel):
    """How rows share the network."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_rows: int | None = Field(
        default=None,
        ge=1,
        description="rows of the model's own length that a network call takes at most; null = measured at the start",
    )
    max_waiting_rows: int = Field(
        default=1024, ge=1, description="rows that may wait beside those that a call takes; then requests are refused"
    )
    slice_calls: int = Field(
        default=32, ge=1, description="network calls after which a row makes room if others wait for its place"
    )


class CanaryConfig(BaseModel):
    """When a version that is tried with a share of the traffic gets all of it, and when none (`serving.canary`)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    min_requests: int = Field(
        default=200, ge=1, description="answers of the candidate after which it takes the name, if nothing is wrong"
    )
    max_seconds: float | None = Field(
        default=None,
        gt=0,
        description="time after which one with fewer, or with `texts` not scored, is dropped; null = it goes on",
    )
    error_alpha: float = Field(
        default=0.01, gt=0, lt=0.5, description="chance that one is dropped that fails no more often than the present"
    )
    texts: str | None = Field(
        default=None,
        description="file (here or s3://...) of held-out texts, one a line, or of images, levels with spaces between, "
        "which both versions score; null = only the entropy of their samples is compared",
    )
    max_texts: int = Field(default=64, ge=2, description="of the file, its first ones")
    draws: int = Field(default=16, ge=1, le=256, description="for each text")
    label: int | None = Field(default=None, ge=0, description="class of the texts, of class-conditional models")
    quality_margin: float = Field(
        default=0.02, ge=0, description="bits per token that the candidate's bound may lie above the present version's"
    )
    entropy_margin: float | None = Field(
        default=0.25, ge=0, description="bits that the entropy within samples may differ; null = it is not looked at"
    )
    quality_alpha: float = Field(
        default=0.01, gt=0, lt=0.5, description="chance that one whose difference is the margin is dropped, of each"
    )


class ServingConfig(BaseModel):
    """How models are served."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    host: str = Field(default="127.0.0.1", description="address to listen at; 0.0.0.0 = all of the machine's")
    port: int = Field(default=8000, ge=0, le=65535, description="0 = any free one")
    engine: EngineConfig = EngineConfig.model_validate({})
    replicas: int = Field(default=1, ge=1, description="processes that hold the models; the most, if they follow load")
    min_replicas: int | None = Field(
        default=None, ge=0, description="the fewest, to which they shrink without load, 0 included; null = replicas"
    )
    requests_per_replica: float = Field(
        default=16.0, gt=0, description="requests under way in each, above which there are to be more replicas"
    )
    grow_s: float = Field(default=5.0, ge=0, description="time of higher load after which replicas are added")
    shrink_s: float = Field(default=300.0, ge=0, description="time of lower load after which replicas are ended")
    num_cpus: float = Field(default=1.0, gt=0, description="Ray CPUs a replica reserves, and its threads")
    num_gpus: float = Field(default=0.0, ge=0, description="GPUs a replica reserves; above 0 its models go there")
    models_per_replica: int | None = Field(
        default=None, ge=1, description="models in memory at once, those of the last requests; null = all"
    )
    refresh_s: float | None = Field(
        default=None,
        ge=0,
        description="time between looks for newer weights; 0 = never by itself; null = 5 of models that are a name in "
        "the registry, or its latest version, 0 of others",
    )
    canary: CanaryConfig = CanaryConfig.model_validate({})
    gateways: int = Field(default=1, ge=1, description="processes that speak HTTP")
    max_ongoing: int = Field(default=256, ge=1, description="requests in a replica; others wait outside")
    max_queued: int = Field(default=128, ge=0, description="requests that may wait outside; then 503")
    max_count: int = Field(default=64, ge=1, description="samples that one request may ask for")
    max_length: int = Field(default=4096, ge=1, description="tokens of a text, where the model's own length is less")
    max_body_bytes: int = Field(default=1 << 20, ge=1, description="of a request; 413 beyond")
    max_steps: int = Field(default=10_000, ge=1, description="steps that a request may ask for")
    max_draws: int = Field(default=256, ge=1, description="draws for each text of a request to score")
    timeout_s: float = Field(default=300.0, gt=0, description="time a request may take, waiting included; then 504")
    keys: Path | None = Field(default=None, description="file of 'name: sha256 of the key' lines; null = open to all")
    requests_per_minute: int | None = Field(default=None, ge=1, description="of one key, or address without keys")
    tokens_per_minute: int | None = Field(default=None, ge=1, description="asked for by one key or address")
    rate_storage: str = Field(
        default="async+memory://",
        description="where rates are counted, a URI of the library limits: async+redis://HOST for several servers",
    )
    access_log: Path | None = Field(
        default=None, description="file for the log of requests; null = standard error, which Ray keeps in its logs"
    )
    log_prompts: bool = Field(default=False, description="write prompts into the log of requests")

    @model_validator(mode="after")
    def _at_most(self) -> "ServingConfig":
        if self.min_replicas is not None and self.min_replicas > self.replicas:
            raise ValueError(f"min_replicas={self.min_replicas} is above replicas={self.replicas}")
        return self

    @property
    def fewest(self) -> int:
        """Replicas that are always there."""
        return self.replicas if self.min_replicas is None else self.min_replicas

    def look_s(self, moves: bool) -> float:
        """Time between looks for newer weights, 0 = never. moves: a name in the registry, or its latest version."""
        return (_MOVING_S if moves else 0.0) if self.refresh_s is None else self.refresh_s

    def placed(self) -> "ServingConfig":
        """The same with absolute paths, for processes that run in other folders."""
        files = {name: getattr(self, name) for name in ("keys", "access_log")}
        changes: dict[str, object] = {name: file.resolve() for name, file in files.items() if file is not None}
        if (texts := self.canary.texts) is not None and "://" not in texts:
            changes["canary"] = self.canary.model_copy(update={"texts": str(Path(texts).resolve())})
        return self.model_copy(update=changes)
