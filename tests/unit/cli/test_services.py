"""From the name that was typed to the service it means."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import pytest

from outbox.cli import services
from outbox.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_SERVICE = "from outbox.consumer import Service\nservice = Service({name!r})\nnumber = 7\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory of its own, with a package `consumers` that is not the checkout's."""
    package = tmp_path / "consumers"
    (package / "exports").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "exports" / "__init__.py").write_text(_SERVICE.format(name="exports"))
    (tmp_path / "shop_mail.py").write_text(_SERVICE.format(name="mail"))
    (tmp_path / "shop_broken.py").write_text("import no_such_library\n")
    (tmp_path / "shop_wrong.py").write_text("value = 1\nraise RuntimeError('the room is closed')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", ".")])
    before = {name: module for name, module in sys.modules.items() if name.split(".")[0] in ("consumers", "shop_mail")}
    for name in before:
        monkeypatch.delitem(sys.modules, name)
    yield tmp_path
    for name in [name for name in sys.modules if name.split(".")[0] in ("consumers", "shop_mail", "shop_broken", "shop_wrong")]:
        del sys.modules[name]


def _refusal(name: str) -> str:
    with pytest.raises(ConfigurationError) as refused:
        services.find(name)
    return str(refused.value)


@pytest.mark.usefixtures("folder")
def test_a_bare_name_is_a_module_of_the_package_consumers_here() -> None:
    assert services.find("exports").name == "exports"


@pytest.mark.usefixtures("folder")
def test_module_and_attribute_are_anybodys() -> None:
    assert services.find("shop_mail:service").name == "mail"


def test_a_module_that_is_not_there_is_said_with_those_that_are(folder: Path) -> None:
    assert _refusal("nope") == "nope: there is no module consumers.nope; here are: exports"
    assert (
        _refusal("nowhere.at_all:service")
        == f"nowhere.at_all:service: there is no module nowhere.at_all; looked in {folder} too"
    )


def test_an_error_inside_the_module_is_another_thing_with_its_place(folder: Path) -> None:
    assert _refusal("shop_broken:service") == (
        "shop_broken can't be imported: ModuleNotFoundError: No module named 'no_such_library' "
        f"({folder}/shop_broken.py, line 1)"
    )
    assert _refusal("shop_wrong:service") == (
        f"shop_wrong can't be imported: RuntimeError: the room is closed ({folder}/shop_wrong.py, line 2)"
    )


def test_a_mistake_in_the_module_that_we_refuse_is_said_in_our_words(folder: Path) -> None:
    (folder / "shop_wrong.py").write_text(
        "from outbox.consumer import Service\nservice = Service('s')\n@service.on('a.b')\ndef h(message, db_session, /): ...\n"
    )
    said = _refusal("shop_wrong:service")
    assert said.startswith(f"shop_wrong can't be imported: handler h ({folder}/shop_wrong.py:3) has no **extra")
    (folder / "shop_broken.py").write_text("x = 1\ndef (:\n")
    assert _refusal("shop_broken:service").endswith(f"SyntaxError: invalid syntax ({folder}/shop_broken.py, line 2)")


@pytest.mark.usefixtures("folder")
def test_a_service_knows_what_was_typed_for_it_so_that_advice_can_be_typed_too() -> None:
    assert services.find("shop_mail:service").typed == "shop_mail:service"
    assert services.find("exports").typed == "exports"


@pytest.mark.usefixtures("folder")
def test_what_is_no_service_is_said_with_those_that_are() -> None:
    assert _refusal("shop_mail:nope") == "shop_mail:nope: shop_mail has no 'nope'; it has shop_mail:service"
    assert _refusal("shop_mail:number") == (
        "shop_mail:number: shop_mail has a 'number' that is a int, no Service; it has shop_mail:service"
    )


@pytest.mark.parametrize("name", ["", "a b", "a.b", "a:", ":b", "a:b:c", "../x", "1x"])
def test_a_text_that_names_nothing_is_refused_with_the_two_forms(name: str) -> None:
    assert _refusal(name).endswith("write a bare name (exports) or module:attribute (shop.mail:service)")


@pytest.mark.usefixtures("folder")
def test_all_names_are_the_modules_of_the_package_consumers() -> None:
    assert services.all_names() == ["exports"]
