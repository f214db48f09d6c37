import json
import shutil

import pytest
import torch
from conftest import save_tiny_bert
from models import load, tokenizer_of
from transformers import BertForSequenceClassification

from lib.errors import InputError
from lib.model.layers import encoder_layers


def test_only_the_top_layers_are_reinitialized(bert):
    plain, changed = load(bert).state_dict(), load(bert, reinit_layers=1).state_dict()
    differ = {name for name in plain if not torch.equal(plain[name], changed[name])}
    assert any("layer.1." in name for name in differ)
    assert not any("layer.0." in name or "embeddings" in name for name in differ)


def test_new_weights_follow_from_the_seed(bert):
    one, same, other = (load(bert, seed=seed).classifier.weight for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_gradient_checkpointing_runs_the_layers_twice(bert):
    model = load(bert, gradient_checkpointing=True).train()
    calls = []
    for layer in encoder_layers(model):
        layer.attention.register_forward_hook(lambda *_: calls.append(1))
    loss = model(input_ids=torch.tensor([[2, 5, 6, 3]])).logits.sum()
    assert len(calls) == 2
    loss.backward()
    assert len(calls) == 4


def test_rejects_gradient_checkpointing_where_there_is_none(bert, monkeypatch):
    monkeypatch.setattr(BertForSequenceClassification, "supports_gradient_checkpointing", False)
    with pytest.raises(InputError, match="--gradient_checkpointing: BertForSequenceClassification"):
        load(bert, gradient_checkpointing=True)


def test_names_of_labels_are_kept(bert):
    assert load(bert).config.id2label == {0: "no", 1: "yes"}


def test_rejects_a_folder_without_weights(bert, tmp_path):
    shutil.copytree(bert, tmp_path / "bert")
    (tmp_path / "bert" / "model.safetensors").unlink()
    with pytest.raises(InputError, match="the folder has no usable weights .model.safetensors."):
        load(tmp_path / "bert")


def test_rejects_a_model_with_another_number_of_labels(bert, tmp_path):
    load(bert, label_names=("a", "b", "c")).save_pretrained(tmp_path)
    tokenizer_of(bert).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="3 labels, the data have 2: --ignore_mismatched_sizes"):
        load(tmp_path)
    assert load(tmp_path, ignore_mismatched_sizes=True).classifier.out_features == 2


@pytest.mark.parametrize("ignored", [False, True])
def test_rejects_a_vocabulary_that_does_not_fit_the_weights(bert, tmp_path, ignored):
    """--ignore_mismatched_sizes replaces a classifier, and never the embeddings."""
    shutil.copytree(bert, tmp_path / "bert")
    path = tmp_path / "bert" / "config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({**settings, "vocab_size": settings["vocab_size"] + 8}))
    with pytest.raises(InputError, match=r"word_embeddings.weight has the shape \[\d+, 32\], and"):
        load(tmp_path / "bert", ignore_mismatched_sizes=ignored)


def test_a_pad_token_that_only_the_tokenizer_has(bert):
    """GPT-2 has no `pad_token_id`, finds the last token of a row by it, and refuses batches."""
    from transformers import GPT2Config, GPT2ForSequenceClassification

    tokenizer = tokenizer_of(bert)
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, n_positions=64)
    model = GPT2ForSequenceClassification(config)
    assert model.config.pad_token_id is None
    folder = bert.parent / "gpt2"
    for part in (model, tokenizer):
        part.save_pretrained(folder)
    loaded = load(folder)
    assert loaded.config.pad_token_id == tokenizer.pad_token_id
    rows = tokenizer(["one two", "three"], padding=True, return_tensors="pt")
    assert loaded(rows["input_ids"]).logits.shape == (2, 2)


def test_rejects_a_tokenizer_without_padding(bert, tmp_path):
    shutil.copytree(bert, tmp_path / "bert")
    path = tmp_path / "bert" / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({**settings, "pad_token": None}))
    with pytest.raises(InputError, match="has no padding token"):
        tokenizer_of(tmp_path / "bert")


def test_rejects_a_folder_without_a_tokenizer(bert, tmp_path):
    for name in ("config.json", "model.safetensors"):
        shutil.copy(bert / name, tmp_path / name)
    with pytest.raises(InputError, match="the folder has no usable tokenizer"):
        tokenizer_of(tmp_path)


def test_rejects_damaged_weights(bert, tmp_path):
    shutil.copytree(bert, tmp_path / "bert")
    (tmp_path / "bert" / "model.safetensors").write_text("version https://git-lfs.github.com/spec")
    with pytest.raises(InputError, match="bert: its weights are damaged, or a pointer of Git LFS"):
        load(str(tmp_path / "bert"))


def test_does_not_load_weights_that_execute_code(bert, tmp_path):
    """A pickle in place of safetensors, which makes a file when it is loaded."""
    import pickle

    class Touch:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    folder = save_tiny_bert(tmp_path / "bert", dropout=0)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Touch()))
    with pytest.raises(InputError, match="no usable weights"):
        load(folder)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("kind", ["distilbert", "roberta", "electra", "deberta-v2"])
def test_finds_the_layers_of_models_like_bert(kind):
    from transformers import AutoConfig, AutoModelForSequenceClassification

    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    if kind == "distilbert":
        sizes = {"dim": 16, "n_layers": 3, "n_heads": 2, "hidden_dim": 32}
    config = AutoConfig.for_model(kind, vocab_size=20, intermediate_size=32, **sizes)
    model = AutoModelForSequenceClassification.from_config(config)
    assert len(encoder_layers(model)) == 3
