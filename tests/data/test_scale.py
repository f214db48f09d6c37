"""The benchmark of the start, at toy size and in this process."""

import datasets
from conftest import MODEL_DIR

from benchmarks import scale


def test_the_table_of_the_start(tmp_path, monkeypatch, capsys):
    def in_this_process(what, folder, ending, model):
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        scale.measure(what, str(folder), ending, model)
        return scale.json.loads(capsys.readouterr().out)

    monkeypatch.setattr(scale, "in_fresh_process", in_this_process)
    scale.main(
        [
            "--format=parquet",
            f"--model_name_or_path={MODEL_DIR}",
            "--rows",
            "300",
            "40",
            f"--folder={tmp_path}",
        ]
    )
    head, _, *lines = capsys.readouterr().out.splitlines()
    assert [line.split("|")[1].strip() for line in lines] == ["40", "300"]
    assert {line.count("|") for line in lines} == {head.count("|")}
    assert list(tmp_path.iterdir()) == []


def test_memory_is_counted_for_each_row_more():
    start = {"seconds": 2.0, "planning": 0.25}
    results = {
        num_rows: {
            "first": start,
            "tokenizer": start,
            "cached": {**start, "anonymous": anonymous, "resident": 9e6},
        }
        for num_rows, anonymous in ((1000, 5e6), (11_000, 5.2e6))
    }
    assert scale.table(results).splitlines()[2:] == [
        "| 1,000 | 2.00 | 2.00 | 2.00 | 0.250 | 5.0 MB | 9.0 MB |",
        "| 11,000 | 2.00 | 2.00 | 2.00 | 0.250 | 5.2 MB (20 B/row) | 9.0 MB (0 B/row) |",
    ]
