"""safetensors files in a folder, here or in S3: written completely or not at all, read a run of elements at a time.

The format (a JSON header with the place of each tensor, then bare numbers) is read here by ranges of bytes, since a
worker wants only its own part of each tensor and the library wants a whole file on this machine. Whole files are the
library's: `safetensors.torch.load_file` reads them.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence

import torch
from safetensors.torch import save
from torch import Tensor

from pipelines.storage import Folder

_HEADER_LIMIT = 2**27  # bytes; a longer header is no header


def write(folder: Folder, file: str, tensors: Mapping[str, Tensor]) -> dict[str, int | str]:
    """Write float32 tensors by name; returns the file's `bytes` and `sha256`."""
    data = save(dict(tensors))
    folder.write(file, data)
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


class TensorFile:
    """One file of float32 tensors. ValueError if it is not what its header says."""

    def __init__(self, folder: Folder, file: str):
        self._folder, self._file = folder, file
        (length,) = (int.from_bytes(part, "little") for part in folder.read_ranges(file, [(0, 8)]))
        if not 0 < length <= _HEADER_LIMIT:
            raise ValueError(f"{folder.path(file)} is no safetensors file")
        (text,) = folder.read_ranges(file, [(8, 8 + length)])
        self._begin = 8 + length
        self._tensors = {name: facts for name, facts in json.loads(text).items() if name != "__metadata__"}

    @property
    def names(self) -> list[str]:
        return list(self._tensors)

    def read(self, wanted: Sequence[tuple[str, int, int]]) -> list[Tensor]:
        """Elements `start .. start + count - 1` of some tensors, each float32 `[count]`; several requests at once."""
        spans = []
        for name, start, count in wanted:
            facts = self._tensors[name]
            begin, end = facts["data_offsets"]
            size = math.prod(facts["shape"])
            if facts["dtype"] != "F32" or end - begin != 4 * size or not 0 <= start <= start + count <= size:
                raise ValueError(f"{self._folder.path(self._file)}: {name} is not float32 {facts['shape']}")
            spans.append((self._begin + begin + 4 * start, self._begin + begin + 4 * (start + count)))
        parts = self._folder.read_ranges(self._file, spans)
        return [torch.frombuffer(bytearray(part), dtype=torch.float32) if part else torch.empty(0) for part in parts]
