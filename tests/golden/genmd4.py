"""The check of GenMD4's loss: its terms, and the gradient of each in the powers' parameter w.

At 1 - t = 1e-3 the reference's float32 alpha has lost three digits; log q is held to that.
"""

import numpy as np
import torch

from md4.genmd4 import GenMD4
from md4.interchange import from_reference, reference_config
from md4.objectives import bits_per_token
from tests.golden.checks import TOLERANCE, Vectors, text_model
from tests.golden.compare import Comparisons


def check_genmd4_loss(file: Vectors, compare: Comparisons) -> None:
    source = file.parameters()
    meta = {**source.meta, **file.meta, "model_type": "genmd4"}
    model = text_model(meta, source.group("param:") | {"noise_schedule/w": file["w"]})
    assert isinstance(model, GenMD4)
    tokens, t = file.integers("x0"), file.reals("t")
    z = torch.stack((file.integers("xt_1"), file.integers("xt_2")), dim=1)
    for copy in (0, 1):
        logits = model.logits(z[:, copy], t, file.labels)
        compare.close(f"logits_{copy + 1}", logits, file[f"logits_{copy + 1}"], TOLERANCE)

    powers = model.schedule()
    for name, value in {"max": powers.max(), "min": powers.min(), "avg": powers.mean()}.items():
        compare.close(f"out:power_{name}", value, file[f"out:power_{name}"], TOLERANCE, floor=0)

    diffusion, score, reconstruction = terms = model.terms(tokens, z, t, powers, file.labels)
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
