import itertools

import numpy as np
import pytest
from torch.utils.data import DataLoader
from transformers import AutoTokenizer

from lib.data.batching import (
    MicroBatches,
    collator,
    dropout_seed,
    evaluation_batches,
    global_batches,
    padding_share,
)
from lib.data.tasks import IGNORED
from lib.demo.corpus import MODEL_DIR

LENGTHS = np.random.default_rng(0).integers(8, 100, size=3668).tolist()


def plan(**changes):
    arguments = {"seed": 1, "epoch": 0, "batch_size": 32, "num_micro_batches": 1, **changes}
    return global_batches(changes.pop("lengths", LENGTHS), **arguments)


def flat(batches):
    return [row for batch in batches for micro_batch in batch for row in micro_batch]


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


def test_micro_batches_differ_by_one_row_and_few_tokens():
    for batch in plan(num_micro_batches=4):
        sizes = [len(rows) for rows in batch]
        assert max(sizes) - min(sizes) <= 1
        means = [np.mean([LENGTHS[row] for row in rows]) for rows in batch]
        assert max(means) - min(means) < 8


def test_the_same_rows_form_a_batch_on_any_number_of_processes():
    alone = [sorted(rows) for batch in plan() for rows in batch]
    shared = [sorted(flat([batch])) for batch in plan(num_micro_batches=6)]
    assert alone == shared


def test_order_follows_from_seed_and_epoch():
    assert plan() == plan()
    assert plan() != plan(epoch=1)
    assert plan() != plan(seed=2)


def test_batches_are_not_the_same_company_every_epoch():
    first, second = ({frozenset(rows) for b in plan(epoch=epoch) for rows in b} for epoch in (0, 1))
    assert not first & second


def test_grouping_leaves_little_padding():
    def share(**changes):
        return padding_share(LENGTHS, [rows for batch in plan(**changes) for rows in batch])

    assert share() < 0.03
    assert share(length_grouping=False) > 0.3


def test_padding_share_by_hand():
    # Rows of 2 and 4 tokens make 8 places, 6 of them real; a row alone has no padding.
    assert padding_share([2, 4, 5], [[0, 1], [2]]) == pytest.approx(1 - 11 / 13)


def test_the_longest_rows_come_first():
    assert max(LENGTHS) == max(LENGTHS[row] for row in plan()[0][0])


def test_fewer_rows_than_micro_batches_leave_empty_ones():
    batches = global_batches([5, 6, 7], seed=0, epoch=0, batch_size=8, num_micro_batches=4)
    assert [len(rows) for rows in batches[0]] == [1, 1, 1, 0]


@pytest.mark.parametrize(("num_rows", "num_processes"), [(408, 3), (408, 2), (2, 3), (64, 1)])
def test_evaluation_gives_each_process_as_many_batches(num_rows, num_processes):
    batches = evaluation_batches([9] * num_rows, batch_size=32, num_processes=num_processes)
    assert len(batches) % num_processes == 0
    assert sorted(row for rows in batches for row in rows) == list(range(num_rows))
    assert max(map(len, batches)) <= 32


def test_sampler_starts_at_any_update():
    sampler = MicroBatches(lambda epoch: plan(epoch=epoch, num_micro_batches=2))
    sampler.start(epoch=3)
    whole = list(sampler)
    sampler.start(epoch=3, first=10)
    assert list(sampler) == whole[20:]
    sampler.start(epoch=3, first=10, last=12)
    assert list(sampler) == whole[20:24]
    assert len(sampler) == 4


@pytest.mark.parametrize("num_processes", [1, 2, 3])
def test_accelerate_deals_batches_of_any_size_round_robin(num_processes):
    """What the sampler relies on; would notice if `BatchSamplerShard` changed."""
    from accelerate.data_loader import prepare_data_loader

    lengths = LENGTHS[:53]
    batches = global_batches(
        lengths, seed=0, epoch=0, batch_size=8, num_micro_batches=2 * num_processes
    )
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
    in_order = [rows for batch in batches for rows in batch]
    assert dealt == [in_order[index::num_processes] for index in range(num_processes)]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL_DIR)


def row(length, number=0):
    return {"input_ids": [5] * length, "attention_mask": [1] * length, "labels": 1, "row": number}


COLUMNS = ["input_ids", "attention_mask"]


def test_pads_to_the_longest_row(tokenizer):
    collate = collator(tokenizer, columns=COLUMNS, max_length=64, pad_to_max_length=False)
    batch = collate([row(3), row(7, 1)])
    assert batch["input_ids"].shape == (2, 7)
    assert batch["attention_mask"].sum(dim=1).tolist() == [3, 7]
    assert batch["labels"].tolist() == [1, 1]
    assert batch["row"].tolist() == [0, 1]


def test_pads_to_max_length(tokenizer):
    collate = collator(tokenizer, columns=COLUMNS, max_length=64, pad_to_max_length=True)
    assert collate([row(3)])["input_ids"].shape == (1, 64)


def test_fills_an_empty_micro_batch_with_a_row_that_does_not_count(tokenizer):
    collate = collator(tokenizer, columns=COLUMNS, max_length=64, pad_to_max_length=False)
    batch = collate([])
    assert batch["labels"].tolist() == [IGNORED]
    assert batch["row"].tolist() == [-1]
    assert batch["input_ids"].tolist() == [tokenizer("")["input_ids"]]


def test_compiled_shapes_are_few(tokenizer):
    collate = collator(
        tokenizer, columns=COLUMNS, max_length=64, pad_to_max_length=False, num_rows=4
    )
    shapes = {
        tuple(collate([row(length)] * count)["input_ids"].shape)
        for length in range(2, 65)
        for count in range(5)
    }
    assert shapes == {(4, 16), (4, 32), (4, 48), (4, 64)}
    assert collate([row(3)] * 2)["labels"].tolist() == [1, 1, IGNORED, IGNORED]


def test_dropout_seeds_differ():
    places = list(itertools.product(range(3), range(9), range(2), range(2)))
    assert len({dropout_seed(*place) for place in places}) == len(places)
