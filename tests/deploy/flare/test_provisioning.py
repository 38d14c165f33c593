"""Startup kits for named sites: real certificates, and nothing written but the kits."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time

import pytest
import yaml

from runs import COMMAND, invoke, started
from splitft.deploy.site.policy import load_site
from splitft.specs import SiteSpec

pytest.importorskip("nvflare")
SITES = ("north", "south-clinic", "st-mary_3")


@pytest.fixture(scope="module")
def provisioned(tmp_path_factory):
    """The kits, and what the command said; it ran in empty home, working and temporary folders."""
    folder = tmp_path_factory.mktemp("provision")
    deploy = {"sites": list(SITES), "server": "splitft.example.org", "port": 9443}
    (folder / "run.yaml").write_text(
        yaml.safe_dump({"clients": {"count": 3, "cuts": [1, 2, 3]}, "deploy": deploy})
    )
    places = {name: folder / name for name in ("home", "work", "scratch")}
    for place in places.values():
        place.mkdir()
    environment = {**os.environ, "HOME": str(places["home"]), "TMPDIR": str(places["scratch"])}
    done = subprocess.run(
        [*COMMAND, "deploy", "provision", str(folder / "run.yaml"), "--to", str(folder / "kits")],
        cwd=places["work"], env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return folder, done


def certificate(path):
    from cryptography import x509

    return x509.load_pem_x509_certificate(path.read_bytes())


def common_name(path) -> str:
    from cryptography.x509.oid import NameOID

    return certificate(path).subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value


def test_there_is_a_kit_for_everyone_and_it_says_for_whom(provisioned):
    folder, done = provisioned
    assert done.returncode == 0, done.stderr
    kits = {path.name for path in (folder / "kits").iterdir() if not path.name.startswith(".")}
    assert kits == {"splitft.example.org", *SITES, "submitter@splitft.local", "admin@splitft.local"}
    for kit in kits:
        assert str(folder / "kits" / kit) in done.stdout
    assert "holds the private keys of all parties" in done.stdout


def test_nothing_is_written_outside_the_folder(provisioned):
    folder, _ = provisioned
    assert {path.name for path in folder.iterdir()} == {"run.yaml", "home", "work", "scratch", "kits"}
    for name in ("home", "work", "scratch"):
        assert list((folder / name).iterdir()) == []


def test_every_certificate_is_the_partys_own_and_signed_by_the_projects_root(provisioned):
    kits = provisioned[0] / "kits"
    found = {"splitft.example.org": "server.crt", **dict.fromkeys(SITES, "client.crt")}
    root = certificate(kits / SITES[0] / "startup" / "rootCA.pem")
    keys = set()
    for party, file in found.items():
        own = certificate(kits / party / "startup" / file)
        own.verify_directly_issued_by(root)
        assert common_name(kits / party / "startup" / file) == party
        keys.add((kits / party / "startup" / file.replace(".crt", ".key")).read_bytes())
    assert len(keys) == len(found)


def test_sites_call_the_server_at_its_one_port(provisioned):
    kits = provisioned[0] / "kits"
    for site in SITES:
        said = json.loads((kits / site / "startup" / "fed_client.json").read_text())
        assert "splitft.example.org:9443" in json.dumps(said)


def test_every_site_has_its_owners_file_and_the_server_has_none(provisioned):
    kits = provisioned[0] / "kits"
    for site in SITES:
        assert load_site(kits / site / "local" / "site.yaml") == SiteSpec()
    assert not list((kits / "splitft.example.org").rglob("site.yaml"))


def test_kits_are_never_made_over_others(provisioned):
    folder, _ = provisioned
    again = invoke("deploy", "provision", folder / "run.yaml", "--to", folder / "kits")
    assert again.exit_code == 2
    assert "exists and is not empty" in again.stderr


def test_a_service_that_is_told_to_end_leaves_no_process(provisioned):
    from splitft.deploy.flare.processes import processes_of

    kit = provisioned[0] / "kits" / SITES[0]
    service = started("deploy", "start", kit)
    until = time.monotonic() + 60
    while not processes_of(kit) and time.monotonic() < until:
        time.sleep(0.2)
    assert processes_of(kit)
    service.send_signal(signal.SIGTERM)
    assert service.wait(60) == 130
    assert processes_of(kit) == []
