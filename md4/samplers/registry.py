"""Which class samples by which settings."""

from md4.samplers.ancestral import Ancestral
from md4.samplers.first_hitting import FirstHitting, RefinedFirstHitting
from md4.samplers.genmd4_ancestral import PowerAncestral
from md4.samplers.joint import JointAncestral
from md4.samplers.orders import Confidence, Entropy, Margin
from md4.samplers.path_planning import PathPlanning
from md4.samplers.race import Frozen, LatentRace
from md4.samplers.remasking import ReMDM
from md4.samplers.sampler import Sampler
from md4.samplers.settings import Objective, SamplingConfig
from md4.samplers.thinning import AdaptiveThinning, Thinning

_SAMPLERS: dict[tuple[Objective, str], type[Sampler]] = {
    ("md4", "ancestral"): Ancestral,
    ("md4", "first_hitting"): FirstHitting,
    ("genmd4", "thinning"): Thinning,
    ("genmd4", "adaptive_thinning"): AdaptiveThinning,
    ("genmd4", "race"): LatentRace,
    ("genmd4", "frozen"): Frozen,
    ("genmd4", "ancestral"): PowerAncestral,
    ("md4", "confidence"): Confidence,
    ("md4", "margin"): Margin,
    ("md4", "entropy"): Entropy,
    ("md4", "remdm"): ReMDM,
    ("md4", "p2"): PathPlanning,
    ("genmd4", "confidence"): Confidence,
    ("genmd4", "margin"): Margin,
    ("genmd4", "entropy"): Entropy,
    ("genmd4", "p2"): PathPlanning,
}


def sampler_class(objective: Objective, settings: SamplingConfig) -> type[Sampler]:
    """The sampler of resolved settings."""
    if settings.extrapolate or settings.correct:
        return RefinedFirstHitting
    if settings.draws == "legacy_fp32_joint":
        return JointAncestral
    assert settings.sampler is not None
    return _SAMPLERS[objective, settings.sampler]
