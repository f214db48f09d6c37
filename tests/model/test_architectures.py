"""Tiny random models of many architectures, each through a whole run on one process and two."""

import json
import math
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import MODEL_DIR, NUM_VALIDATION, assert_same_run, pairs, read_metrics
from models import load, tokenizer_of
from runs import run
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    DataCollatorWithPadding,
    GPT2Tokenizer,
    pipeline,
)

from lib.data.batching import FillingCollator
from lib.errors import InputError
from lib.model.layers import freeze_unused

PAD, CLS, SEP = 0, 2, 3  # of the tokenizer of the demo
ENCODER = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 66,
}
DECODER = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
# What each differs in from BERT, by its `model_type`.
SIZES = {
    "bert": ENCODER,
    "roberta": ENCODER,
    "distilbert": {
        "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32, "max_position_embeddings": 66,
    },
    "albert": {**ENCODER, "embedding_size": 8},
    "electra": {**ENCODER, "embedding_size": 8},
    "deberta-v2": {**ENCODER, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    "mpnet": ENCODER,
    "modernbert": {**ENCODER, "classifier_pooling": "mean"},
    "xlnet": {"d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 32},
    "t5": {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2},
    "bart": {
        "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
        "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32,
        "max_position_embeddings": 64,
    },
    "gpt2": DECODER,
}  # fmt: skip


def save_tokenizer(kind, folder):
    """The tokenizer of the demo as the architecture has its own; a BPE as GPT-2's for GPT-2.

    It names the special tokens as the model's configuration wants them.
    """
    if kind == "gpt2":
        return save_gpt2_tokenizer(folder)
    segments = ["token_type_ids"] if kind in ("bert", "albert", "electra", "xlnet") else []
    tokenizer = AutoTokenizer.from_pretrained(
        MODEL_DIR,
        bos_token="[CLS]",
        eos_token="[SEP]",
        model_input_names=["input_ids", "attention_mask", *segments],
        padding_side="left" if kind == "xlnet" else "right",
    )
    tokenizer.save_pretrained(folder)
    return {
        "vocab_size": len(tokenizer),
        "pad_token_id": PAD,
        "bos_token_id": CLS,
        "eos_token_id": SEP,
        "decoder_start_token_id": PAD,
    }


def save_gpt2_tokenizer(folder):
    """No tokens are put around the texts; the padding token is set as our error says."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        [row["sentence1"] for row in pairs(50, 1)],
        trainers.BpeTrainer(
            vocab_size=400,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            special_tokens=["<|endoftext|>"],
            show_progress=False,
        ),
    )
    tokenizer = GPT2Tokenizer(tokenizer_object=bpe)
    tokenizer.save_pretrained(folder)
    with pytest.raises(InputError) as refused:
        tokenizer_of(folder)
    token = re.search(r'add "pad_token": "(.+)" to tokenizer_config.json', str(refused.value))[1]
    change(folder / "tokenizer_config.json", pad_token=token)
    return {"vocab_size": len(tokenizer)}


def change(path, **settings):
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def changed(model, folder, file, **settings):
    """Return a copy of a model's folder with other settings in one of its files."""
    shutil.copytree(model, folder / model.name)
    change(folder / model.name / file, **settings)
    return folder / model.name


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folders of the pretrained models, by architecture."""
    folder = tmp_path_factory.mktemp("models")
    for kind, sizes in SIZES.items():
        special = save_tokenizer(kind, folder / kind)
        torch.manual_seed(0)
        config = AutoConfig.for_model(kind, **special, **sizes)
        AutoModel.from_config(config).save_pretrained(folder / kind)
    return folder


@pytest.fixture(scope="module")
def runs_of(flags, saved, tmp_path_factory):
    """Return the arguments of a whole run of an architecture, and of one resumed half-way."""
    folder = tmp_path_factory.mktemp("runs")

    def arguments(num_processes, kind):
        whole, resumed = (folder / f"{num_processes}-{kind}{end}" for end in ("", "-resumed"))
        common = [
            *flags,
            f"--model_name_or_path={saved / kind}",
            "--max_train_samples=15",  # 8 and 7 rows: the micro-batches of two processes differ
            "--num_train_epochs=2",
            "--checkpointing_steps=2",
        ]
        return whole, resumed, [
            [*common, f"--output_dir={whole}"],
            [*common, f"--output_dir={resumed}", f"--resume_from_checkpoint={whole / 'step_2'}"],
        ]  # fmt: skip

    return arguments


@pytest.fixture(scope="module")
def on_two_processes(runs_of, run_on):
    run_on(2, *(arguments for kind in SIZES for arguments in runs_of(2, kind)[2]))


def assert_trained(whole, resumed):
    """Losses and gradients are finite, a resumed run has the same bits, and users get the model."""
    lines = [line for line in read_metrics(whole) if "loss" in line]
    assert len(lines) == 4
    assert all(math.isfinite(line["loss"]) and line["grad_norm"] > 0 for line in lines)
    assert_same_run(resumed, whole, "step_4")
    classify = pipeline("text-classification", str(whole), top_k=None)
    written = (whole / "predictions" / "validation.jsonl").read_text().splitlines()
    texts = [
        {"text": row["sentence1"], "text_pair": row["sentence2"]}
        for row in pairs(NUM_VALIDATION, 12)
    ]
    answers = classify(texts, truncation=True, max_length=64)
    for answer, line in zip(answers, map(json.loads, written), strict=True):
        scores = {label["label"]: label["score"] for label in answer}
        assert scores == pytest.approx(line["probabilities"], abs=1e-5)
        assert answer[0]["label"] == line["prediction"]


@pytest.mark.parametrize("kind", SIZES)
def test_trains_resumes_and_exports(kind, runs_of):
    whole, resumed, arguments = runs_of(1, kind)
    run(arguments[0], whole)
    run(arguments[1], resumed)
    assert_trained(whole, resumed)


@pytest.mark.processes
@pytest.mark.parametrize("kind", SIZES)
def test_trains_resumes_and_exports_on_two_processes(kind, runs_of, on_two_processes):
    whole, resumed, _ = runs_of(2, kind)
    assert_trained(whole, resumed)


@torch.no_grad()
@pytest.mark.parametrize("kind", SIZES)
def test_padding_does_not_change_the_logits_of_a_row(kind, saved):
    tokenizer, model = tokenizer_of(saved / kind), load(saved / kind)
    short, long = ("they sold it", "it was sold"), ("the officials said " * 5, "nobody said so")
    alone = model(**tokenizer(*short, return_tensors="pt")).logits[0]
    firsts, seconds = map(list, zip(short, long, strict=True))
    padded = model(**tokenizer(firsts, seconds, padding=True, return_tensors="pt")).logits[0]
    torch.testing.assert_close(padded, alone, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("kind", SIZES)
def test_rows_that_fill_a_micro_batch_have_logits(kind, saved):
    """A NaN would spread to the gradient, though their labels do not count."""
    tokenizer, model = tokenizer_of(saved / kind), load(saved / kind)
    columns = tokenizer.model_input_names
    collate = FillingCollator(DataCollatorWithPadding(tokenizer), columns, 64, num_rows=3)
    row = {**tokenizer("they sold it", "it was sold"), "labels": 1, "row": 0}
    for rows in ([], [row]):
        batch = collate(rows)
        logits = model(**{name: batch[name] for name in columns}).logits
        assert logits.shape == (3, 2)
        assert logits.isfinite().all()


@torch.no_grad()
def test_the_last_token_is_found_by_the_padding_token_of_the_tokenizer(saved, tmp_path):
    """Even where config.json names another: the padding would be taken for the end of the row."""
    folder = changed(saved / "gpt2", tmp_path, "config.json", pad_token_id=7)
    tokenizer, model = tokenizer_of(folder), load(folder)
    rows = [model(**tokenizer("sold", padding=padding, max_length=32, return_tensors="pt")).logits
            for padding in (False, "max_length")]  # fmt: skip
    torch.testing.assert_close(*rows, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_rejects_padding_on_the_left_where_it_shifts_positions(kind, saved, tmp_path):
    """XLNet pads on the left, and may: it trains above."""
    folder = changed(saved / kind, tmp_path, "tokenizer_config.json", padding_side="left")
    with pytest.raises(InputError, match="set padding_side to right in tokenizer_config.json"):
        load(folder)


def test_only_weights_that_no_row_reaches_are_frozen(saved):
    frozen = {
        kind: [name for name, weight in load(saved / kind).named_parameters()
               if not weight.requires_grad]
        for kind in SIZES
    }  # fmt: skip
    assert frozen == {kind: [] for kind in SIZES} | {"xlnet": ["transformer.mask_emb"]}


def test_says_once_what_is_frozen(runs_of, tmp_path, capsys):
    run(runs_of(1, "xlnet")[2][0], tmp_path, "--max_train_steps=1")
    printed = capsys.readouterr().err
    assert printed.count("frozen, as the logits do not depend on it: transformer.mask_emb") == 1


def test_experts_that_the_probe_does_not_reach_are_not_frozen():
    """They are a list of modules, of which each row takes some."""

    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))
            self.unused = nn.ModuleList([nn.Linear(2, 2)])

        def forward(self, input_ids):
            return SimpleNamespace(logits=self.experts[1](input_ids.float()))

    model = Experts()
    freeze_unused(model, lambda text, return_tensors: {"input_ids": torch.ones(1, 2)})
    assert all(weight.requires_grad for weight in model.experts.parameters())
    assert not any(weight.requires_grad for weight in model.unused.parameters())
