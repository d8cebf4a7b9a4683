"""Renders the chart, with Helm's own library.

Usage: render.py CHART RELEASE OUT CASE...

A CASE is NAME=VALUES: values files of the chart, or JSON, separated by `+`; the later ones win.
OUT/NAME.yaml is what Helm would install. A NAME that begins with `bad-` must be refused:
OUT/NAME.txt says why.
"""

import sys
from pathlib import Path

import helm_python as helm


def merge(into, values):
    for key, value in values.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            merge(into[key], value)
        else:
            into[key] = value
    return into


def main():
    path, release, out = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    found = helm.lint(path, strict=True, namespace="baton")
    assert not found["errors"] and not [it for it in found["messages"] if it["severity"] > 1], found
    with helm.Chart.load(path) as chart:
        for case in sys.argv[4:]:
            name, sources = case.split("=", 1)
            values = {}
            for source in filter(None, sources.split("+")):
                # JSON is YAML too.
                text = source if source.startswith("{") else (path / source).read_text()
                merge(values, helm.values_from_yaml(text))
            try:
                chart.validate_schema(values)
                rendered = chart.render(values, name=release, namespace="baton")
            except (helm.HelmValuesError, helm.HelmRenderError) as error:
                assert name.startswith("bad-"), f"{name}: {error}"
                (out / f"{name}.txt").write_text(str(error))
                continue
            assert not name.startswith("bad-"), f"{name} was not refused"
            texts = [text for file, text in sorted(rendered.items()) if file.endswith(".yaml")]
            (out / f"{name}.yaml").write_text("\n---\n".join(texts))
    print(f"Helm {helm.helm_sdk_version()}: {len(sys.argv) - 4} cases")


main()
