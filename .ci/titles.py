"""Check of the titles of new commits: `area: imperative`, at most 72 characters.

Prints each wrong title, and exits with status 1 if there is one.
"""

import re
import subprocess
import sys

LAST_UNCHECKED = "9cb4e0b"
"""Last commit that is older than the rule."""

MAX_CHARACTERS = 72
AREA = re.compile(r"[a-z][a-z0-9./-]*(?:, [a-z][a-z0-9./-]*)*: (?P<verb>[a-z]+)\b(?!.*\.$).*")
NOT_IMPERATIVE = re.compile(r".*(?:(?<!s)s|ed|ing)")
IMPERATIVE_NEVERTHELESS = {
    *("alias", "bias", "bring", "embed", "exceed", "feed", "focus", "heed", "need", "ping", "proceed", "ring", "seed"),
    *("shed", "speed", "spring", "string", "succeed", "swing"),
}


def fault(title: str) -> str | None:
    """Return what is wrong with the title, or None."""
    if len(title) > MAX_CHARACTERS:
        return f"{len(title)} characters; at most {MAX_CHARACTERS}"
    found = AREA.fullmatch(title)
    if not found:
        return "does not have the form `area: imperative`, with a lower-case area and verb and without a full stop"
    verb = found["verb"]
    if NOT_IMPERATIVE.fullmatch(verb) and verb not in IMPERATIVE_NEVERTHELESS:
        return f"{verb!r} is not an imperative, like add, fix or remove"
    return None


def new_commits() -> list[tuple[str, str]]:
    """Return short hash and title of each commit after LAST_UNCHECKED.

    If a shallow clone does not have LAST_UNCHECKED, all its commits are new.
    """
    known = _git("rev-parse", "--quiet", "--verify", f"{LAST_UNCHECKED}^{{commit}}")
    shallow = _git("rev-parse", "--is-shallow-repository").strip() == "true"
    if not known and not shallow:
        return []
    log = _git("log", "--no-merges", "--format=%h %s", f"{LAST_UNCHECKED}..HEAD" if known else "HEAD")
    return [(commit, title) for commit, _, title in (line.partition(" ") for line in log.splitlines())]


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], stdout=subprocess.PIPE, text=True, check=False).stdout


def main() -> None:
    commits = new_commits()
    faults = [f"{commit} {title}: {wrong}" for commit, title in commits if (wrong := fault(title))]
    if not commits:
        print(f"SKIPPED: titles of commits, because this is not a clone with commit {LAST_UNCHECKED}", file=sys.stderr)
    print(*faults, sep="\n", end="\n" if faults else "", file=sys.stderr)
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
