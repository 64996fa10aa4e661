"""Damage of any kind is noticed and its file named; nothing in a file is executed."""

import os
import pickle
import random
import shutil
from pathlib import Path

import pytest
import torch
from fairseq import checkpoint_utils

from fairseq_evomoe.checkpoints import recovery, storage
from fairseq_evomoe.checkpoints.index import DamagedCheckpoint, UnreadableCheckpoint
from fairseq_evomoe.checkpoints.saved_optimizer import LAYOUT
from support.cli import LM, assert_equal, call, evomoe
from support.malicious import ATTACKS, infect

LAYER = "decoder.layers.1"
FLIPS = 30


@pytest.fixture(scope="module")
def made(lm_data, tmp_path_factory):
    """Folder of a checkpoint in one file, ``whole.pt``, and the same in two, ``parts.pt``."""
    folder = tmp_path_factory.mktemp("made")
    settings = {**LM, "moe_spawn_update": 0, "max_update": 2, "save_dir": folder / "run"}
    call("fairseq-train", lm_data, **settings)
    shutil.copy(folder / "run" / "checkpoint_last.pt", folder / "whole.pt")
    shutil.rmtree(folder / "run")
    evomoe("reshard", folder / "whole.pt", "--parts", 2, "--out", folder / "parts.pt")
    return folder


@pytest.fixture
def folder(made, tmp_path):
    """A copy of it."""
    return shutil.copytree(made, tmp_path / "copy")


def load(path):
    state = checkpoint_utils.load_checkpoint_to_cpu(str(path))
    return {key: state[key] for key in ("model", "last_optimizer_state", LAYOUT)}


def refused(path, *texts, capsys, skimmed=True):
    """Everything that reads a checkpoint refuses it in one sentence that has some texts.

    ``skimmed``: so does what reads only shapes.
    """
    with pytest.raises((DamagedCheckpoint, UnreadableCheckpoint)) as error:
        load(path)
    out = Path(path).parent / "out.pt"
    with pytest.raises(SystemExit):
        evomoe("consolidate", path, "--out", out)
    assert not out.exists()
    messages = [str(error.value), capsys.readouterr().err.splitlines()[-1]]
    for message in messages + ([recovery.fault(str(path))] if skimmed else []):
        assert "\n" not in message and message.endswith("."), message
        for text in texts:
            assert text in message, message


@pytest.mark.parametrize("name", ["parts.pt", "parts-experts1.pt", "whole.pt"])
def test_a_bit_that_flips_is_noticed(name, folder):
    path, draw = folder / name, random.Random(1)
    first = folder / ("whole.pt" if name == "whole.pt" else "parts.pt")
    content, noticed, expected = path.read_bytes(), 0, load(first)
    for _ in range(FLIPS):
        damaged = bytearray(content)
        damaged[draw.randrange(len(damaged))] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        fault = recovery.fault(str(first))
        if fault is None:  # where nobody looks, such as between two tensors
            assert_equal(load(first), expected)
        else:
            assert str(path) in fault
            noticed += 1
    assert noticed > 0.7 * FLIPS


def test_a_bit_that_flips_in_the_directory_of_the_archive(folder):
    """There is no sum of that: it is noticed, or makes no difference."""
    path, draw = folder / "whole.pt", random.Random(1)
    content, expected = path.read_bytes(), load(path)
    directory, noticed = content.index(b"PK\x01\x02"), 0
    for _ in range(5 * FLIPS):
        damaged = bytearray(content)
        damaged[draw.randrange(directory, len(damaged))] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        if recovery.fault(str(path)) is None:
            assert_equal(load(path), expected)
        else:
            noticed += 1
    assert noticed > 2 * FLIPS


@pytest.mark.parametrize("name", ["parts.pt", "parts-experts1.pt"])
def test_a_page_of_zeros_is_noticed(name, folder, capsys):
    path = folder / name
    content = bytearray(path.read_bytes())
    middle = len(content) // 2 // 4096 * 4096
    content[middle : middle + 4096] = bytes(4096)
    path.write_bytes(content)
    refused(folder / "parts.pt", str(path), "damaged", capsys=capsys)


def set_at(values, *keys, to):
    for key in keys[:-1]:
        values = values[key]
    values[keys[-1]] = to


def swap_experts(index):
    first, second = index["experts_of"][LAYER]
    index["experts_of"][LAYER] = [second, first]


