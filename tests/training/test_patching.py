"""What stands in for a function, method, property or value of somebody else's does so once, whoever asks."""

import functools
import importlib
import importlib.util
import inspect
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from fairseq.data import data_utils

from fairseq_evomoe import compat, patching
from fairseq_evomoe.patching import Patches, put, wrap
from fairseq_evomoe.training import checkpoint_hooks, hooks


@pytest.fixture
def records(monkeypatch):
    """What is recorded in a test is forgotten after it."""
    monkeypatch.setattr(patching, "_applied", {})


@pytest.fixture
def module():
    """Somebody else's module."""
    code = '''
def double(x):
    """Twice as much."""
    return 2 * x

class Counter:
    """A class."""
    step = 1
    def __init__(self, start=0):
        self.count = start
    def add(self, n=1):
        """Count further."""
        self.count += n
        return self.count
    @property
    def next(self):
        """What comes next."""
        return self.count + self.step
    @next.setter
    def next(self, value):
        self.count = value - self.step
'''
    result = ModuleType("somebody")
    exec(code, vars(result))
    return result


@pytest.fixture
def second_copy():
    """This package's module, imported again under another name."""
    spec = importlib.util.spec_from_file_location("copied.patching", patching.__file__)
    copy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copy)
    return copy


def plus_one(original, *args, **kwargs):
    """One more than the original gives.

    Further words.
    """
    return original(*args, **kwargs) + 1


def plus_ten(original, *args, **kwargs):
    """Ten more."""
    return original(*args, **kwargs) + 10


pytestmark = pytest.mark.usefixtures("records")


def test_a_function(module):
    original = module.double
    wrap(module, "double", plus_one)
    assert module.double(3) == module.double(x=3) == 7
    assert (module.double.__name__, module.double.__doc__) == ("double", "Twice as much.")
    assert inspect.unwrap(module.double) is original


def test_a_method(module):
    counter = module.Counter(5)
    wrap(module.Counter, "add", plus_one)
    assert counter.add() == 7 and counter.count == 6
    assert list(inspect.signature(module.Counter.add).parameters) == ["self", "n"]


def test_a_method_that_a_class_inherits(module):
    child = type("Child", (module.Counter,), {})
    wrap(child, "add", plus_one)
    assert (child().add(), module.Counter().add()) == (2, 1)


def test_a_property_keeps_its_setter_and_words(module):
    counter = module.Counter()
    wrap(module.Counter, "next", plus_one)
    assert counter.next == 2
    counter.next = 8
    assert counter.next == 9 and module.Counter.next.__doc__ == "What comes next."


def test_a_class(module):
    """A function may stand in for it, which does not get its methods."""
    original = module.Counter

    def from_hundred(original, start=0):
        return original(100 + start)

    wrap(module, "Counter", from_hundred)
    assert module.Counter(5).count == 105 and inspect.unwrap(module.Counter) is original
    assert not hasattr(module.Counter, "add")


def test_an_object(module):
    counter, other = module.Counter(), module.Counter()
    wrap(counter, "add", plus_one)
    wrap(counter, "add", plus_one)
    assert (counter.add(), other.add()) == (2, 1)


@pytest.mark.parametrize("owner, name", [("module", "double"), ("class", "add"), ("class", "next")])
def test_nothing_is_replaced_twice(owner, name, module, second_copy):
    owner = {"module": module, "class": module.Counter}[owner]
    wrap(owner, name, plus_one)
    before = inspect.getattr_static(owner, name)
    # the function of a second copy is another object, of a module with another name before its last dot
    code = {"__name__": "copied." + __name__.rpartition(".")[2]}
    exec(inspect.getsource(plus_one), code)
    assert code["plus_one"] is not plus_one
    wrap(owner, name, plus_one)
    second_copy.wrap(owner, name, code["plus_one"])
    assert inspect.getattr_static(owner, name) is before


def test_what_others_put_around_it_does_not_hide_it(module):
    wrap(module, "double", plus_one)
    inner = module.double
    module.double = functools.wraps(inner)(lambda x: inner(x) + 100)
    wrap(module, "double", plus_one)
    assert module.double(1) == 103


