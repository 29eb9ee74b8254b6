# Transmits without a look at LSR, and then makes no exit any more.
        .include "pc.inc"
start:  say     "ready"
        mov     $COM1, %dx
        mov     $'!', %al
        outb    %al, %dx
        cli
1:      hlt
        jmp     1b
