"""Virtio's numbers, and where this project puts a function's structures (virtio 1.2, modern PCI only).

Constants alone, so that the supervisor may import them.  Left out: legacy and transitional devices, shared
memory regions, and the feature bits 0 to 23 and 50 on, which belong to the device type.
"""

from __future__ import annotations

from typing import Final

# 2.1 Device Status Field
ACKNOWLEDGE: Final = 1
DRIVER: Final = 2
DRIVER_OK: Final = 4
FEATURES_OK: Final = 8
DEVICE_NEEDS_RESET: Final = 64
FAILED: Final = 128

# 6 Reserved Feature Bits: masks, not numbers
F_INDIRECT_DESC: Final = 1 << 28
F_EVENT_IDX: Final = 1 << 29
F_VERSION_1: Final = 1 << 32
F_ACCESS_PLATFORM: Final = 1 << 33
F_RING_PACKED: Final = 1 << 34
F_IN_ORDER: Final = 1 << 35
F_ORDER_PLATFORM: Final = 1 << 36
F_NOTIFICATION_DATA: Final = 1 << 38
F_NOTIF_CONFIG_DATA: Final = 1 << 39
F_RING_RESET: Final = 1 << 40

# 2.7, 2.8: the limits and alignments of both ring formats, in entries and bytes
QUEUE_SIZE_MAX: Final = 32768
DESC_SIZE: Final = 16
DESC_ALIGN: Final = 16
SPLIT_DRIVER_ALIGN: Final = 2
SPLIT_DEVICE_ALIGN: Final = 4
PACKED_EVENT_ALIGN: Final = 4
PACKED_EVENT_SIZE: Final = 4

# 2.7.5, 2.8.1: flags of a descriptor; the last two in packed rings only
DESC_F_NEXT: Final = 1
DESC_F_WRITE: Final = 2
DESC_F_INDIRECT: Final = 4
DESC_F_AVAIL: Final = 1 << 7
DESC_F_USED: Final = 1 << 15

# 2.7.6, 2.7.8: flags of the available and of the used ring
AVAIL_F_NO_INTERRUPT: Final = 1
USED_F_NO_NOTIFY: Final = 1

# 2.8.10: flags of an event suppression structure
RING_EVENT_FLAGS_ENABLE: Final = 0
RING_EVENT_FLAGS_DISABLE: Final = 1
RING_EVENT_FLAGS_DESC: Final = 2

# 5 Device Types
ID_NET: Final = 1
ID_BLOCK: Final = 2
ID_CONSOLE: Final = 3
ID_ENTROPY: Final = 4
ID_BALLOON: Final = 5
ID_VSOCK: Final = 19
ID_FS: Final = 26

# 4.1.2 PCI Device Discovery
PCI_VENDOR: Final = 0x1AF4
PCI_DEVICE: Final = 0x1040  # plus the device type
PCI_REVISION: Final = 1
PCI_SUBSYSTEM: Final = 0x1100  # 0x40 or more: not transitional

# 4.1.4 Virtio Structure PCI Capabilities: cfg_type, and the length of each capability in bytes
CAP_COMMON_CFG: Final = 1
CAP_NOTIFY_CFG: Final = 2
CAP_ISR_CFG: Final = 3
CAP_DEVICE_CFG: Final = 4
CAP_PCI_CFG: Final = 5
CAP_SIZE: Final = 16
CAP_NOTIFY_SIZE: Final = 20
CAP_PCI_SIZE: Final = 20

# 4.1.4 struct virtio_pci_cap: offsets from the capability's start
CAP_LEN: Final = 2
CAP_CFG_TYPE: Final = 3
CAP_BAR: Final = 4
CAP_ID: Final = 5
CAP_OFFSET: Final = 8
CAP_LENGTH: Final = 12
CAP_NOTIFY_OFF_MULTIPLIER: Final = 16
CAP_PCI_CFG_DATA: Final = 16

# 4.1.4.3 Common configuration: offsets from its start
DEVICE_FEATURE_SELECT: Final = 0x00
DEVICE_FEATURE: Final = 0x04
DRIVER_FEATURE_SELECT: Final = 0x08
DRIVER_FEATURE: Final = 0x0C
CONFIG_MSIX_VECTOR: Final = 0x10
NUM_QUEUES: Final = 0x12
DEVICE_STATUS: Final = 0x14
CONFIG_GENERATION: Final = 0x15
QUEUE_SELECT: Final = 0x16
QUEUE_SIZE: Final = 0x18
QUEUE_MSIX_VECTOR: Final = 0x1A
QUEUE_ENABLE: Final = 0x1C
QUEUE_NOTIFY_OFF: Final = 0x1E
QUEUE_DESC: Final = 0x20
QUEUE_DRIVER: Final = 0x28
QUEUE_DEVICE: Final = 0x30
QUEUE_NOTIFY_DATA: Final = 0x38
QUEUE_RESET: Final = 0x3A
COMMON_CFG_SIZE: Final = 0x3C

MSI_NO_VECTOR: Final = 0xFFFF  # 4.1.5.1.2

# 4.1.4.5 ISR status
ISR_QUEUE: Final = 1
ISR_CONFIG: Final = 2

# Where this project puts the structures: offsets in BAR0, the only BAR, and their sizes
BAR_SIZE: Final = 0x8000
BAR_COMMON: Final = 0x0000
BAR_COMMON_SIZE: Final = 0x1000
BAR_ISR: Final = 0x1000
BAR_ISR_SIZE: Final = 0x1000
BAR_DEVICE: Final = 0x2000
BAR_DEVICE_SIZE: Final = 0x1000
BAR_NOTIFY: Final = 0x3000
BAR_NOTIFY_SIZE: Final = 0x3000
NOTIFY_OFF_MULTIPLIER: Final = 4  # queue_notify_off is the queue's index
BAR_MSIX_TABLE: Final = 0x6000
BAR_MSIX_PBA: Final = 0x7000

# Likewise the capabilities: offsets in configuration space, in the order in which they are linked
CONFIG_MSIX: Final = 0x40
CONFIG_COMMON: Final = 0x50
CONFIG_NOTIFY: Final = 0x60
CONFIG_ISR: Final = 0x74
CONFIG_DEVICE: Final = 0x84
CONFIG_PCI: Final = 0x94
