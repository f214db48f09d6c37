"""Pretrain the tiny BERT that `--demo` fine-tunes: `python -m lib.demo.pretrain`.

A WordPiece tokenizer and a BERT are trained from scratch, on pairs that the generator of the demo
makes from other seeds. Pairs that are in the demo's splits are dropped, so no label of the demo is
seen. There are two stages:

1. Self-supervised training on equivalent pairs. Half of each batch has masked words, as in BERT.
   In half of the rest some names and numbers of the second sentence are replaced by others of
   their kind, or two are swapped. The model predicts for each word whether it was replaced, as in
   ELECTRA, restores the original, and predicts from the pooled output whether any word was
   replaced.
2. Intermediate-task training, as in Phang et al. 2018 (STILTs): the demo's own task, with labels,
   on other pairs, half of them equivalent and half near misses of every kind.

Both are needed. From random weights the second stage learned nothing in 700 steps, and fine-tuning
stays at the majority class (0.6625). The first stage contains no opposite or negated verbs: without
the second, fine-tuning misses them and swapped roles (validation accuracy 0.79 instead of 0.926).
No head is saved, so fine-tuning starts with a new classifier, but the encoder has already learned
the demo's task.

Pretraining takes five minutes on one core. On the same machine, with the same library versions, it
writes the same files bit for bit.
"""

import argparse
import random
import string
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import BertWordPieceTokenizer
from torch import Tensor
from torch.nn import functional
from transformers import BertConfig, BertForPreTraining, BertTokenizer, set_seed

from lib.demo import corpus, generator
from lib.demo.events import word_classes

SEED = 7
NUM_PAIRS = 50_000
WORD_STEPS = 1500
WORD_BATCH_SIZE = 64
WORD_LEARNING_RATE = 3e-3
PAIR_STEPS = 3500
PAIR_BATCH_SIZE = 32
PAIR_LEARNING_RATE = 1e-3
MASKED_WORDS = 0.25
SWAPPED_PAIRS = 0.3
DETECTION_WEIGHT = 5.0
MAX_LENGTH = 96
DROPOUT = 0.1
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]

Row = tuple[list[int], list[int]]


def make_pairs_outside_demo(
    num_pairs: int, *, seed: int, positive_share: float
) -> list[dict[str, Any]]:
    """Generate pairs and drop those in a split of the demo."""
    # The task is symmetric: the order of the sentences does not matter.
    taken = {
        frozenset((pair["sentence1"], pair["sentence2"]))
        for name in corpus.SPLITS
        for pair in corpus.load_split(name)
    }
    pairs = generator.make_pairs(num_pairs, seed=seed, positive_share=positive_share)
    return [
        pair for pair in pairs if frozenset((pair["sentence1"], pair["sentence2"])) not in taken
    ]


def word_stage_pairs(num_pairs: int = NUM_PAIRS) -> list[dict[str, Any]]:
    """Equivalent pairs for the first stage."""
    return make_pairs_outside_demo(num_pairs, seed=SEED, positive_share=1.0)


def pair_stage_pairs(num_pairs: int = NUM_PAIRS) -> list[dict[str, Any]]:
    """Labeled pairs for the second stage."""
    return make_pairs_outside_demo(num_pairs, seed=SEED + 1, positive_share=0.5)


def train_tokenizer(sentences: list[str]) -> BertTokenizer:
    """Train an uncased WordPiece tokenizer on the sentences."""
    trained = BertWordPieceTokenizer(lowercase=True)
    trained.train_from_iterator(sentences, vocab_size=2000, show_progress=False)
    # The trainer breaks ties and numbers pieces in a random order. That changes only intermediate
    # pieces, which the text does not use: drop them.
    used = {piece for encoding in trained.encode_batch(sentences) for piece in encoding.tokens}
    letters = {*string.ascii_lowercase, *string.digits}
    pieces = used | letters | {f"##{letter}" for letter in letters}
    vocabulary = SPECIAL + sorted(pieces - set(SPECIAL))
    return BertTokenizer(
        vocab={piece: index for index, piece in enumerate(vocabulary)},
        do_lower_case=True,
        model_max_length=MAX_LENGTH,
    )


def pack(tokenizer: BertTokenizer, pairs: list[dict[str, Any]]) -> list[Row]:
    """Tokenize each pair into one sequence: ids and token types."""
    encoded = tokenizer([p["sentence1"] for p in pairs], [p["sentence2"] for p in pairs])
    return list(zip(encoded["input_ids"], encoded["token_type_ids"], strict=True))


