"""Encodings by hand from ACPI 6.5 chapter 20 and section 6.4; iasl checks the rest in test_acpi."""

import pytest

from kvmcore import aml


@pytest.mark.parametrize(
    ("value", "encoding"),
    [
        (0, "00"),
        (1, "01"),
        (2, "0a02"),
        (0xFF, "0aff"),
        (0x100, "0b0001"),
        (0x10000, "0c00000100"),
        (0x100000000, "0e0000000001000000"),
    ],
)
def test_integers_take_their_shortest_form(value, encoding):
    assert aml.integer(value).hex() == encoding


@pytest.mark.parametrize(
    ("body", "prefix"),
    [
        (62, "3f"),  # 63 bytes with the length itself: one byte
        (63, "4104"),  # 65 with two bytes of length
        (4093, "4fff"),
        (4094, "810001"),  # 4097 with three
        ((1 << 20) - 4, "8fffff"),
        ((1 << 20) - 3, "c1000001"),
    ],
)
def test_package_length_counts_itself(body, prefix):
    term = aml.scope("X", bytes(body - 4))  # four bytes of name
    assert term[1 : 1 + len(prefix) // 2].hex() == prefix
    assert len(term) == 1 + len(prefix) // 2 + body


def test_eisa_id_is_compressed():
    assert aml.hardware_id("PNP0A03").hex() == "0c41d00a03"


def test_acpi_id_is_a_string():
    assert aml.hardware_id("ACPI0007") == b"\x0dACPI0007\0"


def test_names_are_padded_to_four_characters():
    assert aml.name("\\_S5", b"\0") == b"\x08\\_S5_\0"
