"""One check for each kind of vector file. A check fills a `Comparisons`, or raises: `Unsupported`, or UserError.

Tolerances are those stated with the vectors, wider only where the reference's own float32 rounding asks for it. It
forms M = 1 - alpha by a subtraction that is off by up to 2e-7: what is divided by M is held to max(1e-4, 2e-7 / M);
its cosine weight at t = 1e-6 is off by 1.2e-3. Its time features have angles off by up to 1.5e-7 x at x = 1000 t.
"""

import itertools
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from md4.errors import UserError
from md4.genmd4 import GenMD4
from md4.interchange import from_reference, read_arrays, reference_config, reference_names
from md4.model import build
from md4.networks.conditioning import timestep_embedding
from md4.objectives import MD4, MaskedDiffusion, antithetic, bits_per_token
from md4.samplers.ancestral import reveal_probability
from md4.samplers.draws import filter_top_p
from md4.samplers.grids import time_grid
from md4.schedules import EPS, LearnedPolynomial, Schedule, parse_schedule
from orchestration.optimizer import AdamWithEma, learning_rate
from tests.golden.compare import Comparisons

TOLERANCE = 1e-4
LOOSE = 1e-3  # discrete time, and the reconstruction term: the reference's cancellation enters whole
TRAJECTORY = 1e-5
GRID = 1e-6
NO_GRADIENT = 2e-3  # of the whole gradient's norm: a parameter's share below which its errors are held to this share


class Unsupported(Exception):
    """The file is of a kind, or of a model, that is not implemented."""


@dataclass
class Vectors:
    """One file: its arrays, and the description that the reference has put beside them."""

    path: Path
    arrays: dict[str, np.ndarray] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> "Vectors":
        return cls(path, read_arrays(path))

    def __contains__(self, name: str) -> bool:
        return name in self.arrays

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self.arrays:
            raise UserError(f"it lacks the array {name!r}")
        return self.arrays[name]

    def reals(self, name: str) -> Tensor:
        return torch.from_numpy(np.array(self[name], dtype=np.float32))

    def integers(self, name: str) -> Tensor:
        return torch.from_numpy(np.array(self[name], dtype=np.int64))

    @property
    def labels(self) -> Tensor | None:
        return self.integers("cond") if "cond" in self else None

    def group(self, prefix: str) -> dict[str, np.ndarray]:
        """The arrays called `prefix`..., without the prefix."""
        return {name.removeprefix(prefix): a for name, a in self.arrays.items() if name.startswith(prefix)}

    @cached_property
    def meta(self) -> dict[str, Any]:
        try:
            meta = json.loads(str(self.arrays.get("meta_json", "{}")))
        except ValueError:
            raise UserError("its meta_json is not JSON") from None
        if not isinstance(meta, dict):
            raise UserError("its meta_json is not an object")
        return meta

    def setting(self, name: str) -> Any:
        if name not in self.meta:
            raise UserError(f"its meta_json lacks {name!r}")
        return self.meta[name]

    def parameters(self, prefix: str = "param:") -> "Vectors":
        """The file with the network's parameters: this one, or the one that it names, in the same folder."""
        if self.group(prefix):
            return self
        return Vectors.read(self.path.with_name(Path(self.setting("params_file")).name))


