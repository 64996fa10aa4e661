"""The documentation says what the code says.

``python tests/test_docs.py`` writes the generated tables into README.md.
"""

import dataclasses
import re
from pathlib import Path

README = Path(__file__).resolve().parent.parent / "README.md"
MARKED = r"(<!-- {0} -->\n)(.*?)(<!-- /{0} -->)"


def options_table() -> str:
    """The table of options, made from the dataclass that flags and YAML are made from."""
    from fairseq_evomoe.config.options import MoEOptions, flag
    from fairseq_evomoe.models.translation import EvoMoETransformerConfig

    rows = ["| option | default | what it does |", "|---|---|---|"]
    for field in dataclasses.fields(MoEOptions):
        if not field.name.startswith("moe_"):
            continue
        choices = getattr(field.type, "__members__", None)
        name = f"`{flag(field.name)}`"
        if choices:
            values = [member.value for member in choices.values()]
            name += " {" + ", ".join(values) + "}"
        default = "" if field.default is None else f"`{field.default}`"
        other = EvoMoETransformerConfig.__dataclass_fields__[field.name].default
        if other != field.default:
            default += f" (`evomoe_transformer`: `{other}`)"
        rows.append("| {} | {} | {} |".format(name, default, field.metadata["help"]))
    return "\n".join(rows) + "\n"


def test_options_table_matches_the_dataclasses():
    found = re.search(MARKED.format("options"), README.read_text(encoding="utf-8"), re.S)
    assert found, "README.md has no marked options table"
    assert found.group(2) == options_table(), "run: python tests/test_docs.py"


def test_every_option_has_a_help_text_in_full_sentences():
    from fairseq_evomoe.config.options import MoEOptions

    for field in dataclasses.fields(MoEOptions):
        if field.name.startswith("moe_"):
            text = field.metadata["help"]
            assert text[0].isupper() and text.endswith("."), field.name


def test_files_that_the_readme_names_exist():
    text = README.read_text(encoding="utf-8")
    names = set(re.findall(r"\b(?:examples|tests|fairseq_evomoe)/[\w/.-]*[\w]", text))
    assert names
    missing = [name for name in names if not (README.parent / name).exists()]
    assert not missing


def test_versions_agree():
    import fairseq_evomoe

    changelog = (README.parent / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"## {fairseq_evomoe.__version__}" in changelog


if __name__ == "__main__":
    text = README.read_text(encoding="utf-8")
    table = options_table()
    new = re.sub(MARKED.format("options"), lambda m: m.group(1) + table + m.group(3), text, flags=re.S)
    README.write_text(new, encoding="utf-8")
