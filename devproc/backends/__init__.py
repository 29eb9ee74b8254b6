"""What touches the host on a device's behalf: one small class per kind of descriptor."""