def reference_model(meta: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> MaskedDiffusion:
    """The reference's model of that description and those parameters, in training mode (they have no dropout)."""
    config = reference_config({**meta, "dropout_rate": 0.0})
    model = build(config)
    model.load_state_dict(from_reference(arrays, config))
    return model


def reference_md4(meta: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> MD4:
    """`reference_model` where only an MD4 will do."""
    model = reference_model(meta, arrays)
    if not isinstance(model, MD4):
        raise UserError("its meta_json describes another objective than MD4")
    return model


def cancellation(masked: Tensor | np.ndarray) -> np.ndarray:
    """How much wider than 1e-4 the tolerance is of what the reference divides by its float32 1 - alpha."""
    return np.maximum(2e-7 / TOLERANCE / np.asarray(masked, dtype=np.float64), 1.0)


def discrete_cancellation(schedule: Schedule, t: Tensor, timesteps: int) -> np.ndarray:
    """How much wider than LOOSE the tolerance is of the discrete weight, which the reference gets from a difference of
    two log-SNRs; each has an error of 2e-7 / M, and a rounding."""
    s = (t.double() - 1 / timesteps).clamp(min=0)
    difference = (schedule.log_snr(t.double()) - schedule.log_snr(s)).abs()
    return np.maximum(((2e-7 / schedule.masked(s) + 5e-7) / difference / LOOSE).numpy(), 1.0)


# --- schedules, times, embeddings, grids, filters: no network ---


def check_schedules(file: Vectors, compare: Comparisons) -> None:
    t = file.reals("t")
    names = [name.removesuffix(":alpha") for name in file.arrays if name.endswith(":alpha")]
    for name in names:
        if name == "vec":
            check_learned_schedule(file, compare)
            continue
        schedule = parse_schedule(name, eps=file.meta.get("eps", EPS))
        widen = cancellation(schedule.masked(t))
        compare.close(f"{name}:alpha", schedule.alpha(t), file[f"{name}:alpha"], 1e-5, floor=0.1)
        compare.close(f"{name}:dalpha", schedule.dalpha(t), file[f"{name}:dalpha"], 1e-5, floor=0.1)
        compare.close(f"{name}:weight", schedule.weight(t), file[f"{name}:weight"], TOLERANCE, floor=0, widen=widen)
        widen = np.maximum(widen, cancellation(schedule.alpha(t)))
        compare.close(f"{name}:logsnr", schedule.log_snr(t), file[f"{name}:logsnr"], TOLERANCE, widen=widen)


def check_learned_schedule(file: Vectors, compare: Comparisons) -> None:
    schedule = LearnedPolynomial(len(file["vec:w"]), eps=file.meta.get("eps", EPS))
    schedule.load_state_dict({"w": file.reals("vec:w")})
    t, powers = file.reals("vec:t")[:, None], schedule()
    widen = cancellation(schedule.alpha(t, powers).detach())
    compare.close("vec:power", powers, file["vec:power"], GRID)
    compare.close("vec:alpha", schedule.alpha(t, powers), file["vec:alpha"], 1e-5, floor=0.1)
    compare.close("vec:dalpha", schedule.dalpha(t, powers), file["vec:dalpha"], 1e-5, floor=0.1)
    compare.close("vec:weight", schedule.weight(t, powers), file["vec:weight"], TOLERANCE, floor=0)
    compare.close("vec:logsnr", schedule.log_snr(t, powers), file["vec:logsnr"], TOLERANCE, widen=widen)
    for name, theirs in file.group("vec:w_init_").items():
        compare.close(f"vec:w_init_{name}", LearnedPolynomial(len(theirs), float(name)).w, theirs, GRID)


def check_antithetic_times(file: Vectors, compare: Comparisons) -> None:
    for size in (int(name.removeprefix("t0_")) for name in file.arrays if re.fullmatch(r"t0_\d+", name)):
        ours = antithetic(float(file[f"t0_{size}"]), size)
        # For some sizes the reference's grid has one point too many: its bug, not to be copied.
        distance = np.abs(ours.numpy() - file[f"t_{size}"][:size])
        compare.absolute(f"t_{size}", np.minimum(distance, 1 - distance), np.zeros(size), GRID)


def check_timestep_embedding(file: Vectors, compare: Comparisons) -> None:
    for dim in (int(name.removeprefix("emb_")) for name in file.arrays if re.fullmatch(r"emb_\d+", name)):
        ours = timestep_embedding(file.reals(f"in_{dim}"), dim)
        widen = np.maximum(1.5e-7 / TOLERANCE * np.abs(file[f"in_{dim}"]), 1.0)[:, None]
        compare.close(f"emb_{dim}", ours, file[f"emb_{dim}"], TOLERANCE, widen=widen)


def check_sampling_grids(file: Vectors, compare: Comparisons) -> None:
    for name in file.arrays:
        if parts := re.fullmatch(r"([a-z]+)_(\d+)_([st])(_traced)?", name):
            grid = time_grid(parts[1], int(parts[2]))
            compare.absolute(name, grid[1:] if parts[3] == "s" else grid[:-1], file[name], GRID)


def borderline(logits: Tensor, p: float) -> np.ndarray:
    """Where `[...]` rounding decides which tokens top-p keeps: some cumulative probability lies within 1e-6 of p."""
    falling = logits.double().softmax(-1).sort(dim=-1, descending=True).values
    return ((falling.cumsum(-1) - p).abs() < 1e-6).any(-1).numpy()


def check_topp_mask(file: Vectors, compare: Comparisons) -> None:
    logits = file.reals("logits")
    for name in file.arrays:
        if name.startswith("masked_"):
            p = float(name.removeprefix("masked_"))
            ours, theirs = filter_top_p(logits, p).numpy(), file[name]
            kept = theirs > -1e6
            wrong = (np.isfinite(ours) & (ours > -1e6)) != kept
            compare.count(name, wrong & ~borderline(logits, p)[..., None])
            both = kept & ~wrong
            compare.absolute(f"{name}, kept logits", ours[both], theirs[both], 1e-6)
        elif name.startswith("topk_"):
            compare.remarks.append("topk_* left out (no top-k filter)")
    compare.remarks = sorted(set(compare.remarks))


# --- the network, its loss, its samplers ---


# Tokens of images are [B, H, W, C] in the files; here they are flat.


def check_backbone(file: Vectors, compare: Comparisons) -> None:
    model = reference_model(file.meta, file.group("param:"))
    z, t = file.integers("z").flatten(1), file.reals("t")
    inside = {name.split(":")[0]: a for name, a in file.group("mid:").items()}
    with Recorder(model, reference_names(reference_config(file.meta)), list(inside)) as recorder:
        ours = model.logits(z, t, file.labels)
        compare.close("logits", ours, file.reals("logits").flatten(1, -2), TOLERANCE)
    for name, theirs in inside.items():
        compare.close(f"after {name}", recorder.outputs[name], theirs, TOLERANCE)
    if "logits_scalar_t" in file:
        ours = model.logits(z, float(t[0]), file.labels)
        compare.close("logits_scalar_t", ours, file.reals("logits_scalar_t").flatten(1, -2), TOLERANCE)


class Recorder:
    """Keeps what the modules put out that stand at the reference's `paths`, channels last."""

    def __init__(self, model: MaskedDiffusion, names: Mapping[str, str], paths: list[str]):
        self.outputs: dict[str, Tensor] = {}
        self.handles = []
        for path in paths:
            inside = [ours.split(".") for ours, theirs in names.items() if theirs.startswith(f"{path}/")]
            if not inside:
                raise UserError(f"it has the output of {path}, which has no counterpart here")
            # The module that holds all of the parameters below `path`, and no other.
            shared = zip(*(parts[:-1] for parts in inside), strict=False)
            module = ".".join(parts[0] for parts in itertools.takewhile(lambda parts: len(set(parts)) == 1, shared))
            self.handles.append(model.get_submodule(module).register_forward_hook(self._keep(path)))

    def _keep(self, path: str) -> Callable:
        def hook(module, inputs, output):
            self.outputs[path] = output.permute(0, 2, 3, 1) if output.ndim == 4 else output

        return hook

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, *_) -> None:
        for handle in self.handles:
            handle.remove()


def check_md4_loss(file: Vectors, compare: Comparisons) -> None:
    source = file.parameters()
    model = reference_md4({**source.meta, **file.meta}, source.group("param:"))
    tokens, z = file.integers("x0").flatten(1), file.integers("xt").flatten(1)
    t, labels = file.reals("t_used"), file.labels
    tolerance = TOLERANCE if model.continuous else LOOSE

    if "t_raw" in file:
        compare.absolute("t_used", model.used_times(file.reals("t_raw")), file["t_used"], GRID)
    if model.continuous:
        widen = cancellation(model.schedule.masked(t))
    else:
        widen = discrete_cancellation(model.schedule, t, model.timesteps)
    compare.close("weight", model.loss_weight(t), file["weight"], tolerance, floor=0, widen=widen)
    logits = model.logits(z, t, labels)
    compare.close("logits", logits, file.reals("logits").flatten(1, -2), TOLERANCE)
    if "token_logp" in file:
        log_p = F.log_softmax(logits, -1).gather(-1, tokens[..., None])[..., 0]
        compare.close("token_logp", log_p, file.reals("token_logp").flatten(1), TOLERANCE)

    nats = model.diffusion_nats(tokens, z, t, labels)
    theirs = file["loss_diff_per_example_nats"]
    compare.close("loss_diff_per_example_nats", nats, theirs, tolerance, floor=0, widen=widen)
    length = tokens.shape[1]
    loss = bits_per_token(nats + model.reconstruction(length) + model.prior(length), length).mean()
    widen = float(np.max(widen))
    compare.close("out:loss", loss, file["out:loss"], tolerance, floor=0, widen=widen)
    parts = {"out:loss_recon": model.reconstruction(length), "out:loss_prior": model.prior(length)}
    for name, value in parts.items():
        if name in file:
            compare.close(name, value / (length * math.log(2)), file[name], LOOSE, floor=0)
    if "out:loss_diff" in file:
        diffusion = nats.mean() / (length * math.log(2))
        compare.close("out:loss_diff", diffusion, file["out:loss_diff"], tolerance, floor=0, widen=widen)

    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    if "grad_norm" in file:
        norm = torch.stack([g.double().norm() for g in gradients.values()]).norm()
        compare.close("grad_norm", norm, file["grad_norm"], tolerance, floor=0, widen=widen)
    if file.group("grad:"):
        config = reference_config({**source.meta, **file.meta})
        theirs = from_reference(file.group("grad:"), config)
        # Some gradients are rounding alone: of a bias that all keys share, of what is added to a whole group of a norm.
        floor = NO_GRADIENT * torch.stack([g.norm() for g in theirs.values()]).norm().item()
        for name, gradient in theirs.items():
            compare.norm(f"gradient of {name}", gradients[name], gradient, tolerance * widen, floor=floor)


def check_sampler(file: Vectors, compare: Comparisons) -> None:
    source = file.parameters()
    model = reference_md4({**source.meta, "noise_schedule": file.setting("noise_schedule")}, source.group("param:"))
    kind, steps, labels = file.setting("sampler"), file.setting("T"), file.labels
    grid = time_grid(file.setting("sampling_grid"), steps)
    t, s = grid[:-1], grid[1:]
    compare.absolute("t", t, file["t"], GRID)
    compare.absolute("s", s, file["s"], GRID)
    # From here on at the reference's times: its rounding of t shows in the embedding's highest frequencies. On the
    # cosine grid its last s is below 0, where a polynomial of fractional power has no value.
    t, s = file.reals("t"), file.reals("s").clamp(min=0)
    sound = ~np.isnan(file["alpha_s"])
    schedule: Schedule = model.schedule
    compare.close("alpha_t", schedule.alpha(t), file["alpha_t"], 1e-5, floor=0.1)
    compare.close("alpha_s", schedule.alpha(s)[sound], file["alpha_s"][sound], 1e-5, floor=0.1)
    reveal = reveal_probability(schedule, t, s)
    widen = cancellation(schedule.masked(t))
    compare.close("unmask_prob", reveal[sound], file["unmask_prob"][sound], TOLERANCE, widen=widen[sound])

    z, logits = file.integers("z").flatten(2), file.reals("logits").flatten(2, -2)
    ours = torch.stack([model.logits(z[i], t[i], labels) for i in range(steps)])
    compare.close("logits", ours, logits, TOLERANCE)
    if kind == "mean":
        compare.close("x0_probs", ours.softmax(-1), file.reals("x0_probs").flatten(2, -2), TOLERANCE)
    elif kind in ("ancestral", "topp"):
        # From the reference's logits, which have just been compared: rounding must not move a token across top-p.
        kept = logits.double()
        sure = np.broadcast_to(sound[:, None, None], logits.shape[:-1])
        if kind == "topp":
            kept, sure = filter_top_p(kept, file.setting("topp")), sure & ~borderline(logits, file.setting("topp"))
        rho = reveal.view(-1, 1, 1, 1)
        stay = (1 - rho).expand(*logits.shape[:-1], 1)
        probabilities = torch.cat((rho * kept.softmax(-1), stay), -1).numpy()
        theirs = file.reals("probs").flatten(2, -2).numpy()
        widen = np.broadcast_to(widen.reshape(rho.shape), theirs.shape)[sure]
        compare.close("probs", probabilities[sure], theirs[sure], TOLERANCE, widen=widen)
    else:
        raise Unsupported(f"the sampler {kind!r} is not implemented")

    if "decode_in" in file:
        before, after = file.integers("decode_in").flatten(1), file.integers("decode_out").flatten(1)
        ours, theirs = model.logits(before, 0.0, labels), file.reals("decode_logits").flatten(1, -2)
        compare.close("decode_logits", ours, theirs, TOLERANCE)
        masked = before == model.mask_id
        compare.count("decode_out, known tokens", (before != after)[~masked])
        # A tie may go either way: what counts is the likelihood of the token chosen here.
        chosen = theirs.gather(-1, ours.argmax(-1, keepdim=True))[..., 0][masked]
        compare.close("decode_out", chosen, theirs.gather(-1, after[..., None])[..., 0][masked], 2 * TOLERANCE)


def optimised_nats(model: MaskedDiffusion, tokens: Tensor, z: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
    """What training differentiates, `[B]`, for tokens [B, L] hidden as z [B, copies, L] at used times t [B]."""
    if isinstance(model, GenMD4):
        return model.terms(tokens, z, t, model.schedule(), labels).loss.optimised
    assert isinstance(model, MD4)
    length = tokens.shape[1]
    return model.diffusion_nats(tokens, z[:, 0], t, labels) + model.reconstruction(length) + model.prior(length)


def check_trajectory(file: Vectors, compare: Comparisons) -> None:
    setting = file.setting
    model = reference_model(file.meta, file.group("init:"))
    discrete, decay = isinstance(model, MD4) and not model.continuous, setting("ema_rate")
    optimizer = AdamWithEma(
        model.parameters(),
        lr=0.0,
        betas=(setting("b1"), setting("b2")),
        eps=setting("adam_eps"),
        weight_decay=setting("weight_decay"),
        ema=decay,
    )
    tokens, z, t = file.integers("x0"), file.integers("xt").transpose(1, 2), file.reals("t")
    losses, rates = [], []
    for step in range(setting("num_steps")):
        rate = learning_rate(
            step, setting("base_learning_rate"), setting("warmup_steps"), setting("num_steps"), setting("schedule_type")
        )
        for group in optimizer.param_groups:
            group["lr"] = rate
        nats = optimised_nats(model, tokens[step], z[step], t[step], file.labels)
        loss = bits_per_token(nats, tokens.shape[-1]).mean()
        optimizer.zero_grad()
        loss.backward()
        if file.meta.get("clip"):
            torch.nn.utils.clip_grad_value_(model.parameters(), setting("clip"))
        optimizer.step()
        losses.append(loss.item())
        rates.append(rate)
    if "lr" in file:
        compare.close("lr", np.array(rates), file["lr"], 1e-5, floor=1e-3 * setting("base_learning_rate"))
    compare.close("loss", np.array(losses), file["loss"], LOOSE if discrete else TOLERANCE, floor=0)
    config = reference_config(file.meta)
    ours = dict(model.named_parameters())
    for name, theirs in from_reference(file.group("final:"), config).items():
        compare.absolute(f"final {name}", ours[name], theirs, TRAJECTORY)
    if decay:
        for name, theirs in from_reference(file.group("ema:"), config).items():
            compare.absolute(f"EMA of {name}", optimizer.state[ours[name]]["ema"], theirs, TRAJECTORY)
