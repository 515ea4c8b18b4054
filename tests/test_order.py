import pickle
from collections import Counter
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssl_vit.config import InputError
from ssl_vit.data import order as order_module
from ssl_vit.data.loader import Pixels, TrainBatches
from ssl_vit.data.order import (
    Order,
    Stream,
    block_rows,
    derive_seed,
    permutation,
    rank_positions,
    replacement_positions,
    steps_of,
)

sizes = st.lists(st.integers(0, 40), min_size=1, max_size=8).filter(lambda s: sum(s) > 0)
lanes = st.integers(1, 16)
windows = st.integers(1, 50)
seeds = st.integers(0, 2**64)
GOLDEN = {
    "seed": 8493733112532773764,
    "seed3": 3034334815109854690,
    "permutation": [7, 2, 6, 5, 3, 0, 4, 1],
    "order": [82, 33, 54, 4, 28, 37, 56, 0, 38, 7],
    "stream": [(1, 15), (1, 15), (1, 24), (1, 13), (0, 59), (0, 45), (0, 5)],
}
quick = settings(max_examples=60, deadline=None)


def epoch(order: Order, number: int) -> list[int]:
    start = number * order.epoch_size
    return [order.sample(entry) for entry in range(start, start + order.epoch_size)]


@quick
@given(sizes, seeds, lanes, windows, st.integers(0, 10**9))
def test_an_epoch_is_distinct_samples_and_drops_less_than_a_row(shard_sizes, seed, num_lanes, window, number):
    order = Order(shard_sizes, seed, num_lanes, window)
    samples = epoch(order, number)
    assert len(set(samples)) == order.epoch_size > 0
    assert set(samples) <= set(range(order.num_samples))
    assert order.epoch_size % order.num_lanes == 0
    assert order.num_samples - order.epoch_size < num_lanes


@quick
@given(sizes, seeds, lanes, windows, st.data())
def test_random_access_equals_sequential_access(shard_sizes, seed, num_lanes, window, data):
    sequential = Order(shard_sizes, seed, num_lanes, window)
    expected = [sequential.sample(entry) for entry in range(3 * sequential.epoch_size)]
    entries = data.draw(st.lists(st.integers(0, len(expected) - 1), max_size=10))
    assert [Order(shard_sizes, seed, num_lanes, window).sample(entry) for entry in entries] == [
        expected[entry] for entry in entries
    ]
    travelled = pickle.loads(pickle.dumps(sequential))
    assert [travelled.sample(entry) for entry in entries] == [expected[entry] for entry in entries]


@quick
@given(sizes, seeds, lanes, windows)
def test_a_lane_is_a_stretch_of_the_line_read_window_by_window(shard_sizes, seed, num_lanes, window):
    order = Order(shard_sizes, seed, num_lanes, window)
    offset, ends, shifts = order._line(0)
    line = [at + shifts[int(np.searchsorted(ends, at, side="right"))] for at in range(order.num_samples)]
    assert sorted(line) == list(range(order.num_samples))
    line = line[offset:] + line[:offset]
    samples = epoch(order, 0)
    for lane in range(order.num_lanes):
        stretch = line[lane * order.lane_length : (lane + 1) * order.lane_length]
        mixed = samples[lane :: order.num_lanes]
        for start in range(0, order.lane_length, window):
            assert sorted(mixed[start : start + window]) == sorted(stretch[start : start + window])


def test_what_is_left_out_moves_even_with_one_shard():
    order = Order([71], seed=0, num_lanes=8)
    left_out = [frozenset(range(71)) - frozenset(epoch(order, number)) for number in range(30)]
    assert all(len(samples) == 7 for samples in left_out)
    assert len(set(left_out)) > 15
    assert frozenset.union(*left_out) == frozenset(range(71))


