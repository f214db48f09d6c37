import itertools

import numpy as np
import pytest
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, DataCollatorWithPadding

from lib.data.batching import (
    FillingCollator,
    MicroBatches,
    compiled_multiple,
    deal,
    dropout_seed,
    num_tokens,
    padding_share,
    padding_shares,
    plan_epoch,
    plan_evaluation,
)
from lib.data.tasks import IGNORED
from lib.demo.corpus import MODEL_DIR

LENGTHS = np.random.default_rng(0).integers(8, 100, size=3668)


def planned(lengths=LENGTHS, **changes):
    arguments = {"seed": 1, "epoch": 0, "batch_size": 32, "num_micro_batches": 1, **changes}
    return plan_epoch(lengths, **arguments)


def plan(**changes):
    """As lists of lists of lists of rows."""
    return [[rows.tolist() for rows in batch] for batch in planned(**changes)]


def flat(batches):
    return [row for batch in batches for micro_batch in batch for row in micro_batch]


def array_split(items, num_parts):
    """As numpy's, on a list."""
    size, longer = divmod(len(items), num_parts)
    cuts = [0]
    for number in range(num_parts):
        cuts.append(cuts[-1] + size + (number < longer))
    return [items[first:last] for first, last in itertools.pairwise(cuts)]


def plain_plan(lengths, *, seed, epoch, batch_size, num_micro_batches, length_grouping):
    """The order that checkpoints of earlier versions rely on, written with lists."""
    generator = np.random.default_rng([seed, epoch])
    order = generator.permutation(len(lengths)).tolist()
    num_batches = -(-len(order) // batch_size)
    batches = array_split(order, num_batches)
    if length_grouping:
        windows = array_split(batches, max(1, round(num_batches / 50)))
        batches = []
        for window in windows:
            rows = sorted((row for batch in window for row in batch), key=lambda row: lengths[row])
            for batch in window:
                batches.append(rows[: len(batch)])
                rows = rows[len(batch) :]
        batches = [batches[number] for number in generator.permutation(num_batches)]
        longest = [max(lengths[row] for row in batch) for batch in batches]
        batches.insert(0, batches.pop(longest.index(max(longest))))
    return [
        [batch[first::num_micro_batches] for first in range(num_micro_batches)] for batch in batches
    ]


@pytest.mark.parametrize("length_grouping", [True, False])
@pytest.mark.parametrize(
    ("num_rows", "batch_size", "num_micro_batches"),
    [(3668, 32, 1), (3668, 16, 4), (3668, 1, 1), (57, 8, 3), (5, 8, 6), (1, 1, 1)],
)
def test_the_order_equals_a_plain_implementation(
    num_rows, batch_size, num_micro_batches, length_grouping
):
    for epoch in range(3):
        arguments = {
            "seed": 7,
            "epoch": epoch,
            "batch_size": batch_size,
            "num_micro_batches": num_micro_batches,
            "length_grouping": length_grouping,
        }
        lengths = LENGTHS[:num_rows]
        found = plan(lengths=lengths, by_tokens=num_micro_batches == 1, **arguments)
        assert found == plain_plan(lengths.tolist(), **arguments)


@pytest.mark.parametrize("length_grouping", [True, False])
@pytest.mark.parametrize("num_micro_batches", [1, 2, 3, 8])
def test_every_row_once(length_grouping, num_micro_batches):
    batches = plan(length_grouping=length_grouping, num_micro_batches=num_micro_batches)
    assert sorted(flat(batches)) == list(range(3668))
    assert all(len(batch) == num_micro_batches for batch in batches)


def test_batches_are_cut_evenly():
    # 3,668 rows in ceil(3668 / 32) = 115 batches: 103 of 32 and 12 of 31.
    sizes = sorted(len(batch[0]) for batch in plan())
    assert sizes == [31] * 12 + [32] * 103


def test_micro_batches_dealt_by_rows_differ_by_one_row_and_few_tokens():
    for batch in plan(num_micro_batches=4, by_tokens=False):
        sizes = [len(rows) for rows in batch]
        assert max(sizes) - min(sizes) <= 1
        means = [np.mean([LENGTHS[row] for row in rows]) for rows in batch]
        assert max(means) - min(means) < 8


@pytest.mark.parametrize(
    ("lengths", "parts"),
    [
        ([9, 3, 3, 3], [1, 3]),  # 9 tokens each, where an even cut has 18 and 6
        ([6, 5, 3, 2, 2, 2], [1, 2, 3]),  # 6, 10 and 6 tokens; an even cut has 12, 6 and 4
        ([4, 4, 4, 4, 4], [3, 2]),  # an even cut is as good as any
        ([7, 5], [1, 1, 0]),
        ([3, 0, 0], [1, 2]),  # a text may be empty
    ],
)
def test_long_rows_are_dealt_with_few_others(lengths, parts):
    assert deal(lengths, len(parts)) == parts


def test_no_cut_has_a_smaller_largest_part():
    """All cuts are tried."""
    generator = np.random.default_rng(0)
    for _ in range(200):
        num_rows = int(generator.integers(3, 11))
        num_parts = int(generator.integers(2, min(num_rows, 4) + 1))
        lengths = sorted(generator.integers(1, 60, num_rows).tolist(), reverse=True)

        def largest(counts, lengths=lengths):
            starts = np.cumsum(counts) - counts
            return max(n * lengths[start] for n, start in zip(counts, starts, strict=True))

        cuts = [
            counts
            for counts in itertools.product(range(1, num_rows + 1), repeat=num_parts)
            if sum(counts) == num_rows
        ]
        assert tuple(deal(lengths, num_parts)) in cuts
        assert largest(deal(lengths, num_parts)) == min(map(largest, cuts))


@pytest.mark.parametrize("length_grouping", [True, False])
def test_micro_batches_are_padded_to_few_tokens(length_grouping):
    """Where rows are of all lengths, an even number of them is no even amount of work."""
    by_tokens, by_rows = (
        [
            [num_tokens(LENGTHS, [rows])[1] for rows in batch]
            for batch in planned(
                num_micro_batches=8,
                batch_size=128,
                by_tokens=by_tokens,
                length_grouping=length_grouping,
            )
        ]
        for by_tokens in (True, False)
    )
    assert all(max(ours) <= max(theirs) for ours, theirs in zip(by_tokens, by_rows, strict=True))
    assert np.mean([max(ours) / np.mean(ours) for ours in by_tokens]) < 1.05
    if not length_grouping:
        assert np.sum(by_tokens) < 0.75 * np.sum(by_rows)


@pytest.mark.parametrize("length_grouping", [True, False])
@pytest.mark.parametrize("by_tokens", [True, False])
def test_batches_are_the_same_on_any_number_of_processes(length_grouping, by_tokens):
    options = {"length_grouping": length_grouping, "by_tokens": by_tokens}
    alone = [sorted(rows) for batch in plan(**options) for rows in batch]
    shared = [sorted(flat([batch])) for batch in plan(num_micro_batches=6, **options)]
    assert alone == shared


def test_order_follows_from_seed_and_epoch():
    assert plan() == plan()
    assert plan() != plan(epoch=1)
    assert plan() != plan(seed=2)


def test_batches_hold_other_rows_every_epoch():
    first, second = ({frozenset(rows) for b in plan(epoch=epoch) for rows in b} for epoch in (0, 1))
    assert not first & second


def test_grouping_leaves_little_padding():
    def share(**changes):
        return padding_share(LENGTHS, [rows for batch in planned(**changes) for rows in batch])

    assert share() < 0.03
    assert share(length_grouping=False) > 0.3


def test_padding_by_hand():
    # Rows of 2 and 4 tokens make 8 places, 6 of them real; a row alone has no padding, and a
    # micro-batch without rows no tokens.
    lengths = np.array([2, 4, 5])
    micro_batches = [np.array([0, 1]), np.array([], dtype=int), np.array([2])]
    assert num_tokens(lengths, micro_batches) == (11, 13, 4 + 16 + 25)
    assert padding_share(lengths, micro_batches) == pytest.approx(1 - 11 / 13)
    # Padded to multiples of 4: 2 x 4 and 1 x 8 places.
    assert num_tokens(lengths, micro_batches, lambda longest: -(-longest // 4) * 4)[:2] == (11, 16)


def test_padding_shares_of_an_epoch_by_hand(tokenizer):
    # At 2 rows an update: in order (3, 9) and (3, 9) make 36 places for 24 tokens, sorted none too
    # many, at a fixed length of 10 there are 40.
    lengths = np.array([3, 9, 3, 9])
    sorted_plan = planned(lengths=lengths, batch_size=2)
    shares = padding_shares(lengths, sorted_plan, collator(tokenizer, longest=10))
    assert shares == pytest.approx(
        {"fixed length": 1 - 24 / 40, "plain dynamic": 1 - 24 / 36, "this run": 0}
    )


def test_the_longest_rows_come_first():
    assert max(LENGTHS) == max(LENGTHS[row] for row in plan()[0][0])


def test_fewer_rows_than_micro_batches_leave_empty_ones():
    batches = planned(lengths=np.array([5, 6, 7]), batch_size=8, num_micro_batches=4)
    assert [len(rows) for rows in batches[0]] == [1, 1, 1, 0]


@pytest.mark.parametrize(("num_rows", "num_processes"), [(408, 3), (408, 2), (2, 3), (64, 1)])
def test_evaluation_gives_each_process_as_many_batches(num_rows, num_processes):
    sampled = MicroBatches(
        lambda _: plan_evaluation(np.full(num_rows, 9), batch_size=32, num_processes=num_processes)
    )
    batches = list(sampled)
    assert len(batches) % num_processes == 0
    assert sorted(row for rows in batches for row in rows) == list(range(num_rows))
    assert max(map(len, batches)) <= 32
    assert len(sampled) == len(batches)


def test_evaluation_starts_with_the_longest_rows():
    (batch,), (rest,) = plan_evaluation(np.array([4, 9, 2, 7]), batch_size=2, num_processes=1)
    assert (batch.tolist(), rest.tolist()) == ([1, 3], [0, 2])


def test_sampler_starts_at_any_update():
    sampler = MicroBatches(lambda epoch: planned(epoch=epoch, num_micro_batches=2))
    sampler.start(epoch=3)
    whole = list(sampler)
    sampler.start(epoch=3, first=10)
    assert list(sampler) == whole[20:]
    sampler.start(epoch=3, first=10, last=12)
    assert list(sampler) == whole[20:24]
    assert len(sampler) == 4
    assert sampler.batches.most_rows == 16


def test_an_epoch_is_planned_once():
    epochs = []
    sampler = MicroBatches(lambda epoch: epochs.append(epoch) or planned(epoch=epoch))
    for first in range(3):
        sampler.start(epoch=0, first=first)
    sampler.start(epoch=1)
    assert epochs == [0, 1]


@pytest.mark.parametrize("first", [0, 100_000])
def test_a_late_update_is_dealt_without_those_before(first):
    """A run that resumes there plans that epoch alone, and draws its micro-batches alone."""
    from accelerate.data_loader import prepare_data_loader

    epochs, drawn = [], []

    def plan(epoch):
        epochs.append(epoch)
        return planned(epoch=epoch, num_micro_batches=2)

    sampler = MicroBatches(plan, per_epoch=115, num_micro_batches=2)
    loader = prepare_data_loader(
        DataLoader(range(3668), batch_sampler=sampler, collate_fn=lambda r: drawn.append(r) or r),
        num_processes=2,
        process_index=0,
        even_batches=False,
        put_on_device=False,
    )
    dealt = [
        (rows, list(micro_batches))
        for rows, micro_batches in sampler.updates(loader, 2, first, first + 1)
    ]
    epoch, index = divmod(first, 115)
    mine, others = planned(epoch=epoch, num_micro_batches=2)[index]
    assert [[part.tolist() for part in rows] for rows, _ in dealt] == [
        [mine.tolist(), others.tolist()]
    ]
    assert epochs == [epoch]
    assert drawn == [mine.tolist()]


def test_an_update_is_repeated_when_its_number_of_micro_batches_changes():
    lengths = LENGTHS[:53]  # 7 updates an epoch
    sampler = MicroBatches(lambda epoch: planned(lengths=lengths, epoch=epoch, batch_size=8))
    loader = DataLoader(range(53), batch_sampler=sampler, collate_fn=list)
    seen = []
    for number, (rows, micro_batches) in enumerate(sampler.updates(loader, 1, 5, 9)):
        assert [batch.tolist() for batch in rows] == list(micro_batches)
        seen.append((len(rows), sorted(flat([rows]))))
        if number in (1, 4):  # the seventh, last of its epoch, and the ninth, last of all
            sampler.num_micro_batches *= 2
    whole = [sorted(row for rows in batch for row in rows) for epoch in (0, 1) for batch in
             plan(lengths=lengths, epoch=epoch, batch_size=8)]  # fmt: skip
    counts, updates = zip(*seen, strict=True)
    assert counts == (1, 1, 2, 2, 2, 4)
    assert list(updates) == [whole[number] for number in (5, 6, 6, 7, 8, 8)]


@pytest.mark.parametrize("num_processes", [1, 2, 3])
def test_accelerate_deals_batches_of_any_size_round_robin(num_processes):
    """The sampler relies on it; fails if `BatchSamplerShard` changes."""
    from accelerate.data_loader import prepare_data_loader

    lengths = LENGTHS[:53]
    batches = planned(lengths=lengths, batch_size=8, num_micro_batches=2 * num_processes)
    dealt = []
    for index in range(num_processes):
        loader = prepare_data_loader(
            DataLoader(
                range(53),
                batch_sampler=MicroBatches(lambda _: batches),
                collate_fn=lambda rows: rows,
            ),
            num_processes=num_processes,
            process_index=index,
            even_batches=False,
            put_on_device=False,
        )
        dealt.append(list(loader))
    in_order = [rows.tolist() for batch in batches for rows in batch]
    assert dealt == [in_order[index::num_processes] for index in range(num_processes)]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL_DIR)


def row(length, number=0):
    return {"input_ids": [5] * length, "attention_mask": [1] * length, "labels": 1, "row": number}


def collator(tokenizer, num_rows=None, longest=64, **padding):
    pad = DataCollatorWithPadding(tokenizer, **padding)
    return FillingCollator(pad, ["input_ids", "attention_mask"], longest, num_rows)


def test_pads_to_the_longest_row(tokenizer):
    batch = collator(tokenizer)([row(3), row(7, 1)])
    assert batch["input_ids"].shape == (2, 7)
    assert batch["attention_mask"].sum(dim=1).tolist() == [3, 7]
    assert batch["labels"].tolist() == [1, 1]
    assert batch["row"].tolist() == [0, 1]


def test_fills_an_empty_micro_batch_with_a_row_that_does_not_count(tokenizer):
    batch = collator(tokenizer)([])
    assert batch["labels"].tolist() == [IGNORED]
    assert batch["row"].tolist() == [-1]
    assert batch["input_ids"].tolist() == [tokenizer("[PAD]")["input_ids"]]
    assert batch["attention_mask"].all()  # the softmax of a row that is masked whole is NaN


def test_fills_with_rows_that_have_as_many_separators(tokenizer):
    """BART, which classifies at the last separator, refuses other rows."""
    batch = collator(tokenizer, num_rows=3)([row(3), row(7, 1)])
    assert batch["input_ids"][2].tolist() == batch["input_ids"][0].tolist()
    assert batch["row"].tolist() == [0, 1, -1]


@pytest.mark.parametrize(
    ("padding", "lengths"),
    [
        ({}, range(2, 65)),
        ({"padding": "max_length", "max_length": 64}, [64]),
        ({"pad_to_multiple_of": compiled_multiple(64)}, [16, 32, 48, 64]),
    ],
)
def test_the_padded_length_is_known_from_the_longest_row(tokenizer, padding, lengths):
    collate = collator(tokenizer, num_rows=4, **padding)
    shapes = set()
    for length in range(2, 65):
        shape = tuple(collate([row(length), row(2)])["input_ids"].shape)
        assert shape == (4, collate.padded_length(np.array([length]))[0])
        shapes.add(shape)
    assert shapes == {(4, length) for length in lengths}
    assert collate([row(3)] * 2)["labels"].tolist() == [1, 1, IGNORED, IGNORED]


def test_compiled_shapes_never_exceed_max_length():
    # Four lengths where quarters are whole, fewer where they are not.
    expected = {128: 32, 96: 24, 66: 22, 50: 25, 127: 127}
    assert {length: compiled_multiple(length) for length in expected} == expected


def test_dropout_seeds_differ():
    places = list(itertools.product(range(3), range(9), range(2), range(2)))
    assert len({dropout_seed(*place) for place in places}) == len(places)
