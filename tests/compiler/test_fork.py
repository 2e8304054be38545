"""What is run in a process of its own fails where it takes too much or ends without a word."""

import os
import time

import pytest

from . import fork
from .fork import ENDS, forked


def spin():
    while True:
        pass


def fail():
    raise KeyError("this")


BAD = {
    "raises": (fail, "KeyError: 'this'"),
    "aborts": (os.abort, f"{ENDS} with status"),
    "leaves": (lambda: os._exit(0), f"{ENDS} with status 0"),
    "computes on": (spin, f"{ENDS} with status"),
    "waits": (lambda: time.sleep(60), "takes more than 3 s"),
}


@pytest.mark.parametrize("name", BAD)
def test_an_end_that_is_a_failure(monkeypatch, name):
    monkeypatch.setattr(fork, "SECONDS", -1 if name == "computes on" else 10)  # a second more is left
    monkeypatch.setattr(fork, "WALL_SECONDS", 3 if name == "waits" else 60)
    work, word = BAD[name]

    def outcomes():
        yield "failed", ENDS
        work()
        yield "compiled", ""

    outcome, message, *_ = forked(outcomes)
    assert outcome == "failed" and word in message


def test_the_last_word_counts():
    assert forked(lambda: iter([("failed", ENDS), ("compiled", "so")]))[:2] == ("compiled", "so")


@pytest.mark.parametrize("limit", ["SECONDS", "MEGABYTES"])
def test_a_good_end_that_takes_too_much_is_a_failure(monkeypatch, limit):
    def outcomes():
        kept, end = bytearray(64 << 20), time.process_time() + 0.2
        while time.process_time() < end:
            pass
        yield "compiled", f"{len(kept)} bytes"

    assert forked(outcomes)[0] == "compiled"
    monkeypatch.setattr(fork, limit, {"SECONDS": 0, "MEGABYTES": 32}[limit])
    outcome, message, *_ = forked(outcomes)
    assert outcome == "failed" and message.startswith("takes ")
