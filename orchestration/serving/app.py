"""The sampling service: one Ray Serve deployment that speaks HTTP and samples concurrent requests together.

    POST /v1/samples   samples of a prompt        GET /v1/model   what is served
    GET  /healthz      200 once the model is in   GET /docs       the interface, described

Requests that arrive within `batch_wait_ms` of each other share their network calls. The rows of a batch don't touch
each other, so an answer is a function of the request and its seed; but a batch ends as one: a short request waits for
the longest beside it.
"""

import asyncio
import logging
import socket
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import fastapi
import torch
from pydantic import BaseModel, Field
from ray import serve

from md4.errors import UserError
from md4.samplers import Job, SamplingConfig, wording
from orchestration import sampling
from orchestration.sampling import Answer, ModelFacts, Request
from orchestration.serving.body_limit import LimitBody
from orchestration.serving.config import ServingConfig
from orchestration.serving.errors import Problem, handle
from orchestration.serving.messages import Drawn, SampleRequest, SampleResponse, Timings

if TYPE_CHECKING:
    from orchestration.runs import Loaded

NAME = "md4"  # of the Serve application
MAX_BODY_BYTES = 1 << 18  # a prompt of some thousand characters, however it is escaped, is far smaller
_RETRY_AFTER_S = 1


api = fastapi.FastAPI(
    title="md4",
    version=version("md4"),
    description="Samples of a masked diffusion model: free, of a given beginning, or filled into the holes of a text.",
)


handle(api)
api.add_middleware(LimitBody, limit=MAX_BODY_BYTES)


class BatchedResponse(SampleResponse):
    """Samples, and how they came about."""

    batch_requests: int = Field(description="requests in the batch, this one included")


class ModelOfRun(ModelFacts):
    """What is served, and with which settings if a request names none."""

    run: str
    vocabulary: str
    length: int
    sampling: SamplingConfig
    version: str = Field(description="of the program")


class Ready(BaseModel):
    status: str
    hash: str


_PROBLEMS: dict[int | str, dict[str, Any]] = {
    413: {"model": Problem, "description": "The body is too long."},
    422: {"model": Problem, "description": "The request is malformed or can't be sampled."},
    500: {"model": Problem, "description": "The model answered with NaN."},
    503: {"description": "Too many requests are waiting. Try again after the time in Retry-After."},
}


@dataclass
class _Item:
    """A request on its way through a batch."""

    request: Request
    job: Job
    arrived: float


@dataclass
class _Done:
    """What the batch gives back for it."""

    answer: Answer | UserError
    queue_s: float
    sample_s: float
    batch_requests: int


@serve.ingress(api)
class SamplingService:
    """One replica: the model, and the HTTP routes."""

    def __init__(self, load: "Callable[[], Loaded]", settings: SamplingConfig | None, config: ServingConfig) -> None:
        # Two OpenMP threads beside Ray's processes on a busy machine wait for each other at every barrier.
        torch.set_num_threads(1)
        self.loaded = load()
        if config.num_gpus > 0:
            self.loaded.model.to("cuda")
        self.settings = settings or self.loaded.config.sampling
        self.config = config
        self.facts = ModelFacts(hash=self.loaded.weights_hash, step=self.loaded.step)
        self._sample.set_max_batch_size(config.max_batch_size)  # type: ignore[attr-defined]
        self._sample.set_batch_wait_timeout_s(config.batch_wait_ms / 1e3)  # type: ignore[attr-defined]

    @api.get("/healthz", responses={503: {"description": "No replica is ready."}})
    async def health(self) -> Ready:
        """Answers once the model is loaded."""
        return Ready(status="ok", hash=self.facts.hash)

    @api.get("/v1/model")
    async def model(self) -> ModelOfRun:
        """The model and the settings of requests that name none."""
        return ModelOfRun(
            **self.facts.model_dump(),
            run=self.loaded.config.name,
            vocabulary=self.loaded.vocabulary.name,
            length=self.loaded.config.model.length,
            sampling=self.settings,
            version=version("md4"),
        )

    @api.post("/v1/samples", responses=_PROBLEMS)
    async def samples(self, body: SampleRequest) -> BatchedResponse:
        """Write texts. The same seed, prompt, settings and model give the same texts."""
        arrived = perf_counter()
        if body.count > self.config.max_count:
            raise UserError(f"count={body.count}: at most {self.config.max_count} samples a request")
        longest = max(self.config.max_length, self.loaded.config.model.length)
        if body.length is not None and body.length > longest:
            raise UserError(f"length={body.length}: at most {longest:,} tokens a text")
        changes = {} if body.sampling is None else body.sampling.model_dump(exclude_unset=True)
        request = Request(
            prompt=body.prompt,
            count=body.count,
            length=body.length,
            seed=sampling.random_seed() if body.seed is None else body.seed,
            label=body.label,
            settings=wording.change(self.settings, changes),
            order=body.order,
            stop=body.stop,
        )
        item = _Item(request, sampling.prepare(self.loaded, request), arrived)
        done: _Done = await self._sample(item)  # type: ignore[assignment, arg-type]
        if isinstance(done.answer, UserError):
            raise fastapi.HTTPException(500, str(done.answer))
        return BatchedResponse(
            samples=[Drawn(**sample.model_dump()) for sample in done.answer.samples],
            model=self.facts,
            settings=done.answer.settings,
            timings=Timings(
                queue_ms=round(1e3 * done.queue_s, 3),
                sample_ms=round(1e3 * done.sample_s, 3),
                total_ms=round(1e3 * (perf_counter() - arrived), 3),
            ),
            calls=done.answer.network_calls,
            draws=done.answer.draws,
            draws_mode=done.answer.mode,
            counted=done.answer.counted,
            batch_requests=done.batch_requests,
        )

    @serve.batch
    async def _sample(self, items: list[_Item]) -> list[_Done]:
        # In a thread, so that the replica keeps answering health checks and collects the next batch meanwhile.
        return await asyncio.to_thread(self._run, items)

    def _run(self, items: list[_Item]) -> list[_Done]:
        began = perf_counter()
        answers = sampling.answer(
            self.loaded, [item.request for item in items], [item.job for item in items], self.config.max_rows
        )
        took = perf_counter() - began
        return [
            _Done(answer, began - item.arrived, took, len(items)) for item, answer in zip(items, answers, strict=True)
        ]


