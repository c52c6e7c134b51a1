"""From the configuration and the manifests of prepared sets to the order of a run. Reads no shard.

Which order a set gets (`data.order`) is decided by a rule that depends on nothing but the settings and the set, so that
every worker, a resumed run and an audit come to the same one: the full order where the decoded training rows take no
more than `data.cache_mb`, for then a copy of them on each machine makes all rows cheap to reach; else lanes. Rows that
are windows (packing=windows) can only be had in the full order: neighbours overlap, so lanes would not shuffle them.
"""

from collections.abc import Sequence

from md4.errors import UserError
from pipelines.config import DataConfig
from pipelines.full_order import FullOrder
from pipelines.manifest import Manifest
from pipelines.mixture import Mixture
from pipelines.order import Order, mixing_by_memory
from pipelines.quotas import quotas
from pipelines.vocabularies import token_dtype


def plan(config: DataConfig, manifests: Sequence[Manifest], batch_size: int, slices: int, seed: int) -> Mixture:
    """The global batches of a run over the train splits of its sets, in the order of `config.sets()`.

    UserError if a set has no rows, or the sets cannot be mixed with each other.
    """
    names = config.names()
    for name, manifest in zip(names, manifests, strict=True):
        _check_like(names[0], manifests[0], name, manifest)
        if not manifest.splits["train"].rows:
            raise UserError(f"the split 'train' of the data set {name!r} has no rows to make batches of")
    orders = tuple(_order(config, manifest, batch_size, slices, seed) for manifest in manifests)
    return Mixture(orders, quotas([weight for weight, _ in config.sets()]))


def _order(config: DataConfig, manifest: Manifest, batch_size: int, slices: int, seed: int) -> Order | FullOrder:
    train, group = manifest.splits["train"], manifest.rows_per_group
    row_bytes = manifest.length * token_dtype(manifest.vocabulary_size).itemsize
    cached = train.stored_rows * row_bytes
    if config.order == "full" or (config.order == "auto" and cached <= config.cache_mb * 10**6):
        return FullOrder(train.rows, batch_size, slices, seed, manifest.fingerprint)
    if manifest.packing == "windows" and config.order == "lanes":
        raise UserError("data.order=lanes cannot serve packing=windows, whose rows overlap: say full, or auto")
    if manifest.packing == "windows":
        raise UserError(
            f"packing=windows needs the decoded tokens on each machine, {cached / 1e6:,.0f} MB, and "
            f"data.cache_mb={config.cache_mb} allows less: set it higher, or data.order=full"
        )
    mixing = mixing_by_memory(slices, group * row_bytes)
    return Order(train.rows, batch_size, slices, seed, group, mixing, manifest.fingerprint)


def _check_like(first_name: str, first: Manifest, name: str, other: Manifest) -> None:
    """UserError unless rows of two sets can stand in one batch."""

    def facts(manifest: Manifest) -> dict[str, object]:
        pixels = manifest.pixels
        return {
            "vocabulary": manifest.vocabulary,
            "vocabulary_size": manifest.vocabulary_size,
            "length": manifest.length,
            "shape": None if pixels is None else list(pixels.shape),
            "vocabulary_digest": manifest.vocabulary_digest,
            "padding": "behind the end of a text" if manifest.packing == "document" else "none",
        }

    for fact, value in facts(first).items():
        if facts(other)[fact] != value:
            raise UserError(
                f"sets of a mixture must have the same {fact}: {first_name!r} has {value}, "
                f"{name!r} has {facts(other)[fact]}"
            )
