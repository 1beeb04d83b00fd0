"""The fuzz targets accept and reject their corpus correctly, and survive mutations of it."""

import logging
import random
from collections.abc import Iterator
from importlib import import_module

import pytest

from fuzz.run import TARGETS, corpus, longest
from fuzz.targets import http
from support.running import case

TRIES = 150


@pytest.fixture(scope="session", autouse=True)  # a module may be torn down several times if xdist moves tests
def _servers_end() -> Iterator[None]:
    yield
    for server in http.running:
        server.close()


@pytest.mark.parametrize("target", TARGETS)
def test_corpus_file_is_accepted_unless_named_bad(target: str) -> None:
    module = import_module(f"fuzz.targets.{target}")
    for path in corpus(target):
        with case(path.name):
            assert module.check(path.read_bytes()) == (path.suffix != ".bad")


def test_fuzzed_servers_do_not_affect_logs_of_other_tests(caplog: pytest.LogCaptureFixture) -> None:
    assert http.check(corpus("http")[0].read_bytes())
    logging.getLogger("harmonia").error("of another test", exc_info=KeyError())
    assert caplog.messages == ["of another test"]
    assert http.check(corpus("http")[0].read_bytes())


@pytest.mark.parametrize("target", TARGETS)
def test_mutations_of_the_corpus_do_not_fail(target: str) -> None:
    """The mutations are like those of a fuzzer, and the same in each run."""
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
