"""The privileged process: routes every guest access to the device process that owns the address."""
