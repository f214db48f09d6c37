"""The training loop as Accelerate's documentation shows it: what `compare.py` compares with.

Shuffled batches, padded to their longest row; PyTorch's default AdamW; the loss of the model. It
prints one JSON line: rows, real tokens and seconds of training, after a warm-up.
"""

import argparse
import json
import time

import torch
from accelerate import Accelerator
from datasets import load_dataset
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    get_linear_schedule_with_warmup,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dataset_name", required=True)
    parser.add_argument("--model_name_or_path", required=True)
    parser.add_argument("--train_batch_size", type=int, default=16)
    parser.add_argument("--max_train_samples", type=int)
    parser.add_argument("--warm_up", type=int, default=0, help="updates that are not timed")
    parser.add_argument("--seed", type=int, default=42)
    arguments = parser.parse_args()

    accelerator = Accelerator()
    torch.manual_seed(arguments.seed)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model_name_or_path)
    model = AutoModelForSequenceClassification.from_pretrained(
        arguments.model_name_or_path, num_labels=2
    )
    rows = load_dataset(arguments.dataset_name)["train"]
    if arguments.max_train_samples:
        rows = rows.select(range(arguments.max_train_samples))
    rows = rows.map(
        lambda batch: tokenizer(
            batch["sentence1"], batch["sentence2"], truncation=True, max_length=128
        ),
        batched=True,
        remove_columns=["sentence1", "sentence2", "idx"],
    ).rename_column("label", "labels")
    loader = DataLoader(
        rows,
        shuffle=True,
        batch_size=arguments.train_batch_size,
        collate_fn=DataCollatorWithPadding(tokenizer),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5)
    schedule = get_linear_schedule_with_warmup(optimizer, 0, len(loader))
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)

    model.train()
    started, masks = time.perf_counter(), []
    for update, batch in enumerate(loader):
        if update == arguments.warm_up > 0:
            int(masks[-1].sum())  # waits for the device
            started, masks = time.perf_counter(), []
        masks.append(batch["attention_mask"])
        loss = model(**batch).loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    loss.item()  # waits for the device
    seconds = time.perf_counter() - started
    num_rows, num_tokens = sum(map(len, masks)), sum(int(mask.sum()) for mask in masks)
    print(json.dumps({"rows": num_rows, "tokens": num_tokens, "seconds": seconds}))


if __name__ == "__main__":
    main()
