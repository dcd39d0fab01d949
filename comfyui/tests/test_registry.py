"""pyproject.toml has what the Comfy Registry requires, read as ComfyUI reads it.

The requirements: https://docs.comfy.org/registry/specifications
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import real_comfyui  # noqa: F401
from comfy_config.config_parser import extract_node_configuration
from comfyui_version import __version__
from packaging.specifiers import SpecifierSet

PACK = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def config() -> Any:
    return extract_node_configuration(str(PACK))


def test_the_name_is_one_that_the_registry_takes(config: Any) -> None:
    name = config.project.name
    assert re.fullmatch(r"[A-Za-z]([-_.]?[A-Za-z0-9])*", name) and len(name) < 100
    assert "comfyui" not in name.lower()


def test_the_version_has_three_numbers_and_is_that_of_the_server(config: Any) -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", config.project.version)
    assert config.project.version == json.loads((PACK.parent / "package.json").read_text())["version"]


def test_what_the_registry_shows_is_there(config: Any) -> None:
    assert config.project.description and config.tool_comfy.display_name
    assert (PACK.parent / "LICENSE").read_text().startswith(config.project.license.text)
    assert config.project.supported_os == ["OS Independent"]


def test_this_version_of_comfyui_is_supported(config: Any) -> None:
    supported = config.project.supported_comfyui_version
    assert supported and __version__ in SpecifierSet(supported)
    assert "0.3.51" not in SpecifierSet(supported)


def test_what_only_a_publisher_knows_is_valid_or_left_open_as_the_readme_says(config: Any) -> None:
    readme = (PACK / "README.md").read_text()
    for field, value, form in (
        ("PublisherId", config.tool_comfy.publisher_id, r"[A-Za-z0-9][-_A-Za-z0-9]*"),
        ("Repository", config.project.urls.repository, r"https://[^/\s]+/\S+"),
    ):
        named = f'`{field} = ""`' in readme
        assert named if value == "" else re.fullmatch(form, value) and not named, field