def batches(rows: list[Row], batch_size: int, rng: random.Random) -> Iterator[list[int]]:
    """Yield shuffled batches of indices of rows of similar length, epoch after epoch."""
    order = list(range(len(rows)))
    pool = 20 * batch_size
    while True:
        rng.shuffle(order)
        for start in range(0, len(order), pool):
            chunk = sorted(order[start : start + pool], key=lambda index: len(rows[index][0]))
            grouped = [chunk[i : i + batch_size] for i in range(0, len(chunk), batch_size)]
            rng.shuffle(grouped)
            for indices in grouped:
                rng.shuffle(indices)
                yield indices


def replace_words(row: Row, kinds: dict[int, list[int]], rng: random.Random) -> list[int]:
    """Replace words of the second sentence by others of their kind; return the new ids."""
    ids, types = list(row[0]), row[1]
    places = [at for at, second in enumerate(types) if second and ids[at] in kinds]
    if rng.random() < SWAPPED_PAIRS:
        for at in places:
            twins = [to for to in places if to > at and ids[to] in kinds[ids[at]]]
            if twins:
                to = rng.choice(twins)
                ids[at], ids[to] = ids[to], ids[at]
                return ids
    share = rng.random()
    for at in [at for at in places if rng.random() < share] or [rng.choice(places)]:
        ids[at] = rng.choice([other for other in kinds[ids[at]] if other != ids[at]])
    return ids


def attend_to_same_words(model: BertForPreTraining) -> None:
    """Initialize two heads of the first layer to attend to other occurrences of the same word."""
    # From plain random weights the model needs thousands of steps to discover that the two
    # sentences can be compared.
    query, key = (
        model.get_parameter(f"bert.encoder.layer.0.attention.self.{name}.weight")
        for name in ("query", "key")
    )
    rows = slice(2 * model.config.hidden_size // model.config.num_attention_heads)
    with torch.no_grad():
        for name in ("position", "token_type"):
            model.get_parameter(f"bert.embeddings.{name}_embeddings.weight").mul_(0.3)
        query[rows] *= 2
        key[rows] = query[rows]


class Batch(NamedTuple):
    """Tokenized pairs: masked in the first half, with replaced words in some of the second."""

    inputs: dict[str, Tensor]
    words: Tensor
    replaced: Tensor
    half: int


class Batcher:
    """Makes batches for the three tasks of the first stage."""

    def __init__(self, tokenizer: BertTokenizer, rng: random.Random) -> None:
        self.tokenizer = tokenizer
        self.rng = rng
        vocabulary = tokenizer.get_vocab()
        self.special = {vocabulary[piece] for piece in SPECIAL}
        self.mask = vocabulary["[MASK]"]
        self.kinds: dict[int, list[int]] = {}
        for words in word_classes():
            members = [vocabulary[word] for word in words]
            self.kinds.update(dict.fromkeys(members, members))

    def _hide(self, token: int) -> int:
        hide = token not in self.special and self.rng.random() < MASKED_WORDS
        return self.mask if hide else token

    def __call__(self, rows: list[Row]) -> Batch:
        """Mask the first half of the rows and replace words in half of the others."""
        half = len(rows) // 2
        shown = [[self._hide(token) for token in ids] for ids, _ in rows[:half]]
        for row in rows[half:]:
            spoil = self.rng.random() < 0.5
            shown.append(replace_words(row, self.kinds, self.rng) if spoil else row[0])
        features = [
            {"input_ids": new, "token_type_ids": types}
            for new, (_, types) in zip(shown, rows, strict=True)
        ]
        inputs = dict(self.tokenizer.pad(features, return_tensors="pt"))
        truth = self.tokenizer.pad({"input_ids": [ids for ids, _ in rows]}, return_tensors="pt")
        changed = inputs["input_ids"] != truth["input_ids"]
        replaceable = torch.isin(truth["input_ids"], torch.tensor(list(self.kinds)))
        replaceable &= inputs["token_type_ids"].bool()
        words = truth["input_ids"].masked_fill(~changed, -1)
        words[half:] = truth["input_ids"][half:].masked_fill(~replaceable[half:], -1)
        return Batch(inputs, words, changed.float(), half)


def word_stage_loss(model: BertForPreTraining, detector: torch.nn.Linear, batch: Batch) -> Tensor:
    """Sum the losses of the first stage."""
    states, pooled = model.bert(**batch.inputs)[:2]
    hidden = batch.words >= 0
    words = functional.cross_entropy(model.cls.predictions(states[hidden]), batch.words[hidden])
    second = batch.inputs["token_type_ids"].bool() & batch.inputs["attention_mask"].bool()
    second[: batch.half] = False
    detection = functional.binary_cross_entropy_with_logits(
        detector(states[second])[:, 0], batch.replaced[second]
    )
    pairs = functional.cross_entropy(
        model.cls.seq_relationship(pooled[batch.half :]),
        batch.replaced[batch.half :].any(1).long(),
    )
    return words + DETECTION_WEIGHT * detection + pairs


def minimize(
    next_loss: Callable[[], Tensor],
    parameters: list[torch.nn.Parameter],
    learning_rate: float,
    num_steps: int,
) -> None:
    """Run AdamW with a learning rate that rises and falls linearly."""
    optimizer = torch.optim.AdamW(
        parameters, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        learning_rate,
        total_steps=num_steps,
        pct_start=0.06,
        anneal_strategy="linear",
        cycle_momentum=False,
    )
    for step in range(1, num_steps + 1):
        loss = next_loss()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f"step {step}/{num_steps} loss {loss.item():.4f}", flush=True)


