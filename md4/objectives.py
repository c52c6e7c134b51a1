"""The MD4 objective: hide tokens, predict them, weigh the cross-entropy (MD4, sections 3 and 4; equations 5 and 9).

Time t runs from 0 (clean) to 1 (all hidden). Each token is kept with probability alpha(t), else replaced by the mask
id, which is `vocab_size`. One time serves a whole example, and the times of a global batch are stratified: one random
offset and equal steps, so that every batch covers [0, 1) evenly. They may be drawn from another density than the even
one (md4/times.py); the loss is then weighed so that its mean is the same.

`MaskedDiffusion` is the face that training, evaluation and checkpoints see; `MD4` hides all tokens alike, `GenMD4`
(md4/genmd4.py) learns how fast each token is hidden.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from md4 import documents, noise
from md4.errors import UserError
from md4.masked_loss import IGNORED, Scores, plain_scores
from md4.schedules import Schedule
from md4.times import UNIFORM, Times

if TYPE_CHECKING:
    from md4.samplers.saved import Saved


def stratified_times(u: Tensor | float, stratum: Tensor, batch_size: int) -> Tensor:
    """(u + stratum / batch_size) mod 1: the grid's point for each `stratum` [n] of 0..batch_size-1; `u` in [0, 1).

    Computed in float64, or in float32 if `u` is a float32 tensor.
    """
    if not isinstance(u, Tensor):
        u = torch.tensor(u, dtype=torch.float64, device=stratum.device)
    t = u + stratum.to(u.dtype) / batch_size
    return t - t.floor()


def antithetic(u: Tensor | float, batch_size: int) -> Tensor:
    """The times of one batch, `[batch_size]`, in the order of the strata: (u + i / batch_size) mod 1."""
    return stratified_times(u, torch.arange(batch_size), batch_size)


def global_times(seed: int, step: int, slots: Tensor, batch_size: int, slices: int) -> Tensor:
    """Times of the examples at `slots` [n] (0..batch_size-1) of global batch `step`: float64 `[n]` in [0, 1).

    A pure function of (seed, step, slot): the times of a global batch are one stratified grid however many workers
    share it. Slot `slice * m + place` (m = batch_size / slices) takes stratum `place * slices + slice`, so that every
    slice by itself, and every run of slices, spans all times evenly.

    Raises UserError unless `slices` divides `batch_size`.
    """
    if slices < 1 or batch_size % slices:
        raise UserError(f"a batch of {batch_size} examples cannot be cut into {slices} equal slices")
    places = batch_size // slices
    stratum = (slots % places) * slices + slots // places
    u = noise.uniform(noise.key(seed, "time", step), torch.zeros((), dtype=torch.int64, device=slots.device))
    return stratified_times(u, stratum, batch_size)


def mask_uniforms(seed: int, step: int, slots: Tensor, length: int) -> Tensor:
    """Uniforms in (0, 1) that decide which tokens to hide: float64 `[n, length]`, row i a function of slots[i]."""
    keys = noise.derive(noise.key(seed, "mask", step), slots)
    return noise.uniform(keys[:, None], torch.arange(length, device=slots.device))


def bits_per_token(nats: Tensor, length: Tensor | float) -> Tensor:
    """Nats per example, `[...]`, as bits per token of examples of `length` tokens."""
    return nats / (length * math.log(2))


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Without dropout."""
    if not network.training:
        yield
        return
    network.eval()
    try:
        yield
    finally:
        network.train()


class Loss(NamedTuple):
    """What one training pass gives for each example, in nats (a SUM over its tokens), reconstruction included."""

    optimised: Tensor  # [B], whose gradient trains the model; its value need not mean anything
    bound: Tensor  # [B], an unbiased estimate of the negative ELBO, without gradient: the figure to report
    hidden: Tensor  # [B], how many tokens were hidden; of examples that are hidden twice, the mean


