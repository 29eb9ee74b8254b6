# Sends back what it receives; r first reads the clock's seconds, q powers off.
        .include "pc.inc"
start:  say     "ready"
1:      mov     $LSR, %dx
        inb     %dx, %al
        testb   $1, %al
        jz      1b
        mov     $COM1, %dx
        inb     %dx, %al
        cmpb    $'q', %al
        je      3f
        cmpb    $'r', %al
        jne     2f
        inb     $0x71, %al
        mov     $'r', %al
2:      call    putc
        jmp     1b
3:      poweroff
