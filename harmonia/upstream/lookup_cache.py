"""What the answers of upstreams were, remembered for their time."""

import asyncio
from collections import OrderedDict
from dataclasses import dataclass

from harmonia.upstream.loop_guard import Via
from harmonia.upstream.remote_path import Found

POSITIVE_TTL = 3600.0  # seconds: as long as no signature is withdrawn, what is said of a path stays true
_NEGATIVE_TTL = 30.0  # seconds: long enough for a client that asks twice, short for one who waits for a build
_SIZE = 32 << 20  # bytes, about: some 20,000 paths, or 60,000 that nobody has

Question = tuple[str, Via]
"""A hash part, and the way by which the question for it came."""


@dataclass(frozen=True, slots=True)
class Answer:
    found: Found | None
    expires: float
    size: int
    """Bytes of memory, about."""


class Memory:
    """Bounded: what was used longest ago goes first."""

    def __init__(self) -> None:
        self._left = _SIZE
        self._by_question: OrderedDict[Question, Answer] = OrderedDict()

    def get(self, question: Question) -> Answer | None:
        answer = self._by_question.get(question)
        if answer is None or answer.expires < asyncio.get_running_loop().time():
            return None
        self._by_question.move_to_end(question)
        return answer

    def remember(self, question: Question, found: Found | None) -> None:
        self.forget(question)
        ttl = POSITIVE_TTL if found else _NEGATIVE_TTL
        # Objects in Python take more than the text that they were made of.
        size = (
            500
            + 100 * (len(question[1].through) + len(question[1].asked))
            + (1000 + 3 * found.narinfo_size if found else 0)
        )
        self._by_question[question] = Answer(found, asyncio.get_running_loop().time() + ttl, size)
        self._left -= size
        while self._left < 0:
            self.forget(next(iter(self._by_question)))

    def forget(self, question: Question) -> None:
        answer = self._by_question.pop(question, None)
        self._left += answer.size if answer else 0
