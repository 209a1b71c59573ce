"""The one error type, and the door to optional packages."""

import importlib

import pytest

from twin_merging_hf.errors import TwinMergingError, require_extra


def test_it_is_a_value_error():
    assert issubclass(TwinMergingError, ValueError)


def test_a_package_that_is_there_is_given():
    assert require_extra("json.decoder", "demo") is importlib.import_module("json.decoder")


@pytest.mark.parametrize(
    ("module", "package", "extra"),
    [("sklearn.datasets", "scikit-learn", "demo"), ("PIL", "pillow", "vision"), ("matplotlib", "matplotlib", "plot")],
)
def test_a_package_that_is_not_names_the_command(monkeypatch, module, package, extra):
    def fail(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name.split(".")[0])

    monkeypatch.setattr(importlib, "import_module", fail)
    with pytest.raises(TwinMergingError, match=rf"needs {package}.*pip install 'twin-merging-hf\[{extra}\]'"):
        require_extra(module, extra)


def test_a_package_that_is_there_but_broken_is_not_called_missing(monkeypatch):
    """Installing it again would not help, and the true reason would be lost."""

    def fail(name):
        raise ImportError("libfreetype.so.6: cannot open shared object file")

    monkeypatch.setattr(importlib, "import_module", fail)
    with pytest.raises(ImportError, match="libfreetype"):
        require_extra("matplotlib", "plot")
