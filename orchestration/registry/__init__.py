"""Which models there are, which of them are signed off, and why (issue: no part of Ray keeps this).

    PLACE/                                 a folder, here or in S3: --registry, else MD4_REGISTRY, else registry/
      rules.yaml  MODEL/rules.yaml         what a promotion has to show (`registry.rules`)
      MODEL/versions.json                  which versions there are; changed by compare-and-swap only
      MODEL/versions/00001/                a version: an exported folder (`md4.weights`) and where it comes from
          model.safetensors config.json [tokenizer.json] [grids/*.json]
          evaluation/*.json                reports and figures that there were when it was added
          lineage.json card.md card.html
          manifest.json                    written last: bytes and sha256 of every file
      MODEL/names/production.json          a signed-off name and its history; changed by compare-and-swap only

A version never changes. It is there from the moment that versions.json lists it; what a killed `add` left is not.
"""

from orchestration.registry.names import Candidate, Change, Name
from orchestration.registry.registry import Registry
from orchestration.registry.versions import Manifest, Version

__all__ = ["Candidate", "Change", "Manifest", "Name", "Registry", "Version"]
