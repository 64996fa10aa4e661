"""The documentation says what the code says.

``python tests/test_docs.py`` writes what is generated: the tables of ``fairseq_evomoe/config/README.md``, and
the router that ``fairseq_evomoe/README.md`` shows.
"""

import dataclasses
import re
import subprocess
import textwrap
from pathlib import Path

import pytest

from support import pages

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
PACKAGE = ROOT / "fairseq_evomoe" / "README.md"
OPTIONS = ROOT / "fairseq_evomoe" / "config" / "README.md"
PLUGIN = ROOT / "tests" / "support" / "plugin_router" / "__init__.py"
ROUTER = r"(<!-- router: .*? -->\n```python\n)(.*?)(```\n<!-- /router -->)"
MARKED = r"(<!-- {0} -->\n)(.*?)(<!-- /{0} -->)"
FOLDERS = (".github", "examples", "fairseq_evomoe", "tests")
PAGES = sorted([*ROOT.glob("*.md"), *(page for name in FOLDERS for page in (ROOT / name).rglob("*.md"))])

FIVE = ("preset", "router", "experts", "freq", "spawn_update")
GROUPS = ("five", "gate", "one_router", "spawn", "losses", "experts", "teacher", "ranks")
LOSSES = ("balance", "balance_rate", "balance_form", "balance_choices", "l1_form", "l1_start", "l1_factor")


def _groups():
    """The names of the options of each table, in the order in which they are declared."""
    from fairseq_evomoe.config.config import declarations, owner

    routers = _routers()
    groups = {name: [] for name in GROUPS}
    groups["five"] = list(FIVE)
    of_owner = {"schedule": "spawn", "plateau": "spawn", "spawning": "spawn"}
    of_owner.update({"distillation": "teacher", "ranks": "ranks"})
    for name, declared in declarations().items():
        if name in FIVE:
            continue
        having = [cls for cls in routers.values() if name in cls.Options.declared()]
        if owner(name) is None and not having:
            continue  # of a router that a test has registered
        if declared[0].loss or name in LOSSES:
            groups["losses"].append(name)
        elif owner(name) is None:
            groups["gate" if len(having) > 1 else "one_router"].append(name)
        else:
            groups[of_owner.get(owner(name), "experts")].append(name)
    return groups


def _routers():
    """The routers of the package, by name."""
    from fairseq_evomoe.moe import ROUTERS

    return {name: cls for name, cls in ROUTERS.items() if cls.__module__.startswith("fairseq_evomoe.")}


def _defaults(name):
    """The defaults of an option, each with the routers that have it; ``None``: every model has the option."""
    from fairseq_evomoe.config.config import declarations, owner

    if owner(name) is not None:
        return [(declarations()[name][0].default, None)]
    found = {}
    for router, cls in _routers().items():
        if name in cls.Options.declared():
            found.setdefault(cls.Options.declared()[name].default, []).append(router)
    return list(found.items())


def _word(default):
    value = getattr(default, "value", default)
    return str(value).lower() if isinstance(value, bool) else str(value)


def options_table(group):
    """One table of options, made from the declarations that flags and YAML are made from."""
    from fairseq_evomoe.config.config import declarations
    from fairseq_evomoe.config.errors import PREFIX, flag
    from fairseq_evomoe.config.options import MoEOptions, common_help

    known = declarations()
    rows = ["| option | default | what it does |", "|---|---|---|"]
    for name in _groups()[group]:
        shown, default = f"`{flag(PREFIX + name)}`", ""
        if name in known:
            words = [word for item in known[name] for word in item.choices]
            shown += f" {{{', '.join(dict.fromkeys(words))}}}" if words else ""
            parts = []
            for value, routers in _defaults(name):
                of = f" ({', '.join(routers)})" if routers else ""
                parts.append((f"`{_word(value)}`" if value is not None else "") + of)
            default, text = ", ".join(parts).strip(), common_help(known[name])
        else:
            fields = {field.name: field for field in dataclasses.fields(MoEOptions)}
            text = fields[PREFIX + name].metadata["help"]
            if name == "router":
                shown, default = f"{shown} {{{', '.join(_routers())}}}", "`dts`"
        rows.append(f"| {shown} | {default} | {text} |")
    return "\n".join(rows) + "\n"


@pytest.mark.parametrize("group", GROUPS)
def test_options_tables_match_the_declarations(group):
    found = re.search(MARKED.format(group), OPTIONS.read_text(encoding="utf-8"), re.S)
    assert found, f"{OPTIONS} has no marked table {group}"
    assert found.group(2) == options_table(group), "run: python tests/test_docs.py"


def test_the_router_that_is_shown_is_the_one_that_is_tested():
    found = re.search(ROUTER, PACKAGE.read_text(encoding="utf-8"), re.S)
    assert found and found.group(2) == PLUGIN.read_text(encoding="utf-8"), "run: python tests/test_docs.py"
    assert len(found.group(2).splitlines()) < 50


def test_the_library_example_runs():
    code = re.search(
        r"## As a library.*?```python\n(.*?)```", PACKAGE.read_text(encoding="utf-8"), re.S
    ).group(1)
    names = {}
    exec(code, names)
    assert names["layer"].spawned and names["layer"].router.weight.grad is not None


