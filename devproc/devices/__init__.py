"""Pure device models: registers, ports and a clock handed in; no os, socket, time, threading or select."""
