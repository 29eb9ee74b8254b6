"""No property here is about time: a loaded machine is not a counter-example."""

from hypothesis import settings

settings.register_profile("vmsup", deadline=None)
settings.load_profile("vmsup")