def swap_keys(index):
    keys = index["layout"]["keys"]
    keys[0], keys[1] = keys[1], keys[0]


EDITS = {
    "experts swapped": swap_experts,
    "widths": lambda index: set_at(index, "widths", LAYER, to=[12, 12, 6, 18]),
    "widths of another layer": lambda index: set_at(index, "widths", to={}),
    "no widths": lambda index: index.pop("widths"),
    "an expert twice": lambda index: set_at(index, "experts_of", LAYER, to=[[0, 2], [1, 1]]),
    "more files": lambda index: index["experts_of"][LAYER].append([]),
    "no files": lambda index: set_at(index, "experts_of", to={}),
    "no list": lambda index: set_at(index, "experts_of", LAYER, to=None),
    "update": lambda index: set_at(index, "update", to="many"),
    "keys swapped": swap_keys,
    "sizes": lambda index: set_at(index, "layout", "sizes", to=[1]),
    "no layout": lambda index: set_at(index, "layout", to={}),
    "something else": lambda index: index.update(color="red"),
}


@pytest.mark.parametrize("sealed", [True, False], ids=["", "without digest"])
@pytest.mark.parametrize("files", [["parts.pt"], ["parts.pt", "parts-experts1.pt"]], ids=["first", "all"])
@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_index_is_noticed(edit, files, sealed, folder, capsys):
    for name in files:
        state = torch.load(folder / name)
        EDITS[edit](state["moe_shards"])
        if not sealed:
            del state["moe_shards"]["digest"]
        torch.save(state, folder / name)
    if edit == "experts swapped" and files != ["parts.pt"] and not sealed:
        return  # a set of an older version says nothing that this would contradict
    refused(folder / "parts.pt", str(folder / "parts"), capsys=capsys, skimmed=sealed)


def test_a_set_of_an_older_version_has_no_digest(folder):
    expected = load(folder / "parts.pt")
    for name in ("parts.pt", "parts-experts1.pt"):
        state = torch.load(folder / name)
        del state["moe_shards"]["digest"]
        torch.save(state, folder / name)
    assert_equal(load(folder / "parts.pt"), expected)


def test_files_of_two_checkpoints_are_both_named(folder, capsys):
    evomoe("reshard", folder / "whole.pt", "--parts", 2, "--out", folder / "other.pt")
    shutil.copy(folder / "other-experts1.pt", folder / "parts-experts1.pt")
    path = folder / "parts.pt"
    message = f"{folder}/parts-experts1.pt belongs to another checkpoint (update 2) than {path} (update 2)"
    refused(path, message, capsys=capsys)


def test_an_index_that_was_removed_is_missed(folder, capsys):
    path = folder / "parts.pt"
    state = torch.load(path)
    for keys in (["moe_shards"], ["moe_experts", "moe_shard"]):
        for key in keys:
            del state[key]
        torch.save(state, path)
        refused(path, f"{path} is the first file", "has no index", capsys=capsys)


def test_a_part_is_no_checkpoint(folder, lm_data, capsys):
    path = folder / "parts-experts1.pt"
    refused(path, f"{path} has a part of the experts", "give its first file", capsys=capsys)
    with pytest.raises(DamagedCheckpoint, match="give its first file"):
        call("fairseq-eval-lm", lm_data, path=path, cpu=True)
    with pytest.raises(DamagedCheckpoint, match="give its first file"):
        call("fairseq-train", lm_data, **LM, restore_file=path, save_dir=folder / "run")


def test_a_file_of_something_else_is_named(folder):
    torch.save([1, 2], folder / "whole.pt")
    for read in (recovery.load, recovery.peek):
        with pytest.raises(DamagedCheckpoint, match="whole.pt cannot be read: it is no checkpoint"):
            read(str(folder / "whole.pt"))


def test_a_whole_checkpoint_is_no_part_of_another(folder):
    shutil.copy(folder / "whole.pt", folder / "parts-experts1.pt")
    with pytest.raises(DamagedCheckpoint, match="experts1.pt is no part of a checkpoint in several files"):
        load(folder / "parts.pt")


def test_there_is_nothing_to_consolidate_in_one_file(folder, capsys):
    with pytest.raises(SystemExit):
        evomoe("consolidate", folder / "whole.pt", "--out", folder / "out.pt")
    assert "whole.pt has all experts already" in capsys.readouterr().err