def test_seeds_and_epochs_differ_and_shards_are_mixed():
    order = Order([100] * 10, seed=0)
    assert epoch(order, 0) != epoch(order, 1) != epoch(Order([100] * 10, seed=1), 1)
    assert len({sample // 100 for sample in epoch(order, 0)[:64]}) > 5


def test_fewer_samples_than_lanes_are_one_lane():
    order = Order([3, 2], seed=0, num_lanes=64)
    assert (order.num_lanes, order.epoch_size) == (1, 5)
    with pytest.raises(InputError, match="no samples"):
        Order([0, 0], seed=0)


def test_the_order_never_silently_changes():
    """Pinned: another order would break the resume of every run begun before the change."""
    assert derive_seed(0) == GOLDEN["seed"]
    assert derive_seed(1, 2, 3) == GOLDEN["seed3"]
    assert permutation(8, 5).tolist() == GOLDEN["permutation"]
    order = Order([30, 0, 50, 21], seed=7, num_lanes=4, window=10)
    assert [order.sample(entry) for entry in (*range(8), 100, 1234567)] == GOLDEN["order"]
    stream = Stream([order, Order([40], seed=8, num_lanes=4)], seed=9, weights=[3, 1], repeats=2)
    assert [stream.locate(position) for position in (0, 1, 2, 9, 100, 1001, 10**6)] == GOLDEN["stream"]


def test_derived_seeds():
    assert len({derive_seed(a, b) for a in range(30) for b in range(30)}) == 900
    assert derive_seed(1, 23) != derive_seed(12, 3)
    assert 0 <= derive_seed(2**70, np.int64(3)) < 2**64
    with pytest.raises(ValueError, match=">= 0"):
        derive_seed(0, -1)


def test_permutations_are_uniform():
    counts = Counter(tuple(permutation(3, i).tolist()) for i in range(6000))
    assert len(counts) == 6
    assert all(abs(count - 1000) < 150 for count in counts.values())


@quick
@given(st.lists(sizes, min_size=1, max_size=4), seeds, st.integers(1, 8), st.integers(1, 4), st.data())
def test_each_source_runs_its_own_stream(sources, seed, num_lanes, repeats, data):
    weights = data.draw(st.none() | st.lists(st.integers(1, 9), min_size=len(sources), max_size=len(sources)))
    orders = [Order(shard_sizes, derive_seed(seed, i), num_lanes) for i, shard_sizes in enumerate(sources)]
    stream = Stream(orders, seed, weights, repeats)
    block = stream.block * stream.num_lanes * repeats if len(orders) > 1 else 100 * repeats
    located = [stream.locate(position) for position in range(2 * block)]
    for copy in range(repeats):
        assert located[copy::repeats] == located[::repeats]
    assert stream.epoch_size == sum(order.epoch_size for order in orders)
    for source, order in enumerate(orders):
        mine = [sample for number, sample in located[::repeats] if number == source]
        assert mine == [order.sample(entry) for entry in range(len(mine))]
        if len(orders) > 1:
            assert sum(number == source for number, _ in located[:block]) == (
                stream.rows[source] * stream.num_lanes * repeats
            )
    again = pickle.loads(pickle.dumps(stream))
    assert again.locate(2 * block - 1) == located[-1]


@pytest.mark.parametrize(
    ("weights", "rows"),
    [
        ([1], [64]),
        ([0.7, 0.3], [49, 21]),
        ([1 / 3, 2 / 3], [22, 44]),
        ([0.125, 0.875], [8, 56]),
        ([1e-6, 1], [1, 1023]),
        ([1000, 1, 22], [1000, 1, 22]),
    ],
)
def test_blocks_hold_exact_counts(weights, rows):
    assert block_rows(weights) == rows


@quick
@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=6))
def test_any_weights_give_a_bounded_block_close_to_them(weights):
    rows = block_rows(weights)
    assert min(rows) >= 1
    assert 64 <= sum(rows) <= 1024
    for row, weight in zip(rows, weights, strict=True):
        assert abs(row / sum(rows) - weight / sum(weights)) <= len(weights) / 1000


@pytest.mark.parametrize("weights", [[1.0], [1, 0], [1, -1], [1, float("nan")]])
def test_bad_weights_are_named(weights):
    orders = [Order([10], 0), Order([10], 1)]
    with pytest.raises(InputError, match="weight"):
        Stream(orders, 0, weights)


@quick
@given(st.integers(0, 10**6), st.integers(1, 16), st.integers(1, 12), st.integers(1, 64))
def test_ranks_share_the_global_batch(step, num_ranks, multiple, num_lanes):
    batch_size = num_ranks * multiple
    parts = [rank_positions(step, rank, num_ranks, batch_size, num_lanes).tolist() for rank in range(num_ranks)]
    assert all(part == sorted(part) and len(part) == multiple for part in parts)
    assert sorted(position for part in parts for position in part) == list(
        range(step * batch_size, (step + 1) * batch_size)
    )


def test_ranks_keep_to_their_lanes():
    for rank in range(4):
        positions = np.concatenate([rank_positions(step, rank, 4, 128, 64) for step in range(3)])
        assert set(positions % 64) == set(range(rank * 16, rank * 16 + 16))


