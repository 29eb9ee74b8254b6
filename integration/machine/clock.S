# Reads the clock's seconds for ever.
        .include "pc.inc"
start:  say     "ready"
1:      xor     %eax, %eax
        outb    %al, $0x70
        inb     $0x71, %al
        jmp     1b
