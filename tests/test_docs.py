"""Documents: links and named files exist, and the programs accept the code blocks."""

import netrc
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from click.testing import CliRunner

from harmonia import cli
from harmonia.config import loader
from harmonia.nix.signing import SecretKey
from support.generated import targets
from support.pages import BLOCKS, PAGES, ROOT, Block, paragraphs, sentences, without_fences
from support.programs import needs
from support.running import PATIENCE_S

NAMES = [str(page.relative_to(ROOT)) for page in PAGES]


def of(*languages: str) -> pytest.MarkDecorator:
    chosen = [block for block in BLOCKS if block.language in languages]
    assert chosen
    return pytest.mark.parametrize("block", chosen, ids=lambda block: f"{block.page}:{block.line}")


def prose(page: Path) -> str:
    """Return the page without its code."""
    return re.sub(r"`[^`\n]*`", "", without_fences(page))


def links(page: Path) -> list[str]:
    text = prose(page)
    return re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r"(?m)^\[[^\]]+\]: (\S+)$", text)


@cache
def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub makes of headings."""
    found: set[str] = set()
    for heading in re.findall(r"(?m)^#+ (.*?)\s*$", without_fences(page)):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        anchor = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
        number = 0
        while (name := f"{anchor}-{number}" if number else anchor) in found:
            number += 1
        found.add(name)
    return found


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_have_targets(page: Path) -> None:
    for link in links(page):
        path, _, anchor = link.partition("#")
        if link.startswith("https://"):
            continue
        target = page.parent / path if path else page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target.resolve()), f"{link}: no such heading; there are {sorted(anchors(target))}"


def test_every_page_is_reachable_from_readme() -> None:
    found: set[Path] = set()
    waiting = [ROOT / "README.md"]
    while waiting:
        page = waiting.pop().resolve()
        if page not in found and page.suffix == ".md" and page.exists():
            found.add(page)
            waiting += [page.parent / link.partition("#")[0] for link in links(page) if "://" not in link]
    assert set(PAGES) - found == set()


def test_folder_of_each_document_is_its_kind() -> None:
    documents = {str(page.relative_to(ROOT / "docs")) for page in PAGES if page.is_relative_to(ROOT / "docs")}
    kinds = ("how-to/", "reference/", "explanation/")
    assert {name for name in documents if name != "tutorial.md" and not name.startswith(kinds)} == set()


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_each_line_is_one_sentence(page: Path) -> None:
    for first, _, lines in paragraphs(without_fences(page).splitlines()):
        assert lines == sentences(" ".join(lines)), f"{page}:{first}"


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_no_conflict_of_a_merge_is_left(page: Path) -> None:
    assert not re.findall(r"(?m)^(?:<{7}|>{7}) .*$", page.read_text())


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_named_files_of_this_project_exist(page: Path) -> None:
    packages = "|".join(path.name for path in (ROOT / "harmonia").iterdir() if path.is_dir())
    named = re.findall(rf"`((?:harmonia|tests|docs|benchmarks|nixos-tests|{packages})/[\w./-]*)`", page.read_text())
    missing = [name for name in named if not any((ROOT / place / name).exists() for place in ("", "harmonia"))]
    assert missing == []


def test_documents_named_in_code_exist() -> None:
    patterns = ("*.nix", "Makefile", "harmonia/**/*.py", "tests/**/*.py", "benchmarks/**/*.py", "nixos-tests/**/*.*")
    code = [path.read_text() for pattern in patterns for path in ROOT.glob(pattern) if path.suffix != ".pyc"]
    named = {name for text in code for name in re.findall(r"\bdocs/[\w/-]+\.md\b", text)}
    assert {name for name in named if not (ROOT / name).exists()} == set()


def test_modules_in_the_picture_exist() -> None:
    picture = (ROOT / "docs/pictures/request.svg").read_text()
    for name in re.findall(r"([a-z_/]+\.py)\b", picture):
        assert list((ROOT / "harmonia").rglob(name)), name


def test_every_code_block_has_a_language() -> None:
    checked = {"toml", "nix", "ini", "nginx", "caddyfile", "yaml", "nix.conf", "netrc", "console", "pycon", "python"}
    other = {f"{block.page}:{block.line}" for block in BLOCKS if block.language not in checked | {"text"}}
    assert other == set(), f"as its language, give one of {sorted(checked)}, or `text` where no program reads it"


def with_keys(text: str) -> str:
    """Replace keys and hashes that end in three dots by real ones."""
    text = re.sub(r"([\w.-]+-1):…", lambda match: str(SecretKey.generate(match[1]).public_key), text)
    return text.replace("…", "0" * 32)


@of("toml")
def test_toml_blocks_are_valid_settings(block: Block) -> None:
    loader.parse(with_keys(block.text), block.page, {})


@of("nix")
@pytest.mark.nix
@needs("nix-instantiate")
def test_nix_blocks_parse(block: Block) -> None:
    command = ["nix-instantiate", "--parse", "-"]
    done = subprocess.run(command, input=block.text, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@of("netrc")
def test_netrc_blocks_parse(block: Block, tmp_path: Path) -> None:
    (tmp_path / "netrc").write_text(block.text)
    assert netrc.netrc(str(tmp_path / "netrc")).hosts


@of("nix.conf")
@pytest.mark.nix
@needs("nix")
def test_nix_conf_blocks_have_settings_of_nix(block: Block, tmp_path: Path) -> None:
    (tmp_path / "nix.conf").write_text(f"experimental-features = nix-command\n{with_keys(block.text)}")
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "NIX_CONF_DIR": str(tmp_path)}
    done = subprocess.run(
        ["nix", "show-config"], capture_output=True, text=True, env=environment, check=True, timeout=PATIENCE_S
    )
    assert "unknown setting" not in done.stderr
    for name in re.findall(r"(?m)^(?:extra-)?([a-z-]+) =", block.text):
        assert f"\n{name} = " in f"\n{done.stdout}"


@of("ini")
@needs("systemd-analyze")
def test_systemd_accepts_the_unit(block: Block, tmp_path: Path) -> None:
    unit = tmp_path / "harmonia.service"
    unit.write_text(block.text.replace("/path/to/harmonia", "/bin/true"))
    done = subprocess.run(
        ["systemd-analyze", "verify", unit], capture_output=True, text=True, check=False, timeout=PATIENCE_S
    )
    messages = [line for line in done.stderr.splitlines() if str(unit) in line or line.startswith("harmonia.service")]
    assert messages == []


@of("yaml")
@needs("promtool")
def test_promtool_accepts_the_configuration(block: Block, tmp_path: Path) -> None:
    (tmp_path / "prometheus.yml").write_text(block.text)
    shutil.copy(ROOT / "docs/alerts.yml", tmp_path)
    kind = "rules" if block.text.startswith("groups:") else "config"
    command = ["promtool", "check", kind, str(tmp_path / "prometheus.yml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_environment_variables_in_the_code_are_documented() -> None:
    code = "\n".join(path.read_text() for path in (ROOT / "harmonia").rglob("*.py"))
    read = set(re.findall(r'environ(?:\.get\(|\[)"([A-Z_]+)"|"([A-Z_]+)" in os\.environ', code))
    page = (ROOT / "docs/reference/configuration.md").read_text().partition("## Environment")[2]
    assert {name for names in read for name in names if name} - set(re.findall(r"`([A-Z_]+)`", page)) == set()


def test_metrics_in_documents_exist() -> None:
    reference = (ROOT / "docs/reference/metrics.md").read_text()
    listed = set(re.findall(r"(?m)^\| `(harmonia_\w+)`", reference))  # tests/server/test_metrics.py compares them
    for page in ("docs/reference/metrics.md", "docs/how-to/monitor.md"):
        assert set(re.findall(r"\bharmonia_\w+", (ROOT / page).read_text())) <= listed


OTHER_PROGRAMS = {
    *(
        "apt-get",
        "cat",
        "cd",
        "chmod",
        "cp",
        "curl",
        "echo",
        "export",
        "find",
        "git",
        "install",
        "journalctl",
        "ls",
        "mkdir",
        "nginx",
        "nix",
    ),
    *("nix-collect-garbage", "nix-store", "pip", "pipx", "printf", "python", "python3", "rm", "sed", "sha256sum", "ss"),
    *("sqlite3", "ssh", "systemctl", "systemd-analyze", "xargs", "zstd"),
}
"""Programs of others that the documents use on purpose."""


def commands(text: str) -> Iterator[list[str]]:
    """Yield the words of each command after a prompt."""
    for line in re.findall(r"(?m)^[$#] ((?:.*\\\n)*.*)$", text):
        words = shlex.shlex(line.replace("\\\n", " "), posix=True, punctuation_chars=True)
        command: list[str] = []
        for word in words:
            if set(word) <= set("();<>|&"):
                yield command
                command = [">"] if ">" in word or "<" in word else []
            else:
                command.append(word)
        yield command


@of("console")
def test_console_blocks_have_known_commands_and_options(block: Block) -> None:
    assert re.match(r"[$#] ", block.text)
    for words in commands(block.text):
        while words and re.fullmatch(r"\w+=.*", words[0]):
            words.pop(0)
        if not words or words[0] == ">":
            continue
        program = words[0].rpartition("/")[2]
        if program == "harmonia":
            # --help does not hide unknown options.
            answer = CliRunner().invoke(cli.main, [*words[1:], "--help"])
            assert answer.exit_code == 0, (words, answer.output)
        elif program == "make":
            asked = {word for word in words[1:] if "=" not in word}
            assert asked <= set(targets()), words
        elif program == "pytest" or (ROOT / words[0]).is_file():
            pass
        else:
            assert program in OTHER_PROGRAMS, words
