"""vhost-user: a virtio device whose driver's VMM is another program's."""
