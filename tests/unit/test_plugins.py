"""Records of other packages: entry points on the path, and module:function."""

import sys

import pytest

from selftrans.methods import registry
from selftrans.methods.registry import METHODS
from selftrans.methods.spec import MethodSpec
from selftrans.models.registry import MODELS
from selftrans.models.spec import ModelSpec
from selftrans.plugins import NotFound, Registry, trust

MODULE = """
from selftrans.methods.spec import MethodSpec
from selftrans.models.sit import SiTConfig, build
from selftrans.models.spec import ModelSpec
METHOD = MethodSpec("plain", "Plain", lambda config: [])
def method():
    return METHOD
MODEL = ModelSpec("net", SiTConfig, build, ("net-s", "net-m"))
"""


@pytest.fixture
def install(tmp_path, monkeypatch):
    """A function that puts a distribution with these entry points on the path, `a.b:c` by name and group."""

    def put(name, points, module=MODULE):
        site = tmp_path / name
        info = site / f"{name}-1.dist-info"
        info.mkdir(parents=True)
        (site / f"{name}.py").write_text(module)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n")
        lines = [f"[selftrans.{group}]\n{key} = {value}" for group, key, value in points]
        (info / "entry_points.txt").write_text("\n".join(lines))
        monkeypatch.syspath_prepend(site)

    return put


def methods():
    return Registry("method", dict(METHODS), MethodSpec, "selftrans.methods")


def models():
    return Registry("model.name", dict(MODELS), ModelSpec, "selftrans.models", lambda spec: spec.names)


def test_installed_records_are_found_by_every_name(install):
    install("outside_a", [("methods", "plain", "outside_a:METHOD"), ("models", "net", "outside_a:MODEL")])
    assert methods().find("plain").title == "Plain" and methods().every()[-1].name == "plain"
    assert {models().find(name).name for name in ("net", "net-s", "net-m")} == {"net"}
    with pytest.raises(ValueError, match=r"'net-l' is unknown; did you mean net-s or net-m\?$"):
        models().find("net-l")


def test_title_of_a_record_imports_nothing(install):
    install("outside_t", [("methods", "plain", "outside_t:METHOD")])
    found = methods()
    assert found.loaded("plain") is None and found.loaded("vanilla").title == "vanilla"
    assert found.loaded("outside_t:method") is None and "outside_t" not in sys.modules
    found.find("plain")
    assert found.loaded("plain").title == "Plain"


def test_entry_point_may_be_a_function_that_returns_the_record(install):
    install("outside_b", [("methods", "plain", "outside_b:method")])
    assert methods().find("plain").name == "plain"


@pytest.mark.parametrize(
    ("value", "module", "expected"),
    [
        ("outside_c:METHOD", "import no_such_module_at_all", "ModuleNotFoundError"),
        ("outside_c:METHOD", "this is no python", "SyntaxError"),
        ("outside_c:METHOD", "raise RuntimeError('no driver')", "no driver"),
        ("outside_c:MISSING", MODULE, "AttributeError"),
        ("outside_c:MODEL", MODULE, "is no MethodSpec"),
    ],
)
def test_broken_package_does_not_disable_the_others(value, module, expected, install):
    install("outside_c", [("methods", "broken", value)], module)
    install("outside_d", [("methods", "plain", "outside_d:METHOD")])
    registry_of_methods = methods()
    assert registry_of_methods.find("vanilla") is METHODS["vanilla"]
    with pytest.warns(UserWarning, match=f"{expected}.*left out"):
        assert [spec.name for spec in registry_of_methods.every()] == [*METHODS, "plain"]
    with pytest.warns(UserWarning, match=expected), pytest.raises(ValueError, match=expected):
        registry_of_methods.find("broken")


def test_package_cannot_replace_a_built_in_method(install):
    install("outside_e", [("methods", "vanilla", "outside_e:METHOD")])
    with pytest.warns(UserWarning, match="'vanilla', which is built in; rename it; it is left out"):
        assert methods().every() == list(METHODS.values())
    assert methods().find("vanilla") is METHODS["vanilla"]


def test_unknown_name_in_a_file_asks_for_the_package():
    with pytest.raises(NotFound, match=r"'zzz' is unknown; choose one of vanilla, .*, or module:function") as caught:
        methods().find("zzz")
    assert caught.value.in_file == "method 'zzz' is not known here; install the package that adds it"


def test_record_of_another_kind_is_named(install):
    install("outside_f", [])
    trust("outside_f:MODEL")
    with pytest.raises(ValueError, match="outside_f:MODEL is no MethodSpec"):
        registry.find("outside_f:MODEL")
