"""Holds files of settings against their JSON schema.

Usage: validate.py SCHEMA GOOD.toml… -- BAD.toml…
"""

import json
import sys
import tomllib
from pathlib import Path

from jsonschema import Draft202012Validator

schema = json.loads(Path(sys.argv[1]).read_text())
Draft202012Validator.check_schema(schema)
validator = Draft202012Validator(schema)
at = sys.argv.index("--")
for paths, good in [(sys.argv[2:at], True), (sys.argv[at + 1 :], False)]:
    assert paths, "nothing to look at"
    for path in paths:
        errors = [error.message for error in validator.iter_errors(tomllib.loads(Path(path).read_text()))]
        assert bool(errors) != good, f"{path}: {errors or 'no error'}"
        print(path, *errors, sep="\n  ")
