"""The pages of docs/compatibility/, from stored results."""

from typing import Any

from _compatibility_case import Family
from _compatibility_checks import CHECKS, RATE, STEPS, TARGET, TOLERANCE


def page(family: Family, stored: dict[str, Any]) -> str:
    """What works with the models of one library, what does not, and why."""
    models: dict[str, dict[str, Any]] = stored["models"]
    versions = ", ".join(f"{package} {version}" for package, version in stored["versions"].items())
    passed = sum(not failures(found) for found in models.values())
    parts = [
        f"# Models of {family.package}",
        f"{passed} of {len(models)} small models of [{family.package}]({family.url}) pass all of the checks below, "
        f"with {versions}, on the CPU.\n`python benchmarks/compatibility.py {family.package}` checks those that have "
        "no stored result, and with `--table` writes this page.",
        f"Every model is built from its configuration with random weights, and trained for {STEPS} steps of SGD "
        f"(learning rate {RATE}, momentum 0.9) to {TARGET:.0%} zeros, without dropout. Losses may differ by "
        f"{TOLERANCE}, relatively. The columns:",
        "\n".join(f"* **{name}**: {what}" for name, what in CHECKS.items()),
        table(models),
    ]
    failing = {name: found for name, found in models.items() if failures(found)}
    if failing:
        parts += ["## What fails, and why", "\n".join(told(name, failing[name], family) for name in failing)]
    if absent := [name for name in family.models if name not in models]:
        parts.append(f"Not checked yet: {', '.join(absent)}.")
    return "\n\n".join(parts) + "\n"


def table(models: dict[str, dict[str, Any]]) -> str:
    rows = [["model", "kind", "parameters", "masked", *CHECKS, "losses off by", "graphs"]]
    rows.append(["---"] * len(rows[0]))
    for name, found in models.items():
        checks = found["checks"]
        compiled = [checks[key] for key in ("compiled", "one line") if "off" in checks.get(key, {})]
        rows.append(
            [
                name,
                found.get("kind", ""),
                f"{found['parameters']:,}" if "parameters" in found else "",
                f"{found['masked'] / found['parameters']:.0%}" if "masked" in found else "",
                *(cell(checks.get(key)) for key in CHECKS),
                f"{max(c['off'] for c in compiled):.0e}" if compiled else "",
                str(max(c["graphs"] for c in compiled)) if compiled else "",
            ]
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def cell(found: dict[str, Any] | None) -> str:
    if found is None:
        return "not run"
    return "**no**" if "error" in found else "yes"


def failures(found: dict[str, Any]) -> dict[str, str]:
    """The errors by check, without that of the dense model, which is there to explain others."""
    return {name: check["error"] for name, check in found["checks"].items() if "error" in check and name != "dense"}


def told(name: str, found: dict[str, Any], family: Family) -> str:
    dense = found["checks"].get("dense")
    lines = [f"* **{name}**: {family.reasons.get(name, 'not looked into yet.')}"]
    lines += [f"  * {check}: {code(error)}" for check, error in failures(found).items()]
    if dense is not None:
        same = f"fails too: {code(dense['error'])}" if "error" in dense else "trains as in eager mode"
        lines.append(f"  * the dense model, compiled by PyTorch alone, {same}")
    return "\n".join(lines)


def code(text: str) -> str:
    return f"`{text.replace('`', chr(39))}`"
