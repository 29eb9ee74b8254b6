"""Virtio over PCI: constants, virtqueues and the transport that every virtio device model shares."""
