"""From the command line, and the YAML file that it names, to a configuration."""

import argparse
import functools
import multiprocessing
import os
import re
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from lib.cli.config import FLAGS, TrainConfig
from lib.cli.flags.declaration import Flag, checked, did_you_mean
from lib.cli.translations import ALIASES, NAMES, translate
from lib.errors import InputError

DESCRIPTION = """\
Fine-tune a BERT on GLUE/MRPC, on another GLUE task, or on sentence pairs of your own.

With no flags: BERT base on MRPC, both from the Hugging Face hub. --demo takes a minute and needs
no network; --dry_run shows what a run would do. Underscores and hyphens are the same. Most flags
of run_glue.py and Trainer are understood too: docs/from-run-glue.md."""

# What people change first.
USAGE = """accelerate launch train_mrpc.py
    [--model_name_or_path NAME_OR_DIR] [--task_name TASK] [--output_dir DIR]
    [--train_file FILE --validation_file FILE] [--num_train_epochs N] [--learning_rate X]
    [--train_batch_size N] [--seed N] [--report_to TRACKER ...] [more flags]"""

METAVARS = {int: "N", float: "X", str: "NAME", tuple: "NAME"}


def parse_arguments(arguments: Sequence[str]) -> TrainConfig:
    """Return the configuration that the command line describes.

    Defaults give way to `--demo`, that to `--config`, and that to the flags.

    Raises:
        InputError: an unknown flag, or a value that breaks a rule.
        SystemExit: after `--help`.
    """
    given, unknown = _parser().parse_known_args([_with_underscores(word) for word in arguments])
    if unknown:
        raise InputError(_unknown_flag(unknown[0]))
    flags = _translated(vars(given))
    return TrainConfig(**{**(_read_yaml(flags["config"]) if "config" in flags else {}), **flags})


def _translated(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return flags under our names; print which of the others a run does not need."""
    flags, remarks = translate(given)
    if os.environ.get("RANK", "0") == "0" and multiprocessing.parent_process() is None:
        for remark in remarks:
            print(f"train_mrpc: {remark}", flush=True)
    return flags


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Raise what argparse would print below the usage, of which there are two screens."""
        name, _, reason = message.removeprefix("argument ").partition(": ")
        raise InputError(f"{name} needs a value" if "expected" in reason else message)


def _parser() -> _Parser:
    parser = _Parser(
        usage=USAGE,
        description=DESCRIPTION,
        formatter_class=functools.partial(
            argparse.RawDescriptionHelpFormatter, max_help_position=36, width=100
        ),
        argument_default=argparse.SUPPRESS,  # what is not given is left to the defaults
        allow_abbrev=False,
    )
    groups: dict[str, argparse._ArgumentGroup] = {}
    for name, declared in FLAGS.items():
        if declared.group not in groups:
            groups[declared.group] = parser.add_argument_group(declared.group)
        _add(groups[declared.group], name, declared)
    for name in NAMES:
        if name in ALIASES and FLAGS[ALIASES[name]].kind is not bool:
            parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
            continue
        parser.add_argument(f"--{name}", action=_Other, nargs="*", help=argparse.SUPPRESS)
        parser.add_argument(
            f"--no_{name}", dest=name, action="store_const", const=False, help=argparse.SUPPRESS
        )
    return parser


class _Other(argparse.Action):
    """Store the value of a flag of another script: true without one, a list of several."""

    def __call__(self, _: Any, namespace: argparse.Namespace, words: Any, *__: Any) -> None:
        value = words[0] if len(words) == 1 else words or True
        setattr(namespace, self.dest, value)


def _add(group: argparse._ArgumentGroup, name: str, declared: Flag) -> None:
    """Add a flag. Its value stays text: `checked` converts it, as it does for YAML."""
    help = declared.help
    if declared.default is not False and declared.default not in (None, ()):
        default = declared.default
        shown = " ".join(default) if isinstance(default, tuple) else str(default).lower()
        help += f" Default: {shown}."
    if declared.kind is bool:
        group.add_argument(
            f"--{name}", nargs="?", const=True, metavar="true|false", help=help.replace("%", "%%")
        )
        group.add_argument(  # the same as `--name false`
            f"--no_{name}", dest=name, action="store_const", const=False, help=argparse.SUPPRESS
        )
        return
    metavar = declared.metavar or METAVARS[declared.kind]
    if declared.choices and declared.metavar is None:
        metavar = name.split("_")[-1].upper()
        help += f" One of {', '.join(declared.choices)}."
    group.add_argument(
        f"--{name}",
        nargs="+" if declared.kind is tuple else None,
        metavar=metavar,
        help=help.replace("%", "%%"),
    )


def _with_underscores(word: str) -> str:
    """Return `--max_length=8` for `--max-length=8`; values keep their hyphens."""
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value


def _unknown_flag(word: str) -> str:
    name = word.partition("=")[0]
    if not name.startswith("-"):
        return (
            f"unexpected argument {word!r}: every value follows the name of a flag, as in --seed 1"
        )
    hint = did_you_mean(name.removeprefix("--"), [*FLAGS]).replace("mean ", "mean --")
    return f"unknown flag {name}: {hint or '--help lists them all'}"


def _read_yaml(path: str) -> dict[str, Any]:
    """Return the flags in a YAML file.

    Raises:
        InputError: it cannot be read, or a value breaks a rule.
    """
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
    if not isinstance(given, Mapping):
        raise InputError(f"--config {path} must hold one 'flag: value' line for each flag")
    for name in given:
        if name not in FLAGS.keys() | NAMES or name == "config":
            hint = did_you_mean(str(name), [*FLAGS]) or "--help lists them all"
            raise InputError(f"--config {path}: unknown flag {name}: {hint}")
    try:
        flags = _translated(given)
        for name, value in flags.items():
            checked(name, value, FLAGS[name])
    except InputError as error:
        raise InputError(f"--config {path}: {str(error).removeprefix('--')}") from error
    return flags


def _yaml_loader(yaml: types.ModuleType) -> Any:
    """Return YAML's safe loader, made to read 5e-5 as a number (YAML 1.1 asks for 5.0e-5)."""
    loader = type("Loader", (yaml.SafeLoader,), {})
    loader.add_implicit_resolver(  # type: ignore[attr-defined]
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"),
        list("-+.0123456789"),
    )
    return loader