def train_on_words(
    model: BertForPreTraining,
    tokenizer: BertTokenizer,
    pairs: list[dict[str, Any]],
    num_steps: int,
) -> None:
    """Run the first, self-supervised stage."""
    rng = random.Random(SEED)
    rows = pack(tokenizer, pairs)
    order = batches(rows, WORD_BATCH_SIZE, rng)
    make_batch = Batcher(tokenizer, rng)
    detector = torch.nn.Linear(model.config.hidden_size, 1)

    def next_loss() -> Tensor:
        return word_stage_loss(model, detector, make_batch([rows[i] for i in next(order)]))

    parameters = [*model.parameters(), *detector.parameters()]
    minimize(next_loss, parameters, WORD_LEARNING_RATE, num_steps)


def train_on_pairs(
    model: BertForPreTraining,
    tokenizer: BertTokenizer,
    pairs: list[dict[str, Any]],
    num_steps: int,
) -> None:
    """Run the second stage, on labeled pairs."""
    rows = pack(tokenizer, pairs)
    order = batches(rows, PAIR_BATCH_SIZE, random.Random(SEED))
    classifier = torch.nn.Linear(model.config.hidden_size, 2)

    def next_loss() -> Tensor:
        chosen = next(order)
        features = [{"input_ids": rows[i][0], "token_type_ids": rows[i][1]} for i in chosen]
        pooled = model.bert(**tokenizer.pad(features, return_tensors="pt")).pooler_output
        labels = torch.tensor([pairs[i]["label"] for i in chosen])
        return functional.cross_entropy(classifier(pooled), labels)

    parameters = [*model.bert.parameters(), *classifier.parameters()]
    minimize(next_loss, parameters, PAIR_LEARNING_RATE, num_steps)


def pretrain(output_dir: Path, *, num_pairs: int, max_steps: int) -> None:
    """Train tokenizer and model and save both into `output_dir`."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    set_seed(SEED)
    pairs = word_stage_pairs(num_pairs)
    tokenizer = train_tokenizer([p[key] for p in pairs for key in ("sentence1", "sentence2")])
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=256,
        max_position_embeddings=MAX_LENGTH,
        initializer_range=0.1,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = BertForPreTraining(config)
    attend_to_same_words(model)
    model.train()
    train_on_words(model, tokenizer, pairs, min(max_steps, WORD_STEPS))
    train_on_pairs(model, tokenizer, pair_stage_pairs(num_pairs), min(max_steps, PAIR_STEPS))
    model.config.hidden_dropout_prob = model.config.attention_probs_dropout_prob = DROPOUT
    model.bert.save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)


def main() -> None:
    """Parse the command line and pretrain."""
    parser = argparse.ArgumentParser(description="Pretrain the tiny BERT of --demo.")
    parser.add_argument("--output_dir", type=Path, default=corpus.MODEL_DIR)
    parser.add_argument("--num_pairs", type=int, default=NUM_PAIRS, help="pairs of each stage")
    parser.add_argument("--max_steps", type=int, default=PAIR_STEPS, help="maximum for each stage")
    args = parser.parse_args()
    pretrain(args.output_dir, num_pairs=args.num_pairs, max_steps=args.max_steps)


if __name__ == "__main__":
    main()
