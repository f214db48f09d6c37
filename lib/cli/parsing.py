"""From the command line to a configuration, and from an error to one line and an exit status."""

import contextlib
import dataclasses
import difflib
import io
import os
import re
import sys
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lib.cli.config import FIELDS, TYPES, TrainConfig, check_type
from lib.errors import TRY_AGAIN, InputError, LostProcessError, NonFiniteError, Preempted

BOOLEAN_WORDS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


@contextlib.contextmanager
def exit_status() -> Iterator[None]:
    """Turn the project's own errors into one line and an exit status, 75 if it was told to stop.

    Processes that have met raise the same error, and rank 0 speaks for all. Before that an error
    may be one machine's own, and the first process of each speaks.
    """
    try:
        yield
    except (InputError, NonFiniteError, LostProcessError, Preempted) as error:
        distributed = sys.modules.get("torch.distributed")
        met = distributed is not None and distributed.is_initialized()
        stopped = isinstance(error, Preempted)
        rank = os.environ.get("RANK" if met or stopped else "LOCAL_RANK", "0")
        if int(rank) <= 0 or isinstance(error, LostProcessError):
            kind = "" if stopped else "error: "
            print(f"train_mrpc.py: {kind}{error}", file=sys.stderr, flush=True)
        sys.exit(TRY_AGAIN if stopped else 2 if isinstance(error, InputError) else 1)


def hide_token(arguments: list[str]) -> None:
    """Take the value of --hub_token out of the arguments, where wandb and `ps` would read it."""
    for position, word in enumerate(arguments):
        name, equals, _ = word.replace("-", "_").partition("=")
        if name == "__hub_token" and equals:
            arguments[position] = "--hub_token=***"
        elif name == "__hub_token" and position + 1 < len(arguments):
            arguments[position + 1] = "***"


def parse_arguments(arguments: Sequence[str]) -> TrainConfig:
    """The configuration that the command line, and the files it names, describe.

    Defaults give way to `--demo`, that to `--config`, and that to the flags.

    Raises:
        InputError: an unknown flag, or a value that is not of its field's type or range.
        SystemExit: after `--help`.
    """
    import tyro  # 0.2 s: not for those who import TrainConfig

    tokens = _normalise(list(arguments))
    given = _read_yaml(path) if (path := _value_of(tokens, "--config")) else {}
    if "--demo" in tokens or given.get("demo"):
        from lib.demo.corpus import DEFAULTS

        given = {**DEFAULTS, **given}
    box = io.StringIO()
    try:
        # tyro draws its errors as boxes; what users get here is one line.
        with contextlib.redirect_stderr(box):
            config, unknown = tyro.cli(
                TrainConfig,
                args=tokens,
                default=_unchecked(given),
                use_underscores=True,
                return_unknown_args=True,
            )
    except SystemExit as stop:
        if stop.code in (None, 0):
            raise
        raise InputError(_unboxed(box.getvalue())) from None
    if unknown:
        raise InputError(_unknown("flag", unknown[0], prefix="--"))
    return config


def _unknown(kind: str, name: str, prefix: str = "") -> str:
    word = name.removeprefix("--").split("=")[0].replace("-", "_")
    near = difflib.get_close_matches(word, list(FIELDS), n=1, cutoff=0.5)
    hint = f"did you mean {prefix}{near[0]}?" if near else "--help lists them all"
    return f"unknown {kind} {name.split('=')[0]}: {hint}"


def _read_yaml(path: str) -> Mapping[str, Any]:
    import yaml

    try:
        given = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_yaml_loader(yaml))
    except OSError as error:
        raise InputError(f"--config {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"--config {path} is not UTF-8: save it as UTF-8") from error
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise InputError(f"--config {path} is not YAML: {reason}") from error
    if not isinstance(given, dict):
        raise InputError(f"--config {path} must hold 'field: value' lines, one of each field")
    for name in given:
        if name not in FIELDS or name == "config":
            raise InputError(f"--config {path}: {_unknown('field', str(name))}")
    try:
        return {name: _as_field(name, value) for name, value in given.items()}
    except InputError as error:
        raise InputError(f"--config {path}: {str(error).removeprefix('--')}") from error


def _as_field(name: str, value: Any) -> Any:
    """A value as YAML gives it, as its field takes it: lists as tuples, `10` as "10" for text."""
    takes_tuple = typing.get_origin(TYPES[name]) is tuple
    if takes_tuple:
        value = tuple(value) if isinstance(value, list) else (value,)
    elif isinstance(value, int) and not isinstance(value, bool) and TYPES[name] == str | None:
        value = str(value)
    check_type(name, value)
    return value


def _unchecked(given: Mapping[str, Any]) -> TrainConfig:
    """A configuration whose fields are not yet checked together: flags may complete it."""
    config = object.__new__(TrainConfig)
    for name, field in FIELDS.items():
        default = None if field.default is dataclasses.MISSING else field.default
        object.__setattr__(config, name, given.get(name, default))
    return config


def _yaml_loader(yaml: types.ModuleType) -> Any:
    """YAML's safe loader, that also takes 5e-5 for a number (YAML 1.1 asks for 5.0e-5)."""

    loader = type("Loader", (yaml.SafeLoader,), {})
    loader.add_implicit_resolver(  # type: ignore[attr-defined]
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"),
        list("-+.0123456789"),
    )
    return loader


def _normalise(tokens: list[str]) -> list[str]:
    """Flags as tyro reads them: `--seed=5` -> `--seed 5`, `--flag false` -> `--no_flag`.

    Booleans are bare flags in some of the peers (`--with_tracking`) and take a value in others
    (`--length_grouping false`); both are understood.
    """
    split: list[str] = []
    for token in tokens:
        if token.startswith("--"):
            name, equals, value = token.partition("=")
            split.append("--" + name[2:].replace("-", "_"))
            split += [value] if equals else []
        else:
            split.append(token)
    result: list[str] = []
    position = 0
    while position < len(split):
        token = split[position]
        name = token.removeprefix("--")
        position += 1
        if not (token.startswith("--") and name in FIELDS and TYPES[name] is bool):
            result.append(token)
            continue
        value = split[position] if position < len(split) else "--"
        if value.startswith("--"):
            result.append(token)
            continue
        position += 1
        if value.lower() not in BOOLEAN_WORDS:
            raise InputError(f"{token} takes true or false, got {value!r}")
        result.append(token if BOOLEAN_WORDS[value.lower()] else f"--no_{name}")
    return result


def _value_of(tokens: Sequence[str], flag: str) -> str | None:
    if flag not in tokens:
        return None
    position = tokens.index(flag) + 1
    if position == len(tokens):
        raise InputError(f"{flag} takes the path of a YAML file")
    return tokens[position]


def _unboxed(text: str) -> str:
    """The words of one of tyro's boxed messages, without the frame, the title and the help."""
    lines = [line.strip("│╭╮╰╯─ ") for line in text.splitlines()[1:]]
    words = " ".join(line for line in lines if line and "--help" not in line)
    words = words.split(" Argument helptext:")[0].removeprefix("Error parsing ")
    return words.removeprefix("TrainConfig: ")
