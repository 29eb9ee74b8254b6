# Transmits without a look at LSR, and powers itself off at once.
        .include "pc.inc"
start:  mov     $COM1, %dx
        mov     $'b', %al
        outb    %al, %dx
        mov     $'y', %al
        outb    %al, %dx
        mov     $'e', %al
        outb    %al, %dx
        poweroff