class MaskedDiffusion(nn.Module, ABC):
    """A network, and a rule by which tokens are hidden from it.

    Args:
        network: `network(z [B, L], t [B], labels [B] | None)` -> float32 logits `[B, L, vocab_size]`. A network for
            images has a `shape` (H, W, C), and `[B, H, W, C]` in the place of `[B, L]`; here tokens are always flat.
        vocab_size: number of real tokens; the mask id is `vocab_size`.
        times: what `noise` draws the times of training from, and `forward` makes up for.
    """

    objective: Literal["md4", "genmd4"]  # its name in configurations
    masks_per_example: int  # masked copies of an example in one training pass; its rows in the network
    schedule: Any  # a Schedule, or a module with parameters: see the subclasses

    def __init__(self, network: nn.Module, vocab_size: int, times: Times = UNIFORM):
        super().__init__()
        self.network = network
        self.times = times
        self.vocab_size = vocab_size
        self.mask_id = vocab_size
        self.shape: tuple[int, int, int] | None = getattr(network, "shape", None)
        self.saved: Saved | None = None  # sampling settings that were found for it, by name

    def _network(self, z: Tensor, t: Tensor | float, labels: Tensor | None) -> Tensor:
        """The network's logits `[B, L, V]` for flat tokens z [B, L], whatever shape an example has there."""
        if self.shape is None:
            return self.network(z, t, labels)
        return self.network(z.unflatten(1, self.shape), t, labels).flatten(1, -2)

    def scores(
        self, tokens: Tensor, z: Tensor, t: Tensor, labels: Tensor | None = None, powers: Tensor | None = None
    ) -> Scores:
        """What a loss needs of the network's prediction for tokens [B, L] hidden as z [B, L] at used times t [B].

        A network that can give it without the logits `[B, L, V]` has a method `scores` of its own. powers: `[V]`.
        """
        targets = torch.where(z == self.mask_id, tokens, IGNORED)
        own: Any = getattr(self.network, "scores", None)
        if own is not None:
            end = getattr(self.network, "end_of_text", None)
            segments = None if end is None else documents.segments(tokens, end)  # hidden ends count, too
            return own(z, t, labels, targets, powers, segments)
        return plain_scores(self._network(z, t, labels), targets, powers)

    @abstractmethod
    def forward(
        self,
        tokens: Tensor,
        t: Tensor,
        uniforms: Tensor,
        labels: Tensor | None = None,
        real: Tensor | None = None,
    ) -> Loss:
        """The loss of each example `[B]`: one Monte Carlo draw, given by the arguments (dropout aside).

        Args:
            tokens: clean tokens `[B, L]`, int64.
            t: times `[B]` in [0, 1), of the density `times`.
            uniforms: in (0, 1), as `noise` makes them; a position stays visible iff its uniform is below its alpha(t).
            labels: classes `[B]`, for a class-conditional network.
            real: bool `[B, L]`, what is no padding; None: everything. Padding is never hidden and costs nothing: the
                loss is that of the other tokens, given how many there are.
        """

    def noise(
        self, seed: int, step: int, slots: Tensor, batch_size: int, slices: int, length: int
    ) -> dict[str, Tensor]:
        """What `forward` needs beside the data, by argument name, for the examples at `slots` [n] of batch `step`.

        A pure function of (seed, step, slot): `t` float64 `[n]`, of one stratified grid over the whole batch, and
        `uniforms` float64 `[n, L]`, or `[n, masks, L]` where an example is hidden more than once. The first axis of
        all of them may be cut into micro-batches. Raises UserError unless `slices` divides `batch_size`.
        """
        masks = self.masks_per_example
        uniforms = mask_uniforms(seed, step, slots, masks * length)
        return {
            "t": self.times.draw(global_times(seed, step, slots, batch_size, slices)),
            "uniforms": uniforms if masks == 1 else uniforms.unflatten(1, (masks, length)),
        }

    @torch.no_grad()
    def logits(self, z: Tensor, t: Tensor | float, labels: Tensor | None = None) -> Tensor:
        """What the network predicts for every position of z [B, L]: float32 `[B, L, V]`, no gradient, no dropout.

        `t` is `[B]` or one number for all rows.
        """
        with evaluating(self.network):
            return self._network(z, t, labels)


