"""Keys are made where they stay: the commands of an authority and of parties, each in a folder of its own."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest
import yaml

pytest.importorskip("nvflare")

from runs import invoke
from splitft.deploy.identity.certificates import certificate_of, check_kit, root_of
from splitft.deploy.identity.revocation import read_revoked
from splitft.deploy.site.policy import load_site
from splitft.specs import SiteSpec

SERVER = "fl.example.org"
KEY = b"PRIVATE KEY"


def run(*words, status=0):
    done = invoke("deploy", *words)
    assert done.exit_code == status, done.stdout + done.stderr
    return done.stdout + done.stderr


def admit(folder: Path, name: str, root: str, role: str = "site") -> Path:
    """A party's way in: a request there, an approval by the authority, a kit there."""
    theirs = folder / f"at-{name}"
    run("request", name, "--role", role, "--to", theirs / "asked")
    run("approve", theirs / "asked" / f"{name}.request.zip", "--authority", folder / "authority",
        "--role", role, "--to", folder / f"{name}.signed.zip")  # fmt: skip
    said = run(
        "package", folder / f"{name}.signed.zip", "--request", theirs / "asked", "--to", theirs / "kit",
        "--fingerprint", root,
    )  # fmt: skip
    assert root in said
    return theirs / "kit"


@pytest.fixture(scope="module")
def federation(tmp_path_factory):
    """The folder of everybody, the fingerprint of the root, and the kits of a server, a site and a person."""
    folder = tmp_path_factory.mktemp("authority")
    file = folder / "run.yaml"
    deploy = {"sites": ["north", "south"], "server": SERVER, "port": 9443}
    file.write_text(yaml.safe_dump({"clients": {"count": 2, "cuts": [1, 2]}, "deploy": deploy}))
    said = run("authority", file, "--to", folder / "authority")
    root = next(line.split()[1] for line in said.splitlines() if line.startswith("root"))
    kits = {
        name: admit(folder, name, root, role)
        for name, role in ((SERVER, "server"), ("north", "site"), ("ada@a.org", "submitter"))
    }
    return folder, root, kits


def test_every_kit_is_whole_and_its_certificate_says_the_role_that_was_approved(federation):
    _, _, kits = federation
    assert {name: check_kit(kit).role for name, kit in kits.items()} == {
        SERVER: "server", "north": "client", "ada@a.org": "lead",
    }  # fmt: skip
    assert len({root_of(kit).fingerprint for kit in kits.values()}) == 1


def test_a_private_key_is_in_its_owners_kit_and_nowhere_else_and_none_travels(federation):
    folder, _, _ = federation
    holders = {path.parent.parent.name for path in folder.rglob("*.key") if path.parent.name == "startup"}
    assert holders == {"kit"}
    others = [path for path in folder.rglob("*.key") if path.parent.name != "startup"]
    assert [path.name for path in others] == ["rootCA.key"]
    for file in folder.rglob("*.zip"):
        with zipfile.ZipFile(file) as archive:
            assert not [name for name in archive.namelist() if KEY in archive.read(name)], file
    for file in (folder / "authority").rglob("*"):
        assert file.is_dir() or file.name == "rootCA.key" or KEY not in file.read_bytes()


def test_nobody_else_on_the_machine_reads_kits_requests_or_the_authority(federation):
    folder, _, kits = federation
    for place in (*kits.values(), folder / "authority"):
        assert not [path for path in (place, *place.rglob("*")) if path.stat().st_mode & 0o077]


def test_a_sites_kit_calls_the_server_and_has_its_owners_file_and_strict_permissions(federation):
    _, _, kits = federation
    north = kits["north"]
    assert f"{SERVER}:9443" in (north / "startup" / "fed_client.json").read_text()
    assert load_site(north / "local" / "site.yaml") == SiteSpec()
    assert (
        json.loads((north / "local" / "authorization.json").read_text())["permissions"]["lead"]["byoc"]
        == "none"
    )
    assert not (kits[SERVER] / "local" / "site.yaml").exists()