@dataclass(frozen=True)
class Server:
    """A running service."""

    url: str

    def stop(self, cluster_ends: bool = False) -> None:
        """End the service and Ray Serve with it; requests under way are answered first.

        cluster_ends: the Ray cluster itself is ended next and takes Serve's own actors with it; ending them one by one
        before makes Ray complain of an actor that ends itself.
        """
        if cluster_ends:
            serve.delete(NAME)
        else:
            serve.shutdown()


def application(
    load: "Callable[[], Loaded]", config: ServingConfig, settings: SamplingConfig | None = None
) -> serve.Application:
    """The Serve application; every replica calls `load`. settings: defaults of requests, None = the run's own."""
    deployment = serve.deployment(
        SamplingService,
        name="SamplingService",
        num_replicas=config.replicas,
        # While one batch is sampled the next one gathers in the replica; what goes beyond waits outside.
        max_ongoing_requests=2 * config.max_batch_size,
        max_queued_requests=config.max_queued,
        backpressure_config={"status_code": 503, "retry_after_s": _RETRY_AFTER_S},
        # A model that can't be loaded won't be loadable a moment later.
        max_constructor_retry_count=1,
        ray_actor_options={"num_cpus": config.num_cpus, "num_gpus": config.num_gpus},
    )
    return deployment.bind(load, settings, config)


def serve_run(
    run: str | Path,
    config: ServingConfig | None = None,
    settings: SamplingConfig | None = None,
    *,
    load: "Callable[[], Loaded] | None" = None,
) -> Server:
    """Serve a run on the Ray that is initialised; returns when the service answers.

    run: the run's folder, from which each replica loads the newest sound checkpoint; config: the run's own if None;
    settings: sampling defaults of requests, the run's own if None; load: replaces the way a replica loads its model.

    Raises `UserError` if the port is taken, Serve runs already, or the model can't be loaded.
    """
    if config is None or load is None:
        from orchestration import checkpoints
        from orchestration.runs import Run, load_model

        folder = Run(run)
        config = folder.config.serving if config is None else config
        if load is None:
            if checkpoints.newest(folder.checkpoints, print) is None:
                raise UserError(f"run {folder.path} has no sound checkpoint yet")
            load = partial(load_model, folder.path.resolve())
    port = free_port(config.host, config.port)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    if serve.status().proxies:
        raise UserError("Ray Serve runs on this Ray cluster already; stop it first (serve.shutdown)")
    serve.start(proxy_location="HeadOnly", http_options={"host": config.host, "port": port})
    try:
        serve.run(application(load, config, settings), name=NAME, route_prefix="/")
    except RuntimeError as error:
        cause = _cause()
        serve.shutdown()
        raise UserError(f"the service did not start: {cause}") from error
    host = "127.0.0.1" if config.host in ("0.0.0.0", "::") else config.host
    return Server(f"http://{host}:{port}")


def free_port(host: str, port: int) -> int:
    """`port`, or any free one for 0, after a trial that it can be bound. Raises `UserError` naming it if it can't."""
    if not 0 <= port <= 65535:
        raise UserError(f"port {port} does not exist; allowed are 1 to 65535, and 0 for any free one")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as trial:
        # As servers do: a port whose last connections are still fading away is not in use.
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind((host, port))
        except OSError as error:
            reason = error.strerror or str(error)
            raise UserError(f"can't listen at {host}, port {port}: {reason}; choose another port") from None
        return trial.getsockname()[1]


def _cause() -> str:
    """What Serve knows of why the application failed: the line of the replica's traceback that says it."""
    application = serve.status().applications[NAME]
    messages = [deployment.message for deployment in application.deployments.values()] + [application.message]
    lines = [line.strip() for message in messages for line in message.splitlines() if line.strip()]
    errors = [line for line in lines if "Error: " in line and not line.endswith("Traceback (most recent call last):")]
    return errors[-1] if errors else lines[0] if lines else "no reason given"
