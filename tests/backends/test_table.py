"""How operations become rows of a table, and how a URL names one: without a database."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from walbatch.backends.sql.fields import take_table, url_query
from walbatch.backends.sql.table import Table, UnreadableError, read
from walbatch.errors import ConfigError

WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no name": ({"name": ""}, "'' is no name of a table"),
    "an empty part": ({"name": "a."}, "'' is no name"),
    "a name that would be cut off": ({"name": "x" * 64}, "1 to 63"),
    "a name with a line break": ({"columns": "a\nb"}, "is no name"),
    "a name that is no text": ({"columns": [7]}, "7 is no name"),
    "no key": ({"key": ()}, "has no key columns"),
    "a column twice": ({"key": "payload"}, "'payload' of table 't' is named twice"),
    "an unknown codec": ({"codec": "xml"}, "codec is 'xml', but must be one of bytes, text, json"),
    "an unknown key codec": ({"key_codec": "uuid"}, "key_codec is 'uuid'"),
    "one value for two columns": (
        {"columns": ("a", "b")},
        'codec "bytes" makes one value, but there are 2 columns',
    ),
    "one value for two keys": ({"key": ("a", "b")}, 'key_codec "bytes" makes one value, but there are 2'),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_table_that_cannot_be_is_refused_with_the_reason(wrong: str) -> None:
    options, says = WRONG[wrong]
    with pytest.raises(ConfigError, match=says):
        Table(**{"name": "t", **options})


def test_every_problem_is_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        Table("", codec="xml", key_codec="?")
    assert len(caught.value.problems) == 3


KEYS: dict[str, tuple[str, bytes, tuple[Any, ...] | None]] = {
    "bytes": ("bytes", b"\xff", (b"\xff",)),
    "text": ("text", "\u00df".encode(), ("\u00df",)),
    "no text": ("text", b"\xff", None),
    "a number": ("integer", b"-12", (-12,)),
    "no number": ("integer", b"1.5", None),
    "nothing for a number": ("integer", b"", None),
    "digits of another script": ("integer", "\u0663".encode(), None),
    "too many digits": ("integer", b"1" * 21, None),
    "an array": ("json", b'["a", 1]', None),
    "an array of one": ("json", b'["a"]', ("a",)),
    "no array": ("json", b'"a"', None),
    "an array in an array": ("json", b"[[1]]", None),
    "an array of nothing": ("json", b"[null]", None),
    "no json": ("json", b"[", None),
}


@pytest.mark.parametrize("case", KEYS)
def test_a_key_is_read_or_refused(case: str) -> None:
    codec, key, expected = KEYS[case]
    table = Table("t", key_codec=codec)
    if expected is None:
        with pytest.raises(UnreadableError, match="key"):
            table.read_key(key)
    else:
        assert table.read_key(key) == expected


def test_an_empty_payload_is_a_value_or_deletes_as_the_codec_says_unless_told_otherwise() -> None:
    assert Table("t").read_payload(b"") == (b"",)
    assert Table("t", codec="text").read_payload(b"") == ("",)
    assert Table("t", codec="json").read_payload(b"") is None
    assert Table("t", empty_deletes=True).read_payload(b"") is None
    with pytest.raises(UnreadableError):
        Table("t", codec="json", empty_deletes=False).read_payload(b"")
    with pytest.raises(UnreadableError, match="NoneType"):
        Table("t", codec="json").read_payload(b"null")


def test_lists_and_objects_are_stored_as_json_text() -> None:
    table = Table("t", columns=("a", "b", "c"), codec="json")
    assert table.read_payload('{"a": {"x": ["\u00df"]}, "b": false}'.encode()) == (
        '{"x": ["\u00df"]}',
        False,
        None,
    )


# --- folding: what is left to do for many changes, is what they do one after the other ------------------------------

OPERATIONS = st.lists(
    st.tuples(st.sampled_from([b"a", b"b", b"c"]), st.sampled_from([b"", b"1", b"2", b"3"])), max_size=12
)


@given(OPERATIONS, st.data())
def test_folded_changes_leave_what_they_leave_one_by_one(
    pairs: list[tuple[bytes, bytes]], data: st.DataObject
) -> None:
    table = Table("t", empty_deletes=True)
    wanted = data.draw(st.none() | st.just(range(0, len(pairs), 2)))
    changes, refused = read(table, [key for key, _ in pairs], [payload for _, payload in pairs], wanted)
    assert not refused
    start = data.draw(st.integers(0, len(changes)))
    end = data.draw(st.integers(start, len(changes)))
    # A row is its payload and its age: a row that is put after its delete is new.
    ones = dict.fromkeys((b"a", b"b"), (b"old", 0))
    folded = dict(ones)
    for key, values in list(zip(changes.keys, changes.values, strict=True))[start:end]:
        if values is None:
            ones.pop(key[0], None)
        else:
            ones[key[0]] = (values[0], ones[key[0]][1] if key[0] in ones else 1)
    apart = data.draw(st.sampled_from([None, [{str}], [{bytes}]]))
    steps = changes.fold(start, end, apart)
    assert apart != [{bytes}] or len(steps) == (start < end)
    for deletes, columns in steps:
        rows = list(zip(*columns, strict=True))
        assert deletes or rows
        assert len(set(deletes)) == len(deletes)
        assert len({row[0] for row in rows}) == len(rows)
        for (key,) in deletes:
            folded.pop(key, None)
        for key, payload in rows:
            folded[key] = (payload, folded[key][1] if key in folded else 1)
    assert folded == ones


LIKE: Final = st.sampled_from([1, 1.0, True, "1", "a", "A", 0.0, -0.0])


@given(
    st.lists(st.tuples(LIKE, st.sampled_from([b"", b"1", b"2"])), max_size=12),
    st.sampled_from([str, repr, str.upper]),
)
def test_keys_that_are_one_to_python_or_to_the_database_alone_end_as_the_last_operation_says(
    pairs: list[tuple[Any, bytes]], seen: Callable[[Any], str]
) -> None:
    """Rows are put one after the other here, as SQLite does it, by what a column makes of keys: `seen`."""
    table = Table("t", key_codec=lambda key: (pairs[int(key)][0],), empty_deletes=True)
    changes, _ = read(
        table, [b"%d" % place for place in range(len(pairs))], [payload for _, payload in pairs], None
    )
    ones: dict[str, bytes] = {}
    folded: dict[str, bytes] = {}
    for key, payload in pairs:
        if payload:
            ones[seen(str(key))] = payload
        else:
            ones.pop(seen(str(key)), None)
    for deletes, columns in changes.fold(0, len(changes), [set() if seen is str.upper else {str}]):
        for (key,) in deletes:
            folded.pop(seen(str(key)), None)
        for key, payload in zip(*columns, strict=True):
            folded[seen(str(key))] = payload
    assert folded == ones


@given(OPERATIONS)
def test_a_plain_table_folds_as_any_other(pairs: list[tuple[bytes, bytes]]) -> None:
    keys, payloads = [key for key, _ in pairs], [payload for _, payload in pairs]
    plain, _ = read(Table("t"), keys, payloads, None)
    slow, _ = read(Table("t", key_codec=lambda key: (key,)), keys, payloads, None)
    assert plain.fold(0, len(pairs), None) == slow.fold(0, len(pairs), None)


# --- URLs -----------------------------------------------------------------------------------------------------------

NAMES = st.text(st.characters(exclude_categories=["C", "Z"], exclude_characters="."), min_size=1, max_size=10)


@given(
    NAMES,
    st.lists(NAMES, unique=True, min_size=1, max_size=4),
    st.sampled_from(["json"]),
    st.booleans(),
    st.sampled_from([None, True, False]),
)
def test_a_table_as_a_query_is_the_same_table(
    name: str, columns: list[str], codec: str, create: bool, empty_deletes: bool | None
) -> None:
    table = Table(
        name, key=columns[:1], columns=columns[1:], key_codec="text", codec=codec, create=create, empty_deletes=empty_deletes
    )  # fmt: skip
    again, rest = take_table(url_query(table) + "&other=a%20b", "shown")
    assert again == table
    assert rest == {"other": "a b"}
    plain = Table(name)
    assert take_table(url_query(plain), "shown") == (plain, {})
