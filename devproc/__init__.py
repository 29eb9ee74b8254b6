"""The device side: the wire, the zygote, the jail, and the device models that run inside it."""