def test_several_may_stand_in_one_after_the_other(module):
    for _ in range(2):
        wrap(module, "double", plus_one)
        wrap(module, "double", plus_ten)
    assert module.double(0) == 11


def test_only_where_there_is_a_fault(module):
    seen = []
    original = module.double
    wrap(module, "double", plus_one, when=lambda found: seen.append(found))
    assert module.double is original and seen == [original] and not patching.applied()
    wrap(module, "double", plus_one, when=lambda found: True)
    assert module.double(1) == 3


def test_a_name_that_is_not_there(module):
    for owner in (module, module.Counter, module.Counter()):
        with pytest.raises(AttributeError, match="triple"):
            wrap(owner, "triple", plus_one)


class _Ten(SimpleNamespace):
    """A number that somebody lacks."""


def test_a_value(module, second_copy):
    put(module.Counter, "step", _Ten)
    first = module.Counter.step
    put(module.Counter, "step", _Ten)
    second_copy.put(module.Counter, "step", _Ten)
    assert isinstance(first, _Ten) and module.Counter.step is first
    module.Counter.step = 1
    put(module.Counter, "step", _Ten)
    assert isinstance(module.Counter.step, _Ten)


def test_declared_replacements_wait_until_they_are_applied(module):
    patches = Patches()

    @patches.replaces(module, "double")
    @patches.replaces(module.Counter, "add")
    def more(original, *args):
        """More of everything."""
        return original(*args) + 1

    assert module.double(1) == 2 and more(lambda: 1) == 2
    for _ in range(2):
        patches.apply()
    assert module.double(1) == 3 and module.Counter().add() == 2


def test_what_is_replaced_is_recorded(module):
    wrap(module, "double", plus_one)
    wrap(module, "double", plus_one)
    wrap(module.Counter, "add", plus_ten)
    wrap(module.Counter(), "add", plus_one)
    put(module.Counter, "step", _Ten)
    here = __name__.rpartition(".")[2]
    assert [tuple(each) for each in patching.applied()] == [
        ("somebody.double", f"{here}.plus_one", "One more than the original gives."),
        ("somebody.Counter.add", f"{here}.plus_ten", "Ten more."),
        ("somebody.Counter.add of one object", f"{here}.plus_one", "One more than the original gives."),
        ("somebody.Counter.step", f"{here}._Ten", "A number that somebody lacks."),
    ]
    assert sys.modules.get("somebody") is None


PACKAGE = Path(patching.__file__).parent


def test_a_second_copy_of_the_package_changes_nothing(monkeypatch):
    """One under another name, such as that of another folder, as far as it can be imported."""
    package = ModuleType("copied_evomoe")
    package.__path__ = [str(PACKAGE)]
    monkeypatch.setitem(sys.modules, "copied_evomoe", package)
    before = [_current(compat.patches), data_utils.np]
    assert all(before[0])
    copy = importlib.import_module("copied_evomoe.compat")
    try:
        assert copy is not compat
        copy.apply()
        assert [_current(compat.patches), data_utils.np] == before
        assert _current(copy.patches) == before[0]
    finally:
        for name in ("copied_evomoe.compat", "copied_evomoe.patching"):
            del sys.modules[name]


def test_hooks_are_installed_once():
    every = [hooks.patches, checkpoint_hooks.patches]
    before = [_current(patches) for patches in every]
    hooks.install()
    assert [_current(patches) for patches in every] == before


def _current(patches):
    """What there is in the places that are replaced."""
    return [inspect.getattr_static(owner, name) for owner, name, _, _ in patches._steps]


def test_importing_the_plugin_imports_nothing_that_fairseq_does_not():
    code = """
import sys
import fairseq.trainer, fairseq_cli.train
before = set(sys.modules)
import fairseq_evomoe
new = {name: getattr(sys.modules[name], "__file__", None) or "" for name in set(sys.modules) - before}
print(sorted(name for name, file in new.items() if "packages" in file and "evomoe" not in name))
"""
    env = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
