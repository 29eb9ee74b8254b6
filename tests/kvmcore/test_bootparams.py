"""The zero page is read back by a C program compiled against the kernel's own <asm/bootparam.h>."""

import json
import shutil
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmcore import bootparams
from kvmcore.bootparams import Header, Kernel
from kvmcore.errors import ConfigError
from kvmcore.layout import GIB, MIB, ram_regions
from kvmcore.memory import GuestMemory

READER = r"""
#include <stdio.h>
#include <asm/bootparam.h>
#define FIELD(f) printf("\"%s\": %llu, ", #f, (unsigned long long)p.f)
int main(void)
{
    struct boot_params p;
    if (fread(&p, 1, sizeof p, stdin) != 4096) return 1;
    printf("{");
    FIELD(acpi_rsdp_addr); FIELD(ext_ramdisk_image); FIELD(ext_ramdisk_size); FIELD(ext_cmd_line_ptr);
    FIELD(e820_entries); FIELD(sentinel); FIELD(hdr.setup_sects); FIELD(hdr.syssize); FIELD(hdr.boot_flag);
    FIELD(hdr.header); FIELD(hdr.version); FIELD(hdr.type_of_loader); FIELD(hdr.loadflags);
    FIELD(hdr.code32_start); FIELD(hdr.ramdisk_image); FIELD(hdr.ramdisk_size); FIELD(hdr.cmd_line_ptr);
    FIELD(hdr.initrd_addr_max); FIELD(hdr.kernel_alignment); FIELD(hdr.relocatable_kernel);
    FIELD(hdr.xloadflags); FIELD(hdr.cmdline_size); FIELD(hdr.setup_data); FIELD(hdr.pref_address);
    FIELD(hdr.init_size); FIELD(hdr.heap_end_ptr); FIELD(hdr.vid_mode); FIELD(hdr.kernel_info_offset);
    printf("\"e820\": [");
    for (int i = 0; i < p.e820_entries; i++)
        printf("%s[%llu, %llu, %u]", i ? ", " : "", (unsigned long long)p.e820_table[i].addr,
               (unsigned long long)p.e820_table[i].size, p.e820_table[i].type);
    printf("]}");
}
"""
LAST = 0x1F1 + 0x79  # the end of a 2.15 header


@pytest.fixture(scope="session")
def reader(tmp_path_factory):
    cc = shutil.which("cc")
    if cc is None:
        pytest.skip("no C compiler")
    directory = tmp_path_factory.mktemp("reader")
    source, program = directory / "reader.c", directory / "reader"
    source.write_text(READER)
    build = subprocess.run([cc, "-o", program, source], capture_output=True, text=True, check=False)
    if build.returncode:
        pytest.skip(f"<asm/bootparam.h> does not compile: {build.stderr.splitlines()[0]}")
    return lambda page: json.loads(
        subprocess.run([program], input=page, capture_output=True, check=True).stdout
    )


@pytest.fixture(scope="session")
def scratch():
    """RAM for the property tests, which do not look at what an earlier example left in it."""
    memory = GuestMemory.create(ram_regions(64 * MIB))
    yield memory
    memory.close()


@pytest.fixture
def memory():
    memory = GuestMemory.create(ram_regions(64 * MIB))
    yield memory
    memory.close()


@pytest.fixture
def kernel():
    return Kernel(start=0x200000, end=0x1800001, entry=0x200200, header=Header.for_elf())


@pytest.fixture
def file(tmp_path):
    def file(data):
        path = tmp_path / "initrd"
        path.write_bytes(data)
        return str(path)

    return file


def written(memory, reader):
    return reader(memory.read(0x7000, 4096))