@quick
@given(st.integers(0, 10**6), st.integers(1, 50))
def test_replacements_stay_in_the_global_batch(position, batch_size):
    others = list(replacement_positions(position, batch_size))
    batch = range(position // batch_size * batch_size, (position // batch_size + 1) * batch_size)
    assert sorted([*others, position]) == list(batch)
    assert list(islice(others, 1)) == ([] if batch_size == 1 else [batch[(position + 1) % batch_size]])


def test_steps_count_epochs_exactly():
    assert steps_of(0.1, 3000, 100) == 3
    assert steps_of(1, 3001, 100) == 31
    assert steps_of(300, 1281152, 4096) == 93835
    assert steps_of(0, 10, 3) == 0


def streams(draw: st.DrawFn, repeats: int) -> Stream:
    sources = draw(st.lists(sizes, min_size=1, max_size=3))
    weights = draw(st.none() | st.lists(st.integers(1, 9), min_size=len(sources), max_size=len(sources)))
    seed, num_lanes, window = draw(seeds), draw(lanes), draw(windows)
    orders = [Order(counts, derive_seed(seed, i), num_lanes, window) for i, counts in enumerate(sources)]
    return Stream(orders, seed, weights, repeats)


@st.composite
def readings(draw: st.DrawFn) -> tuple[Stream, int, int, int, int, int]:
    """A stream; ranks, micro-batch size and accumulation, whose product is the global batch; workers; repeats."""
    repeats = draw(st.integers(1, 3))
    stream = streams(draw, repeats)
    num_ranks, micro, accumulation = draw(st.integers(1, 16)), draw(st.integers(1, 6)), draw(st.integers(1, 3))
    return stream, num_ranks, micro, accumulation, draw(st.integers(0, 8)), repeats


def read_steps(
    stream: Stream, steps: range, num_ranks: int, micro: int, accumulation: int, workers: int
) -> dict[int, tuple[int, int]]:
    """The place in the data of each position of some steps, read by ranks and their workers, each with its own copy."""
    batch_size, found = num_ranks * micro * accumulation, {}
    for rank in range(num_ranks):
        batches = TrainBatches([], stream, dict, Pixels((), ()), 0, batch_size, micro, rank, num_ranks)
        copies = [pickle.loads(pickle.dumps(batches)) for _ in range(max(workers, 1))]
        for item in range(steps.start * accumulation, steps.stop * accumulation):
            copy = copies[item % len(copies)]
            for position in copy.positions(item):
                assert position not in found
                found[position] = copy.stream.locate(position)
    return found


@quick
@given(readings(), st.integers(0, 10**6))
def test_a_step_is_the_same_whoever_reads_it(reading, step):
    """The union over ranks and micro-batches is exactly the step's positions, each leading to the same sample."""
    stream, num_ranks, micro, accumulation, workers, _ = reading
    batch_size = num_ranks * micro * accumulation
    found = read_steps(stream, range(step, step + 2), num_ranks, micro, accumulation, workers)
    alone = {position: stream.locate(position) for position in range(step * batch_size, (step + 2) * batch_size)}
    assert found == alone
    assert found == read_steps(stream, range(step, step + 2), 1, batch_size, 1, 0)


@quick
@given(readings(), st.integers(0, 1000))
def test_an_epoch_has_each_sample_once_but_for_the_remainder(reading, number):
    stream, num_ranks, micro, accumulation, workers, repeats = reading
    stream = Stream(stream.orders[:1], stream.seed, repeats=repeats)
    (order,) = stream.orders
    first, last = number * order.epoch_size * repeats, (number + 1) * order.epoch_size * repeats
    batch_size = num_ranks * micro * accumulation
    steps = range(first // batch_size, -(-last // batch_size))
    found = read_steps(stream, steps, num_ranks, micro, accumulation, workers)
    times = Counter(found[position] for position in range(first, last))
    assert set(times.values()) == {repeats}
    assert order.num_samples - len(times) == order.num_samples % order.num_lanes


@quick
@given(readings(), st.integers(0, 10**6))
def test_mixed_sources_have_their_exact_counts_in_every_block(reading, block):
    stream, *_, repeats = reading
    length = stream.block * stream.num_lanes * repeats
    counts = Counter(stream.locate(position)[0] for position in range(block * length, (block + 1) * length, repeats))
    if len(stream.orders) > 1:
        assert [counts[source] for source in range(len(stream.orders))] == [n * stream.num_lanes for n in stream.rows]


@quick
@given(sizes, seeds, lanes, windows, st.integers(0, 10**9))
def test_a_late_step_costs_no_more_than_the_first(shard_sizes, seed, num_lanes, window, step):
    """What is computed to find the samples of a step: the shards of its epoch and a window of each lane it reads."""
    order = Order(shard_sizes, seed, num_lanes, window)

    def cost(number: int) -> list[int]:
        drawn: list[int] = []

        def counted(size: int, *keys: int) -> np.ndarray:
            drawn.append(size)
            return permutation(size, *keys)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(order_module, "permutation", counted)
            fresh = Order(shard_sizes, seed, num_lanes, window)
            for entry in range(number * order.num_lanes, (number + 1) * order.num_lanes):
                fresh.sample(entry)
        return drawn

    first, late = cost(0), cost(step)
    assert len(late) == len(first) == order.num_lanes + 1
    assert sum(late) <= sum(first) <= len(shard_sizes) + order.num_lanes * window
