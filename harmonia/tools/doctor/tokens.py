"""Check of the server's tokens: which have expired, or expire soon."""

import time

from harmonia.config import credentials, tokens
from harmonia.config.settings import Settings
from harmonia.errors import ConfigError
from harmonia.tools.doctor.finding import Finding, Findings


def check(settings: Settings) -> Findings:
    """Yield findings if the settings name a file with tokens, and this user may read it."""
    try:
        found = credentials.load_tokens(settings)
    except ConfigError:
        return  # `harmonia check-config` shows the error; only some users may read the file
    now, problems = time.time(), 0
    for token in found:
        if problem := tokens.expiry_problem(token, now):
            problems += 1
            remedy = f"replace its line in {settings.tokens_path} with one of harmonia token {token.name}"
            yield Finding("tokens", "warning", problem, remedy)
    if found and not problems:
        yield Finding("tokens", "ok", f"none of {len(found)} expires within 14 days")
