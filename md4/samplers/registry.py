"""Which class samples by which settings."""

from md4.errors import UserError
from md4.samplers.ancestral import Ancestral
from md4.samplers.first_hitting import FirstHitting, RefinedFirstHitting
from md4.samplers.genmd4_ancestral import PowerAncestral
from md4.samplers.joint import JointAncestral
from md4.samplers.race import Frozen, LatentRace
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
}


def sampler_class(objective: Objective, settings: SamplingConfig) -> type[Sampler]:
    """The sampler of resolved settings."""
    if settings.extrapolate or settings.correct:
        return RefinedFirstHitting
    if settings.draws == "legacy_fp32_joint":
        return JointAncestral
    assert settings.sampler is not None
    try:
        return _SAMPLERS[objective, settings.sampler]
    except KeyError:
        raise UserError(f"sampler={settings.sampler} of objective {objective} is not there yet") from None
