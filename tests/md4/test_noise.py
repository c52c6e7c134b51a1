"""Random numbers: the published generator bit for bit, uniform, and the same whichever of them are asked for."""

import hashlib

import torch

from md4 import noise

MASK = 2**64 - 1
GOLDEN = 0x9E3779B97F4A7C15


def splitmix_finaliser(x: int) -> int:
    """SplitMix64's output function on Python's integers, as published."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def unsigned(x: torch.Tensor) -> list[int]:
    return [int(v) & MASK for v in x.flatten()]


def chi_square(values: torch.Tensor, cells: int = 64) -> float:
    """Deviation of the chi-square of values in (0, 1) over equal cells, in its standard deviations."""
    counts = torch.histc(values.double(), cells, 0, 1)
    expected = values.numel() / cells
    return (((counts - expected) ** 2 / expected).sum().item() - (cells - 1)) / (2 * (cells - 1)) ** 0.5


def test_bits_are_splitmix64():
    """Number i of stream k is the (i+1)-th output of the generator seeded with k."""
    for key in (0, 1234567, -5, 2**63 - 1):
        state, expected = key & MASK, []
        for _ in range(6):
            state = (state + GOLDEN) & MASK
            expected.append(splitmix_finaliser(state))
        assert unsigned(noise.bits(key, torch.arange(6))) == expected


def test_bits_match_published_outputs():
    """The outputs for seed 1234567 that the generator's reference program prints."""
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert unsigned(noise.bits(1234567, torch.arange(4))) == published


def test_keys_are_hashes_of_their_words():
    """`key` and `derive` on Python's integers: mix(key + mix(word ^ golden)), a text's word being its BLAKE2b hash."""

    def derive(key: int, word: int | str) -> int:
        if isinstance(word, str):
            word = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")
        return splitmix_finaliser((key + splitmix_finaliser((word & MASK) ^ GOLDEN)) & MASK)

    expected = derive(derive(splitmix_finaliser(42), "mask"), 7)
    assert noise.key(42, "mask", 7) & MASK == expected
    forked = noise.derive(noise.key(42, "mask", 7), torch.tensor([3, -1]))
    assert unsigned(forked) == [derive(expected, 3), derive(expected, -1)]
    first = splitmix_finaliser((derive(expected, 3) + GOLDEN) & MASK)
    assert noise.uniform(forked[:1], torch.tensor([0])).item() == ((first >> 12) + 0.5) / 2**52


def test_numbers_stay_what_they_are():
    """A change of this code must not change the numbers of a run that is to be resumed."""
    key = noise.key(42, "mask", 7)
    assert key == 1263283834072541002
    assert noise.uniform(noise.derive(key, torch.tensor([3])), torch.tensor([0])).item() == 0.2734247695056292


def test_a_number_does_not_depend_on_what_else_is_asked():
    key = noise.key(1, "purpose", 2)
    index = torch.arange(1000)
    whole = noise.uniform(key, index)
    assert torch.equal(whole[123:456], noise.uniform(key, index[123:456]))
    assert torch.equal(whole.flip(0), noise.uniform(key, index.flip(0)))
    keys = noise.derive(key, index[:50])
    table = noise.uniform(keys[:, None], index[:20])
    for row in (0, 17, 49):
        assert torch.equal(table[row], noise.uniform(noise.derive(key, row), index[:20]))


def test_the_global_generator_plays_no_part():
    torch.manual_seed(0)
    first = noise.exponential(noise.key(3, "x"), torch.arange(9))
    torch.manual_seed(1)
    state = torch.get_rng_state()
    assert torch.equal(first, noise.exponential(noise.key(3, "x"), torch.arange(9)))
    assert torch.equal(state, torch.get_rng_state())


def test_keys_tell_words_seeds_and_their_order_apart():
    keys = [
        noise.key(0),
        noise.key(1),
        noise.key(0, "a"),
        noise.key(0, "b"),
        noise.key(1, "a"),
        noise.key(0, "a", 1),
        noise.key(0, 1, "a"),
        noise.key(0, 1),
        noise.key(0, 0, 1),
        noise.key(0, 1, 0),
        noise.key(0, "1"),
    ]
    assert len(set(keys)) == len(keys)


def test_uniforms_are_uniform_and_streams_independent():
    """Within one stream, across the streams of neighbouring keys, and of the products of neighbours.

    Six chi-squares, each to 5 standard deviations: a false alarm in about 1e-5 of all seeds. The seed is fixed.
    """
    index = torch.arange(200_000)
    stream = noise.uniform(noise.key(7, "uniform"), index)
    across = noise.uniform(noise.derive(noise.key(7, "across"), index), torch.zeros_like(index))
    steps = torch.stack([noise.uniform(noise.key(7, "time", s), torch.tensor([0])) for s in range(2000)]).flatten()
    grid = noise.uniform(noise.derive(noise.key(7, "grid"), torch.arange(500))[:, None], torch.arange(400))
    for values in (stream, across, steps, grid.flatten()):
        assert abs(chi_square(values)) < 5
    for values in (grid, grid.T):  # a pair of neighbours is one of 64 cells of the square
        cell = (values[:, :-1] * 8).floor() * 8 + (values[:, 1:] * 8).floor()
        assert abs(chi_square((cell.flatten() + 0.5) / 64)) < 5


def test_uniforms_are_never_0_or_1():
    """They are the centres of 2^52 equal cells."""
    values = noise.uniform(noise.key(0, "range"), torch.arange(100_000))
    assert values.dtype == torch.float64
    assert 0 < values.min() < 1e-3
    assert 1 - 1e-3 < values.max() < 1
    cells = (values - 0.5 * 2.0**-52) * 2.0**52
    assert torch.equal(cells, cells.round())


def test_exponentials_have_their_mean_and_variance():
    """n = 200,000: mean to 5 / sqrt(n), variance to 5 sqrt(8 / n); false alarm about 1e-6. The seed is fixed."""
    n = 200_000
    values = noise.exponential(noise.key(11, "exponential"), torch.arange(n))
    assert abs(values.mean().item() - 1) < 5 / n**0.5
    assert abs(values.var().item() - 1) < 5 * (8 / n) ** 0.5


def test_permutations():
    order = noise.permutation(noise.key(5, "order"), 1000)
    assert torch.equal(order.sort().values, torch.arange(1000))
    assert torch.equal(order, noise.permutation(noise.key(5, "order"), 1000))
    assert not torch.equal(order, noise.permutation(noise.key(6, "order"), 1000))
