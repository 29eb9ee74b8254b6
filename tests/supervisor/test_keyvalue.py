import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmcore.errors import ConfigError
from supervisor.keyvalue import Key, check_table, parse

KEYS = (
    Key("type", choices=("file", "sink")),
    Key("num", int, 1, 4),
    Key("path"),
    Key("console", bool),
)


def test_the_first_keys_name_may_be_omitted():
    assert parse("--x", KEYS, "sink,num=2") == {"type": "sink", "num": 2}


def test_a_bare_boolean_is_true():
    assert parse("--x", KEYS, "type=sink,console") == {"type": "sink", "console": True}


def test_a_boolean_may_be_the_first_word():
    assert parse("--x", KEYS, "console,type=sink") == {"console": True, "type": "sink"}


@pytest.mark.parametrize(("word", "value"), [("true", True), ("on", True), ("off", False), ("0", False)])
def test_a_boolean_may_be_spelled_out(word, value):
    assert parse("--x", KEYS, f"console={word}") == {"console": value}


def test_integers_may_be_hexadecimal():
    assert parse("--x", KEYS, "num=0x3") == {"num": 3}


def test_a_comma_may_stand_in_double_quotes():
    assert parse("--x", KEYS, r'path="a,b\"c\\d",num=1') == {"path": r'a,b"c\d', "num": 1}


def test_an_equals_sign_belongs_to_the_value():
    assert parse("--x", KEYS, "path=/tmp/a=b") == {"path": "/tmp/a=b"}


def test_unknown_keys_are_refused_with_the_known_ones_listed():
    with pytest.raises(ConfigError, match=r"--x: unknown key 'speed', .*type, num, path, console"):
        parse("--x", KEYS, "type=sink,speed=9600")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("type=sink,type=file", "type given twice"),
        ("sink,type=file", "type given twice"),
        ("type=sink,", "ends with a comma"),
        ("type=sink,path", "'path' has no value"),
        ("type=sink,,num=1", "has no value"),
        ("type=pipe", "expected one of file, sink"),
        ("num=5", "expected an integer from 1 to 4"),
        ("num=one", "expected an integer"),
        ("console=maybe", "expected true or false"),
        ("path=", "expected a non-empty string"),
        ("path=a\0b", "expected a non-empty string"),
        ('path="a"b', "cannot read"),
        ('num=1,path="a', "cannot read"),
    ],
)
def test_a_bad_list_is_one_line_that_names_the_option(text, why):
    with pytest.raises(ConfigError, match=f"(?s)^--x: .*{why}"):
        parse("--x", KEYS, text)


def test_no_text_gives_no_values():
    assert parse("--x", KEYS, "") == {}


def test_a_table_takes_toml_types_and_no_others():
    assert check_table("t", KEYS, {"num": 2, "console": False}) == {"num": 2, "console": False}
    with pytest.raises(ConfigError, match="num: expected an integer"):
        check_table("t", KEYS, {"num": True})
    with pytest.raises(ConfigError, match="path: expected a non-empty string"):
        check_table("t", KEYS, {"path": 3})
    with pytest.raises(ConfigError, match="console: expected true or false"):
        check_table("t", KEYS, {"console": 1})


@given(st.text(max_size=60))
def test_any_text_gives_values_or_a_config_error(text):
    try:
        values = parse("--x", KEYS, text)
    except ConfigError:
        return
    assert values.keys() <= {k.name for k in KEYS}


@given(st.text(min_size=1).filter(lambda s: "\0" not in s))
def test_every_string_can_be_quoted(text):
    quoted = '"' + text.replace("\\", r"\\").replace('"', r"\"") + '"'
    assert parse("--x", KEYS, f"num=1,path={quoted}") == {"num": 1, "path": text}
