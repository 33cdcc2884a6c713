"""What may be written where, and how server.toml is read: pure rules."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest

from slum.backup import config, manifest
from slum.backup.manifest import Head, Span
from slum.errors import ConfigError
from slum.paths import Home

HEAD = Head(
    format=1,
    cluster="c",
    generation=7,
    lineage="l",
    claim="7-000003",
    member="m1",
    schema=1,
    version="0.1.0",
    seq=100,
    chain="ab",
    revision=2,
    at=1000.0,
    txid=9,
    bytes=1,
    rows="",
    rows_seq=100,
    first_seq=60,
    first_at=900.0,
    former=(Span(claim="7-000001", generation=7, first_seq=1, last_seq=50, first_at=100.0, last_at=500.0),),
)


def test_a_ledger_follows_its_own_history_only() -> None:
    ours = {"cluster": "c", "generation": 7, "lineage": "l"}
    assert manifest.why_not(None, **ours) == ""  # type: ignore[arg-type]
    assert manifest.why_not(HEAD, **ours) == ""  # type: ignore[arg-type]
    for change, word in (
        ({"cluster": "d"}, "cluster c"),
        ({"generation": 6}, "has replaced 6"),
        ({"lineage": "m"}, "began twice"),
    ):
        assert word in manifest.why_not(HEAD, **{**ours, **change})  # type: ignore[arg-type]
    newer = {"cluster": "c", "generation": 8, "lineage": "x"}
    assert manifest.why_not(HEAD, **newer) == "", "a restore begins again further down"  # type: ignore[arg-type]


def test_claims_count_upwards_whatever_is_taken() -> None:
    assert manifest.next_claim(None, 7, ()) == "7-000001"
    assert manifest.next_claim(HEAD, 7, ()) == "7-000004"
    assert manifest.next_claim(HEAD, 7, ("7-000009", "6-000030")) == "7-000010"
    assert manifest.next_claim(HEAD, 8, ("7-000009",)) == "8-000001"


@pytest.mark.parametrize(
    ("point", "claim"),
    [
        ({"seq": 1}, "7-000001"),
        ({"seq": 50}, "7-000001"),
        ({"seq": 60}, "7-000003"),
        ({"seq": 100}, "7-000003"),
        ({"seq": 55}, "7-000001"),
        ({"seq": 101}, None),
        ({"seq": 0}, None),
        ({"at": 99.0}, None),
        ({"at": 100.0}, "7-000001"),
        ({"at": 899.0}, "7-000001"),
        ({"at": 5000.0}, "7-000003"),
    ],
)
def test_a_point_belongs_to_one_claim(point: dict[str, float], claim: str | None) -> None:
    found = manifest.span_for(HEAD.spans, **point)  # type: ignore[arg-type]
    assert (found.claim if found else None) == claim


def test_claims_are_kept_as_long_as_their_last_moment() -> None:
    assert manifest.former_of(HEAD, 1000.0, 500.0) == HEAD.spans
    assert manifest.former_of(HEAD, 1001.0, 500.0) == (HEAD.span,)


def test_a_manifest_of_a_newer_slum_is_refused() -> None:
    data = msgspec.json.encode({**msgspec.to_builtins(HEAD), "format": 2, "spans": "otherwise"})
    with pytest.raises(ConfigError, match="format 2"):
        manifest.decode_head(data)
    with pytest.raises(ConfigError, match="no manifest of slum"):
        manifest.decode_head(b"<html>")
    assert manifest.decode_head(manifest.encode(HEAD)) == HEAD
    for claim in ("../7-000001", "", "7-000001/x", "7-"):
        with pytest.raises(ConfigError, match="which slum never makes"):
            manifest.decode_head(manifest.encode(msgspec.structs.replace(HEAD, claim=claim)))


def load(tmp_path: Path, text: str) -> config.Settings | None:
    home = Home(data=tmp_path, run=tmp_path)
    home.server_config.write_text(text)
    return config.load(home)


def test_the_server_says_where_its_backup_goes(tmp_path: Path) -> None:
    found = load(tmp_path, '[backup]\nurl = "s3://my-backups/fleet/one/"\ninterval_ms = 100\n')
    assert found is not None
    assert found.interval_ms == 100
    assert config.place_of(found) == config.Place(kind="s3", bucket="my-backups", path="fleet/one")
    assert load(tmp_path, "") is None
    assert config.place_of(config.made("file:///srv/backup/")).path == "/srv/backup"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[bakup]", r"server.toml:1: bakup: unknown table; did you mean `backup`"),
        (
            '[backup]\nurl = "file:///x"\nintervall_ms = 3',
            r"server.toml:3: backup.intervall_ms: unknown key; did you mean",
        ),
        ("[backup]", "url"),
        ('[backup]\nurl = "ftp://x/y"', "no address of a store"),
        ('[backup]\nurl = "s3://key:secret@bucket/x"', "holds more than an address"),
        ('[backup]\nurl = "file:///x"\ninterval_ms = 1', "1 is not between 50 and 60000"),
        ('[backup]\nurl = "file:///x"\ninterval_ms = true', "int"),
        ('[backup]\nurl = "s3://bucket/x"\nsecrets_ref = "hunter2"', "no reference such as file:/abs"),
        ('[backup]\nurl = "s3://bucket/x"\nendpoint = "https://user:hunter2@host"', "endpoint: is no address"),
    ],
)
def test_what_is_wrong_is_said_with_its_place_and_without_secrets(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    assert re.search(says, str(caught.value)), caught.value
    assert "hunter2" not in str(caught.value)


def test_credentials_come_from_a_private_file_or_the_environment(tmp_path: Path) -> None:
    settings = config.made("s3://bucket/x")
    file = tmp_path / "server.env"
    environ = {config.KEY_ID: "id", config.SECRET: "from-environ"}
    assert config.keys_of(settings, environ, file).secret == "from-environ"
    file.write_text(f"{config.SECRET}=from-file\n")
    file.chmod(0o644)
    with pytest.raises(ConfigError, match="others may read it"):
        config.keys_of(settings, environ, file)
    file.chmod(0o600)
    found = config.keys_of(settings, environ, file)
    assert (found.id, found.secret) == ("id", "from-file")
    assert "from-file" not in repr(found)
    with pytest.raises(ConfigError, match=r"lacks AWS_ACCESS_KEY_ID"):
        config.keys_of(settings, {}, None)
    missing = config.made("s3://bucket/x", secrets_ref=f"file:{tmp_path}/nothing")
    with pytest.raises(ConfigError, match="no such file"):
        config.keys_of(missing, environ, None)