def test_every_field_is_where_the_kernels_own_header_has_it(reader):
    for name, (offset, form) in bootparams.FIELDS.items():
        size = {"<B": 1, "<H": 2, "<I": 4, "<Q": 8}[form]
        page = bytearray(4096)
        page[offset : offset + size] = b"\xff" * size
        fields = reader(bytes(page)) if name != "e820_entries" else {"e820_entries": 255}
        assert fields.get(name, fields.get(f"hdr.{name}")) == (1 << 8 * size) - 1
        assert {k for k, v in fields.items() if v and k != "e820"} == {
            name if name in fields else f"hdr.{name}"
        }


def test_header_of_the_image_is_kept_but_for_what_a_loader_owns(reader):
    image = bytes(range(1, 1 + LAST - 0x1F1))
    page = bootparams.zero_page(Kernel(0x200000, 0x300000, 0x200200, Header(image)), ())
    before, after = reader(bytes(0x1F1) + image + bytes(4096 - LAST)), reader(page)
    owned = ("type_of_loader", "loadflags", "code32_start", "ramdisk_image", "ramdisk_size", "cmd_line_ptr",
             "setup_data")  # fmt: skip
    changed = {k for k in before if k.startswith("hdr.") and before[k] != after[k]}
    assert changed <= {f"hdr.{name}" for name in owned}
    assert after["hdr.type_of_loader"] == 0xFF
    assert after["hdr.code32_start"] == 0x200000
    assert after["sentinel"] == 0


def test_heap_flag_of_the_real_mode_code_is_cleared(reader):
    header = bytearray(Header.for_elf().data)
    header[0x211 - 0x1F1] = 0x81
    page = bootparams.zero_page(Kernel(0x200000, 0x300000, 0x200200, Header(bytes(header))), ())
    assert reader(page)["hdr.loadflags"] == 1


def test_elf_gets_a_header_that_linux_accepts(reader, memory, kernel):
    bootparams.write(memory, kernel, "")
    fields = written(memory, reader)
    assert fields["hdr.boot_flag"] == 0xAA55
    assert fields["hdr.header"] == 0x53726448
    assert fields["hdr.kernel_alignment"] == 0x200000
    assert fields["hdr.version"] >= 0x20C


def test_rsdp_is_announced(reader, memory, kernel):
    bootparams.write(memory, kernel, "")
    assert written(memory, reader)["acpi_rsdp_addr"] == 0xE0000


def test_memory_map_of_a_big_guest_is_in_the_zero_page(reader, kernel):
    memory = GuestMemory.create(ram_regions(5 * GIB))
    bootparams.write(memory, kernel, "", ecam_buses=1)
    fields = written(memory, reader)
    assert fields["e820_entries"] == 4
    assert fields["e820"] == [
        [0, 0x9FC00, 1],
        [0x100000, 0xD0000000 - 0x100000, 1],
        [0xD0000000, 0x100000, 2],
        [0x100000000, 5 * GIB - 0xD0000000, 1],
    ]


def test_command_line_is_at_its_address_with_a_nul(reader, memory, kernel):
    memory.write(0x20000, b"\xff" * 64)
    bootparams.write(memory, kernel, "console=ttyS0")
    assert memory.read(0x20000, 15) == b"console=ttyS0\0\xff"
    assert written(memory, reader)["hdr.cmd_line_ptr"] == 0x20000


def test_command_line_may_be_as_long_as_the_kernel_says_and_no_longer():
    assert bootparams.encode_cmdline("x" * 255, 255) == b"x" * 255 + b"\0"
    with pytest.raises(ConfigError, match="256 bytes, this kernel takes at most 255"):
        bootparams.encode_cmdline("x" * 256, 255)


def test_command_line_ends_before_the_ebda_whatever_the_kernel_says():
    room = 0x9FC00 - 0x20000
    assert len(bootparams.encode_cmdline("x" * (room - 1), 1 << 30)) == room
    with pytest.raises(ConfigError, match="at most"):
        bootparams.encode_cmdline("x" * room, 1 << 30)


def test_command_line_length_counts_bytes_not_characters():
    with pytest.raises(ConfigError, match="4 bytes, this kernel takes at most 3"):
        bootparams.encode_cmdline("éé", 3)


