"""Whether what we depend on is known to be vulnerable, by what `pip-audit --format json` says.

pip-audit itself calls it well where there was nobody to be asked.
"""

import json
import sys

found = json.loads(sys.stdin.read() or '{"dependencies": [{"name": "all", "skip_reason": ""}]}')["dependencies"]
unknown = [each for each in found if "skip_reason" in each]
vulnerable = [(each, flaw) for each in found for flaw in each.get("vulns", [])]
for each, flaw in vulnerable:
    print(f"{each['name']} {each['version']}: {flaw['id']}; mended in {', '.join(flaw['fix_versions']) or 'none'}")
if unknown:
    print(f"SKIPPED: {len(unknown)} of {len(found)} packages, of which nobody could be asked; see .audit/log")
if not vulnerable:
    print(f"{len(found) - len(unknown)} packages are not known to be vulnerable")
sys.exit(bool(vulnerable))
