# Says so and halts.
        .include "pc.inc"
start:  say     "ready"
        cli
1:      hlt
        jmp     1b
