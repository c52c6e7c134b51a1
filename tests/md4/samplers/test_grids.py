import pytest
import torch

from md4.errors import UserError
from md4.samplers.grids import GRIDS, time_grid


@pytest.mark.parametrize("kind", GRIDS)
@pytest.mark.parametrize("steps", [1, 2, 7, 1000])
def test_runs_from_one_to_exactly_zero(kind, steps):
    times = time_grid(kind, steps)
    assert times.shape == (steps + 1,)
    assert times.dtype == torch.float64
    assert times[0] == 1
    assert times[-1] == 0
    assert (times.diff() < 0).all()


def test_cosine_is_the_cosine_of_the_rest():
    u = torch.linspace(1, 0, 9, dtype=torch.float64)
    torch.testing.assert_close(time_grid("cosine", 8), torch.cos(torch.pi / 2 * (1 - u)), atol=1e-15, rtol=0)


def test_linear_schedule_on_the_cosine_grid_reveals_like_the_cosine_schedule_on_the_uniform_grid():
    from md4.samplers.ancestral import reveal_probability
    from md4.schedules import parse_schedule

    fine, even = time_grid("cosine", 12), time_grid("uniform", 12)
    linear = reveal_probability(parse_schedule("linear"), fine[:-1], fine[1:])
    cosine = reveal_probability(parse_schedule("cosine"), even[:-1], even[1:])
    torch.testing.assert_close(linear, cosine, atol=1e-14, rtol=0)


@pytest.mark.parametrize(("kind", "steps", "message"), [("sine", 4, "uniform, cosine"), ("uniform", 0, "at least 1")])
def test_mistakes_are_named(kind, steps, message):
    with pytest.raises(UserError, match=message):
        time_grid(kind, steps)
