"""Checks that a gateway's document is valid OpenAPI 3.1.

Usage: validate.py BASE_URL
"""

import json
import sys
import urllib.request

from openapi_spec_validator import OpenAPIV31SpecValidator

with urllib.request.urlopen(f"{sys.argv[1]}/openapi.json", timeout=30) as reply:
    document = json.load(reply)
assert document["openapi"].startswith("3.1."), document["openapi"]
errors = list(OpenAPIV31SpecValidator(document).iter_errors())
assert not errors, "\n".join(str(error) for error in errors)
print(f"{len(document['paths'])} paths, {len(document['components']['schemas'])} schemas")
