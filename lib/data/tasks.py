"""The GLUE tasks as data: text columns, labels, metrics, splits, and the submission files."""

import dataclasses

# The label of a row that has none, or that fills up a micro-batch: no loss, no gradient, no metric.
IGNORED = -100


@dataclasses.dataclass(frozen=True)
class Task:
    """What distinguishes one task from another.

    `labels` are the names of the classes in the order of their numbers; empty for a regression.
    `validation` and `test` are names of splits: the first of `validation` chooses the best model.
    `others` are metrics of evaluations that do not count for GLUE's score, the mean of `metrics`.
    `submissions` are the files that gluebenchmark.com takes, one for each test split, and
    `submits_names` says whether they hold names of labels or numbers.
    """

    columns: tuple[str, ...]
    labels: tuple[str, ...]
    metrics: tuple[str, ...]
    submissions: tuple[str, ...] = ()
    submits_names: bool = False
    validation: tuple[str, ...] = ("validation",)
    test: tuple[str, ...] = ("test",)
    others: tuple[str, ...] = ()


ENTAILMENT = ("entailment", "not_entailment")

# Source: the GLUE paper (Wang et al., 2019), table 1; label order of the hub's nyu-mll/glue;
# file names and contents of the sample submission at gluebenchmark.com.
TASKS = {
    "cola": Task(
        ("sentence",), ("unacceptable", "acceptable"), ("matthews_correlation",), ("CoLA.tsv",)
    ),
    "mnli": Task(
        ("premise", "hypothesis"),
        ("entailment", "neutral", "contradiction"),
        ("accuracy",),
        ("MNLI-m.tsv", "MNLI-mm.tsv"),
        submits_names=True,
        validation=("validation_matched", "validation_mismatched"),
        test=("test_matched", "test_mismatched"),
    ),
    "mrpc": Task(
        ("sentence1", "sentence2"),
        ("not_equivalent", "equivalent"),
        ("accuracy", "f1"),
        ("MRPC.tsv",),
    ),
    "qnli": Task(
        ("question", "sentence"), ENTAILMENT, ("accuracy",), ("QNLI.tsv",), submits_names=True
    ),
    "qqp": Task(
        ("question1", "question2"), ("not_duplicate", "duplicate"), ("accuracy", "f1"), ("QQP.tsv",)
    ),
    "rte": Task(
        ("sentence1", "sentence2"), ENTAILMENT, ("accuracy",), ("RTE.tsv",), submits_names=True
    ),
    "sst2": Task(("sentence",), ("negative", "positive"), ("accuracy",), ("SST-2.tsv",)),
    "stsb": Task(("sentence1", "sentence2"), (), ("pearson", "spearmanr"), ("STS-B.tsv",)),
    "wnli": Task(
        ("sentence1", "sentence2"), ("not_entailment", "entailment"), ("accuracy",), ("WNLI.tsv",)
    ),
}


def task_of_files(columns: tuple[str, ...], labels: tuple[str, ...]) -> Task:
    """The task that files of the user's own describe; no labels mean a regression."""
    if not labels:
        return Task(columns, labels, ("pearson", "spearmanr"))
    return Task(columns, labels, ("accuracy", "f1" if len(labels) == 2 else "macro_f1"))
