"""How a flag is declared and checked."""

import dataclasses
import difflib
import math
import os
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from lib.errors import InputError


class Range(NamedTuple):
    """Lowest and highest value, and the remedy for one outside."""

    low: float
    high: float
    remedy: str


@dataclasses.dataclass(frozen=True)
class Flag:
    """The declaration of a flag, kept in the metadata of its dataclass field.

    Attributes:
        group: heading under which `--help` lists the flag.
        default: value if the flag is not given.
        help: one sentence, ending in a period.
        rule: range of the value.
        choices: the values that are allowed.
        words: what a number may be instead, such as auto.
        metavar: placeholder of the value in `--help`.
        resume: "same" if a resumed run must have the same value, "longer" if it may also be larger,
            "free" if the flag does not decide what a run computes.
        is_path: whether `~` stands for the home folder.
        saved: whether config.yaml keeps the value.
        kind: type of the value: bool, int, float, str, or tuple for a list of text.
        optional: whether None is a value.
    """

    group: str
    default: Any
    help: str
    rule: Range | None = None
    choices: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    metavar: str | None = None
    resume: Literal["same", "longer", "free"] = "same"
    is_path: bool = False
    saved: bool = True
    kind: type = str
    optional: bool = False


def flag(group: str, default: Any, help: str, **rules: Any) -> Any:
    """Declare a field of a configuration; `rules` are attributes of `Flag`."""
    declared = Flag(group, default, help, **rules)
    return dataclasses.field(default=default, repr=declared.saved, metadata={"flag": declared})


def between(low: float, high: float, remedy: str) -> Range:
    """A closed range."""
    return Range(low, high, remedy)


def at_least(low: float, remedy: str) -> Range:
    """A range without an upper end."""
    return Range(low, math.inf, remedy)


def flags_of(config_class: type) -> dict[str, Flag]:
    """Return the flags of a configuration by name, with the types of their fields."""
    flags = {}
    for name, annotation in typing.get_type_hints(config_class).items():
        union = isinstance(annotation, types.UnionType)
        kind, *rest = typing.get_args(annotation) if union else (annotation,)
        flags[name] = dataclasses.replace(
            config_class.__dataclass_fields__[name].metadata["flag"],  # type: ignore[attr-defined]
            kind=typing.get_origin(kind) or kind,
            optional=types.NoneType in rest,
        )
    return flags


def checked(name: str, value: Any, declared: Flag) -> Any:
    """Return the value of a flag in the flag's type, once it obeys the flag's rules.

    Args:
        value: text from the command line, a value of any type from YAML, or one from Python.

    Raises:
        InputError: the value breaks a rule.
    """
    if (value is None and declared.optional) or value in declared.words:
        return value
    if declared.kind is tuple:
        items = (value,) if isinstance(value, str) else value
        if not isinstance(items, list | tuple):
            raise InputError(f"--{name} takes a list of text, got {value!r}")
        value = tuple(_text(name, item) for item in items)
    else:
        value = _converted(name, value, declared)
    if declared.is_path and isinstance(value, tuple):
        value = tuple(map(os.path.expanduser, value))
    elif declared.is_path:
        value = os.path.expanduser(value)
    _check_rules(name, value, declared)
    return value


def _text(name: str, item: Any) -> str:
    """An item of a list; YAML has `class_weights: [1, 2.5]` as numbers."""
    if isinstance(item, bool) or not isinstance(item, str | int | float):
        raise InputError(f"--{name} takes a list of text, got {item!r} in it")
    return str(item)


BOOLEAN_WORDS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def _converted(name: str, value: Any, declared: Flag) -> Any:
    """A single value as its flag's type; text is read as the command line writes numbers."""
    kind = declared.kind
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    allowed = " or ".join([names[kind], *declared.words])
    rejected = InputError(f"--{name} takes {allowed}, got {value!r}")
    if kind is bool:
        word = str(value).lower() if isinstance(value, str | bool) else ""
        if word not in BOOLEAN_WORDS:
            raise rejected
        return BOOLEAN_WORDS[word]
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise rejected
    if kind is str:
        # YAML has `checkpointing_steps: 10` as a number.
        if isinstance(value, float):
            raise rejected
        return str(value)
    try:
        # Trainer writes whole numbers as 3.0 too.
        number = kind(str(value).removesuffix(".0")) if kind is int else kind(value)
    except ValueError:
        raise rejected from None
    if not math.isfinite(number):
        raise rejected
    return number


def _check_rules(name: str, value: Any, declared: Flag) -> None:
    if declared.rule is not None and not declared.rule.low <= value <= declared.rule.high:
        low, high, remedy = declared.rule
        rule = f"lie in [{low:g}, {high:g}]" if high < math.inf else f"be at least {low:g}"
        raise InputError(f"--{name} must {rule}, got {value:g}: {remedy}")
    for item in value if isinstance(value, tuple) else (value,):
        if declared.choices and item not in declared.choices:
            raise InputError(
                f"--{name} must be one of {', '.join(declared.choices)}, got {item!r}"
                f"{did_you_mean(item, declared.choices, ': ')}"
            )


def did_you_mean(word: str, known: Sequence[str] | Mapping[str, Any], before: str = "") -> str:
    """The nearest of the `known` words as a question after `before`; empty if none is near."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"{before}did you mean {near[0]}?" if near else ""
