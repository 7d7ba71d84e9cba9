"""The files of random sites: each is read, or refused in a few lines; nothing hangs, nothing else is raised."""

import json
import random
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mappo.errors import ConfigError
from mappo.strict_json import to_dict
from pipelines.site import Site, read_site

EXAMPLE = Path("k8s/site.yaml").read_text()
SECONDS = 5
WORDS = [
    *("a", "''", '"\\ud800"', '"\\e[2J"', '"\\n"', "~", "null", "true", "no", "=", "<<", "!!null", "- -", "? [a]"),
    *("0", "-1", "1.5", "1e999", ".inf", ".nan", "0x" + "f" * 5000, "9" * 5000, "9" * 4000, "1:60:99", "0b"),
    *("2001-13-45", "2001-01-01", "2001-01-01T99:99:99Z", "!!timestamp x", "!!int ''", "!!float ''", "!!bool x"),
    *("!!binary é", "!!binary YQ==", "!!set {a}", "!!omap [a: 1]", "!!pairs [a: 1]", "!!str 5", "!!python/name:a"),
    *("&a [*a]", "&a {b: *a}", "{<<: [{a: 1}, {b: 2}]}", "{<<: 5}", "{<<: *b}", "*b", "*c", "{? {a: 1} : 2}"),
    *("[" * 60 + "]" * 60, "[" * 400 + "]" * 400, "{a: " * 60 + "}" * 60, "{1: a, 1.0: b}", "{'': ''}", "%YAML"),
    *("|\n  text", ">-\n  text", "'x' 'y'", "\t", "\u2028", "\ufeff", "\x00", "\x07", "---", "...", "@", "`", "é"),
    *(
        "500m",
        "8Gi",
        "s3://b/c",
        "http://h:99999",
        "http://[::1",
        "{key: a, operator: Exists}",
        "a:1",
        "x" * 10**4,
    ),
    *("{a: 1, a: 2}", "[[[[a]]]]", "0o9"),
]


def paths(values: dict, start: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, value in values.items():
        yield (*start, key)
        if isinstance(value, dict):
            yield from paths(value, (*start, key))


PATHS = list(paths(to_dict(Site())))


def with_word(generator: random.Random) -> str:
    """Return a site with odd values in a few fields, known ones for the most part."""
    lines = ["b: &b {a: x}"] if generator.random() < 0.2 else []
    for _ in range(generator.randint(1, 3)):
        *outer, key = generator.choice(PATHS) if generator.random() < 0.9 else (generator.choice(WORDS),)
        opened = "".join(f"{name}: {{" for name in outer)
        lines.append(f"{opened}{key}: {generator.choice(WORDS)}{'}' * len(outer)}")
    return "\n".join(lines)


def with_damage(generator: random.Random) -> str:
    """Return the example with some characters removed, repeated or replaced."""
    text = EXAMPLE
    for _ in range(generator.randint(1, 10)):
        start = generator.randrange(len(text))
        end = start + generator.randint(0, 20)
        character = chr(generator.randrange(1, 0x3000))
        middle = generator.choice(["", text[start:end] * 3, generator.choice(WORDS), character])
        text = text[:start] + middle + text[end:]
    return text


def with_structure(generator: random.Random) -> str:
    """Return random values in the place of a field, or aliases of aliases."""
    if generator.random() < 0.2:
        opening, closing = generator.choice([("[", "]"), ("{<<: [", "]}")])
        base = "x" if opening == "[" else "{a: 1}"
        lines = [f"a0: &a0 {opening}{base}, {base}{closing}"]
        for number in range(1, generator.randint(2, 12)):
            aliases = ", ".join([f"*a{number - 1}"] * 9)
            lines.append(f"a{number}: &a{number} {opening}{aliases}{closing}")
        return "\n".join(lines)
    return json.dumps({generator.choice(PATHS)[-1]: structure(generator, 6)})


def structure(generator: random.Random, depth: int):
    kind = generator.randrange(7 if depth else 5)
    if kind < 5:
        number = generator.random()
        return (None, number < 0.5, generator.randint(-(2**70), 2**70), number * 1e300, "é\n" * 3)[kind]
    children = [structure(generator, depth - 1) for _ in range(generator.randrange(5))]
    return children if kind == 5 else {generator.choice(generator.choice(PATHS)): child for child in children}


@contextmanager
def deadline(text: str) -> Iterator[None]:
    def fail(*_):
        raise AssertionError(f"the site is read for more than {SECONDS} s: {text[:2000]!r}")

    previous = signal.signal(signal.SIGALRM, fail)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def check(path: Path, text: str) -> bool:
    """Read a site's file; return whether it is accepted. If it is refused, the message must be short."""
    path.write_text(text, errors="surrogatepass")
    with deadline(text):
        try:
            read_site(path)
        except ConfigError as error:
            lines = str(error).splitlines()
            assert 0 < len(lines) < 30, text[:2000]
            assert all(line.startswith(f"{path}: ") and len(line) < 500 for line in lines), (lines, text[:2000])
            assert all(line.isprintable() for line in lines), (lines, text[:2000])
            return False
    return True


@pytest.mark.parametrize(
    ("make", "number"),
    [
        *((make, 100) for make in (with_word, with_damage, with_structure)),
        *(pytest.param(make, 3400, marks=pytest.mark.long) for make in (with_word, with_damage, with_structure)),
    ],
)
def test_random_site_is_read_or_refused_in_a_few_short_lines(tmp_path, make, number):
    accepted = [check(tmp_path / "site.yaml", make(random.Random(seed))) for seed in range(number)]
    assert not all(accepted)


def test_every_odd_value_is_read_or_refused_in_every_field(tmp_path):
    for word in WORDS:
        for name in ("image", "pod_labels", "run_as_user", "stages"):
            check(tmp_path / "site.yaml", f"{name}: {word}")


def test_large_sites_are_refused_at_once(tmp_path):
    for text in (
        "\n".join(f"key{number}: 1" for number in range(60_000)),
        "pod_labels:\n" + "\n".join(f"  key{number}: a" for number in range(60_000)),
        "\n".join(f"key{number}: 1" for number in range(4_000)),
        "a: " + "x" * 2_000_000,
        "[" * 1_000_000,
        "? " * 100_000,
        "- " * 100_000,
    ):
        assert not check(tmp_path / "site.yaml", text)
