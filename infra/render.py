"""`md4 render kuberay`: the manifests with which a Kubernetes cluster runs what a configuration says.

    md4 render kuberay pydocs-tiny train.device=cpu --kind job --image registry.example/md4:0.1.0 --storage pvc:md4 \
        | kubectl apply -f -

The same configuration gives the same text. Nothing is asked of any cluster.
"""

import hashlib
import shlex
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import yaml

from infra.kuberay import kinds, sizes
from infra.kuberay.options import Options, object_name
from infra.kuberay.places import Places
from md4.errors import UserError
from orchestration.config import Config


def render(config: Config, options: Options, command: Sequence[str], entry: Any = None) -> str:
    """The manifest, YAML. command: what was typed, for the head of it; entry: of `md4 cron`, for kind "cron".

    Raises:
        UserError: what cannot be, by its key or option, its value and what is allowed.
    """
    options.check()
    places = Places(options.storage)
    tree = places.tree(config)
    _check(config, options, tree)
    name = object_name(options.kind, options.name or (entry.name if entry is not None else config.name))
    labels = {
        "app.kubernetes.io/name": "md4",
        "app.kubernetes.io/instance": name,
        "app.kubernetes.io/managed-by": "md4-render",
        **options.labels,
    }
    frame = kinds.Frame(name, options, labels, places.claim)
    if options.kind == "service":
        size = sizes.of_serving(config, options.memory)
        objects = kinds.ray_service(frame, config, size, f"{tree['runs']}/{config.name}")
    else:
        size = sizes.of_training(config, options.workers_per_pod, options.gpu_memory, options.memory)
        objects = _training(frame, config, size, tree, entry)
    text = yaml.dump_all(objects, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
    return _head(config, options, command, size, places.needed) + text