def test_an_authority_does_not_approve_another_role_than_it_says(federation):
    folder, _, _ = federation
    run("request", "eve@e.org", "--role", "administrator", "--to", folder / "eve")
    said = run(
        "approve", folder / "eve" / "eve@e.org.request.zip", "--authority", folder / "authority", status=2
    )
    assert "asks for the role administrator" in said
    assert "--role administrator" in said
    assert not list(folder.rglob("eve@e.org.signed.zip"))


def test_an_approval_is_of_no_use_without_its_key_or_for_another_kit(federation):
    folder, root, kits = federation
    run("request", "west", "--to", folder / "west")
    run("approve", folder / "west" / "west.request.zip", "--authority", folder / "authority",
        "--to", folder / "west.signed.zip")  # fmt: skip
    run("request", "west", "--to", folder / "thief")
    words = ("--to", folder / "stolen", "--fingerprint", root)
    assert "FLARE refuses" in run(
        "package", folder / "west.signed.zip", "--request", folder / "thief", *words, status=2
    )
    assert not (folder / "stolen").exists()
    into = ("--request", folder / "west", "--to", kits["north"])
    assert "the kit of north" in run("package", folder / "west.signed.zip", *into, status=2)
    assert certificate_of(kits["north"]).name == "north"


def test_another_root_than_the_authority_told_is_refused(federation):
    folder, root, _ = federation
    run("request", "east", "--to", folder / "east")
    run("approve", folder / "east" / "east.request.zip", "--authority", folder / "authority",
        "--to", folder / "east.signed.zip")  # fmt: skip
    other = root[:-2] + ("00" if root[-2:] != "00" else "01")
    words = ("--request", folder / "east", "--to", folder / "east-kit", "--fingerprint", other)
    assert "FLARE refuses" in run("package", folder / "east.signed.zip", *words, status=2)
    assert not (folder / "east-kit").exists()


def test_a_renewed_kit_has_a_new_key_and_keeps_its_owners_file(federation):
    folder, _, kits = federation
    north = kits["north"]
    (north / "local" / "site.yaml").write_text("text: {source: /data/notes.jsonl}\n")
    before, key = certificate_of(north), (north / "startup" / "client.key").read_bytes()
    run("renew", north)
    run("approve", north / "renewal" / "north.request.zip", "--authority", folder / "authority",
        "--to", folder / "again.signed.zip", "--valid-days", "20")  # fmt: skip
    run("package", folder / "again.signed.zip", "--request", north / "renewal", "--to", north)
    after = check_kit(north)
    assert after.fingerprint != before.fingerprint
    assert 19 < after.days_left() < 21
    assert (north / "startup" / "client.key").read_bytes() != key
    assert load_site(north / "local" / "site.yaml").text.source == "/data/notes.jsonl"
    assert not (north / "renewal").exists()


def test_revoking_withdraws_all_certificates_of_a_name_and_admits_a_new_one(federation):
    folder, root, kits = federation
    first = certificate_of(admit(folder, "south", root)).fingerprint
    said = run("revoke", "south", "--authority", folder / "authority", "--kit", kits[SERVER])
    assert "1 certificate of south" in said
    listed = kits[SERVER] / "local" / "revoked.json"
    assert set(read_revoked(listed)) == {first}
    (folder / "at-south").rename(folder / "was-south")
    (folder / "south.signed.zip").unlink()
    second = certificate_of(admit(folder, "south", root)).fingerprint
    assert second not in read_revoked(listed)
    assert "no certificate of 'nobody'" in run(
        "revoke", "nobody", "--authority", folder / "authority", status=2
    )
    assert "kit of a site" in run(
        "revoke", "south", "--authority", folder / "authority", "--kit", kits["north"], status=2
    )


@pytest.mark.parametrize("name", ["../../escape", "a b", "x" * 80, ".hidden", "né"])
def test_a_name_that_is_no_name_makes_no_request(tmp_path, name):
    run("request", name, "--to", tmp_path / "asked", status=2)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_what_is_no_request_is_said(federation, tmp_path):
    folder, _, _ = federation
    (tmp_path / "x.zip").write_bytes(b"no archive")
    said = run("approve", tmp_path / "x.zip", "--authority", folder / "authority", status=2)
    assert "is no request" in said
    assert "is no authority" in run(
        "approve", next(folder.rglob("*.request.zip")), "--authority", tmp_path, status=2
    )
