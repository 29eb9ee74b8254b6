# Prints without end.
        .include "pc.inc"
start:  say     "ready"
        jmp     start
