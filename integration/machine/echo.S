# Sends back what it receives; q powers off.
        .include "pc.inc"
start:  say     "ready"
1:      mov     $LSR, %dx
        inb     %dx, %al
        testb   $1, %al
        jz      1b
        mov     $COM1, %dx
        inb     %dx, %al
        cmpb    $'q', %al
        je      2f
        call    putc
        jmp     1b
2:      poweroff
