"""The check of GenMD4's loss: its terms, and the gradient of each in the powers' parameter w.

Some files hold the network and its gradients, others only the logits that it had given.
"""

import numpy as np
import torch
from torch import Tensor, nn

from md4.genmd4 import GenMD4
from md4.interchange import from_reference, reference_config
from md4.objectives import bits_per_token
from tests.golden.checks import TOLERANCE, Vectors, reference_model
from tests.golden.compare import Comparisons


def check_genmd4_loss(file: Vectors, compare: Comparisons) -> None:
    meta = {**file.meta, "model_type": "genmd4"}
    complete = len(file.group("param:")) > 1  # else w alone
    model = reference_model(meta, file.group("param:")) if complete else GenMD4(_Replay(file), meta["vocab_size"])
    assert isinstance(model, GenMD4)
    model.schedule.load_state_dict({"w": file.reals("w")})
    tokens, t = file.integers("x0"), file.reals("t")
    z = torch.stack((file.integers("xt_1"), file.integers("xt_2")), dim=1)
    for copy in (0, 1) if complete else ():
        logits = model.logits(z[:, copy], t, file.labels)
        compare.close(f"logits_{copy + 1}", logits, file[f"logits_{copy + 1}"], TOLERANCE)

    powers = model.schedule()
    for name, value in {"max": powers.max(), "min": powers.min(), "avg": powers.mean()}.items():
        compare.close(f"out:power_{name}", value, file[f"out:power_{name}"], TOLERANCE, floor=0)

    terms = model.terms(tokens, z, t, powers, file.labels)
    diffusion, score, reconstruction = terms.diffusion, terms.score, terms.reconstruction
    for copy in (0, 1):
        theirs = file[f"loss_diff_{copy + 1}_nats"]
        compare.close(f"loss_diff_{copy + 1}_nats", diffusion[:, copy], theirs, TOLERANCE, floor=0)
    # A difference of two losses of some hundred nats, times one of two log-likelihoods.
    compare.close("rloo_nats", score, file["rloo_nats"], TOLERANCE, floor=float(np.abs(file["rloo_nats"]).max()))
    compare.close("recon_nats", reconstruction, file["recon_nats"], TOLERANCE, floor=0)

    losses = {
        "loss": terms.loss.optimised,
        "loss_nelbo": terms.loss.optimised - score,
        "loss_diff": diffusion.mean(1),
        "loss_recon": reconstruction,
        "rloo": score,
    }
    bits = {name: bits_per_token(nats, tokens.shape[1]).mean() for name, nats in losses.items()}
    compare.close("the reported bound", terms.loss.bound, losses["loss_nelbo"], 1e-6, floor=0)
    for name, value in bits.items():
        if f"out:{name}" in file:
            compare.close(f"out:{name}", value, file[f"out:{name}"], TOLERANCE, floor=0)
        (gradient,) = torch.autograd.grad(value, model.schedule.w, retain_graph=True)
        if f"grad_w:{name}" in file:
            compare.norm(f"grad_w:{name}", gradient, file[f"grad_w:{name}"], TOLERANCE)

    if not complete:
        return
    bits["loss"].backward()
    gradients = {name: p.grad for name, p in model.network.named_parameters() if p.grad is not None}
    norm = torch.stack([g.double().norm() for g in gradients.values()]).norm()
    compare.close("grad_norm_net", norm, file["grad_norm_net"], TOLERANCE, floor=0)
    if file.group("grad:"):
        arrays = {"noise_schedule/w": file["grad_w:loss"], **file.group("grad:")}
        for name, gradient in from_reference(arrays, reference_config(meta)).items():
            ours = model.get_parameter(name).grad
            assert ours is not None
            compare.norm(f"gradient of {name}", ours, gradient, TOLERANCE)


class _Replay(nn.Module):
    """Stands for a network whose parameters the file does not hold: answers with the logits that it had given."""

    def __init__(self, file: Vectors):
        super().__init__()
        self.answer = torch.stack((file.reals("logits_1"), file.reals("logits_2")), dim=1).flatten(0, 1)

    def forward(self, z: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        return self.answer
