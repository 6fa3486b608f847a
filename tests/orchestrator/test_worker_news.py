"""When a Ray worker answers that its training still runs."""

from __future__ import annotations

import threading
import time

import pytest

from orchestrator.worker import News

LONG_S = 60.0


def waited(news: News, seconds: float = LONG_S) -> float:
    start = time.monotonic()
    news.wait(seconds)
    return time.monotonic() - start


def test_without_news_an_answer_waits_its_time() -> None:
    assert waited(News(), 0.2) >= 0.2


def test_news_end_one_wait_and_not_the_next() -> None:
    news = News()
    news.tell()
    assert waited(news) < LONG_S / 2
    assert waited(news, 0.2) >= 0.2


@pytest.mark.parametrize("delay_s", [0.0, 0.05])
def test_nobody_waits_for_a_training_that_is_over(delay_s: float) -> None:
    news = News()
    threading.Timer(delay_s, news.close).start()
    assert waited(news) < LONG_S / 2
    assert waited(news) < LONG_S / 2
