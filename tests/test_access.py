"""Tokens: a server knows only their hashes, and no message shows the content of the token file."""

import hashlib
import re
import time
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from harmonia.config.tokens import SCOPES, Tokens, expiry_problem, format_time, new, parse, parse_end
from harmonia.errors import FormatError
from harmonia.tools.store_builder import StoreBuilder
from support.running import run

SECRET, TOKEN = new("ci", ["read"])
HASH = f"sha256:{TOKEN.sha256.hex()}"


def test_find_token_finds_only_the_exact_secret() -> None:
    others = [new(f"other-{number}", SCOPES)[1] for number in range(100)]
    tokens = Tokens([*others, TOKEN])
    assert tokens.find_token(SECRET) == TOKEN
    for other in ("", SECRET[:-1], SECRET + "x", SECRET.upper(), SECRET[1:], HASH, TOKEN.sha256.hex(), "\udcff", "ü"):
        assert tokens.find_token(other) is None
    assert Tokens([]).find_token(SECRET) is None


def test_token_with_a_colliding_prefix_of_its_hash_is_not_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    near = TOKEN.sha256[:-1] + bytes([TOKEN.sha256[-1] ^ 1])
    monkeypatch.setattr("harmonia.config.tokens._sha256", lambda _: near)
    assert Tokens([TOKEN]).find_token("another") is None


def test_new_secrets_are_long_and_unique() -> None:
    made = {new("a", ["read"])[0] for _ in range(100)}
    assert len(made) == 100
    assert all(re.fullmatch(r"harmonia_[A-Za-z0-9_-]{43}", secret) for secret in made)


@given(st.lists(st.sampled_from((*SCOPES[:-1], "sign:one-*", "sign:two")), unique=True, min_size=1))
@example(list(SCOPES))
def test_token_line_round_trips(scopes: list[str]) -> None:
    secret, token = new("a.b@c-d", scopes)
    assert parse(f"\n# comment\n  {token}   # another\n\n") == (token,)
    assert token.sha256 == hashlib.sha256(secret.encode()).digest()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("ci read", "line 2: expected NAME SCOPES HASH"),
        (f"ci {HASH}", "line 2: expected NAME"),
        (f"ci read {HASH} more", "line 2: expected NAME"),
        (f"ci read {SECRET}", "line 2: the hash is not sha256: and 64 hexadecimal digits"),
        (f"ci read {HASH[:-1]}", "line 2: the hash is not"),
        (f"ci read {HASH.upper()}", "line 2: the hash is not"),
        (f"ci/x read {HASH}", "line 2: the name has other characters than letters"),
        (f"ci upload {HASH}", "line 2: unknown or repeated scope; scopes are read, browse, metrics"),
        (f"ci {SECRET} {HASH}", "line 2: unknown or repeated scope"),
        (f"{SECRET}! read {HASH}", "line 2: the name"),
        (f"ci read,read {HASH}", "line 2: unknown or repeated scope"),
        (f"ci sign,sign:x {HASH}", "line 2: unknown or repeated scope"),
        (f"ci sign:x,sign:x {HASH}", "line 2: unknown or repeated scope"),
        (f"ci push:x {HASH}", "line 2: unknown or repeated scope"),
        (f"ci sign: {HASH}", "line 2: a pattern of sign cannot match any name"),
        (f"ci sign:/{SECRET} {HASH}", "line 2: a pattern of sign cannot match any name"),
        (f"ci , {HASH}", "line 2: unknown or repeated scope"),
        (f"ci read {HASH} until:soon", "line 2: until: expected a day like"),
        (f"ci read {HASH} until:{SECRET}", "line 2: until: expected a day like"),
        (f"ci read {HASH} until:", "line 2: until: expected a day like"),
        (f"ci read {HASH} until:2026-12-31 until:2026-12-31", "line 2: expected NAME"),
        (f"ci read {'sha256:' + '0' * 64}", "line 2: repeats the name or the hash of an earlier line"),
        (f"ci2 read {HASH}", "line 2: repeats the name or the hash of an earlier line"),
    ],
    ids=lambda _: "line",
)
def test_malformed_line_is_reported_without_its_content(line: str, message: str) -> None:
    with pytest.raises(FormatError) as caught:
        parse(f"{TOKEN}\n{line}")
    assert str(caught.value).startswith(message)
    assert SECRET[10:30] not in str(caught.value)


@given(st.integers(0, 253402300799))
def test_end_round_trips(end: int) -> None:
    _, token = new("ci", ["read"], float(end))
    assert parse(str(token)) == (token,)
    assert parse_end(format_time(end)) == end


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("2026-12-31", "2027-01-01T00:00:00Z"),
        ("2026-12-31T18:00Z", "2026-12-31T18:00:00Z"),
        ("2026-12-31T18:00:00Z", "2026-12-31T18:00:00Z"),
        ("2026-12-31T18:00:00+01:00", "2026-12-31T17:00:00Z"),
        ("2026-12-31T18:00:00-01:30", "2026-12-31T19:30:00Z"),
        ("2028-02-29", "2028-03-01T00:00:00Z"),
    ],
)
def test_day_ends_in_utc_and_time_has_a_zone(text: str, moment: str) -> None:
    assert format_time(parse_end(text)) == moment


