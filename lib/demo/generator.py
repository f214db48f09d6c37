"""Generate MRPC-like sentence pairs from a seed.

A pair describes an event (a takeover, a match, a verdict, a storm, ...) twice, each time with its
own template, synonyms, clause order, attribution and spelling of the number. In an equivalent pair
(about two thirds, as in MRPC) both sentences describe the same event. In a near miss the second
event differs in one detail: swapped roles, another number, name, place or day, or the opposite or
negated verb. The wording does not depend on the label, except that a near miss reuses the template
of its first sentence slightly more often, so that word overlap reveals little.
"""

import random
from typing import Any, NamedTuple

from lib.demo.events import ASIDES, DIGITS_TO_WORDS, FRAMES, POOLS, SOURCES, Frame

LABELS = ("not_equivalent", "equivalent")
POSITIVE_SHARE = 2 / 3


class Event(NamedTuple):
    """One event: a sense of its frame, and a word for each slot."""

    frame: Frame
    sense: int
    values: dict[str, str]


class Style(NamedTuple):
    """How a sentence describes its event: the template, and what is added to it."""

    template: str
    with_day: bool
    source: str | None
    aside: str | None


def _draw_event(rng: random.Random) -> Event:
    frame = rng.choice(FRAMES)
    values: dict[str, str] = {"day": rng.choice(POOLS["day"])}
    for slot, pool in frame.slots.items():
        values[slot] = rng.choice([v for v in POOLS[pool] if v not in values.values()])
    return Event(frame, rng.randrange(len(frame.senses)), values)


def _near_miss(event: Event, both_days: bool, rng: random.Random) -> Event:
    """Change one detail; the day only if both sentences mention it."""
    frame, sense, values = event
    values = dict(values)
    kinds = ["slot", "slot"]
    if frame.swap:
        kinds += ["swap", "swap"]
    if len(frame.senses) > 1:
        kinds += ["sense", "sense"]
    kind = rng.choice(kinds)
    if kind == "swap" and frame.swap:
        one, two = frame.swap
        values[one], values[two] = values[two], values[one]
    elif kind == "sense":
        sense = 1 - sense
    else:
        slot = rng.choice([*frame.slots, "day"] if both_days else [*frame.slots])
        pool = POOLS[frame.slots.get(slot, "day")]
        values[slot] = rng.choice([v for v in pool if v not in values.values()])
    return Event(frame, sense, values)


def _draw_style(template: str, source: str, rng: random.Random) -> Style:
    return Style(
        template,
        with_day=rng.random() < 0.4,
        source=source if rng.random() < 0.3 else None,
        aside=rng.choice(ASIDES) if rng.random() < 0.15 else None,
    )


def _render(event: Event, style: Style, rng: random.Random) -> str:
    values = {
        slot: DIGITS_TO_WORDS.get(value, value) if rng.random() < 0.5 else value
        for slot, value in event.values.items()
    }
    forms = event.frame.senses[event.sense]
    verbs = {form: rng.choice(phrases).format(**values) for form, phrases in forms.items()}
    text = style.template.format(**values, **verbs)
    if style.with_day:
        day = values["day"]
        text = f"on {day}, {text}" if rng.random() < 0.4 else f"{text} on {day}"
    if style.aside:
        text = f"{text}, {style.aside}"
    if style.source:
        wrap = rng.choice(["{s} said that {t}", "{t}, {s} said", "{t}, according to {s}"])
        text = wrap.format(s=style.source, t=text)
    return text[0].upper() + text[1:] + "."


def _draw_pair(rng: random.Random, share: float) -> tuple[str, str, int]:
    event = _draw_event(rng)
    label = int(rng.random() < share)
    source = rng.choice(SOURCES)
    templates = event.frame.templates
    first = _draw_style(rng.choice(templates), source, rng)
    keep = rng.random() < (0.3 if label else 0.4)
    others = [template for template in templates if template != first.template]
    second = _draw_style(first.template if keep else rng.choice(others), source, rng)
    other = event
    if not label:
        other = _near_miss(event, first.with_day and second.with_day, rng)
    return _render(event, first, rng), _render(other, second, rng), label


def make_pairs(
    num_pairs: int,
    *,
    seed: int,
    positive_share: float = POSITIVE_SHARE,
) -> list[dict[str, Any]]:
    """Generate distinct pairs (sentence1, sentence2, label, idx) that depend only on the arguments.

    A shorter list is the beginning of a longer one.
    """
    rng = random.Random(seed)
    seen: set[tuple[str, str]] = set()
    pairs: list[dict[str, Any]] = []
    while len(pairs) < num_pairs:
        sentence1, sentence2, label = _draw_pair(rng, positive_share)
        if sentence1 == sentence2 or (sentence1, sentence2) in seen:
            continue
        seen.add((sentence1, sentence2))
        row = {"sentence1": sentence1, "sentence2": sentence2, "label": label, "idx": len(pairs)}
        pairs.append(row)
    return pairs
