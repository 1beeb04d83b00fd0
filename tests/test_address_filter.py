"""SSRF protection: a public upstream cannot make us connect to private addresses."""

import socket

import pytest
from aiohttp import AddrInfoType

from harmonia.upstream.address_filter import AddressFilter, PrivateAddressError, is_public

PUBLIC = """
    8.8.8.8 198.41.0.4 2001:4860:4860::8888 ::ffff:8.8.8.8 64:ff9b::808:808 2002:808:808::1
"""
PRIVATE = """
    127.0.0.1 127.255.255.254 10.1.2.3 172.16.0.1 172.31.255.255 192.168.0.1 169.254.169.254 100.64.0.1 0.0.0.0
    224.0.0.1 239.1.1.1 255.255.255.255 ::1 :: fe80::1 fe80::1%lo fc00::1 fd12:3456::1 fec0::1 ff02::1 ff0e::1
    ::ffff:127.0.0.1 ::ffff:10.0.0.1 64:ff9b::10.0.0.1 64:ff9b::7f00:1 2002:a00:1::1
"""


@pytest.mark.parametrize("address", PUBLIC.split())
def test_public_addresses_are_public(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize("address", PRIVATE.split())
def test_private_and_special_addresses_are_not_public(address: str) -> None:
    assert not is_public(address)


def address(of: str) -> AddrInfoType:
    return socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", (of, 80)


@pytest.mark.parametrize("order", [("8.8.8.8", "10.0.0.1"), ("10.0.0.1", "8.8.8.8")])
def test_upstream_with_public_and_private_addresses_counts_as_public(order: tuple[str, str]) -> None:
    address_filter = AddressFilter()
    for each in order:
        address_filter.connect_direct(address(each)).close()
    address_filter.connect_redirected(address("8.8.4.4")).close()
    with pytest.raises(PrivateAddressError):
        address_filter.connect_redirected(address("10.0.0.2"))


def test_upstream_that_counts_as_public_leads_to_no_private_address_but_its_own() -> None:
    address_filter = AddressFilter(is_public=True)
    address_filter.connect_direct(address("10.0.0.1")).close()
    address_filter.connect_redirected(address("8.8.8.8")).close()
    for each in ("10.0.0.2", "127.0.0.1", "169.254.169.254"):
        with pytest.raises(PrivateAddressError):
            address_filter.connect_redirected(address(each))


def test_private_upstream_may_redirect_to_any_address() -> None:
    address_filter = AddressFilter()
    address_filter.connect_direct(address("10.0.0.1")).close()
    for each in ("10.0.0.2", "8.8.8.8"):
        address_filter.connect_redirected(address(each)).close()