@pytest.mark.parametrize(
    "text",
    [
        "",
        "2026",
        "2026-02-30",
        "20261231",
        "2026-12-31T18:00:00",
        "2026-12-31 18:00Z",
        "2026-W01-1",
        "9999-12-31",
        "0001-01-01",
        "9999-12-31T23:59:59-12:00",
        "٢٠٢٦-12-31",
    ],
)
def test_other_ends_are_rejected(text: str) -> None:
    with pytest.raises(FormatError, match="expected a day like 2026-12-31, or a time with zone"):
        parse_end(text)


def test_problem_begins_fourteen_days_before_the_end() -> None:
    _, token = new("ci", ["read"], 1_000_000_000.0)
    fortnight = 14 * 86400
    assert expiry_problem(token, 1_000_000_000.0 - fortnight) is None
    assert expiry_problem(token, 1_000_000_001.0 - fortnight) == "the token ci expires at 2001-09-09T01:46:40Z"
    assert expiry_problem(token, 1_000_000_000.0) == "the token ci expired at 2001-09-09T01:46:40Z"
    assert expiry_problem(TOKEN, 1e15) is None


@given(st.text())
def test_arbitrary_text_raises_only_format_error(text: str) -> None:
    try:
        parse(text)
    except FormatError as error:
        assert re.match(r"line [0-9]+: ", str(error))  # noqa: PT017 (no error is fine as well)


@pytest.mark.parametrize(
    ("scopes", "allowed"),
    [
        (["push"], set()),
        (["sign"], {"app-1", "app", "lib-1"}),
        (["sign:app-*"], {"app-1"}),
        (["push", "sign:app-*", "sign:lib-?"], {"app-1", "lib-1"}),
    ],
)
def test_token_allows_to_sign_the_names_of_its_patterns(scopes: list[str], allowed: set[str]) -> None:
    _, token = new("ci", scopes)
    assert {name for name in ("app-1", "app", "lib-1") if token.may_sign(name)} == allowed


def test_repr_of_a_token_has_no_hash() -> None:
    assert TOKEN.sha256.hex() not in repr(TOKEN)
    assert repr(TOKEN.sha256) not in repr(TOKEN)


def test_token_command_prints_secret_and_line() -> None:
    made = run("token", "builder", "--scope", "read", "--scope", "metrics", "--scope", "sign:app-*")
    assert made.returncode == 0
    (secret,) = set(re.findall(r"harmonia_[A-Za-z0-9_-]{43}", made.stdout))
    (line,) = re.findall(r"\S+ +\S+ +sha256:\w+", made.stdout)
    (token,) = parse(line)
    assert (token.name, sorted(token.scopes)) == ("builder", ["metrics", "read", "sign"])
    assert token.sign_names == ("app-*",)
    assert Tokens([token]).find_token(secret) == token
    assert f"login builder password {secret}" in made.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ["a b"],
        [""],
        ["ci", "--scope", "upload"],
        ["ci", "--scope", "sign:/x"],
        ["ci", "--scope", "sign:[a,b]"],
        ["ci", "--until", "soon"],
        ["ci", "--until", "9999999w"],
        ["create"],
    ],
)
def test_token_command_rejects_invalid_arguments(arguments: list[str]) -> None:
    refused = run("token", *arguments)
    assert (refused.returncode, refused.stdout) == (2, "")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (f"ci upload {HASH}", "': line 1: unknown or repeated scope"),
        (SECRET, "': line 1: expected NAME SCOPES HASH"),
        ("\xff", "': not UTF-8"),
        (None, "cannot read"),
    ],
    ids=["scope", "secret", "bytes", "none"],
)
def test_invalid_token_file_prevents_the_start(tmp_path: Path, content: str | None, message: str) -> None:
    store = StoreBuilder(tmp_path)
    if content is not None:
        (tmp_path / "tokens").write_text(content, encoding="latin-1")
    config = tmp_path / "harmonia.toml"
    config.write_text(
        f"real_nix_store = '{store.real_dir}'\nnix_db_path = '{store.db_path}'\ntokens_path = '{tmp_path}/tokens'\n"
    )
    checked = run("--config", str(config), "check-config")
    assert checked.returncode == 2
    assert checked.stderr.startswith(f"harmonia: {config}:3: tokens_path: ")
    assert message in checked.stderr
    assert checked.stderr.count("\n") == 1
    assert SECRET not in checked.stderr


def test_many_tokens_are_parsed_in_linear_time() -> None:
    """The limit is ten times the usual time; quadratic time would be half a minute."""
    hashes = (hashlib.sha256(str(number).encode()).hexdigest() for number in range(20_000))
    text = "".join(f"token-{number} read,browse sha256:{each}\n" for number, each in enumerate(hashes))
    began = time.process_time()
    assert len(parse(text)) == 20_000
    assert time.process_time() - began < 2
    with pytest.raises(FormatError, match="line 20001: repeats the name"):
        parse(f"{text}token-0 read sha256:{'0' * 64}")
