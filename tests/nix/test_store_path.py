import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harmonia.errors import FormatError
from harmonia.nix.store_path import StorePath, is_hash_part
from harmonia.untrusted import excerpt
from support.strategies import NAME_CHARACTERS, NIX32, STORE_DIR, base_names, hash_parts, near_base_names, store_paths

HASH_PART = "1dvdsyn9d7z6wfrkpxw28nj59kflfxyz"


def is_base_name(text: str) -> bool:
    """Implement the grammar a second time, independently."""
    hash_part, dash, name = text[:32], text[32:33], text[33:]
    return (
        len(hash_part) == 32
        and set(hash_part) <= set("0123456789abcdfghijklmnpqrsvwxyz")
        and dash == "-"
        and 1 <= len(name) <= 211
        and set(name) <= set(string.ascii_letters + string.digits + "+-._?=")
        and name not in {".", ".."}
        and not name.startswith((".-", "..-"))
    )


def accepts(text: str) -> bool:
    try:
        StorePath(text)
    except FormatError:
        return False
    return True


@given(st.one_of(base_names, near_base_names, st.builds("{}-{}".format, hash_parts, st.text(".-a\n", max_size=4))))
def test_store_path_accepts_exactly_the_grammar(text: str) -> None:
    assert accepts(text) == is_base_name(text)


@given(near_base_names)
def test_near_miss_is_rejected_and_shown(text: str) -> None:
    with pytest.raises(FormatError) as caught:
        StorePath(text)
    assert excerpt(text) in str(caught.value)


@pytest.mark.parametrize("name", [".a", "...", "..a", "...-a", ".a-", "-", "--", "a.", "a" * 211, "q?z=1.drv"])
def test_unusual_names_are_accepted(name: str) -> None:
    assert StorePath(f"{HASH_PART}-{name}").name == name


def test_names_have_1_to_211_characters() -> None:
    lengths = [length for length in range(300) if accepts(f"{HASH_PART}-{'a' * length}")]
    assert lengths == list(range(1, 212))


@given(hash_parts, st.text(NAME_CHARACTERS, min_size=1))
def test_store_path_has_hash_part_and_name(hash_part: str, name: str) -> None:
    path = StorePath(f"{hash_part}-a{name}"[:244])
    assert path.hash_part == hash_part
    assert f"{path.hash_part}-{path.name}" == path
    assert path.is_derivation == (path.name[-4:] == ".drv")


@given(st.text(NIX32 + "eotuA\n ٣", min_size=31, max_size=33) | hash_parts)
def test_is_hash_part_accepts_exactly_32_base32_digits(text: str) -> None:
    assert is_hash_part(text) == (len(text) == 32 and set(text) <= set(NIX32))


@given(
    st.lists(store_paths | st.sampled_from(["a", "a-b", "a.b", "a0", "A"]).map(lambda n: StorePath(f"{'0' * 32}-{n}")))
)
def test_store_paths_sort_by_bytes(paths: list[StorePath]) -> None:
    assert [path.encode() for path in sorted(paths)] == sorted(path.encode() for path in paths)


@given(store_paths, st.sampled_from([STORE_DIR, "/gnu/store", "/tmp/a b"]))
def test_in_dir_parses_a_full_path(path: StorePath, store_dir: str) -> None:
    assert StorePath.in_dir(store_dir, f"{store_dir}/{path}") == path


@pytest.mark.parametrize(
    "path",
    [
        f"/gnu/store/{HASH_PART}-a",
        f"/nix/store{HASH_PART}-a",
        f"/nix/store2{HASH_PART}-a",
        f"/nix/store//{HASH_PART}-a",
        f"/nix/store/{HASH_PART}-a/",
        f"/nix/store/{HASH_PART}-a/bin",
        f"/nix/store/../store/{HASH_PART}-a",
        f"{HASH_PART}-a",
        "/nix/store/.links",
        "/nix/store/",
        "/nix/store",
        "",
    ],
)
def test_in_dir_rejects_paths_outside_the_store_directory(path: str) -> None:
    with pytest.raises(FormatError):
        StorePath.in_dir(STORE_DIR, path)
