"""Blobs are read back by dtc."""

import shutil
import subprocess

import pytest

from kvmcore import fdt
from kvmcore.errors import ConfigError
from kvmcore.fdt import Fstab, Mount

FSTAB = """\
# partitions of the guest

/dev/block/vdb /vendor ext4 ro,noatime wait,check
/dev/block/vdc /odm    squashfs ro     wait
"""


@pytest.fixture
def dtc(tmp_path):
    """The source dtc sees in a blob, with every run of blanks made one."""
    program = shutil.which("dtc")
    if program is None:
        pytest.skip("no dtc (Debian package device-tree-compiler)")

    def decompile(blob):
        run = subprocess.run(
            [program, "-I", "dtb", "-O", "dts", "-"], input=blob, capture_output=True, check=False
        )
        assert run.returncode == 0, run.stderr.decode()
        return " ".join(run.stdout.decode().split())

    return decompile


@pytest.fixture
def file(tmp_path):
    def file(text, name="fstab"):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(path)

    return file


def test_dtc_reads_back_every_mount(dtc, file):
    source = dtc(fdt.android(file(FSTAB)))
    assert source == (
        "/dts-v1/; / { #address-cells = <0x02>; #size-cells = <0x02>; "
        'firmware { android { compatible = "android,firmware"; vendor { }; '
        'fstab { compatible = "android,fstab"; '
        'vendor { compatible = "android,vendor"; dev = "/dev/block/vdb"; type = "ext4"; '
        'mnt_flags = "ro,noatime"; fsmgr_flags = "wait,check"; }; '
        'odm { compatible = "android,odm"; dev = "/dev/block/vdc"; type = "squashfs"; '
        'mnt_flags = "ro"; fsmgr_flags = "wait"; }; }; }; }; };'
    )


def test_vendor_properties_come_from_the_files_they_name(dtc, file):
    value = file("google/board:13", "fingerprint")
    source = dtc(fdt.android(file(f"#dt-vendor build.fingerprint {value} - -\n")))
    assert 'vendor { build.fingerprint = "google/board:13"; };' in source


def test_bytes_of_any_length_survive(dtc):
    blob = fdt.encode({"a": b"", "b": b"\1", "c": b"\1\2\3\4\5", "n": {"a": b"\xff"}, "m": {}})
    assert dtc(blob) == "/dts-v1/; / { a; b = [01]; c = [01 02 03 04 05]; n { a = [ff]; }; m { }; };"


def test_the_same_property_name_is_stored_once():
    blob = fdt.encode({"n": {"long-property-name": b"1"}, "m": {"long-property-name": b"2"}})
    assert blob.count(b"long-property-name\0") == 1


def test_fstab_is_parsed_with_its_comments_and_blank_lines_left_out():
    assert fdt.parse_fstab(FSTAB, "f") == Fstab(
        (
            Mount("vendor", "/dev/block/vdb", "ext4", "ro,noatime", "wait,check"),
            Mount("odm", "/dev/block/vdc", "squashfs", "ro", "wait"),
        )
    )


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/dev/vdb /vendor ext4 ro", "expected device, mount point, type, mount flags, fs_mgr flags"),
        ("/dev/vdb /vendor ext4 ro wait extra", "expected device, mount point"),
        ("/dev/vdb vendor ext4 ro wait", "expected a new mount point like /vendor, found 'vendor'"),
        ("/dev/vdb / ext4 ro wait", "found '/'"),
        ("/dev/vdb /mnt/x ext4 ro wait", "found '/mnt/x'"),
        ("/dev/vdb /" + "x" * 32 + " ext4 ro wait", "expected a new mount point"),
        ("/dev/vdd /compatible ext4 ro wait", "found '/compatible'"),
        ("/dev/vdd /odm ext4 ro wait", "found '/odm'"),
        ("#dt-vendor build.fingerprint", "expected device"),
        ("#dt-vendor a/b file - -", "expected a new property of at most 31 characters, found 'a/b'"),
    ],
)  # fmt: skip
def test_bad_lines_are_named_by_file_and_number(line, message):
    with pytest.raises(ConfigError) as e:
        fdt.parse_fstab(f"{FSTAB}{line}\n", "/etc/fstab.arc")
    assert str(e.value).startswith("fstab /etc/fstab.arc:5: ")
    assert message in str(e.value)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\xff", "expected UTF-8 text"),
        (b"a\0b", "without NUL"),
        (b"\n" * 65537, "65537 bytes, expected at most"),
    ],
)
def test_what_is_not_a_small_text_file_is_refused(file, data, message):
    with pytest.raises(ConfigError, match=message):
        fdt.android(file(data))


def test_missing_files_are_named(file):
    with pytest.raises(ConfigError, match="fstab /nonexistent: No such file"):
        fdt.android("/nonexistent")
    with pytest.raises(ConfigError, match="#dt-vendor a /nonexistent: No such file"):
        fdt.android(file("#dt-vendor a /nonexistent - -\n"))