class MD4(MaskedDiffusion):
    """All tokens are hidden alike, by a fixed schedule.

    Args:
        network, vocab_size, times: see `MaskedDiffusion`.
        schedule: how alpha falls with time.
        continuous: continuous time (every published model), or `timesteps` discrete ones.
    """

    objective = "md4"
    masks_per_example = 1

    def __init__(
        self,
        network: nn.Module,
        schedule: Schedule,
        vocab_size: int,
        continuous: bool = True,
        timesteps: int = 1000,
        times: Times = UNIFORM,
    ):
        super().__init__(network, vocab_size, times)
        self.schedule: Schedule = schedule
        self.continuous = continuous
        self.timesteps = timesteps

    def forward(
        self,
        tokens: Tensor,
        t: Tensor,
        uniforms: Tensor,
        labels: Tensor | None = None,
        real: Tensor | None = None,
    ) -> Loss:
        """The negative ELBO of each example, float32 `[B]`; `uniforms` is `[B, L]`. See `MaskedDiffusion.forward`."""
        drawn, t = t, self.used_times(t)
        z = self.corrupt(tokens, t, uniforms)
        z = z if real is None else torch.where(real, z, tokens)
        nats = self.diffusion_nats(tokens, z, t, labels)
        if not self.times.uniform:
            nats = nats * self.times.weight(drawn).to(nats.dtype)
        count = tokens.shape[1] if real is None else real.sum(1).to(nats.dtype)
        nats = nats + self.reconstruction(count) + self.prior(count)
        return Loss(optimised=nats, bound=nats.detach(), hidden=(z == self.mask_id).sum(1).float())

    def used_times(self, t: Tensor) -> Tensor:
        """The times that masking, network and weight see, `[B]`: `t`, or its step's end (floor(t T) + 1) / T."""
        if self.continuous:
            return t
        index = torch.floor(t * self.timesteps) + 1
        return index.clamp(max=self.timesteps).double() / self.timesteps

    def corrupt(self, tokens: Tensor, t: Tensor, uniforms: Tensor) -> Tensor:
        """`tokens` [B, L] with the positions hidden whose uniform [B, L] is not below alpha(t), t [B]."""
        visible = uniforms < self.schedule.alpha(t.double())[:, None]
        return torch.where(visible, tokens, self.mask_id)

    def loss_weight(self, t: Tensor) -> Tensor:
        """Weight (negative, float64 `[B]`) of the masked tokens' log-likelihood at used times t [B].

        Continuous: alpha'(t) / (1 - alpha(t)). Discrete, s = t - 1/T: T (alpha(t) - alpha(s)) / (1 - alpha(t)).
        """
        t = t.double()
        if self.continuous:
            # A power below 1 has an infinite slope at t = 0 exactly, and infinity times no masked token is not 0.
            return self.schedule.weight(t.clamp(min=torch.finfo(torch.float64).eps))
        now, next_ = self.schedule.masked(t), self.schedule.masked((t - 1 / self.timesteps).clamp(min=0))
        return self.timesteps * (next_ - now) / now

    def diffusion_nats(self, tokens: Tensor, z: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """The diffusion term `[B]` in nats for tokens [B, L] hidden as z [B, L] at used times t [B]."""
        likelihood = self.scores(tokens, z, t, labels).log_likelihood
        return self.loss_weight(t).to(likelihood.dtype) * likelihood.sum(1)

    def reconstruction(self, n_tokens: Any) -> Any:
        """The reconstruction term of an example of `n_tokens`, in nats: what is hidden at t = 0, guessed blindly.

        A number of a number; of numbers `[B]`, numbers `[B]`.
        """
        return n_tokens * self.schedule.eps * math.log(self.vocab_size)

    def prior(self, n_tokens: Any) -> float:
        """The prior term: 0 by convention. (A token stays visible at t = 1 with probability eps; that is dropped.)"""
        return 0.0
