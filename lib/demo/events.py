"""The vocabulary of the demo corpus: kinds of events, and words to describe them with."""

from typing import NamedTuple

# fmt: off
NUMBER_WORDS = [
    "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty",
]

# The words that can fill a slot, by kind.
POOLS = {
    "company": [
        "Northway", "Calder", "Brightline", "Ostrava", "Delmont", "Quantis", "Harrow", "Vexel",
        "Lindqvist", "Pembury", "Solaris", "Trident", "Westfield", "Corvina", "Meridian", "Halden",
        "Zephyr", "Ironbridge", "Kestrel", "Mondavi",
    ],
    "person": [
        "Alvarez", "Becker", "Chandra", "Dawson", "Eriksen", "Fischer", "Gomez", "Hughes", "Ivanov",
        "Jensen", "Kaplan", "Larsen", "Morgan", "Nakamura", "Okafor", "Petrov", "Quinn", "Rossi",
        "Schmidt", "Tanaka", "Usman", "Vargas", "Walsh", "Young",
    ],
    "city": [
        "Boston", "Chicago", "Denver", "Houston", "Seattle", "Atlanta", "Dallas", "Phoenix",
        "Toronto", "London", "Paris", "Berlin", "Madrid", "Rome", "Tokyo", "Sydney", "Mumbai",
        "Cairo", "Lima", "Oslo",
    ],
    "team": [
        "Hawks", "Rovers", "Giants", "Pirates", "Comets", "Wolves", "Falcons", "Kings", "Bears",
        "Tigers", "Rangers", "Saints", "Chargers", "Knights", "Sharks", "Eagles",
    ],
    "day": ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"],
    "number": [str(value) for value in range(2, 41)],
    "crime": ["fraud", "theft", "arson", "bribery", "perjury", "smuggling", "forgery"],
    "disaster": ["storm", "flood", "fire", "blizzard", "landslide", "tornado"],
    "topic": ["taxes", "schools", "firearms", "energy", "water", "housing", "health", "pensions"],
    "unrest": ["protest", "robbery", "riot", "strike", "march", "brawl"],
}
# fmt: on

DIGITS_TO_WORDS = {str(value): word for value, word in enumerate(NUMBER_WORDS, start=2)}

SOURCES = (
    "officials",
    "a spokesman",
    "local media",
    "witnesses",
    "people familiar with the matter",
    "the state news agency",
)
ASIDES = (
    "the second such case this year",
    "after weeks of speculation",
    "in a move that surprised many observers",
    "as had been widely expected",
    "despite earlier reports",
)


class Frame(NamedTuple):
    """A kind of event.

    `slots` maps the slots of the templates to `POOLS`, and `swap` names two slots that change the
    meaning when swapped. `senses` holds the verb forms of the event and, if there are two, of its
    opposite. Each of `templates` describes the event.
    """

    slots: dict[str, str]
    swap: tuple[str, str] | None
    senses: list[dict[str, list[str]]]
    templates: list[str]


