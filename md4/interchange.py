"""Weights from the reference implementation (JAX/flax): its parameter paths and layouts turned into ours.

The reference names a parameter by its path in the flax tree, such as
`classifier/Transformer_0/TransformerBlock_3/feed_forward/w1/kernel`. The numbers in `Dense_0`, `Dense_1`... count the
layers of one module in the order of their creation, so they depend on the configuration. Kernels are stored [in, out]
and [h, w, in, out], torch's weights [out, in] and [out, in, h, w]; everything else is alike (`reference_shape`).

To use a reference checkpoint, save its flat parameters (`flax.traverse_util.flatten_dict(params, sep="/")`) with
`numpy.savez`, and read that file with `load_reference`.
"""

import zipfile
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor

from md4.errors import UserError
from md4.model import ModelConfig, build, skeleton
from md4.networks.transformer import TransformerConfig
from md4.networks.unet import UNetConfig
from md4.networks.uvit import UViTConfig, uvit_plan
from md4.objectives import MaskedDiffusion

_TRANSFORMER = "classifier/Transformer_0"
_UNET = "classifier/UNet5DWrapper_0/UNet_0"


class _Names(dict[str, str]):
    """Our names and the reference's paths, layer by layer."""

    def layer(self, ours: str, theirs: str, bias: bool = False) -> None:
        """A matrix or a convolution."""
        self[f"{ours}.weight"] = f"{theirs}/kernel"
        if bias:
            self[f"{ours}.bias"] = f"{theirs}/bias"

    def norm(self, ours: str, theirs: str, bias: bool = False) -> None:
        self[f"{ours}.weight"] = f"{theirs}/scale"
        if bias:
            self[f"{ours}.bias"] = f"{theirs}/bias"


def reference_names(config: ModelConfig) -> dict[str, str]:
    """The reference's path of every parameter of the model of `config`: {our name: its path}."""
    names = _Names()
    if config.classes:
        names["conditioning.class_embed.weight"] = "cond_embeddings/embedding"
    if config.network.time_input:
        names.layer("conditioning.dense_in", "classifier/CondEmbedding_0/dense0", bias=True)
        names.layer("conditioning.dense_out", "classifier/CondEmbedding_0/Dense_0", bias=True)
    conditioned = config.network.time_input or config.classes > 0
    match config.network:
        case TransformerConfig() as network:
            _name_transformer(names, network, conditioned)
        case UNetConfig() as network:
            _name_image_network(names)
            _name_unet(names, network, conditioned)
        case UViTConfig() as network:
            _name_image_network(names)
            _name_uvit(names, network, conditioned)
    names = {f"network.{ours}": theirs for ours, theirs in names.items()}
    if config.objective == "genmd4":
        names["schedule.w"] = "noise_schedule/w"
    return names


def _name_transformer(names: _Names, network: TransformerConfig, conditioned: bool) -> None:
    layers = (f"{_TRANSFORMER}/Dense_{i}" for i in range(3))  # those outside the blocks, in order of creation
    if network.outside_embed:
        names["embed.weight"] = "classifier/Embed_0/embedding"
        names.layer("lift", next(layers), bias=True)
    else:
        names["embed.weight"] = f"{_TRANSFORMER}/Embed_0/embedding"
    for i in range(network.layers):
        ours, theirs = f"blocks.{i}", f"{_TRANSFORMER}/TransformerBlock_{i}"
        _name_block_norms(names, ours, theirs, conditioned)
        for matrix in ("wq", "wk", "wv", "wo"):
            names.layer(f"{ours}.attention.{matrix}", f"{theirs}/attention/{matrix}")
        for matrix in ("w1", "w2", "w3"):
            names.layer(f"{ours}.mlp.{matrix}", f"{theirs}/feed_forward/{matrix}")
    if conditioned:
        names.layer("modulation", next(layers), bias=True)
    else:
        names.norm("norm", f"{_TRANSFORMER}/RMSNorm_0")
    names.layer("head", next(layers))


def _name_block_norms(names: _Names, ours: str, theirs: str, conditioned: bool) -> None:
    """The norms of a transformer block, of text or of a DiT, or what the conditioning has in their place."""
    if conditioned:
        names.layer(f"{ours}.modulation", f"{theirs}/Dense_0", bias=True)
    else:
        names.norm(f"{ours}.attention_norm", f"{theirs}/RMSNorm_0")
        names.norm(f"{ours}.mlp_norm", f"{theirs}/RMSNorm_1")


def _name_image_network(names: _Names) -> None:
    names["embed.weight"] = "classifier/Embed_0/embedding"
    names.layer("conv_in", f"{_UNET}/Conv_0", bias=True)
    names.layer("head", f"{_UNET}/Conv_1", bias=True)


