"""The changes of fuzz tests: random ones, by fixed seeds, of JSON values, of texts and of bytes."""

import json
import random
from collections.abc import Iterator
from typing import Any

ODD_VALUES = [
    *(
        None,
        True,
        0,
        -1,
        1,
        7,
        2**31,
        2**63,
        2**64,
        10**30,
        0.5,
        -0.0,
        1e308,
        -1e308,
        "",
        "abc",
        "nan",
        "../x",
        "\x00",
    ),
    *("\u202e\x1b[31m", "١٢", "a" * 5_000, [], {}, [[]], [[[[[[]]]]]], {"": {}}, [1, 2, 3], {"float": "abc"}),
    *(
        {"float": "nan"},
        {"float": "-inf"},
        {"float": []},
        {"object": "scenario"},
        {"object": "world"},
        {"object": []},
    ),
    *(
        {"tensor": 0},
        {"tensor": 10**9},
        {"tensor": -1},
        {"array": {}},
        {"tuple": []},
        {"tuple": ["os.system", ["x"]]},
    ),
    *(
        {"kept": "os.system"},
        {"kept": "builtins.function"},
        {"enum": ["os", "x"]},
        {"frozenset": [[]]},
        {"number": {}},
    ),
    *({"array": {"memory": "0.float32", "dtype": "O", "size": [1]}}, {"object": "random_states"}, {"eval": "1"}),
]


def mutated_json(value: Any, generator: random.Random, changes: int = 3) -> Any:
    """Return a copy of a JSON value with up to this many places changed, removed, doubled or exchanged."""
    copy = [json.loads(json.dumps(value))]
    for _ in range(generator.randint(1, changes)):
        container, key = _any_place(copy, generator)
        match generator.randrange(5):
            case 0 | 1:
                container[key] = _odd_value(generator)
            case 2:
                _change_slightly(container, key, generator)
            case 3 if container is not copy:
                del container[key]
            case _:
                other, place = _any_place(copy, generator)
                container[key] = json.loads(json.dumps(other[place]))
    return copy[0]


def _odd_value(generator: random.Random) -> Any:
    return json.loads(json.dumps(generator.choice(ODD_VALUES)))


def _any_place(root: Any, generator: random.Random) -> tuple[Any, Any]:
    """Return a place; each type and length of a value is as likely as the others, so that rare ones are found."""
    by_kind: dict[tuple[type, int], list[tuple[Any, Any]]] = {}
    for container, key in _places(root):
        value = container[key]
        length = min(len(value), 3) if isinstance(value, list | dict) else 0
        by_kind.setdefault((type(value), length), []).append((container, key))
    return generator.choice(generator.choice([*by_kind.values()]))


def _places(container: Any) -> Iterator[tuple[Any, Any]]:
    """Yield each place of a nested JSON value as its container and its key or index."""
    for key in list(container) if isinstance(container, dict) else range(len(container)):
        yield container, key
        if isinstance(container[key], list | dict):
            yield from _places(container[key])


def _change_slightly(container: Any, key: Any, generator: random.Random) -> None:
    value = container[key]
    if isinstance(value, bool) or value is None:
        container[key] = not value
    elif isinstance(value, int | float):
        container[key] = value + generator.choice([-1, 1, 0.5, 1e9])
    elif isinstance(value, str):
        container[key] = value[1:] + "x"
    elif isinstance(value, list):
        value.append(_odd_value(generator))
    else:
        container[key] = {"new": _odd_value(generator), **value}


def mutated_text(text: str, generator: random.Random) -> str:
    """Return a text with a few characters or lines changed, removed, doubled or exchanged."""
    for _ in range(generator.randint(1, 3)):
        first, last = sorted(generator.randrange(len(text) + 1) for _ in range(2))
        lines = text.splitlines(keepends=True) or [""]
        inserted = generator.choice(['"', ",", "\n", "abc", "\x00", "nan", "1e999", "\r", "٣", "9" * 5_000, "'"])
        match generator.randrange(5):
            case 0:
                text = text[:first] + inserted + text[first:]
            case 1:
                text = text[:first] + inserted + text[first + 1 :]
            case 2:
                text = text[:first] + text[last:]
            case 3:
                text = "".join([*lines, generator.choice(lines)])
            case 4:
                generator.shuffle(lines)
                text = "".join(lines)
    return text


def mutated_bytes(content: bytes, generator: random.Random) -> bytes:
    """Return bytes with a few of them changed, removed or added, more often near the start, where headers are."""
    changed = bytearray(content)
    for _ in range(generator.randint(1, 4)):
        end = generator.choice([9, 200, len(changed)])
        place = generator.randrange(max(1, min(end, len(changed))))
        match generator.randrange(4):
            case 0 | 1:
                changed[place : place + 1] = generator.randbytes(1)
            case 2:
                del changed[place : place + generator.randint(1, 50)]
            case 3:
                changed[place:place] = generator.randbytes(generator.randint(1, 20))
    return bytes(changed)
