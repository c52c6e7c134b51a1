"""Samplers: a plan says which positions are revealed when, a draw says which tokens they get, a revision hides again.

`settings` is what can be asked for, `sampler` the interface, `batch` advances rows of any mix one network call at a
time. `plans`, `ancestral` and `first_hitting` know their plan before the first call; `draws` makes tokens of logits;
`grid_costs` and `grid_search` find the times that suit a model, `saved` is what was found and is kept with it.
"""

from md4.samplers.batch import Batch, check, filled, run
from md4.samplers.rows import Job, Samples
from md4.samplers.settings import SamplingConfig

__all__ = ["Batch", "Job", "Samples", "SamplingConfig", "check", "filled", "run"]
