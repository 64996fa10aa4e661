"""The figures of `gpu.py` as Markdown."""

from __future__ import annotations


def report(known: dict[str, dict]) -> str:
    """What is known as Markdown."""
    lines = ["# Measured on a GPU", ""]
    info = known.get("machine")
    if info:
        lines += ["{gpu}, torch {torch}, Python {python}, {cores} cores".format(**info["machine"]), ""]
    kinds = {
        "layer": ["layer", "one function", "looked up", "before", "products"],
        "routers": ["router", "in training", "compiled"],
    }
    for part, names in kinds.items():
        rows = [line for line in known.values() if line["part"] == part]
        if not rows:
            continue
        names = [name for name in names if any(name in line.get("ratio", {}) for line in rows)]
        lines += ["## {}".format(part.capitalize()), ""]
        lines += ["In units of the floor: queued behind others, and (in brackets) alone.", ""]
        lines += ["| case | at most | {} | floor, ms | MiB |".format(" | ".join(names))]
        lines += ["| --- | --: |{} --: | --: |".format(" --: |" * len(names))]
        for row in rows:
            title = row["key"].split(", ", 1)[1]
            if "error" in row:
                lines.append("| {} | | {} |".format(title, row["error"]))
                continue
            cells = []
            for name in names:
                alone = row["ratio"].get(name, {}).get("median")
                cells.append("-" if alone is None else "{} ({:.2f})".format(_in_floors(row, name), alone))
            floor = row.get("queued_ms", row["ms"])["floor"] / row.get("calls", 1)
            mib = " / ".join("{:.0f}".format(v) for v in row["mib"].values() if v is not None)
            cells = [title, "{:.2f}".format(row["target"]), *cells, "{:.3f}".format(floor), mib]
            lines.append("| {} |".format(" | ".join(cells)))
        lines.append("")
    for row in (line for line in known.values() if line["part"] == "peers"):
        lines += ["### {}".format(row["key"]), ""]
        if "error" in row:
            lines += [row["error"], ""]
            continue
        lines += ["| | times ours | ms | MiB |", "| --- | --: | --: | --: |"]
        for r in row["rows"]:
            if "error" in r:
                lines.append("| {} | {} | | |".format(r["name"], r["error"]))
            else:
                mib = "-" if r["mib"] is None else "{:.0f}".format(r["mib"])
                lines.append(
                    "| {} | {:.2f} | {:.2f} | {} |".format(r["name"], r["ratio"]["median"], r["ms"], mib)
                )
        lines.append("")
    profiles = [line for line in known.values() if line["part"] == "profile" and "error" not in line]
    for line in known.values():  # those of a whole update are with its times
        for name, found in line.get("profiles", {}).items():
            profiles.append({**found, "key": "{}: {}".format(line["key"], name)})
    if profiles:
        lines += ["## Profiles", "", "| | launches | busy, us | of, us | most of it |"]
        lines += ["| --- | --: | --: | --: | --- |"]
        for row in profiles:
            most = "; ".join("{} {:.0f} us".format(name[:40], us) for name, _, us in row["kernels"][:4])
            title = row["key"].split(", ", 1)[1]
            lines.append(
                "| {} | {:.0f} | {:.0f} | {:.0f} | {} |".format(
                    title, row["launches"], row["busy_us"], row["span_us"], most.replace("|", "/")
                )
            )
        lines.append("")
    return "\n".join(lines)


def _in_floors(row: dict, name: str) -> str:
    times = row.get("queued_ms", row["ms"])
    return "{:.2f}".format(times[name] / times["floor"])
