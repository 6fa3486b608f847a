"""Random sound domains and spaces for the laws of this room."""

from __future__ import annotations

from hypothesis import strategies as st

from search_spaces.domains import Choice, Domain, Float, Int, same
from search_spaces.space import Axis, Space, When

numbers = st.floats(-1e6, 1e6, allow_subnormal=False)
positive = st.floats(1e-12, 1e6, allow_subnormal=False)
words = st.text("abcxyz_-./+01 ,\"'é:#[]{}", min_size=1, max_size=6)
scalars = st.none() | st.booleans() | st.integers(-(10**9), 10**9) | numbers | words
values = scalars | st.lists(scalars, min_size=1, max_size=3)


@st.composite
def floats(draw: st.DrawFn) -> Float:
    log = draw(st.booleans())
    low, high = sorted(draw(st.lists(positive if log else numbers, min_size=2, max_size=2, unique=True)))
    return Float(low, high, log)


@st.composite
def ints(draw: st.DrawFn) -> Int:
    if draw(st.booleans()):
        low = draw(st.integers(1, 10**6))
        return Int(low, low + draw(st.integers(1, 10**6)), log=True)
    low, step = draw(st.integers(-(10**6), 10**6)), draw(st.integers(1, 50))
    return Int(low, low + draw(st.integers(step, step + 10**4)), step=step)


@st.composite
def choices(draw: st.DrawFn) -> Choice:
    options: list[object] = []
    for value in draw(st.lists(values, min_size=2, max_size=5)):
        if not any(same(value, other) for other in options):
            options.append(value)
    return Choice(tuple(options if len(options) > 1 else ["one", "two"]))


domains: st.SearchStrategy[Domain] = st.one_of(floats(), ints(), choices())


@st.composite
def spaces(draw: st.DrawFn) -> Space:
    """Up to five axes; an axis after a choice may exist only for some of its options."""
    axes: list[Axis] = []
    for index, domain in enumerate(draw(st.lists(domains, min_size=1, max_size=5))):
        governing = [axis for axis in axes if isinstance(axis.domain, Choice)]
        when = None
        if governing and draw(st.booleans()):
            parent = draw(st.sampled_from(governing))
            assert isinstance(parent.domain, Choice)
            chosen = draw(st.lists(st.sampled_from(parent.domain.options), min_size=1, max_size=2))
            when = When(parent.path, tuple(chosen))
        axes.append(Axis(f"part.field_{index}", domain, when))
    return Space(tuple(axes))
