"""Report of known vulnerabilities in the dependencies, from the output of `pip-audit --format json`.

Fails only if there is a vulnerability. Counts the packages that could not be checked, for example because the
database cannot be reached; pip-audit itself exits with success then.
"""

import json
import sys

found = json.loads(sys.stdin.read() or '{"dependencies": [{"name": "all", "skip_reason": ""}]}')["dependencies"]
unknown = [each for each in found if "skip_reason" in each]
vulnerable = [(each, flaw) for each in found for flaw in each.get("vulns", [])]
for each, flaw in vulnerable:
    print(f"{each['name']} {each['version']}: {flaw['id']}; fixed in {', '.join(flaw['fix_versions']) or 'none'}")
if unknown:
    print(f"SKIPPED: {len(unknown)} of {len(found)} packages could not be checked; see .audit/log")
if not vulnerable and len(unknown) < len(found):
    print(f"{len(found) - len(unknown)} packages checked: no known vulnerability")
sys.exit(bool(vulnerable))