def test_the_newest_whole_one_is_offered_in_place_of_one_that_is_asked_for(made, lm_data, tmp_path):
    for name in ("checkpoint_1_1.pt", "checkpoint_1_2.pt"):
        shutil.copy(made / "whole.pt", tmp_path / name)
    asked = tmp_path / "checkpoint_1_2.pt"
    asked.write_bytes(asked.read_bytes()[:-1000])
    with pytest.raises(DamagedCheckpoint, match="give --restore-file .*checkpoint_1_1.pt"):
        call("fairseq-train", lm_data, **{**LM, "moe_spawn_update": 0}, restore_file=asked, save_dir=tmp_path)


def test_a_file_that_must_not_be_read_is_not_called_truncated(folder, capsys, monkeypatch):
    opened = open

    def refusing(path, *args, **kwargs):
        if str(path).endswith("experts1.pt"):
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *args, **kwargs)

    monkeypatch.setattr("builtins.open", refusing)
    monkeypatch.setattr("io.open", refusing)
    refused(folder / "parts.pt", "parts-experts1.pt cannot be read: its permissions", capsys=capsys)


def test_links_and_names_without_an_ending_lead_to_the_others(folder, tmp_path):
    expected = load(folder / "parts.pt")
    (tmp_path / "link.pt").symlink_to(folder / "parts.pt")
    assert_equal(load(tmp_path / "link.pt"), expected)
    (folder / "parts.pt").rename(folder / "parts")
    assert_equal(load(folder / "parts"), expected)


def test_the_newest_whole_one_is_another(folder):
    for name, source in (("last", "parts"), ("best", "parts"), ("1", "whole")):
        for suffix in ("", "-experts1") if source == "parts" else ("",):
            shutil.copy(folder / f"{source}{suffix}.pt", folder / f"checkpoint_{name}{suffix}.pt")
    for number, name in enumerate(["1", "best", "last"]):
        os.utime(folder / f"checkpoint_{name}.pt", (number, number))
    last = str(folder / "checkpoint_last.pt")
    assert recovery.newest_whole(last) == str(folder / "checkpoint_best.pt")
    (folder / "checkpoint_best-experts1.pt").unlink()
    assert recovery.newest_whole(last) == str(folder / "checkpoint_1.pt")
    (folder / "checkpoint_1.pt").write_bytes(b"")
    assert recovery.newest_whole(last) is None


def test_checkpoints_are_checked_on_request(folder, capsys):
    capsys.readouterr()
    evomoe("check", folder / "whole.pt", folder / "parts.pt")
    assert capsys.readouterr().out.splitlines() == [f"{folder}/{x}.pt is whole." for x in ("whole", "parts")]
    os.truncate(folder / "whole.pt", 1000)
    with pytest.raises(SystemExit) as stopped:
        evomoe("check", folder / "whole.pt", folder / "parts.pt")
    output = capsys.readouterr()
    assert stopped.value.code == 2 and "1 of 2 checkpoints are not whole" in output.err
    assert f"{folder}/whole.pt cannot be read: it is truncated" in output.out


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("name", ["whole.pt", "parts.pt", "parts-experts1.pt"])
def test_nothing_is_executed(attack, name, folder, capsys):
    trace = folder / "executed"
    infect(folder / name, attack, trace)
    with pytest.raises(pickle.UnpicklingError):
        storage.load_restricted(str(folder / name))  # what is used with an old torch
    with pytest.raises(pickle.UnpicklingError):
        storage.load(str(folder / name))
    first = folder / name.replace("-experts1", "")
    with pytest.raises(SystemExit):
        evomoe("reshard", first, "--parts", 2, "--out", folder / "out.pt")
    assert f"{folder / name} is refused: it holds objects" in capsys.readouterr().err
    assert not trace.exists() and not list(folder.glob("out*"))


@pytest.mark.parametrize("name", ["whole.pt", "parts.pt", "parts-experts1.pt"])
def test_an_old_torch_reads_the_same(name, folder):
    path = folder / name
    assert_equal(storage.load_restricted(str(path)), torch.load(path))


def test_what_is_skimmed_has_the_shapes(folder):
    expected, found = torch.load(folder / "whole.pt"), storage.skim(str(folder / "whole.pt"))
    assert found["cfg"] == expected["cfg"] and found[LAYOUT] == expected[LAYOUT]
    for key, tensor in expected["model"].items():
        assert found["model"][key].shape == tensor.shape and found["model"][key].dtype == tensor.dtype
        assert found["model"][key].is_meta
