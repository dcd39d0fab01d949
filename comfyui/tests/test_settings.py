"""Where servers and the token come from, and what an address may look like."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from unetd.settings import DEFAULT_URL, SettingsError, normalise, read_settings


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("gpu-box", "ws://gpu-box:8700/v1"),
        ("gpu-box:9000", "ws://gpu-box:9000/v1"),
        (" 192.168.1.20:8700/ ", "ws://192.168.1.20:8700/v1"),
        ("[::1]:8700", "ws://[::1]:8700/v1"),
        ("http://gpu-box:8700", "ws://gpu-box:8700/v1"),
        ("https://unetd.example.com", "wss://unetd.example.com/v1"),
        ("ws://127.0.0.1:8700/v1", "ws://127.0.0.1:8700/v1"),
        ("wss://example.com/gpu/v1/", "wss://example.com/gpu/v1"),
    ],
)
def test_addresses_as_people_write_them(text: str, url: str) -> None:
    assert normalise(text, "here") == url


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("ftp://gpu-box", '"ftp"'),
        ("gpu box:8700", "no host"),
        ("gpu-box:port", "Port"),
        ("gpu-box:99999", "range"),
        ("gpu-box:0", "the port is 0"),
        ("::1", "no server address"),
        ("http://", "no host"),
        ("http://gpu-box:8700/#token=secret", "UNETD_TOKEN"),
        ("ws://user:secret@gpu-box", "UNETD_TOKEN"),
    ],
)
def test_nonsense_is_refused_with_the_place_it_stood_in_and_an_example(text: str, fault: str) -> None:
    with pytest.raises(SettingsError, match=f"(?s)the node's input.*{fault}.*8700"):
        read_settings(text, {})


def test_the_node_comes_before_the_environment_and_that_before_the_file(tmp_path: Path) -> None:
    file = tmp_path / "unetd.json"
    assert read_settings("", {}, file).urls == (DEFAULT_URL,)
    file.write_text(json.dumps({"urls": ["c:1", "d:2"], "token": "of-the-file"}))
    assert read_settings("", {}, file).urls == ("ws://c:1/v1", "ws://d:2/v1")
    environ = {"UNETD_URL": "b:1,b2:2,"}
    assert read_settings(" ", environ, file).urls == ("ws://b:1/v1", "ws://b2:2/v1")
    assert read_settings("a:1, a:1", environ, file).urls == ("ws://a:1/v1",)


def test_the_token_comes_from_the_environment_or_the_file_alone(tmp_path: Path) -> None:
    file = tmp_path / "unetd.json"
    file.write_text(json.dumps({"token": "of-the-file"}))
    assert read_settings("", {}, None).token is None
    assert read_settings("a:1", {}, file).token == "of-the-file"
    assert read_settings("a:1", {"UNETD_TOKEN": "of-the-environment"}, file).token == "of-the-environment"


@pytest.mark.parametrize("content", ["{", "[]", '{"url": "a"}', '{"urls": [1]}', '{"token": 5}'])
def test_a_file_that_cannot_be_understood_is_named(tmp_path: Path, content: str) -> None:
    file = tmp_path / "unetd.json"
    file.write_text(content)
    with pytest.raises(SettingsError, match=r"unetd\.json.*\"urls\""):
        read_settings("", {}, file)


def test_commas_alone_name_no_server() -> None:
    with pytest.raises(SettingsError, match="names no server"):
        read_settings(",", {})
