"""A kit's certificate is checked before it is used, and its end is foretold."""

from __future__ import annotations

import pytest

pytest.importorskip("nvflare")

from deploy.identity.made_up import kit, signed
from splitft.deploy.identity.certificates import (
    certificate_of,
    check_kit,
    root_of,
    warnings_of,
    warnings_of_peers,
)
from splitft.errors import DeployError


def test_a_kit_that_is_whole_and_valid_says_whose_it_is(tmp_path):
    root = signed("splitft")
    own = check_kit(kit(tmp_path / "north", signed("north", root), root))
    assert (own.name, own.role) == ("north", "client")


@pytest.mark.parametrize(
    ("own", "root", "words"),
    [
        ({"ends": -1}, {}, "the certificate of north expired on .* splitft deploy renew"),
        ({"begins": 1}, {}, "is valid from .* clock"),
        ({}, {"ends": -1}, "the federation's root expired"),
    ],
)
def test_what_is_not_valid_now_is_said_with_its_day_and_the_remedy(tmp_path, own, root, words):
    root = signed("splitft", **root)
    with pytest.raises(DeployError, match=words):
        check_kit(kit(tmp_path / "north", signed("north", root, **own), root))


def test_a_kit_put_together_from_two_federations_is_said(tmp_path):
    ours, theirs = signed("splitft"), signed("splitft")
    with pytest.raises(DeployError, match="two federations"):
        check_kit(kit(tmp_path / "north", signed("north", theirs), ours))


def test_a_key_of_another_certificate_is_said(tmp_path):
    root = signed("splitft")
    folder = kit(tmp_path / "north", signed("north", root), root)
    (folder / "startup" / "client.key").write_bytes(signed("north", root).key_pem())
    with pytest.raises(DeployError, match="does not belong to the private key"):
        check_kit(folder)


@pytest.mark.parametrize("damage", [b"", b"no certificate", None])
def test_damaged_certificates_are_said(tmp_path, damage):
    root = signed("splitft")
    folder = kit(tmp_path / "north", signed("north", root), root)
    path = folder / "startup" / "client.crt"
    path.unlink() if damage is None else path.write_bytes(damage)
    with pytest.raises(DeployError, match="certificate"):
        check_kit(folder)


@pytest.mark.parametrize(("days", "warned"), [(400, False), (31, False), (29, True), (1, True), (-1, True)])
def test_a_warning_comes_from_30_days_before_the_end_and_after_it(tmp_path, days, warned):
    root = signed("splitft")
    folder = kit(tmp_path / "north", signed("north", root, ends=days), root)
    found = warnings_of([certificate_of(folder), root_of(folder)])
    assert len(found) == warned
    assert all("north" in line and "splitft deploy renew" in line for line in found)


def test_a_root_that_ends_is_warned_of_too(tmp_path):
    root = signed("splitft", ends=10)
    folder = kit(tmp_path / "north", signed("north", root), root)
    assert "root certificate ends in 10 days" in warnings_of([root_of(folder)])[0]


def test_ends_of_sites_as_the_server_reports_them_are_warned_of_and_nonsense_is_not(tmp_path):
    now = certificate_of(kit(tmp_path / "x", signed("x", signed("r")), signed("r"))).begins
    ends = {"north": now.isoformat(), "odd": "never", "south": now.replace(year=now.year + 90).isoformat()}
    assert [line.split(" expired")[0] for line in warnings_of_peers(ends)] == ["the certificate of north"]
    assert warnings_of_peers(None) == warnings_of_peers([1]) == []
