"""Fuzzing a device process in its own jail; `vmsup fuzz` is supervisor/fuzz.py."""