def test_every_option_is_in_one_table():
    from fairseq_evomoe.config.config import declarations

    listed = [name for names in _groups().values() for name in names]
    assert len(listed) == len(set(listed))
    options = {name for cls in _routers().values() for name in cls.Options.declared()}
    missing = (set(declarations()) & (options | set(listed))) - set(listed)
    assert not missing


def test_every_option_has_a_help_text_in_full_sentences():
    from fairseq_evomoe.config.options import MoEOptions

    for field in dataclasses.fields(MoEOptions):
        if field.name.startswith("moe_"):
            text = field.metadata["help"]
            assert text[0].isupper() and text.endswith("."), field.name


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_that_a_page_names_exist(page):
    """Files and folders named as one types them in a checkout, but for those that are yet to be made."""
    if page.is_relative_to(ROOT / "examples" / "benchmark"):
        return  # it says what was run, with the code of then
    names = re.findall(r"(?<![\w/.-])(?:examples|tests|fairseq_evomoe)/[\w/.-]*\w", page.read_text("utf-8"))
    made = re.compile(r"NAME|examples/systems/results/")
    missing = [name for name in set(names) if not made.search(name) and not (ROOT / name).exists()]
    assert not missing


def test_the_first_page_is_for_a_reader_in_a_hurry():
    text = README.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    assert len(text.split()) < 1500


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_paragraph_is_over_five_lines(page):
    """Of 120 columns, links without their targets; tables, code and headings are none."""
    text = re.sub(r"^ *```.*?^ *```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"<!-- systems:.*?<!-- /systems -->|\]\([^)\s]+\)", "", text, flags=re.DOTALL)
    paragraphs = re.split(r"\n\s*\n|\n(?=[#|<]|\s*(?:[-*]|\d+\.) )", text)
    long = [each for each in paragraphs if each[:1] != "|" and len(textwrap.wrap(each, 120)) > 5]
    assert not long, "\n\n".join(long)


def test_every_command_is_run_by_docs_sh_or_listed_with_a_reason():
    for page in pages.pages():
        for beginning in pages.CANNOT.get(page, {}):
            assert any(command.text.startswith(beginning) for command in pages.commands(page)), beginning
    assert set(pages.CANNOT) <= set(pages.pages())
    listed = [beginning for of_page in pages.CANNOT.values() for beginning in of_page]
    assert len(listed) <= 16  # it may shrink; what is added needs a better reason than these have


@pytest.mark.parametrize("page", pages.pages())
def test_commands_are_bash(page):
    text = "\n".join(command.as_run for command in pages.commands(page) if command.language == "bash")
    done = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_flags_and_commands_that_a_page_names_are_there(page):
    from fairseq_evomoe.config.errors import PREFIX, flag
    from fairseq_evomoe.config.options import MoEOptions

    text = page.read_text(encoding="utf-8")
    known = {flag(field.name) for field in dataclasses.fields(MoEOptions) if field.name.startswith(PREFIX)}
    known |= {"--moe-nearest-strength", "--moe-second-expert-policy"}  # of the plugin, and of another fairseq
    script = (ROOT / "fairseq_evomoe" / "bin" / "arguments.py").read_text(encoding="utf-8")
    if page.name not in ("CHANGELOG.md", "migrating.md"):  # they name flags of before, and of others
        assert set(re.findall(r"--moe-[a-z][a-z0-9-]*[a-z0-9]", text)) <= known
    commands = set(re.findall(r"add_parser\(\s*\"([a-z-]+)\"", script))
    assert set(re.findall(r"(?:^|`)evomoe ([a-z-]+)", text, re.MULTILINE)) <= commands


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    """Links to files of the repository, and to headings of them."""
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" in target or target.startswith("mailto:"):
            continue
        path, _, heading = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), target
        if heading:
            headings = re.findall(r"^#+ (.*)$", found.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = [re.sub(r"[^\w -]", "", text.lower()).replace(" ", "-") for text in headings]
            assert heading in anchors, target


def test_every_preset_that_a_page_names_is_one():
    from fairseq_evomoe.config import presets

    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        named = set(re.findall(r"--moe-preset[= ]([a-z]\w*)(?![\w/.])", text))
        assert named <= set(presets.names()), page


def test_the_table_of_versions_is_that_of_the_script():
    script = (ROOT / "tests" / "versions.sh").read_text(encoding="utf-8")
    tried = re.findall(r"^py\S+ +\| (3\.\d+) ", script, re.MULTILINE)
    table = re.search(
        r"<!-- versions: .*?-->\n(.*?)<!-- /versions -->", README.read_text(encoding="utf-8"), re.S
    )
    assert re.findall(r"^\| (3\.\d+)", table.group(1), re.MULTILINE) == tried


def test_versions_agree():
    import fairseq_evomoe

    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"## {fairseq_evomoe.__version__}" in changelog
    assert f"\nversion: {fairseq_evomoe.__version__}\n" in citation


if __name__ == "__main__":
    text = OPTIONS.read_text(encoding="utf-8")
    for name in _groups():
        table = options_table(name)
        text = re.sub(MARKED.format(name), lambda m: m.group(1) + table + m.group(3), text, flags=re.S)  # noqa: B023
    OPTIONS.write_text(text, encoding="utf-8")
    text, code = PACKAGE.read_text(encoding="utf-8"), PLUGIN.read_text(encoding="utf-8")
    PACKAGE.write_text(
        re.sub(ROUTER, lambda m: m.group(1) + code + m.group(3), text, flags=re.S), encoding="utf-8"
    )