def _name_unet(names: _Names, network: UNetConfig, conditioned: bool) -> None:
    down = [f"down.{i}" for i in range(network.layers)]
    up = [f"up.{i}" for i in range(network.layers + 1)]
    for i, ours in enumerate([*down, "middle_in", "middle_out", *up]):
        theirs = f"{_UNET}/ResBlock_{i}"
        names.norm(f"{ours}.in_norm", f"{theirs}/GroupNorm_0", bias=True)
        names.layer(f"{ours}.conv_in", f"{theirs}/Conv_0", bias=True)
        if conditioned:
            names.layer(f"{ours}.condition", f"{theirs}/Dense_0")
        names.norm(f"{ours}.out_norm", f"{theirs}/GroupNorm_1", bias=True)
        names.layer(f"{ours}.conv_out", f"{theirs}/Conv_1", bias=True)
        if ours in up:
            names.layer(f"{ours}.skip", f"{theirs}/Dense_{int(conditioned)}", bias=True)
    ours, theirs = "attention", f"{_UNET}/SelfAttention_0"
    names.norm(f"{ours}.in_norm", f"{theirs}/GroupNorm_0", bias=True)
    for matrix, role in (("wq", "query"), ("wk", "key"), ("wv", "value"), ("wo", "out")):
        names.layer(f"{ours}.{matrix}", f"{theirs}/MultiHeadDotProductAttention_0/{role}", bias=True)
    names.norm("norm", f"{_UNET}/GroupNorm_0", bias=True)


def _name_uvit(names: _Names, network: UViTConfig, conditioned: bool) -> None:
    def conditional_norm(ours: str, theirs: str) -> None:
        if conditioned:
            names.layer(f"{ours}.condition", f"{theirs}/Dense_0", bias=True)
        else:
            names.norm(f"{ours}.norm", f"{theirs}/GroupNorm_0", bias=True)

    down, up = uvit_plan(network)
    blocks = [(f"down.{i}", block) for i, block in enumerate(down)] + [(f"up.{i}", block) for i, block in enumerate(up)]
    for i, (ours, block) in enumerate(blocks):
        theirs = f"{_UNET}/ResBlock_{i}"
        conditional_norm(f"{ours}.in_norm", f"{theirs}/CondGroupNorm_0")
        names.layer(f"{ours}.conv_in", f"{theirs}/Conv_0", bias=True)
        conditional_norm(f"{ours}.out_norm", f"{theirs}/CondGroupNorm_1")
        names.layer(f"{ours}.conv_out", f"{theirs}/Conv_1", bias=True)
        if block.channels != block.out:
            names.layer(f"{ours}.skip", f"{theirs}/Dense_0", bias=True)
    conditional_norm("norm", f"{_UNET}/CondGroupNorm_0")

    dit = f"{_UNET}/DiT_0"
    names["dit.position"] = f"{dit}/pos_embed"
    names.layer("dit.patches", f"{dit}/x_embedder/proj", bias=True)
    for i in range(network.dit_layers):
        ours, theirs = f"dit.blocks.{i}", f"{dit}/blocks_{i}"
        _name_block_norms(names, ours, theirs, conditioned)
        for matrix in ("wq", "wk", "wv", "wo"):
            names.layer(f"{ours}.attention.{matrix}", f"{theirs}/attn/{matrix}", bias=matrix != "wo")
        for matrix in ("fc1", "fc2"):
            names.layer(f"{ours}.mlp.{matrix}", f"{theirs}/mlp/{matrix}", bias=True)
    if conditioned:
        names.layer("dit.modulation", f"{dit}/final_layer/Dense_0", bias=True)
    else:
        names.norm("dit.norm", f"{dit}/final_layer/RMSNorm_0")
    names.layer("dit.unpatch", f"{dit}/final_layer/linear", bias=True)