FRAMES = [
    Frame(
        {"a": "company", "b": "company", "n": "number"},
        ("a", "b"),
        [
            {
                "act": ["agreed to buy", "will acquire", "is taking over"],
                "pas": ["will be bought by", "is being acquired by", "will be taken over by"],
            },
            {
                "act": ["will not buy", "refused to acquire", "decided against buying"],
                "pas": ["will not be bought by", "is not being acquired by"],
            },
        ],
        [
            "{a} {act} {b} for {n} million dollars",
            "{b} {pas} {a} for {n} million dollars",
            "in a {n} million dollar deal, {a} {act} {b}",
            "in a deal worth {n} million dollars, {b} {pas} {a}",
        ],
    ),
    Frame(
        {"a": "team", "b": "team", "n": "number", "c": "city"},
        ("a", "b"),
        [
            {
                "act": ["beat", "defeated", "won against"],
                "pas": ["lost to", "were beaten by", "suffered a defeat against"],
            },
        ],
        [
            "the {a} {act} the {b} by {n} points in {c}",
            "the {b} {pas} the {a} by {n} points in {c}",
            "in {c}, the {a} {act} the {b} by {n} points",
            "playing in {c}, the {b} {pas} the {a} by a margin of {n} points",
        ],
    ),
    Frame(
        {"a": "company", "n": "number"},
        None,
        [
            {"act": ["rose", "climbed", "gained"], "noun": ["rise", "increase", "gain"]},
            {"act": ["fell", "dropped", "lost"], "noun": ["fall", "drop", "decline"]},
        ],
        [
            "shares of {a} {act} {n} percent",
            "the stock price of {a} {act} by {n} percent",
            "{a} shares {act} {n} percent in early trading",
            "investors saw a {n} percent {noun} in the shares of {a}",
            "there was a {noun} of {n} percent in {a} stock",
        ],
    ),
    Frame(
        {"p": "person", "n": "number", "c": "city", "x": "crime"},
        None,
        [
            {
                "act": ["sentenced {p} to", "ordered {p} to serve", "gave {p}"],
                "pas": ["was sentenced to", "was ordered to serve", "received"],
            },
        ],
        [
            "a court in {c} {act} {n} years in prison for {x}",
            "{p} {pas} {n} years in prison for {x} from a {c} judge",
            "for {x}, a {c} judge {act} {n} years in jail",
            "{p} {pas} a {n} year jail term for {x} in {c}",
        ],
    ),
    Frame(
        {"p": "person", "c": "city", "x": "crime", "n": "number"},
        None,
        [
            {
                "act": ["convicted {p} of", "found {p} guilty of"],
                "pas": ["was convicted of", "was found guilty of"],
            },
            {
                "act": ["acquitted {p} of", "cleared {p} of", "found {p} not guilty of"],
                "pas": ["was acquitted of", "was cleared of", "was found not guilty of"],
            },
        ],
        [
            "a jury in {c} {act} {x} after {n} days of testimony",
            "{p} {pas} {x} by a {c} jury after {n} days of testimony",
            "after {n} days of testimony in {c}, {p} {pas} {x}",
        ],
    ),
    Frame(
        {"c": "city", "n": "number", "x": "disaster"},
        None,
        [
            {"act": ["killed", "took the lives of"], "int": ["died", "were killed"]},
            {"act": ["injured", "wounded"], "int": ["were injured", "were hurt"]},
        ],
        [
            "a {x} in {c} {act} {n} people",
            "{n} people {int} in a {x} in {c}",
            "{n} people {int} when a {x} struck {c}",
            "a {x} that hit the {c} area {act} {n} residents",
        ],
    ),
    Frame(
        {"a": "company", "b": "company", "n": "number"},
        ("a", "b"),
        [
            {
                "act": ["sued", "filed a lawsuit against", "is suing"],
                "pas": ["was sued by", "faces a lawsuit from", "is being sued by"],
            },
            {
                "act": ["did not sue", "will not sue", "dropped its lawsuit against"],
                "pas": ["was not sued by", "will not be sued by", "no longer faces a lawsuit from"],
            },
        ],
        [
            "{a} {act} {b} for {n} million dollars",
            "{b} {pas} {a} for {n} million dollars",
            "seeking {n} million dollars in damages, {a} {act} {b}",
            "{b} {pas} {a} over a debt of {n} million dollars",
        ],
    ),
    Frame(
        {"p": "person", "q": "person", "a": "company"},
        ("p", "q"),
        [
            {
                "act": ["will replace", "takes over from", "succeeds"],
                "pas": ["will be replaced by", "is succeeded by", "hands over to"],
            },
        ],
        [
            "{p} {act} {q} as chief executive of {a}",
            "{q} {pas} {p} as chief executive of {a}",
            "{a} named {p} as chief executive to replace {q}",
            "at {a}, {q} {pas} {p} as head of the company",
        ],
    ),
    Frame(
        {"a": "company", "n": "number", "c": "city"},
        None,
        [
            {
                "act": ["will cut", "plans to eliminate", "is shedding"],
                "pas": ["will be cut by", "are being eliminated by"],
            },
            {
                "act": ["will add", "plans to create", "is adding"],
                "pas": ["will be added by", "are being created by"],
            },
        ],
        [
            "{a} {act} {n} hundred jobs in {c}",
            "{n} hundred jobs in {c} {pas} {a}",
            "at its plant in {c}, {a} {act} {n} hundred jobs",
        ],
    ),
    Frame(
        {"p": "person", "x": "topic", "n": "number"},
        None,
        [
            {
                "act": ["signed", "approved", "backed"],
                "pas": ["was signed by", "was approved by", "won the backing of"],
            },
            {
                "act": ["vetoed", "rejected", "did not sign"],
                "pas": ["was vetoed by", "was rejected by", "was not signed by"],
            },
        ],
        [
            "governor {p} {act} a {n} million dollar bill on {x}",
            "a {n} million dollar bill on {x} {pas} governor {p}",
            "a bill that spends {n} million dollars on {x} {pas} governor {p}",
        ],
    ),
    Frame(
        {"c": "city", "n": "number", "x": "unrest"},
        None,
        [
            {
                "act": ["arrested", "detained", "took into custody"],
                "pas": ["were arrested by", "were detained by"],
            },
            {
                "act": ["released", "freed", "let go"],
                "pas": ["were released by", "were freed by"],
            },
        ],
        [
            "police in {c} {act} {n} people after a {x}",
            "{n} people {pas} police in {c} after a {x}",
            "after a {x} in {c}, {n} people {pas} police",
            "following a {x}, {c} police {act} {n} suspects",
        ],
    ),
    Frame(
        {"a": "company", "b": "company", "n": "number"},
        ("a", "b"),
        [
            {
                "act": ["lent", "provided a loan of"],
                "pas": ["borrowed", "received a loan of"],
            },
            {
                "act": ["did not lend", "denied a loan of"],
                "pas": ["did not borrow", "was refused a loan of"],
            },
        ],
        [
            "{a} {act} {n} million dollars to {b}",
            "{b} {pas} {n} million dollars from {a}",
            "to help {b}, {a} {act} {n} million dollars",
        ],
    ),
    Frame(
        {"p": "person", "q": "person", "x": "topic"},
        ("p", "q"),
        [
            {
                "act": ["praised", "applauded", "defended"],
                "pas": ["was praised by", "was applauded by", "won praise from"],
            },
            {
                "act": ["criticized", "attacked", "denounced"],
                "pas": ["was criticized by", "was attacked by", "drew criticism from"],
            },
        ],
        [
            "{p} {act} {q} over the plan on {x}",
            "{q} {pas} {p} over the plan on {x}",
            "in a debate on {x}, {p} {act} {q}",
            "senator {q} {pas} senator {p} for the position on {x}",
        ],
    ),
    Frame(
        {"c": "city", "d": "city", "n": "number"},
        ("c", "d"),
        [
            {"act": ["canceled", "called off"], "pas": ["were canceled", "were called off"]},
            {"act": ["added", "introduced"], "pas": ["were added", "were introduced"]},
        ],
        [
            "airlines {act} {n} flights from {c} to {d}",
            "{n} flights from {c} to {d} {pas}",
            "{n} flights to {d} from {c} {pas} by airlines",
        ],
    ),
]


def word_classes() -> list[list[str]]:
    """The interchangeable words of the corpus in lower case, a list for each kind."""
    return [[word.lower() for word in words] for words in [*POOLS.values(), NUMBER_WORDS]]
