"""Which addresses an upstream from outside does not lead us to."""

import socket

import pytest
from aiohttp import AddrInfoType

from harmonia.upstream.address_filter import AddressFilter, PrivateAddressError, is_public

OUTSIDE = """
    8.8.8.8 198.41.0.4 2001:4860:4860::8888 ::ffff:8.8.8.8 64:ff9b::808:808 2002:808:808::1
"""
INSIDE = """
    127.0.0.1 127.255.255.254 10.1.2.3 172.16.0.1 172.31.255.255 192.168.0.1 169.254.169.254 100.64.0.1 0.0.0.0
    224.0.0.1 239.1.1.1 255.255.255.255 ::1 :: fe80::1 fe80::1%lo fc00::1 fd12:3456::1 fec0::1 ff02::1 ff0e::1
    ::ffff:127.0.0.1 ::ffff:10.0.0.1 64:ff9b::10.0.0.1 64:ff9b::7f00:1 2002:a00:1::1
"""


@pytest.mark.parametrize("address", OUTSIDE.split())
def test_it_may_lead_to_any_address_of_the_internet(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize("address", INSIDE.split())
def test_it_may_not_lead_to_one_that_is_ours(address: str) -> None:
    assert not is_public(address)


def address(of: str) -> AddrInfoType:
    return socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", (of, 80)


@pytest.mark.parametrize("order", [("8.8.8.8", "10.0.0.1"), ("10.0.0.1", "8.8.8.8")])
def test_one_whose_name_also_leads_inside_is_still_outside(order: tuple[str, str]) -> None:
    reach = AddressFilter()
    for each in order:
        reach.connect_direct(address(each)).close()
    reach.connect_redirected(address("8.8.4.4")).close()
    with pytest.raises(PrivateAddressError):
        reach.connect_redirected(address("10.0.0.2"))


def test_one_inside_leads_anywhere() -> None:
    reach = AddressFilter()
    reach.connect_direct(address("10.0.0.1")).close()
    for each in ("10.0.0.2", "8.8.8.8"):
        reach.connect_redirected(address(each)).close()
