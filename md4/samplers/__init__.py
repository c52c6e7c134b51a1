"""Samplers: a plan says which positions are revealed when, a draw says which tokens they get.

`plans` and `ancestral` hold the first, `draws` the second, `batch` advances rows of any mix one network call at a time.
"""

from md4.samplers.batch import Batch, Job, Samples, run
from md4.samplers.settings import SamplingConfig

__all__ = ["Batch", "Job", "Samples", "SamplingConfig", "run"]
