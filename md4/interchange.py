"""Weights from the reference implementation (JAX/flax): its parameter paths and layouts turned into ours.

The reference names a parameter by its path in the flax tree, such as
`classifier/Transformer_0/TransformerBlock_3/feed_forward/w1/kernel`. The numbers in `Dense_0`, `Dense_1`... count the
layers of one module in the order of their creation, so they depend on the configuration. Kernels are stored [in, out],
the transpose of torch's weights; everything else is alike.

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
from md4.objectives import MD4

_ROOT = "classifier/Transformer_0"


def reference_names(config: ModelConfig) -> dict[str, str]:
    """The reference's path of every parameter of the model of `config`: {our name: its path}."""
    network = config.network
    conditioned = network.time_input or config.classes > 0
    names: dict[str, str] = {}

    def dense(ours: str, theirs: str, bias: bool = False) -> None:
        names[f"{ours}.weight"] = f"{theirs}/kernel"
        if bias:
            names[f"{ours}.bias"] = f"{theirs}/bias"

    if config.classes:
        names["conditioning.class_embed.weight"] = "cond_embeddings/embedding"
    if network.time_input:
        dense("conditioning.dense_in", "classifier/CondEmbedding_0/dense0", bias=True)
        dense("conditioning.dense_out", "classifier/CondEmbedding_0/Dense_0", bias=True)

    layers = (f"{_ROOT}/Dense_{i}" for i in range(3))  # those outside the blocks, in order of creation
    if network.outside_embed:
        names["embed.weight"] = "classifier/Embed_0/embedding"
        dense("lift", next(layers), bias=True)
    else:
        names["embed.weight"] = f"{_ROOT}/Embed_0/embedding"
    for i in range(network.layers):
        ours, theirs = f"blocks.{i}", f"{_ROOT}/TransformerBlock_{i}"
        if conditioned:
            dense(f"{ours}.modulation", f"{theirs}/Dense_0", bias=True)
        else:
            names[f"{ours}.attention_norm.weight"] = f"{theirs}/RMSNorm_0/scale"
            names[f"{ours}.mlp_norm.weight"] = f"{theirs}/RMSNorm_1/scale"
        for matrix in ("wq", "wk", "wv", "wo"):
            dense(f"{ours}.attention.{matrix}", f"{theirs}/attention/{matrix}")
        for matrix in ("w1", "w2", "w3"):
            dense(f"{ours}.mlp.{matrix}", f"{theirs}/feed_forward/{matrix}")
    if conditioned:
        dense("modulation", next(layers), bias=True)
    else:
        names["norm.weight"] = f"{_ROOT}/RMSNorm_0/scale"
    dense("head", next(layers))
    return {f"network.{ours}": theirs for ours, theirs in names.items()}


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
        wanted = shapes[name][::-1] if path.endswith("/kernel") else shapes[name]
        if array.dtype.kind != "f":
            problems.append(f"{path} holds {array.dtype}, not real numbers")
        elif array.shape != wanted:
            problems.append(f"{path} has shape {list(array.shape)}, expected {list(wanted)}")
        else:
            tensor = torch.from_numpy(np.array(array, dtype=np.float32))
            state[name] = tensor.T.contiguous() if path.endswith("/kernel") else tensor
    if problems:
        raise UserError(f"these parameters do not fit the configuration: {'; '.join(problems)}")
    return state


def reference_config(meta: Mapping[str, Any]) -> ModelConfig:
    """The configuration that the reference describes with its own keys (`feature_dim`, `mlp_type`, `classes`...).

    Keys that the text model does not read are passed over. Raises UserError for what is not a text MD4, for a missing
    key and for a value that is not allowed.
    """
    if meta.get("model_type", "md4") != "md4":
        raise UserError(f"model_type is {meta['model_type']!r}: only 'md4' is supported")
    try:
        shape = meta["data_shape"]
        if len(shape) != 1:
            raise UserError(f"data_shape is {shape}: only text, of one axis, is supported")
        return ModelConfig(
            vocab_size=meta["vocab_size"],
            length=shape[0],
            classes=max(0, meta.get("classes", -1)),
            schedule=meta["noise_schedule"] if "noise_schedule" in meta else meta["noise_schedule_type"],
            time="continuous" if meta["cont_time"] else "discrete",
            timesteps=meta["timesteps"],
            network=TransformerConfig(
                feature_dim=meta["feature_dim"],
                heads=meta["num_heads"],
                layers=meta["n_layers"],
                mlp=meta["mlp_type"],
                conditioning=meta["cond_type"],
                depth_scaled_init=meta["depth_scaled_init"],
                outside_embed=meta["outside_embed"],
                time_input=meta["time_features"] == "t",
                dropout=meta["dropout_rate"],
            ),
        )
    except KeyError as error:
        raise UserError(f"the reference's configuration lacks {error}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UserError(f"the reference's {where} is {first['input']!r}: {first['msg']}") from None


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """All arrays of an .npz file, nothing in it being unpickled. Raises UserError if it cannot be read."""
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except FileNotFoundError:
        raise UserError(f"there is no file {path}") from None
    except (OSError, ValueError, EOFError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path} is not a readable .npz file ({error})") from None


def load_reference(path: Path, config: ModelConfig, compute: torch.dtype = torch.float32, prefix: str = "") -> MD4:
    """The model of `config` with the weights of a flat .npz file {prefix + flax path: array}, in eval mode.

    Arrays whose name does not start with `prefix` are passed over. Raises UserError as `from_reference` does.
    """
    arrays = {name.removeprefix(prefix): a for name, a in read_arrays(path).items() if name.startswith(prefix)}
    model = build(config, compute)
    model.load_state_dict(from_reference(arrays, config))
    return model.eval()
