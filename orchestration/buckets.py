"""How much ZeRO moves at a time; apart from `orchestration.zero`, since planning must not import DeepSpeed."""

# Elements of the buffers that ZeRO reduces gradients and gathers weights in: 200 MB. DeepSpeed's own defaults (2 GB,
# and up to a thousand million gathered elements) are for networks that are a hundred times larger than these: with
# them ZeRO-3 would hold every weight whole.
BUCKET = 50_000_000


def bucket_size(parameters: int) -> int:
    """Elements of a bucket for a network of so many: no more than there are."""
    return min(BUCKET, parameters)
