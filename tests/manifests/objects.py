"""Objects of rendered manifests."""

import re
from pathlib import Path

import yaml

# What a chart's release puts on its objects.
RELEASE_LABELS = {"app.kubernetes.io/instance", "app.kubernetes.io/managed-by", "app.kubernetes.io/version", "helm.sh/chart"}


def load(path):
    return [thing for thing in yaml.safe_load_all(Path(path).read_text()) if thing]


def without_release(thing, release):
    """The object as it would be if there were no releases: names and labels without them."""
    if isinstance(thing, dict):
        return {key: without_release(value, release) for key, value in thing.items() if key not in RELEASE_LABELS}
    if isinstance(thing, list):
        return [without_release(value, release) for value in thing]
    if isinstance(thing, str):
        return re.sub(rf"(?<![\w-]){re.escape(release)}-", "", thing)
    return thing