@pytest.mark.parametrize("cmdline", ["a\0b", "a\nb", "a\n"])
def test_command_line_with_nul_or_newline_is_refused(cmdline):
    with pytest.raises(ConfigError, match="without NUL or newline"):
        bootparams.encode_cmdline(cmdline, 2047)


def test_initrd_begins_on_the_page_after_the_kernel(reader, memory, kernel, file):
    bootparams.write(memory, kernel, "", initrd=file(b"initramfs"))
    fields = written(memory, reader)
    assert fields["hdr.ramdisk_image"] == 0x1801000
    assert fields["hdr.ramdisk_size"] == 9
    assert memory.read(0x1801000, 9) == b"initramfs"


def test_no_initrd_leaves_its_fields_zero(reader, memory, kernel):
    bootparams.write(memory, kernel, "")
    fields = written(memory, reader)
    assert fields["hdr.ramdisk_image"] == fields["hdr.ramdisk_size"] == fields["hdr.setup_data"] == 0


def test_initrd_may_fill_memory_to_the_last_byte(memory, kernel, file):
    room = 64 * MIB - 0x1801000
    bootparams.write(memory, kernel, "", initrd=file(bytes(room)))
    with pytest.raises(ConfigError, match="do not fit between kernel"):
        bootparams.write(memory, kernel, "", initrd=file(bytes(room + 1)))


def test_initrd_stays_below_what_the_kernel_can_reach(memory, file):
    header = bytearray(Header.for_elf().data)
    header[0x22C - 0x1F1 : 0x230 - 0x1F1] = (0x1801FFF).to_bytes(4, "little")  # the last usable byte
    kernel = Kernel(0x200000, 0x1800001, 0x200200, Header(bytes(header)))
    bootparams.write(memory, kernel, "", initrd=file(bytes(0x1000)))
    with pytest.raises(ConfigError, match=r"\[0x1801000, 0x1802000\)"):
        bootparams.write(memory, kernel, "", initrd=file(bytes(0x1001)))


def test_missing_or_empty_initrd_is_refused(memory, kernel, file):
    with pytest.raises(ConfigError, match="initrd /nonexistent: No such file"):
        bootparams.write(memory, kernel, "", initrd="/nonexistent")
    with pytest.raises(ConfigError, match="empty"):
        bootparams.write(memory, kernel, "", initrd=file(b""))


SETUP_DATA = st.lists(st.tuples(st.integers(0, 9), st.binary(max_size=300)), max_size=6)


@given(SETUP_DATA)
def test_setup_data_is_a_list_of_aligned_nodes_that_overlap_nothing(scratch, blobs):
    memory = scratch
    bootparams.write(memory, Kernel(0x200000, 0x1800001, 0x200200, Header.for_elf()), "", setup_data=blobs)
    node = int.from_bytes(memory.read(0x7250, 8), "little")
    found, end = [], 0x1800001
    while node:
        assert node % 64 == 0
        assert node >= end
        following, kind, size = (
            int.from_bytes(memory.read(node + o, n), "little") for o, n in ((0, 8), (8, 4), (12, 4))
        )
        found.append((kind, memory.read(node + 16, size)))
        node, end = following, node + 16 + size
    assert found == blobs


def test_initrd_follows_setup_data(reader, memory, kernel, file):
    bootparams.write(
        memory, kernel, "", initrd=file(b"i"), setup_data=[(bootparams.SETUP_DTB, bytes(0x1000))]
    )
    fields = written(memory, reader)
    assert fields["hdr.setup_data"] == 0x1800040
    assert fields["hdr.ramdisk_image"] == 0x1802000


def test_setup_data_that_does_not_fit_is_refused(memory, kernel):
    with pytest.raises(ConfigError, match="setup_data"):
        bootparams.write(memory, kernel, "", setup_data=[(2, bytes(48 * MIB))])
