"""What the fuzzer starts from, what it once found, and what is near that, is taken as it should be."""

import logging
import random
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

from fuzz.run import TARGETS, corpus, longest
from fuzz.targets import http

FILES = [pytest.param(target, path, id=f"{target}-{path.name}") for target in TARGETS for path in corpus(target)]
TRIES = 150


@pytest.fixture(scope="session", autouse=True)  # a module may end several times, if tests are passed between processes
def _servers_end() -> Iterator[None]:
    yield
    for server in http.running:
        server.close()


@pytest.mark.parametrize(("target", "path"), FILES)
def test_the_corpus(target: str, path: Path) -> None:
    assert import_module(f"fuzz.targets.{target}").check(path.read_bytes()) == (path.suffix != ".bad")


def test_fuzzed_servers_leave_the_logs_of_other_tests_alone(caplog: pytest.LogCaptureFixture) -> None:
    assert http.check(corpus("http")[0].read_bytes())
    logging.getLogger("harmonia").error("of another test", exc_info=KeyError())
    assert caplog.messages == ["of another test"]
    assert http.check(corpus("http")[0].read_bytes())


@pytest.mark.parametrize("target", TARGETS)
def test_what_is_near_the_corpus(target: str) -> None:
    """A few of those changes that a fuzzer makes, the same in each run."""
    module = import_module(f"fuzz.targets.{target}")
    chance = random.Random(target)
    texts = [path.read_bytes() for path in corpus(target)]
    for _ in range(TRIES):
        text = bytearray(chance.choice(texts))
        for _ in range(chance.randint(1, 3)):
            at = chance.randint(0, len(text))
            piece = chance.choice(
                [chance.randbytes(1), chance.choice(module.WORDS), chance.choice(texts)[at:][:20], b""]
            )
            text[at : at + chance.choice([0, 1, len(piece)])] = piece
        module.check(bytes(text[: longest(module)]))