def reference_shape(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that the reference's array at `path` has, where ours has `shape`.

    Matrices [out, in] are [in, out] there, convolutions [out, in, h, w] are [h, w, in, out], except those over single
    pixels, which are matrices. In its multi-head attention an axis of heads stands before the size of a head; the one
    network that has it, has one head.
    """
    *_, module, role, kind = ("", *path.split("/"))
    if module.startswith("MultiHead"):
        if kind == "bias":
            return shape if role == "out" else (1, *shape)
        return (1, shape[1], shape[0]) if role == "out" else (shape[1], 1, shape[0])
    if kind != "kernel":
        return shape
    spatial = () if role.startswith("Dense_") else shape[2:]
    return (*spatial, shape[1], shape[0])


def _as_ours(array: Tensor, path: str, shape: tuple[int, ...]) -> Tensor:
    if not path.endswith("/kernel"):
        return array.reshape(shape)
    array = array.reshape(*shape[2:], shape[1], shape[0])
    return array.permute(-1, -2, *range(array.ndim - 2)).contiguous()


def _listed(paths: Iterable[str]) -> str:
    paths = sorted(paths)
    return ", ".join(paths[:5]) + (f" and {len(paths) - 5} more" if len(paths) > 5 else "")


def from_reference(arrays: Mapping[str, np.ndarray], config: ModelConfig) -> dict[str, Tensor]:
    """The state dict (float32) of the model of `config` from the reference's parameters {flax path: array}.

    Being linear, it converts gradients and averages of parameters as well.

    Raises UserError naming the parameters that are missing, unexpected, of the wrong shape or not real numbers.
    """
    names = reference_names(config)
    missing, unexpected = set(names.values()) - set(arrays), set(arrays) - set(names.values())
    problems = []
    if missing:
        problems.append(f"missing: {_listed(missing)}")
    if unexpected:
        problems.append(f"unexpected: {_listed(unexpected)}")

    shapes = {name: tuple(p.shape) for name, p in skeleton(config).named_parameters()}
    state = {}
    for name, path in names.items():
        if path in missing:
            continue
        array = np.asarray(arrays[path])
        wanted = reference_shape(path, shapes[name])
        if array.dtype.kind != "f":
            problems.append(f"{path} holds {array.dtype}, not real numbers")
        elif array.shape != wanted:
            problems.append(f"{path} has shape {list(array.shape)}, expected {list(wanted)}")
        else:
            state[name] = _as_ours(torch.from_numpy(np.array(array, dtype=np.float32)), path, shapes[name])
    if problems:
        raise UserError(f"these parameters do not fit the configuration: {'; '.join(problems)}")
    return state


def reference_config(meta: Mapping[str, Any]) -> ModelConfig:
    """The configuration that the reference describes with its own keys (`feature_dim`, `mlp_type`, `classes`...).

    Keys that the model does not read are passed over. Raises UserError for what is neither MD4 nor GenMD4, for a
    missing key and for a value that is not allowed.
    """
    kind = meta.get("model_type", "md4")
    if kind not in ("md4", "genmd4"):
        raise UserError(f"model_type is {kind!r}: only 'md4' and 'genmd4' are known")
    try:
        shape = tuple(meta["data_shape"])
        if len(shape) not in (1, 3):
            raise UserError(f"data_shape is {list(shape)}: one axis (text) or three (images) are known")
        schedule = meta["noise_schedule"] if "noise_schedule" in meta else meta["noise_schedule_type"]
        if kind == "md4":
            objective = {"schedule": schedule}
        elif schedule == "poly":
            objective = {"objective": kind, "power_init": meta["power_init"]}
        else:
            raise UserError(f"noise_schedule is {schedule!r}: genmd4 has 'poly' alone")
        if len(shape) == 1:
            place, network = {"length": shape[0]}, _transformer_config(meta)
        else:
            place, network = {"shape": shape}, _image_config(meta)
        return ModelConfig.model_validate(
            {
                "vocab_size": meta["vocab_size"],
                "classes": max(0, meta.get("classes", -1)),
                "time": "continuous" if meta["cont_time"] else "discrete",
                "timesteps": meta["timesteps"],
                "network": network,
                **objective,
                **place,
            }
        )
    except KeyError as error:
        raise UserError(f"the reference's configuration lacks {error}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "configuration"
        raise UserError(f"the reference's {where} is {first['input']!r}: {first['msg']}") from None


def _transformer_config(meta: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "kind": "transformer",
        "feature_dim": meta["feature_dim"],
        "heads": meta["num_heads"],
        "layers": meta["n_layers"],
        "mlp": meta["mlp_type"],
        "conditioning": meta["cond_type"],
        "depth_scaled_init": meta["depth_scaled_init"],
        "outside_embed": meta["outside_embed"],
        "time_input": meta["time_features"] == "t",
        "dropout": meta["dropout_rate"],
    }


def _image_config(meta: Mapping[str, Any]) -> dict[str, Any]:
    both = {
        "feature_dim": meta["feature_dim"],
        "layers": meta["n_layers"],
        "time_input": meta["time_features"] == "t",
        "dropout": meta["dropout_rate"],
    }
    if not meta["n_dit_layers"]:
        return {"kind": "unet", **both}
    return {
        "kind": "uvit",
        **both,
        "multipliers": meta["ch_mult"],
        "dit_layers": meta["n_dit_layers"],
        "dit_heads": meta["dit_num_heads"],
        "dit_width": meta["dit_hidden_size"],
    }


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """All arrays of an .npz file, nothing in it being unpickled. Raises UserError if it cannot be read."""
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except FileNotFoundError:
        raise UserError(f"there is no file {path}") from None
    except (OSError, ValueError, EOFError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path} is not a readable .npz file ({error})") from None


def load_reference(
    path: Path, config: ModelConfig, compute: torch.dtype = torch.float32, prefix: str = ""
) -> MaskedDiffusion:
    """The model of `config` with the weights of a flat .npz file {prefix + flax path: array}, in eval mode.

    Arrays whose name does not start with `prefix` are passed over. Raises UserError as `from_reference` does.
    """
    arrays = {name.removeprefix(prefix): a for name, a in read_arrays(path).items() if name.startswith(prefix)}
    model = build(config, compute)
    model.load_state_dict(from_reference(arrays, config))
    return model.eval()
